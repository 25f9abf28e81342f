"""An experiment: every method and seed of a config, trained and evaluated, and its tidy results.

runs/<preset>/base/evaluation/                      the initial policy's scores
runs/<preset>/seed-<s>/shared/                      y0, and y′ of iteration 0, for all methods
runs/<preset>/seed-<s>/<method>/iteration-<t>/      synthetic.parquet, model/, steps.parquet,
                                                    diagnostics.parquet, evaluation/
results/<preset>/                                   see tspin.experiment.results
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from tspin.config import Config, DataSettings, ModelSettings, RunSettings, unknown
from tspin.data.encoding import Example
from tspin.data.formats import Source, load_rows
from tspin.engines.launch import check_launcher
from tspin.engines.vllm import Engine, evaluate_folder, require_vllm
from tspin.errors import UserError
from tspin.evaluation.suites import Suite, evaluate, load_suite
from tspin.experiment.results import BASE, EXAMPLES, TEXTS, Collected, problems_of, read_results, write_results
from tspin.models import dtype_name, load_model, load_tokenizer, policy_fingerprint, resolve
from tspin.objectives import METHODS
from tspin.runs.locks import owned
from tspin.runs.stages import DamagedStage, check_stage, claim_folder, note_damage, run_stage
from tspin.selfplay import IterationResult, SelfPlayTrainer
from tspin.selfplay_config import SelfPlayConfig


def run_experiment(
    preset: str,
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    runs: Path,
    results: Path,
    console: Console | None = None,
    launcher: Path | None = None,
) -> Path:
    """Run what is missing of `methods` × `seeds`, evaluate every checkpoint, write results/<preset>/.

    methods: keys of METHODS, and "base" for the initial policy as it is. launcher: a file for `accelerate launch`, to
    train in several processes. Returns the results folder.
    Raises UserError before any work for unknown methods, and for folders of another config.
    """
    for method in methods:
        if method != BASE and method not in METHODS:
            raise UserError(unknown("method", method, [BASE, *METHODS]))
    if not methods:
        raise UserError(f"--methods is empty: name some of {', '.join([BASE, *METHODS])}")
    if config.evaluation is None:
        raise UserError("evaluation: this config names no suite, so there is nothing to put into results")
    if config.evaluation.backend == "vllm":
        require_vllm("evaluation.backend", Engine(**config.engine.model_dump()), evaluates=True)
    report = (console or Console(stderr=True)).print
    suite = load_suite(config.evaluation.suite)
    quiet_libraries()
    # Everything that can be wrong with settings, model and data is found before anything is written.
    trainers = {
        (method, seed): build_trainer(config.for_method(method), runs / preset / f"seed-{seed}", seed, launcher)
        for seed in seeds
        for method in methods
        if method != BASE
    }
    policy = policy_fingerprint(model_source(config.model)[0])
    target = results / preset
    claim_folder(target, results_config(config, suite, policy), what="result", upgrade=upgraded)
    read_results(target)
    with ExitStack() as locks:
        for trainer in trainers.values():
            locks.enter_context(owned(trainer.folder))
        damaged: set[Path] = set()
        while True:
            try:
                collected = collect(config, suite, methods, seeds, trainers, policy, runs / preset, report)
                break
            except DamagedStage as found:  # what is whole is not made again
                note_damage(found, damaged)
        with owned(target, wait=True):
            write_results(target, preset, suite, collected)
    return target


def collect(
    config: Config,
    suite: Suite,
    methods: Sequence[str],
    seeds: Sequence[int],
    trainers: dict[tuple[str, int], SelfPlayTrainer],
    policy: str,
    runs: Path,
    report: Callable[[str], Any],
) -> Collected:
    """Run what is missing, and gather what all runs left. Raises DamagedStage when something has to be made again."""
    model, model_arguments = model_source(config.model)
    collected = Collected()

    def evaluated(path: str, fingerprint: str, folder: Path, title: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        report(f"[bold]{title}[/bold]: evaluation on {len(suite.columns)} benchmarks")
        scores = evaluate_checkpoint(path, fingerprint, folder, suite, config, model_arguments)
        return scores, problems_of(pd.read_parquet(folder / "samples.parquet"), suite)

    if BASE in methods:
        with owned(runs / BASE, wait=True):  # commands for other methods and seeds need it too
            scores, problems = evaluated(model, policy, runs / BASE / "evaluation", "base")
        for seed in seeds:  # greedy decoding: the same for every seed
            collected.add("evaluations", scores, BASE, seed, None)
            collected.add("problems", problems, BASE, seed, None)
    for (method, seed), trainer in trainers.items():
        self_play = METHODS[method].self_play
        title = f"{method}, seed {seed}"
        report(f"[bold]{title}[/bold]: {len(trainer.examples)} labels")
        for result in trainer.iterate():
            step = f"{title}, iteration {result.iteration}" if self_play else title
            report(f"[bold]{step}[/bold]: {describe(result)}")
            for text in result.warnings.values():
                report(f"[yellow]warning[/yellow]: {step}: {text}")
            folder = result.model_path.parent / "evaluation"
            scores, problems = evaluated(str(result.model_path), result.fingerprint, folder, step)
            iteration = result.iteration if self_play else None
            collected.add("evaluations", scores, method, seed, iteration)
            collected.add("problems", problems, method, seed, iteration)
            for name in ("steps", "diagnostics"):
                path = result.model_path.parent / f"{name}.parquet"
                if path.exists():
                    table = pd.read_parquet(path)
                    if name == "diagnostics" and len(trainer.examples) > TEXTS:
                        shown = {example.prompt_id for example in spread(trainer.examples, TEXTS)}
                        table = table[table["prompt_id"].isin(shown)]
                    collected.add(name, table, method, seed, iteration)
            run = {"method": method, "seed": seed, "iteration": result.iteration}
            facts = {
                "synthetic": result.synthetic,
                "diagnostics": result.diagnostics,
                "warnings": list(result.warnings),
            }
            collected.costs.append({**run, **result.training, **facts})
        if seed == min(seeds):
            collect_texts(collected, trainer, result, method, seed)
    return collected


def collect_texts(
    collected: Collected, trainer: SelfPlayTrainer, last: IterationResult, method: str, seed: int
) -> None:
    """Prompts and responses of a run, as results keep them; `last` is the run's last iteration."""

    examples = trainer.examples
    shown = {example.prompt_id: example for example in spread(examples, TEXTS)}

    def responses(path: Path) -> pd.DataFrame:
        return pd.read_parquet(path, columns=["prompt_id", "text"], filters=[("prompt_id", "in", list(shown))])

    last_path = trainer.sample_last(last, spread(examples, EXAMPLES))
    if not METHODS[method].self_play:
        collected.add("responses", responses(last_path), method, seed, None)
        return
    proto = {
        row["prompt_id"]: row["text"] for row in responses(trainer.response_path("proto", None)).to_dict("records")
    }
    prompts = [
        {"prompt_id": e.prompt_id, "prompt": e.prompt, "labelled": e.labelled.text, "proto": proto[e.prompt_id]}
        for e in shown.values()
    ]
    # The same for every method: rows of a method and seed replace each other.
    if not any(seed in part["seed"].to_numpy() for part in collected.parts.get("prompts", [])):
        collected.add("prompts", pd.DataFrame(prompts), BASE, seed, None)
        collected.add("responses", responses(trainer.response_path("synthetic", 0)), BASE, seed, None)
    for iteration in range(last.iteration):
        collected.add(
            "responses", responses(trainer.response_path("synthetic", iteration + 1)), method, seed, iteration
        )
    collected.add("responses", responses(last_path), method, seed, last.iteration)


def spread(items: Sequence[Example], count: int) -> list[Example]:
    """At most `count` of them, evenly spread."""
    return list(items[:: max(len(items) // count, 1)][:count])


def build_trainer(settings: RunSettings, folder: Path, seed: int, launcher: Path | None = None) -> SelfPlayTrainer:
    """A SelfPlayTrainer for one method's settings, in `folder`/<method>, sharing `folder`/shared."""
    model, model_arguments = model_source(settings.model)
    return SelfPlayTrainer(
        model,
        args=training_arguments(settings, folder / settings.method, seed, folder / "shared", launcher),
        train_dataset=load_dataset(settings.data),
        model_arguments=model_arguments,
    )


def load_dataset(settings: DataSettings) -> Source:
    """The rows that a config's data section chooses."""
    return load_rows(
        settings.path,
        name=settings.name,
        split=settings.split,
        revision=settings.revision,
        columns={str(name): column for name, column in settings.columns.items()},
        labels=settings.labels,
        seed=settings.subset_seed,
    )


def training_arguments(
    settings: RunSettings, folder: Path, seed: int, shared: Path | None = None, launcher: Path | None = None
) -> SelfPlayConfig:
    """A run's settings as SelfPlayConfig. Raises UserError for unknown arguments, and for what launcher cannot do."""
    training, own = settings.training, settings.coefficients
    engine = settings.engine.model_dump()
    if settings.sampling.backend == "vllm":
        require_vllm("sampling.backend", Engine(**engine))
    rates = training.learning_rate if isinstance(training.learning_rate, list) else [training.learning_rate]
    arguments: dict[str, Any] = dict(
        output_dir=str(folder),
        shared_dir=str(shared) if shared else None,
        method=settings.method,
        iterations=settings.iterations,
        alpha=own.alpha,
        beta=own.beta,
        lam=own.lam,
        loss_type=own.loss,
        length_scale=own.length_scale,
        margin=own.margin,
        noise_ratio=own.noise_ratio,
        temperature=settings.sampling.temperature,
        top_p=settings.sampling.top_p,
        max_new_tokens=settings.sampling.max_new_tokens,
        sampling_batch_size=settings.sampling.batch_size,
        sampling_backend=settings.sampling.backend,
        sampling_dtype=settings.sampling.dtype,
        engine=engine,
        launcher=str(launcher) if launcher else None,
        template=settings.data.template,
        max_prompt_tokens=settings.data.max_prompt_tokens,
        max_response_tokens=settings.data.max_response_tokens,
        long_prompts=settings.data.long_prompts,
        lora=training.lora.model_dump() if training.lora else None,
        monitor_proto=training.monitor_proto,
        learning_rate=rates[0],
        learning_rates=rates,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        micro_batch_tokens=training.micro_batch_tokens,
        checkpoint_steps=training.checkpoint_steps,
        layout=training.layout,
        optim=training.optimizer,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup,
        lr_scheduler_type=training.schedule,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=training.gradient_checkpointing,
        bf16=None if training.bf16 == "auto" else training.bf16,
        seed=seed,
    )
    fields = SelfPlayConfig.__dataclass_fields__
    for name in training.trainer:
        if name.endswith("_token"):
            raise UserError(
                f"training.trainer.{name}: a secret is no setting, which results keep; put it into HF_TOKEN"
            )
        if name not in fields:
            raise UserError(f"training.trainer.{name}: {unknown('TrainingArguments field', name, fields)}")
        if name in arguments:
            raise UserError(f"training.trainer.{name}: the config has a key of its own for this; set it there")
    try:
        args = SelfPlayConfig(**arguments, **training.trainer)
    except (TypeError, ValueError) as error:
        raise UserError(f"training: {error}") from error
    if launcher:
        check_launcher(launcher, args)
    return args


def model_source(settings: ModelSettings) -> tuple[str, dict[str, Any]]:
    """(local folder, from_pretrained arguments) of the initial policy; downloads a hub model. Raises UserError."""
    arguments: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "attn_implementation": settings.attention}
    if settings.trust_remote_code:
        arguments["trust_remote_code"] = True
    return resolve(settings.path, settings.revision), arguments


def evaluate_checkpoint(
    path: str, policy: str, folder: Path, suite: Suite, config: Config, model_arguments: dict[str, Any]
) -> pd.DataFrame:
    """Scores of a checkpoint on a suite, kept in `folder` with the per-problem samples."""
    assert config.evaluation is not None
    settings = config.evaluation
    if settings.dtype is not None:
        model_arguments = {**model_arguments, "dtype": getattr(torch, settings.dtype)}

    def produce(target: Path) -> None:
        check_stage(Path(path))
        if settings.backend == "vllm":
            target.mkdir()
            evaluate_folder(
                path,
                suite.model_dump(mode="json"),
                target,
                dtype=dtype_name(model_arguments),
                engine=Engine(**config.engine.model_dump()),
                limit=settings.limit,
                trust_remote_code=config.model.trust_remote_code,
            )
            return
        model = load_model(path, model_arguments)
        if torch.cuda.is_available():
            model.to("cuda")  # type: ignore[arg-type]
        tokenizer = load_tokenizer(path, model_arguments)
        evaluation = evaluate(model, tokenizer, suite, batch_size=settings.batch_size, limit=settings.limit)
        target.mkdir()
        evaluation.scores.to_csv(target / "scores.csv", index=False)
        evaluation.samples.to_parquet(target / "samples.parquet", index=False)

    inputs = {
        "policy": policy,
        "loading": {name: str(value) for name, value in model_arguments.items()},
        "suite": suite.model_dump(mode="json"),
        "tasks": suite.definition(),
        "settings": settings.model_dump(mode="json"),
    }
    run_stage(folder, inputs, produce)
    return pd.read_csv(folder / "scores.csv")


def results_config(config: Config, suite: Suite, policy: str) -> dict[str, Any]:
    """What numbers in one results folder must agree on; `iterations` may grow."""
    return {
        "config": results_config_tree(config),
        "policy": policy,
        "suite": suite.model_dump(mode="json"),
        "tasks": suite.definition(),
    }


def results_config_tree(config: Config) -> dict[str, Any]:
    """The config without what does not change a number: how many iterations there are, and how work is cut up."""
    return config.model_dump(
        mode="json",
        exclude={"iterations": True, "training": {"micro_batch_tokens", "checkpoint_steps"}, "engine": True},
    )


def upgraded(found: Any) -> Any:
    """A results_config as this version writes it: settings that came later have their defaults."""
    try:
        config, suite = Config.model_validate(found["config"]), Suite.model_validate(found["suite"])
    except (KeyError, TypeError, ValueError):
        return found  # of no version that this one knows: the comparison says what differs
    return {**found, "config": results_config_tree(config), "suite": suite.model_dump(mode="json")}


def describe(result: IterationResult) -> str:
    """One line on what an iteration did."""
    training, synthetic = result.training, result.synthetic
    line = f"{training['steps']} steps, {training['tokens']:,} tokens, {training['training_seconds']:.0f} s"
    if synthetic:
        line += (
            f"; synthetic responses: {synthetic['mean_tokens']:.1f} tokens, {synthetic['end_token_share']:.0%} ended, "
            f"{synthetic['duplicate_share']:.0%} duplicates, {synthetic['equal_to_labelled_share']:.0%} equal to y"
        )
    return line


def quiet_libraries() -> None:
    """Leave the terminal to the progress bars: libraries say only what is wrong."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("httpx", "huggingface_hub", "lm_eval", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)

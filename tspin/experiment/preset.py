"""An experiment: every method and seed of a config, trained and evaluated, and its tidy results.

runs/<preset>/base/evaluation/                      the initial policy's scores
runs/<preset>/seed-<s>/shared/                      y0, and y′ of iteration 0, for all methods
runs/<preset>/seed-<s>/<method>/iteration-<t>/      synthetic.parquet, model/, steps.parquet,
                                                    diagnostics.parquet, evaluation/
results/<preset>/                                   see tspin.experiment.results
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from tspin.config import Config, DataSettings, ModelSettings, RunSettings, SelfPlayConfig
from tspin.data.encoding import Example
from tspin.data.formats import Source, load_rows
from tspin.engines.launch import check_launcher
from tspin.engines.vllm import evaluate_folder, require_vllm
from tspin.errors import UserError
from tspin.evaluation.harness import evaluate
from tspin.evaluation.suites import Suite, load_suite
from tspin.experiment.results import EXAMPLES, TEXTS, Collected, problems_of, read_results, write_results
from tspin.models import dtype_name, load_model, load_tokenizer, policy_fingerprint, resolve
from tspin.objectives import METHODS, find_method
from tspin.runs.claims import claim_folder
from tspin.runs.files import fingerprint
from tspin.runs.locks import owned
from tspin.runs.stages import DamagedStage, check_stage, note_damage, run_stage
from tspin.schema import BASE
from tspin.selfplay import IterationResult, SelfPlayTrainer
from tspin.yaml_files import find_yaml

# What y0 and the first y′ follow from, besides the model, the data and the seed.
DRAWING = {
    *("template", "max_prompt_length", "long_prompts", "temperature", "top_p", "max_new_tokens"),
    *("sampling_batch_size", "sampling_backend", "sampling_dtype"),
}


def run_experiment(
    preset: str,
    config: Config,
    methods: Sequence[str],
    seeds: Sequence[int],
    runs: Path,
    results: Path,
    console: Console | None = None,
    launcher: Path | None = None,
    shared: Path | None = None,
) -> Path:
    """Run what is missing of `methods` × `seeds`, evaluate every checkpoint, write results/<preset>/.

    methods: keys of METHODS, and "base" for the initial policy as it is. launcher: a file for `accelerate launch`, to
    train in several processes. shared: see build_trainer. Returns the results folder.
    Raises UserError before any work for unknown methods, and for folders of another config.
    """
    for method in methods:
        if method != BASE:
            find_method(method, besides=[BASE])
    if not methods:
        raise UserError(f"--methods is empty: name some of {', '.join([BASE, *METHODS])}")
    if config.evaluation is None:
        raise UserError("evaluation: this config names no suite, so there is nothing to put into results")
    if config.evaluation.backend == "vllm":
        require_vllm("evaluation.backend", config.training.engine, evaluates=True)
    report = (console or Console(stderr=True)).print
    suite = load_suite(config.evaluation.suite)
    # Everything that can be wrong with settings, model and data is found before anything is written.
    trainers = {
        (method, seed): build_trainer(config.for_method(method), runs / preset / f"seed-{seed}", seed, launcher, shared)
        for seed in seeds
        for method in methods
        if method != BASE
    }
    policy = policy_fingerprint(model_source(config.model)[0])
    target = results / preset
    claim_folder(target, results_config(config, suite, policy), what="result")
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
    proto = {row["prompt_id"]: row["text"] for row in responses(trainer.response_path("proto")).to_dict("records")}
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


def build_trainer(
    settings: RunSettings, folder: Path, seed: int, launcher: Path | None = None, shared: Path | None = None
) -> SelfPlayTrainer:
    """A SelfPlayTrainer for one method's settings, in `folder`/<method>, sharing `folder`/shared with other methods.

    shared: a folder for what runs of several settings share, in place of `folder`/shared.
    """
    model, model_arguments = model_source(settings.model)
    if shared is None:
        shared = folder / "shared"
    else:  # what is sampled from the initial policy is the same for settings that agree in these
        drawing = settings.training.model_dump(include=DRAWING)
        shared = shared / fingerprint([settings.model.model_dump(), settings.data.model_dump(), drawing, seed])
    return SelfPlayTrainer(
        model,
        args=training_arguments(settings, folder / settings.method, seed, shared, launcher),
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
    """A run's settings as SelfPlayConfig. Raises UserError for values that Transformers refuses, or `launcher`."""
    if settings.training.sampling_backend == "vllm":
        require_vllm("sampling_backend", settings.training.engine)
    if launcher and not launcher.is_file():
        launcher = find_yaml(str(launcher), "experiments/accelerate", "launch file")
    given = {"output_dir": folder, "shared_dir": shared, "launcher": launcher, "seed": seed}
    args = SelfPlayConfig(**{**dict(settings.training), **given})
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
                engine=config.training.engine,
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
        "config": config.tree(),
        "policy": policy,
        "suite": suite.model_dump(mode="json"),
        "tasks": suite.definition(),
    }


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

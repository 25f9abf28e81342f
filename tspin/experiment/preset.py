"""An experiment: every method and seed of a config, trained and evaluated, and its tidy results.

runs/<preset>/base/evaluation/                      the initial policy's scores
runs/<preset>/seed-<s>/shared/                      y0, and y′ of iteration 0, for all methods
runs/<preset>/seed-<s>/<method>/iteration-<t>/      synthetic.parquet, model/, steps.parquet,
                                                    diagnostics.parquet, evaluation/
results/<preset>/                                   see tspin.experiment.results
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console

from tspin.config import (
    Config,
    DataSettings,
    ModelSettings,
    Rendering,
    RunSettings,
    SelfPlayConfig,
    rendering_of,
    warmup_of,
)
from tspin.data.encoding import Examples
from tspin.data.mapped import spread
from tspin.data.sources import Source, load_rows
from tspin.data.turns import writes_date
from tspin.devices import device, without_denormals
from tspin.engines.adapters import load_policy
from tspin.engines.launch import check_launcher
from tspin.engines.scoring import check_gpus
from tspin.engines.vllm import Served, Serving, context_of, evaluate_folder, require_vllm
from tspin.errors import UserError
from tspin.evaluation.harness import Evaluation, evaluate
from tspin.evaluation.suites import Suite, check_chat_template, load_suite, tabulated
from tspin.experiment.held_out import held_out_arguments, held_out_examples, held_out_inputs, held_out_scores
from tspin.experiment.results import EXAMPLES, TEXTS, Collected, problems_of, read_results, write_results
from tspin.models import Policy, dtype_name, load_shape, load_tokenizer, policy_fingerprint, resolve
from tspin.names import check_methods
from tspin.objectives import METHODS
from tspin.planning.checks import check_machine, needs_of
from tspin.runs.claims import claim_folder
from tspin.runs.dates import date_of_run, record_date
from tspin.runs.files import fingerprint
from tspin.runs.locks import owned
from tspin.runs.stages import DamagedStage, check_stage, note_damage, run_stage
from tspin.schema import BASE
from tspin.selfplay import IterationResult, SelfPlayTrainer
from tspin.states import HELD_OUT_NLL
from tspin.yaml_files import find_yaml

# What y0 and the first y′ follow from, besides the model, the data and the seed.
DRAWING = {
    *("proto_model", "template", "max_prompt_length", "long_prompts", "temperature", "top_p", "max_new_tokens"),
    *("sampling_batch_size", "sampling_backend", "sampling_dtype", "lora"),
    *(entry.name for entry in fields(Rendering)),
}


@dataclass(frozen=True)
class Where:
    """Where an experiment's files are, and what it is trained by.

    runs: checkpoints, responses, logs. results: tidy numbers, a folder per preset.
    shared: a folder for what runs of several settings share; None: each seed's own.
    launcher: a file for `accelerate launch`, to train in several processes.
    """

    runs: Path
    results: Path
    shared: Path | None = None
    launcher: Path | None = None


def run_experiment(preset: str, config: Config, methods: Sequence[str], seeds: Sequence[int], where: Where) -> Path:
    """Run what is missing of `methods` × `seeds`, evaluate every checkpoint, write results/<preset>/.

    methods: keys of METHODS, and "base" for the initial policy as it is. Returns the results folder.
    Raises UserError before any work for unknown methods, and for folders of another config.
    """
    check_methods(methods)
    if config.evaluation is None:
        raise UserError("evaluation: this config names no suite, so there is nothing to put into results")
    if config.evaluation.backend == "vllm":
        require_vllm("evaluation.backend")
        if BASE in methods and config.training.lora and config.training.lora.quantize:
            raise UserError(
                "evaluation.backend: vllm would evaluate base as the whole model, not in lora.quantize's bits"
            )
        if config.evaluation.held_out:
            raise UserError("evaluation.held_out: vllm evaluates in an engine of its own; it is scored by transformers")
    runs, target = where.runs / preset, where.results / preset
    # Everything that can be wrong with settings, model and data is found before anything is written.
    suite, config = load_suite(config.evaluation.suite), dated(config, runs)
    evaluator = Evaluator(config, suite, runs)
    trainers = {
        (method, seed): build_trainer(
            config.for_method(method), runs / f"seed-{seed}", seed, where.launcher, where.shared, evaluator.serving
        )
        for seed in seeds
        for method in methods
        if method != BASE
    }
    check_needs(list(trainers.values()))
    claim_folder(target, evaluator.results_config(), what="result", option="--results")
    if config.training.date:
        record_date(runs, config.training.date)
    read_results(target)
    with ExitStack() as held:
        held.enter_context(evaluator.serving)
        for trainer in trainers.values():
            held.enter_context(owned(trainer.folder))
        damaged: set[Path] = set()
        while True:
            try:
                collected = Collected()
                if BASE in methods:
                    collect_base(collected, evaluator, runs / BASE, seeds)
                for (method, seed), trainer in trainers.items():
                    last = collect_run(collected, evaluator, trainer, method, seed)
                    if seed == min(seeds):
                        collect_texts(collected, trainer, last, method, seed)
                break
            except DamagedStage as error:  # what is whole is not made again
                note_damage(error, damaged)
        with owned(target, wait=True):
            write_results(target, preset, evaluator.suite, collected)
    return target


def dated(config: Config, folder: Path) -> Config:
    """A config with the day its runs in `folder` began, where the model's chat template writes today's date."""
    path, loading = model_source(config.model)
    if config.training.date or not writes_date(load_tokenizer(path, loading)):
        return config
    return replace(config, training=config.training.model_copy(update={"date": date_of_run(folder)}))


def collect_base(collected: Collected, evaluator: "Evaluator", folder: Path, seeds: Sequence[int]) -> None:
    """Evaluate the initial policy. Raises DamagedStage when something has to be made again, as `collect_run` does."""
    with owned(folder, wait=True):  # commands for other methods and seeds need it too
        scores, problems = evaluator.scores(evaluator.policy, folder / "evaluation", "base")
    for seed in seeds:  # greedy decoding: the same for every seed
        collected.add("evaluations", scores, BASE, seed, None)
        collected.add("problems", problems, BASE, seed, None)


def collect_run(
    collected: Collected, evaluator: "Evaluator", trainer: SelfPlayTrainer, method: str, seed: int
) -> IterationResult:
    """Run and evaluate what is missing of a run, gather what it left; returns its last iteration."""
    self_play = METHODS[method].self_play
    title = f"{method}, seed {seed}"
    say(f"[bold]{title}[/bold]: {len(trainer.examples)} labels")
    for result in trainer.iterate():
        step = f"{title}, iteration {result.iteration}" if self_play else title
        say(f"[bold]{step}[/bold]: {describe(result)}")
        for text in result.warnings.values():
            say(f"[yellow]warning[/yellow]: {step}: {text}")
        scores, problems = evaluator.scores(result.policy, result.model_path.parent / "evaluation", step)
        trainer.write_card(result)  # with its scores
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
        facts = {"synthetic": result.synthetic, "diagnostics": result.diagnostics, "warnings": list(result.warnings)}
        run = {"method": method, "seed": seed, "iteration": result.iteration}
        collected.costs.append({**run, **result.training, **facts})
    return result


def say(text: str) -> None:
    """A line on the terminal, beside the progress bars."""
    Console(stderr=True).print(text)


def collect_texts(
    collected: Collected, trainer: SelfPlayTrainer, last: IterationResult, method: str, seed: int
) -> None:
    """Prompts, responses and their tokens, of a run, as results keep them; `last` is the run's last iteration."""
    for number in range(last.iteration + 1):
        path = trainer.folder / f"iteration-{number}" / "tokens.parquet"
        if path.exists():
            iteration = number if METHODS[method].self_play else None
            collected.add("tokens", pd.read_parquet(path), method, seed, iteration)
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
        {
            "prompt_id": e.prompt_id,
            "prompt": e.prompt,
            "labelled": e.labelled.text,
            "proto": proto[e.prompt_id],
            "task": e.task,
        }
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


def build_trainer(
    settings: RunSettings,
    folder: Path,
    seed: int,
    launcher: Path | None = None,
    shared: Path | None = None,
    serving: Serving | None = None,
) -> SelfPlayTrainer:
    """A SelfPlayTrainer for one method's settings, in `folder`/<method>, sharing `folder`/shared with other methods.

    shared: a folder for what runs of several settings share, in place of `folder`/shared. serving: vLLM's engines, of
    whoever evaluates the checkpoints.
    """
    check_gpus(settings.training.engine)
    model, model_arguments = model_source(settings.model)
    if shared is None:
        shared = folder / "shared"
    else:  # what is sampled from the initial policy is the same for settings that agree in these
        drawing = settings.training.model_dump(include=DRAWING)
        shared = shared / fingerprint([settings.model.model_dump(), settings.data.model_dump(), drawing, seed])
    trainer = SelfPlayTrainer(
        model,
        args=training_arguments(settings, folder / settings.method, seed, shared, launcher),
        train_dataset=load_dataset(settings.data),
        eval_dataset=held_out_rows(settings),
        model_arguments=model_arguments,
    )
    if serving is not None:
        trainer.run.engine.serving = serving
    return trainer


def check_needs(trainers: Sequence[SelfPlayTrainer]) -> None:
    """See tspin.planning.checks.check_machine, of runs that start from one model's folder."""
    if trainers:
        source, loading = str(trainers[0].source), trainers[0].run.engine.loading
        parameters = sum(parameter.numel() for parameter in load_shape(source, loading).parameters())
        check_machine(needs_of([trainer.args for trainer in trainers], parameters, dtype_name(loading)))


def held_out_rows(settings: RunSettings) -> Source | None:
    """evaluation.held_out, where the best iteration is chosen by it; what only evaluates it reads it then."""
    path = settings.evaluation.held_out if settings.evaluation else None
    return load_rows(path) if path and settings.training.best_iteration == HELD_OUT_NLL else None


def load_dataset(settings: DataSettings) -> Source:
    """The rows that a config's data section chooses."""
    return load_rows(
        settings.path,
        name=settings.name,
        split=settings.split,
        revision=settings.revision,
        columns={str(name): column for name, column in settings.columns.items()},
        rounds=settings.rounds,
        generated=settings.generated,
        labels=settings.labels,
        seed=settings.subset_seed,
    )


def training_arguments(
    settings: RunSettings, folder: Path, seed: int, shared: Path | None = None, launcher: Path | None = None
) -> SelfPlayConfig:
    """A run's settings as SelfPlayConfig. Raises UserError for values that Transformers refuses, or `launcher`."""
    if settings.training.sampling_backend == "vllm":
        require_vllm("sampling_backend")
    if launcher and not launcher.is_file():
        launcher = find_yaml(str(launcher), "experiments/accelerate", "launch file")
    given = {
        "history": settings.data.history,
        "output_dir": folder,
        "shared_dir": shared,
        "launcher": launcher,
        "seed": seed,
    }
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


class Evaluator:
    """Scores checkpoints on a config's suite, each kept as a stage.

    suite: asks as the config's runs write their prompts, in all that it does not say itself.
    runs: the experiment's folder, where large held-out sets are kept encoded.
    serving: vLLM's engines, which stay there for what is drawn from a checkpoint after its evaluation.
    Raises UserError for a suite, a model and held-out labels that do not fit together.
    """

    def __init__(self, config: Config, suite: Suite, runs: Path = Path("runs")):
        assert config.evaluation is not None
        self.config = config
        self.suite = suite.alike(rendering_of(config.training))
        self.settings = config.evaluation
        folder, self.loading = model_source(config.model)
        self.policy = Policy(folder, policy_fingerprint(folder))
        if self.settings.dtype is not None:
            self.loading["dtype"] = getattr(torch, self.settings.dtype)
        tokenizer = load_tokenizer(folder, self.loading)
        check_chat_template(self.suite, tokenizer)
        self.held_out: Examples | None = None
        if self.settings.held_out:  # read and encoded once, and before anything is trained
            self.arguments = held_out_arguments(config.training, runs)
            self.held_out = held_out_examples(self.settings.held_out, tokenizer, self.arguments, self.settings.limit)
        vllm = self.settings.backend == "vllm"
        self.serving = Serving(context_of(self._served(self.policy), self.suite) if vllm else 0)

    def results_config(self) -> dict[str, Any]:
        """What numbers in one results folder must agree on; `iterations` may grow."""
        suite = {"suite": self.suite.model_dump(mode="json"), "tasks": self.suite.definition()}
        config = {"config": self.config.tree(), "policy": self.policy.fingerprint}
        return {**config, **suite, **warmup_of(self.config.training)}

    def scores(self, policy: Policy, folder: Path, title: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(scores, problems) of a policy, kept in `folder` with the per-problem samples."""
        say(f"[bold]{title}[/bold]: evaluation on {len(self.suite.columns)} benchmarks")
        inputs = {
            "policy": policy.fingerprint,
            "loading": {name: str(value) for name, value in self._loading(policy).items()},
            "suite": self.suite.model_dump(mode="json"),
            "tasks": self.suite.definition(),
            "settings": self.settings.model_dump(mode="json"),
            **held_out_inputs(self.settings.held_out),
        }
        run_stage(folder, inputs, partial(self._write, policy))
        samples = pd.read_parquet(folder / "samples.parquet")
        return pd.read_csv(folder / "scores.csv"), problems_of(samples, self.suite)

    @without_denormals()
    def _write(self, policy: Policy, target: Path) -> None:
        check_stage(Path(policy.folder))
        if self.settings.backend == "vllm":
            served, limit = self._served(policy), self.settings.limit
            self._keep(evaluate_folder(served, self.suite, limit=limit, serving=self.serving), [], target)
            return
        model = load_policy(policy, self._loading(policy), whole=True)
        model.to(device())  # type: ignore[arg-type]
        tokenizer = load_tokenizer(policy.folder, self.loading)
        settings = self.settings
        evaluation = evaluate(model, tokenizer, self.suite, batch_size=settings.batch_size, limit=settings.limit)
        further = []
        if self.held_out is not None:
            further.append(held_out_scores(model, tokenizer, self.held_out, self.arguments))
        self._keep(evaluation, further, target)

    def _loading(self, policy: Policy) -> dict[str, Any]:
        """What a policy is loaded with: π_θ0 in 4 bits where runs of adapters start from it so."""
        lora = self.config.training.lora
        quantized = lora is not None and lora.quantize is not None and policy.fingerprint == self.policy.fingerprint
        return {**self.loading, "quantize": lora.quantize} if lora and quantized else self.loading

    def _served(self, policy: Policy) -> Served:
        engine, trusted = self.config.training.engine, self.config.model.trust_remote_code
        return Served(policy.folder, dtype_name(self.loading), engine, trusted, policy.fingerprint)

    def _keep(self, evaluation: Evaluation, further: Sequence[pd.DataFrame], target: Path) -> None:
        tabulated(evaluation.scores, self.suite)  # a metric that lm-eval does not report is refused
        target.mkdir()
        pd.concat([evaluation.scores, *further], ignore_index=True).to_csv(target / "scores.csv", index=False)
        evaluation.samples.to_parquet(target / "samples.parquet", index=False)


def describe(result: IterationResult) -> str:
    """One line on what an iteration did."""
    training, synthetic = result.training, result.synthetic
    line = f"{training['steps']} steps, {training['tokens']:,} tokens, {training['training_seconds']:.0f} s"
    moved = result.moved()
    line += f"; peak rate {moved['learning_rate']:.2g}"
    line += "" if math.isnan(moved["labelled"]) else f", log π(y) {moved['labelled']:+.3g} nats"
    if synthetic:
        line += (
            f"; y′: {synthetic['mean_tokens']:.1f} tokens, {synthetic['end_token_share']:.0%} ended, "
            f"{synthetic['duplicate_share']:.0%} duplicates, {synthetic['equal_to_labelled_share']:.0%} equal to y"
        )
    return line

"""Algorithm 1: the loop over iterations, and its Python interface.

    trainer = SelfPlayTrainer(model, args=SelfPlayConfig(output_dir="runs/mine", method="tspin"),
                              train_dataset=dataset, processing_class=tokenizer)
    trainer.train()

Each iteration t samples y′ from π_θt, trains from π_θt on the triplets and writes π_θt+1. Every
arrow is a stage in the run's folder (see run_store), so the same call continues after any crash.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tspin.data.encoding import Example, Examples, encode_dataset
from tspin.data.responses import Responses, read_responses, response_statistics, write_parquet, write_responses
from tspin.devices import give_back
from tspin.diagnostics import diagnose, summary
from tspin.engines.here import Unfinished, response_logps, stage_seed, train_iteration
from tspin.engines.launch import launch_training, trains_in_bfloat16
from tspin.engines.policies import sample_policy
from tspin.engines.scoring import score_in_processes, scoring_processes
from tspin.errors import UserError
from tspin.guards import measure, warnings
from tspin.models import load_model, load_tokenizer, policy_fingerprint, resolve
from tspin.objectives import METHODS, PROTO, SYNTHETIC
from tspin.runs.locks import owned
from tspin.runs.stages import (
    DamagedStage,
    atomic_path,
    check_stage,
    claim_folder,
    folder_fingerprint,
    note_damage,
    run_stage,
    write_json,
)
from tspin.selfplay_config import SelfPlayConfig
from tspin.triplets import Triplets, make_triplets, reference_table, with_reference

PROMPT_SCHEMA = pa.schema([("prompt_id", pa.int64()), ("prompt", pa.string()), ("labelled", pa.string())])


@dataclass(frozen=True)
class IterationResult:
    """What one iteration left: the checkpoint's folder, its fingerprint, and facts of both stages."""

    iteration: int
    model_path: Path
    fingerprint: str
    synthetic: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)  # what tspin.guards finds gone too far


class SelfPlayTrainer:
    """Runs a method for all its iterations, keeping every checkpoint.

    model: a folder, a hub name, "pocket", or a loaded model (which is then saved to the run's
    folder first: each iteration starts from files, so that a resumed run equals an uninterrupted
    one). train_dataset: rows {"prompt", "completion"}, a datasets.Dataset or any iterable of
    mappings; rows may carry "prompt_id". processing_class: the tokenizer, loaded from `model` when
    left out. callbacks: transformers callbacks for every iteration's training.

    Raises UserError for bad data, a folder that is no model, a tokenizer without an end token, and
    an output_dir that holds a run of another config.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: SelfPlayConfig,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        model_arguments: dict[str, Any] | None = None,
    ):
        self.args = args
        self.method = METHODS[args.method]
        self.callbacks = list(callbacks)
        self.folder = Path(str(args.output_dir))
        self.shared = Path(args.shared_dir) if args.shared_dir else self.folder
        self.model_arguments = model_arguments or {}
        if self.callbacks and args.launcher:
            raise UserError("callbacks: those of this process do not reach the processes that args.launcher starts")
        if isinstance(model, PreTrainedModel) and processing_class is None:
            raise UserError("processing_class: give the tokenizer along with a loaded model")
        # What a loaded model depends on besides its files.
        self.loading = {name: str(value) for name, value in self.model_arguments.items()}
        source = model if isinstance(model, PreTrainedModel) else resolve(str(model))
        self.tokenizer = processing_class or load_tokenizer(str(source), self.model_arguments)
        self.examples = encode_dataset(train_dataset, self.tokenizer, args)
        self.data_fingerprint = self.examples.fingerprint
        self.source = source
        self.model: PreTrainedModel | None = None  # the final policy, after train()

    def train(self) -> list[IterationResult]:
        """Run what is missing of all iterations; `self.model` is the final policy afterwards."""
        damaged: set[Path] = set()
        while True:
            results = list(self.iterate())
            try:
                self.model = self._load(str(results[-1].model_path))
                return results
            except DamagedStage as found:
                note_damage(found, damaged)

    def iterate(self) -> Iterator[IterationResult]:
        """The iterations one by one: a result is yielded when its checkpoint is on disk.

        Raises UserError when another process is at work in the run's folder, Stopped at SIGTERM or Ctrl-C in training.
        """
        damaged: set[Path] = set()
        yielded = 0
        with owned(self.folder):
            while True:
                try:
                    for number, result in enumerate(self._iterate()):
                        if number == yielded:
                            yielded += 1
                            yield result
                    return
                except DamagedStage as found:  # an earlier iteration's: from the start, past all that is whole
                    note_damage(found, damaged)

    def _iterate(self) -> Iterator[IterationResult]:
        policy, policy_fingerprint = initial = self._claim()
        self._write_prompts()
        proto = self._responses("proto", None, policy, policy_fingerprint) if self.method.self_play else None
        for iteration in range(self.args.iterations if self.method.self_play else 1):
            result = self._iteration(iteration, policy, policy_fingerprint, proto, initial)
            policy, policy_fingerprint = str(result.model_path), result.fingerprint
            yield result

    def _write_prompts(self) -> None:
        """Leave the prompts and labels in the run's folder, for those who read its responses, and rows of note."""
        if self.examples.noted and not (self.folder / "rows.json").exists():
            write_json(self.folder / "rows.json", self.examples.noted)
        path = self.folder / "prompts.parquet"
        if not path.exists():
            rows = ((e.prompt_id, e.prompt, e.labelled.text) for e in self.examples)
            with atomic_path(path) as temporary:
                write_parquet(temporary, PROMPT_SCHEMA, rows)

    def _iteration(
        self, iteration: int, policy: str, policy_fingerprint: str, proto: Any, initial_policy: tuple[str, str]
    ) -> IterationResult:
        initial, initial_fingerprint = initial_policy
        folder = self.folder / f"iteration-{iteration}"
        inputs: dict[str, Any] = {"policy": policy_fingerprint, "data": self.data_fingerprint}
        responses, synthetic_facts = {}, {}
        if self.method.self_play:
            synthetic = self._responses("synthetic", iteration, policy, policy_fingerprint)
            responses = {SYNTHETIC: synthetic[0], PROTO: proto[0]}
            inputs |= {SYNTHETIC: synthetic[1]["fingerprint"], PROTO: proto[1]["fingerprint"]}
            synthetic_facts = synthetic[1]["facts"]
        coefficients = self.method.coefficients_at(iteration, self.args.coefficients)
        every = dict(responses)
        if not self.args.monitor_proto and PROTO not in self.method.gradient_roles(coefficients):
            responses.pop(PROTO, None)
        triplets = make_triplets(self.examples, responses)
        all_roles = make_triplets(self.examples, every)
        inputs |= {"iteration": iteration, "settings": self.args.computed(), "loading": self.loading}
        if trains_in_bfloat16(self.args):
            inputs |= {"weights": "bfloat16"}  # while they are computed with

        loaded: list[PreTrainedModel] = []  # one model serves the reference pass and the training

        def model() -> PreTrainedModel:
            if not loaded:
                loaded.append(self._load(policy))
            return loaded[0]

        if self.method.uses_reference:
            path = folder / "reference.parquet"
            # Of y0 too where diagnostics ask for it: one pass serves both.
            scored = all_roles if self.args.diagnostics else triplets

            def write_reference(target: Path) -> None:
                previous = self.method.reference == "previous"
                logps = self._logps(
                    policy if previous else initial, scored, "the reference", model if previous else None
                )
                reference_table(scored, logps).to_parquet(target, index=False)

            inputs |= {"reference": initial_fingerprint if self.method.reference == "initial" else policy_fingerprint}
            roles = sorted(scored[0].responses)
            reference = run_stage(path, {**inputs, "roles": roles}, write_reference)
            table = pd.read_parquet(path)
            triplets, all_roles = with_reference(triplets, table), with_reference(all_roles, table)

        def train(target: Path) -> dict[str, Any]:
            if self.args.launcher:
                return launch_training(
                    policy,
                    self.model_arguments,
                    triplets,
                    self.tokenizer,
                    self.args,
                    iteration,
                    checkpoint=target,
                    log_folder=folder,
                )
            return train_iteration(
                model(),
                triplets,
                self.tokenizer,
                self.args,
                iteration,
                checkpoint=target,
                log_folder=folder,
                callbacks=self.callbacks,
                unfinished=Unfinished(folder / "unfinished", inputs),
            )

        record = run_stage(folder / "model", inputs, train, beside=["steps.parquet"], check=False)
        loaded.clear()
        give_back()
        rmtree(folder / "unfinished", ignore_errors=True)
        # What the iteration cost besides its training: sampling y′, and SPIN's reference pass.
        seconds = {"sampling_seconds": synthetic[1]["seconds"]} if self.method.self_play else {}
        if self.method.uses_reference:
            seconds["reference_seconds"] = reference["seconds"]
        facts = record["facts"] | seconds | {"commit": record["provenance"]["commit"]}
        result = IterationResult(iteration, folder / "model", record["fingerprint"], synthetic_facts, facts)
        if self.args.diagnostics:
            self._diagnose(result, all_roles, policy, inputs)
        self._guard(result, every, inputs)
        return result

    def _guard(self, result: IterationResult, responses: dict[str, Responses], inputs: dict[str, Any]) -> None:
        """Measure degeneration, and leave what was found in guards.json."""
        folder = result.model_path.parent

        def produce(target: Path) -> dict[str, float]:
            of = {role: given.of(self.examples.prompt_ids) for role, given in responses.items()}
            table = pd.read_parquet(folder / "diagnostics.parquet") if self.args.diagnostics else None
            found = measure(of.get(SYNTHETIC, []), self.examples.labelled, of.get(PROTO, []), table)
            write_json(target, {"measures": found, "warnings": warnings(found)})
            return found

        made_from = {**inputs, "trained": result.fingerprint, "diagnostics": self.args.diagnostics}
        found = run_stage(folder / "guards.json", made_from, produce)["facts"]
        result.diagnostics.update(found)
        result.warnings.update(warnings(found))

    def _diagnose(self, result: IterationResult, triplets: Triplets, policy: str, inputs: dict[str, Any]) -> None:
        """Write the iteration's diagnostics.parquet: log π and rewards before and after, sample by sample."""

        def logps(path: str, of: str) -> dict[str, list[float]]:
            return self._logps(path, triplets, of)

        def referred() -> dict[str, list[float]]:
            kept = pd.read_parquet(result.model_path.parent / "reference.parquet")
            return {role: kept[role].tolist() for role in triplets[0].responses}

        own = self.method.reference

        def produce(target: Path) -> dict[str, Any]:
            table = diagnose(
                self.method,
                self.method.coefficients_at(result.iteration, self.args.coefficients),
                triplets,
                trained=lambda: logps(str(result.model_path), "the trained policy"),
                before=referred if own == "previous" else lambda: logps(policy, "the policy before"),
                initial=referred if own == "initial" else None,
            )
            table.to_parquet(target, index=False)
            return summary(table)

        path = result.model_path.parent / "diagnostics.parquet"
        record = run_stage(path, {**inputs, "trained": result.fingerprint}, produce)
        result.diagnostics.update(record["facts"])

    def _logps(
        self,
        path: str,
        triplets: Triplets,
        of: str,
        loaded: Callable[[], PreTrainedModel] | None = None,
    ) -> dict[str, list[float]]:
        """log π of every response under the policy in the folder `path`, on as many GPUs as the engine has.

        loaded: gives that policy where one process scores it and trains it afterwards.
        """
        check_stage(Path(path))
        arguments, autocast = self.model_arguments, bool(self.args.bf16)
        if trains_in_bfloat16(self.args):  # π_θ and its reference should differ by training alone
            arguments, autocast = {**arguments, "dtype": torch.bfloat16}, False
        processes = scoring_processes(self.args)
        if processes > 1:
            how = (self.tokenizer, self.args, of, autocast)
            return score_in_processes(processes, path, arguments, triplets, *how)
        model = loaded() if loaded and self.args.launcher is None else load_model(path, arguments)
        return response_logps(model, triplets, self.tokenizer, self.args, of, autocast)

    def _load(self, path: str) -> PreTrainedModel:
        check_stage(Path(path))
        return load_model(path, self.model_arguments)

    def _responses(
        self, kind: str, iteration: int | None, policy: str, policy_fingerprint: str
    ) -> tuple[Responses, dict[str, Any]]:
        """Sampled responses by prompt id, and the record of the stage that made them."""
        decoding = dataclasses.asdict(self.args.decoding)
        # All methods start from the same policy: y0 and the first y′ are sampled once for all of them.
        shared = not iteration
        path = self.response_path(kind, iteration)
        seed = stage_seed(self.args.seed, kind, iteration)
        inputs = {
            "policy": policy_fingerprint,
            "loading": self.loading,
            "data": self.examples.prompts_fingerprint,
            "decoding": decoding,
            "seed": seed,
            **self._backend(),
        }
        of = "the initial policy" if shared else f"iteration {iteration}'s policy"
        with owned(path.parent, wait=True):  # runs of other methods may be at the same responses
            record = self._sample(path, inputs, policy, self.examples, f"{kind} responses of {of}")
            return read_responses(path), record

    def _backend(self) -> dict[str, Any]:
        """What sampled responses depend on besides the decoding, where it is not the default."""
        given = {"backend": self.args.sampling_backend, "dtype": self.args.sampling_dtype}
        return {name: value for name, value in given.items() if value not in (None, "transformers")}

    def _sample(
        self, path: Path, inputs: dict[str, Any], policy: str, examples: Sequence[Example], description: str
    ) -> dict[str, Any]:
        def produce(target: Path) -> dict[str, Any]:
            check_stage(Path(policy))
            responses = sample_policy(
                policy,
                self.model_arguments,
                self.tokenizer,
                examples.prompts if isinstance(examples, Examples) else [e.prompt_ids for e in examples],
                self.args,
                seed=inputs["seed"],
                description=description,
            )
            write_responses(target, (example.prompt_id for example in examples), responses)
            labelled = examples.labelled if isinstance(examples, Examples) else [e.labelled for e in examples]
            return response_statistics(responses, labelled)

        return run_stage(path, inputs, produce)

    def response_path(self, kind: str, iteration: int | None) -> Path:
        """Where y0 ("proto", None) or an iteration's y′ ("synthetic") is kept, as read_responses reads it."""
        if iteration:
            return self.folder / f"iteration-{iteration}" / f"{kind}.parquet"
        return self.shared / ("iteration-0-synthetic.parquet" if kind == "synthetic" else f"{kind}.parquet")

    def sample_last(self, result: IterationResult, examples: Sequence[Example]) -> Path:
        """Responses of an iteration's trained policy to some prompts, in its folder: to look at, not to train on."""
        path = result.model_path.parent / "examples.parquet"
        inputs = {
            "policy": result.fingerprint,
            "prompts": [example.prompt_ids for example in examples],
            "decoding": dataclasses.asdict(self.args.decoding),
            "seed": stage_seed(self.args.seed, "examples", result.iteration),
            **self._backend(),
        }
        self._sample(path, inputs, str(result.model_path), examples, "examples")
        return path

    def _claim(self) -> tuple[str, str]:
        """(folder, fingerprint) of π_θ0, once the run's folder is known to be this run's."""
        config = {"settings": self.args.computed(), "loading": self.loading, "data": self.data_fingerprint}
        if isinstance(self.source, str):
            policy = policy_fingerprint(self.source)
            claim_folder(self.folder, {**config, "policy": policy})
            return self.source, policy
        # A model in memory becomes a folder first: iterations start from files. It is written
        # under another name until the run is known to be the same one.
        initial = self.folder / "initial"
        candidate = self.folder / "initial.candidate"
        with atomic_path(candidate) as temporary:
            self.source.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
        policy = folder_fingerprint(candidate)
        try:
            claim_folder(self.folder, {**config, "policy": policy})
            if initial.exists() and folder_fingerprint(initial) != policy:
                rmtree(initial)  # damaged: the model in memory is the whole one
            if not initial.exists():
                candidate.rename(initial)
        finally:
            rmtree(candidate, ignore_errors=True)
        return str(initial), policy

"""Algorithm 1: the loop over iterations, and its Python interface.

    trainer = SelfPlayTrainer(model, args=SelfPlayConfig(output_dir="runs/mine", method="tspin"),
                              train_dataset=dataset, processing_class=tokenizer)
    trainer.train()

An iteration is a value, and four steps make its files: `sample`, `score_reference`, `train`, `diagnose`. The loop keeps
each file as a stage of the run's folder (tspin.runs.stages), so that the same call continues after any crash.
`tspin sample`, `train` and `diagnose` take the same steps, one at a time, on files of the user's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import pandas as pd
import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tspin.data.encoding import encode_dataset
from tspin.data.tables import (
    Example,
    Examples,
    Responses,
    View,
    read_responses,
    response_statistics,
    write_parquet,
    write_responses,
)
from tspin.diagnostics import degeneration, sample_table, summary, warnings
from tspin.engines.engine import Engine
from tspin.engines.here import Training
from tspin.engines.launch import trains_in_bfloat16
from tspin.errors import UserError
from tspin.models import Policy, load_model, load_tokenizer, policy_fingerprint, resolve
from tspin.objectives import METHODS, PROTO, SYNTHETIC, Coefficients, Method
from tspin.runs.locks import owned
from tspin.runs.seeds import stage_seed
from tspin.runs.stages import (
    DamagedStage,
    atomic_path,
    check_stage,
    claim_folder,
    folder_fingerprint,
    note_damage,
    run_stage,
    sha256,
    write_json,
)
from tspin.runs.unfinished import Unfinished
from tspin.selfplay_config import SelfPlayConfig
from tspin.triplets import Triplet, make_triplets, with_reference

PROMPT_SCHEMA = pa.schema([("prompt_id", pa.int64()), ("prompt", pa.string()), ("labelled", pa.string())])


@dataclass(frozen=True)
class IterationResult:
    """What one iteration left: the checkpoint's folder, its fingerprint, and facts of its steps."""

    iteration: int
    model_path: Path
    fingerprint: str
    synthetic: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)  # what has gone too far, see tspin.diagnostics.warnings


class SelfPlayTrainer:
    """Runs a method for all its iterations, keeping every checkpoint.

    model: a folder, a hub name, "pocket", or a loaded model (which is then saved to the run's
        folder first: each iteration starts from files, so that a resumed run equals an uninterrupted one).
    train_dataset: rows {"prompt", "completion"}, a datasets.Dataset or any iterable of mappings; rows may carry
        "prompt_id".
    processing_class: the tokenizer, loaded from `model` when left out.
    callbacks: transformers callbacks for every iteration's training.
    model_arguments: arguments of `from_pretrained`.

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
        if callbacks and args.launcher:
            raise UserError("callbacks: those of this process do not reach the processes that args.launcher starts")
        if isinstance(model, PreTrainedModel) and processing_class is None:
            raise UserError("processing_class: give the tokenizer along with a loaded model")
        self.source = model if isinstance(model, PreTrainedModel) else resolve(str(model))
        self.args = args
        self.folder = Path(str(args.output_dir))
        self.shared = Path(args.shared_dir) if args.shared_dir else self.folder
        self.callbacks = list(callbacks)
        tokenizer = processing_class or load_tokenizer(str(self.source), model_arguments)
        self.examples = encode_dataset(train_dataset, tokenizer, args)
        self.run = Run(args, self.examples, Engine(args, tokenizer, model_arguments or {}))
        self.model: PreTrainedModel | None = None  # the final policy, after train()

    def algorithm_1(self) -> Iterator[IterationResult]:
        """Algorithm 1 of the paper (arXiv 2601.08198). SFT, which is no self-play, is one training step on y alone."""
        policy = initial = self._initial_policy()
        proto = self._sample(PROTO, initial)  # y0 ~ π_θ0, once
        for number in range(self.run.iterations):
            synthetic = self._sample(SYNTHETIC, policy, number)  # y′ ~ π_θt
            iteration = self._iteration(number, policy, initial, synthetic, proto)
            reference = self._score_reference(iteration)
            trained = self._train(iteration, reference)  # π_θt+1
            diagnosed = self._diagnose(iteration, reference, trained)
            yield _result(iteration, synthetic, reference, trained, diagnosed)
            policy = trained.policy

    def iterate(self) -> Iterator[IterationResult]:
        """The iterations one by one: a result is yielded when its checkpoint is on disk.

        Raises UserError when another process is at work in the run's folder, Stopped at SIGTERM or Ctrl-C in training.
        """
        damaged: set[Path] = set()
        yielded = 0
        with owned(self.folder):
            while True:
                try:
                    for number, result in enumerate(self.algorithm_1()):
                        if number == yielded:
                            yielded += 1
                            yield result
                    return
                except DamagedStage as error:  # an earlier iteration's: from the start, past all that is whole
                    note_damage(error, damaged)

    def train(self) -> list[IterationResult]:
        """Run what is missing of all iterations; `self.model` is the final policy afterwards."""
        damaged: set[Path] = set()
        while True:
            results = list(self.iterate())
            last = results[-1].model_path
            try:
                check_stage(last)
                self.model = load_model(str(last), self.run.engine.loading)
                return results
            except DamagedStage as error:
                note_damage(error, damaged)

    def response_path(self, role: str, number: int = 0) -> Path:
        """Where y0 (PROTO) or an iteration's y′ (SYNTHETIC) is kept, as read_responses reads it.

        All methods start from the same policy: y0 and the first y′ are sampled once for all of them.
        """
        if number > 0:
            return self.folder / f"iteration-{number}" / f"{role}.parquet"
        return self.shared / (f"iteration-0-{role}.parquet" if role == SYNTHETIC else f"{role}.parquet")

    def sample_last(self, result: IterationResult, examples: Sequence[Example]) -> Path:
        """Responses of an iteration's trained policy to some prompts, in its folder: to look at, not to train on."""
        path = result.model_path.parent / "examples.parquet"
        prompts = [example.prompt_ids for example in examples]
        seed = stage_seed(self.args.seed, "examples", result.iteration)
        policy = Policy(str(result.model_path), result.fingerprint)
        inputs = {**self.run.decoding, "policy": policy.fingerprint, "prompts": prompts, "seed": seed}
        run_stage(path, inputs, partial(sample, self.run, policy, examples, seed, of="examples"))
        return path

    def _initial_policy(self) -> Policy:
        """π_θ0, once the run's folder is known to be this run's; leaves the prompts there for those who read it."""
        policy = self._claimed()
        if self.examples.noted and not (self.folder / "rows.json").exists():
            write_json(self.folder / "rows.json", self.examples.noted)
        path = self.folder / "prompts.parquet"
        if not path.exists():
            rows = ((e.prompt_id, e.prompt, e.labelled.text) for e in self.examples)
            with atomic_path(path) as temporary:
                write_parquet(temporary, PROMPT_SCHEMA, rows)
        return policy

    def _claimed(self) -> Policy:
        if isinstance(self.source, str):
            policy = Policy(self.source, policy_fingerprint(self.source))
            claim_folder(self.folder, {**self.run.inputs, "policy": policy.fingerprint})
            return policy
        # A model in memory becomes a folder first: iterations start from files. It is written
        # under another name until the run is known to be the same one.
        initial = self.folder / "initial"
        candidate = self.folder / "initial.candidate"
        with atomic_path(candidate) as temporary:
            self.source.save_pretrained(temporary)
            self.run.engine.tokenizer.save_pretrained(temporary)
        policy = Policy(str(initial), folder_fingerprint(candidate))
        try:
            claim_folder(self.folder, {**self.run.inputs, "policy": policy.fingerprint})
            if initial.exists() and folder_fingerprint(initial) != policy.fingerprint:
                rmtree(initial)  # damaged: the model in memory is the whole one
            if not initial.exists():
                candidate.rename(initial)
        finally:
            rmtree(candidate, ignore_errors=True)
        return policy

    def _sample(self, role: str, policy: Policy, number: int = 0) -> "Made | None":
        if not self.run.method.self_play:
            return None
        path = self.response_path(role, number)
        seed = stage_seed(self.args.seed, role, None if role == PROTO else number)
        prompts = self.examples.prompts_fingerprint
        inputs = {**self.run.decoding, "policy": policy.fingerprint, "data": prompts, "seed": seed}
        whose = f"iteration {number}'s policy" if number else "the initial policy"
        with owned(path.parent, wait=True):  # runs of other methods may be at the same responses
            produce = partial(sample, self.run, policy, self.examples, seed, of=f"{role} responses of {whose}")
            return Made.stage(path, inputs, produce)

    def _iteration(
        self, number: int, policy: Policy, initial: Policy, synthetic: "Made | None", proto: "Made | None"
    ) -> "Iteration":
        sampled = {role: made.path for role, made in ((SYNTHETIC, synthetic), (PROTO, proto)) if made}
        return Iteration(self.run, number, policy, initial, self.folder / f"iteration-{number}", sampled)

    def _score_reference(self, iteration: "Iteration") -> "Made | None":
        if not self.run.method.uses_reference:
            return None
        inputs = {**iteration.inputs, "roles": sorted(iteration.scored_roles)}
        return Made.stage(iteration.folder / "reference.parquet", inputs, partial(score_reference, iteration))

    def _train(self, iteration: "Iteration", reference: "Made | None") -> "Made":
        inputs = {**iteration.inputs, "reference": sha256(reference.path) if reference else None}
        unfinished = Unfinished(iteration.folder / "unfinished", inputs)
        produce = partial(
            train,
            iteration,
            _path(reference),
            log_folder=iteration.folder,
            callbacks=self.callbacks,
            unfinished=unfinished,
        )
        # Of checkpoints most are not read again: whoever loads one checks it.
        trained = Made.stage(iteration.folder / "model", inputs, produce, beside=["steps.parquet"], check=False)
        self.run.engine.release()
        unfinished.forget()
        return trained

    def _diagnose(self, iteration: "Iteration", reference: "Made | None", trained: "Made") -> "list[Made]":
        """The diagnostics, where they are wanted, and the measures of degeneration."""
        inputs = {**iteration.inputs, "trained": trained.policy.fingerprint}
        made = []
        if self.args.diagnostics:
            produce = partial(diagnose, iteration, _path(reference), trained.policy)
            made.append(Made.stage(iteration.folder / "diagnostics.parquet", inputs, produce))
        table = made[0].path if made else None
        guards = {**inputs, "diagnostics": self.args.diagnostics}
        made.append(Made.stage(iteration.folder / "guards.json", guards, partial(measure, iteration, table)))
        return made


@dataclass(frozen=True)
class Run:
    """What all iterations have in common: settings, encoded data, and where steps take place."""

    args: SelfPlayConfig
    examples: Examples
    engine: Engine

    @property
    def method(self) -> Method:
        return METHODS[self.args.method]

    @property
    def iterations(self) -> int:
        """T; SFT is one round of training."""
        return self.args.iterations if self.method.self_play else 1

    @property
    def loading(self) -> dict[str, str]:
        """What a loaded model depends on besides its files."""
        return {name: str(value) for name, value in self.engine.loading.items()}

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every number of the run follows from, besides its policies and responses."""
        return {"settings": self.args.computed(), "loading": self.loading, "data": self.examples.fingerprint}

    @property
    def decoding(self) -> dict[str, Any]:
        """What sampled responses follow from, besides policy, prompts and seed."""
        backend = {"backend": self.args.sampling_backend, "dtype": self.args.sampling_dtype}
        return {"decoding": asdict(self.args.decoding), "loading": self.loading, **backend}


@dataclass(frozen=True)
class Iteration:
    """One iteration as a value: what its steps start from. Their outputs are files.

    number: t, from 0. policy: π_θt. initial: π_θ0. folder: where a run keeps its outputs.
    responses: y′ (SYNTHETIC) and y0 (PROTO), role → Parquet file as read_responses reads it; none without self-play.
    """

    run: Run
    number: int
    policy: Policy
    initial: Policy
    folder: Path
    responses: Mapping[str, Path]

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What the iteration's numbers follow from, for the fingerprints of its stages."""
        return {
            **self.run.inputs,
            "iteration": self.number,
            "policy": self.policy.fingerprint,
            "initial": self.initial.fingerprint,
            "responses": {role: sha256(path) for role, path in self.responses.items()},
            "weights": "bfloat16" if trains_in_bfloat16(self.run.args) else "as loaded",  # while computing
        }

    @property
    def coefficients(self) -> Coefficients:
        """Those in force at this iteration."""
        return self.run.method.coefficients_at(self.number, self.run.args.coefficients)

    @property
    def reference(self) -> Policy:
        """The policy in the loss of methods that have one."""
        return self.initial if self.run.method.reference == "initial" else self.policy

    @property
    def trained_roles(self) -> list[str]:
        """The sampled roles that training sees: y0 only where it carries gradient, or is to be logged."""
        wanted = self.run.method.gradient_roles(self.coefficients)
        return [role for role in self.responses if role != PROTO or self.run.args.monitor_proto or role in wanted]

    @property
    def scored_roles(self) -> list[str]:
        """The sampled roles that the reference scores: of y0 too where diagnostics ask for it; one pass serves both."""
        return list(self.responses) if self.run.args.diagnostics else self.trained_roles

    @cached_property
    def sampled(self) -> dict[str, Responses]:
        """role → the responses in its file."""
        return {role: read_responses(path) for role, path in self.responses.items()}

    def triplets(self, roles: Sequence[str], reference: Path | None = None) -> Sequence[Triplet]:
        """The labelled responses with those of the sampled `roles`, and their reference log-probabilities."""
        triplets = make_triplets(self.run.examples, {role: self.sampled[role] for role in roles})
        return with_reference(triplets, pd.read_parquet(reference)) if reference else triplets


@dataclass(frozen=True)
class Made:
    """A step's output, kept as a stage: its path and the stage's record."""

    path: Path
    record: Mapping[str, Any]

    @classmethod
    def stage(cls, path: Path, inputs: Any, produce: Callable[..., Any], **options: Any) -> "Made":
        """See tspin.runs.stages.run_stage."""
        return cls(path, run_stage(path, inputs, produce, **options))

    @property
    def policy(self) -> Policy:
        """The output as a policy: one is known by what it was made from."""
        return Policy(str(self.path), self.record["fingerprint"])


def _path(made: Made | None) -> Path | None:
    return made.path if made else None


def sample(
    run: Run, policy: Policy, examples: Sequence[Example], seed: int, target: Path, of: str = "responses"
) -> dict[str, float]:
    """Step 1: write one response of `policy` per prompt to a Parquet file; returns response_statistics."""
    prompts = View(len(examples), lambda i: examples[i].prompt_ids)
    responses = run.engine.sample(policy, prompts, seed=seed, description=of)
    write_responses(target, (example.prompt_id for example in examples), responses)
    return response_statistics(responses, View(len(examples), lambda i: examples[i].labelled))


def score_reference(iteration: Iteration, target: Path) -> None:
    """Step 2: write the reference's log-probabilities of all responses: Parquet, prompt_id and a column per role."""
    triplets = iteration.triplets(iteration.scored_roles)
    keep = iteration.reference == iteration.policy  # training starts from it
    logps = iteration.run.engine.score(iteration.reference, triplets, "the reference", keep=keep)
    pd.DataFrame({"prompt_id": [t.prompt_id for t in triplets], **logps}).to_parquet(target, index=False)


def train(
    iteration: Iteration,
    reference: Path | None,
    target: Path,
    *,
    log_folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """Step 3: train from π_θt into the folder `target`; returns tspin.engines.here.train's facts.

    reference: step 2's file. log_folder: where the step log goes. unfinished: where a stopped training keeps its state.
    """
    run = iteration.run
    triplets = iteration.triplets(iteration.trained_roles, reference)
    training = Training(triplets, run.engine.tokenizer, run.args, iteration.number, target, log_folder)
    return run.engine.train(iteration.policy, training, callbacks, unfinished)


def diagnose(iteration: Iteration, reference: Path | None, trained: Policy, target: Path) -> dict[str, float]:
    """Step 4: write log π and reward of every response before and after training; returns tspin.diagnostics.summary.

    reference: step 2's file; without, the reference's log-probabilities are computed where the method has one.
    """
    run, method = iteration.run, iteration.run.method
    triplets = iteration.triplets(list(iteration.responses))
    referred = None
    if reference is not None:
        table = pd.read_parquet(reference)
        referred = {role: table[role].tolist() for role in triplets[0].responses}
    elif method.uses_reference:
        referred = run.engine.score(iteration.reference, triplets, "the reference")
    before = referred if referred and iteration.reference == iteration.policy else None
    before = before or run.engine.score(iteration.policy, triplets, "the policy before")
    after = before if trained == iteration.policy else run.engine.score(trained, triplets, "the trained policy")
    table = sample_table(method, iteration.coefficients, triplets, before, after, referred)
    table.to_parquet(target, index=False)
    return summary(table)


def measure(iteration: Iteration, diagnostics: Path | None, target: Path) -> dict[str, float]:
    """Write measures of degeneration, and the warnings that follow from them, as JSON; returns the measures."""
    examples = iteration.run.examples
    responses = {role: sampled.of(examples.prompt_ids) for role, sampled in iteration.sampled.items()}
    table = None if diagnostics is None else pd.read_parquet(diagnostics)
    measures = degeneration(responses.get(SYNTHETIC, []), examples.labelled, responses.get(PROTO, []), table)
    write_json(target, {"measures": measures, "warnings": warnings(measures)})
    return measures


def _result(
    iteration: Iteration, synthetic: Made | None, reference: Made | None, trained: Made, diagnosed: Sequence[Made]
) -> IterationResult:
    """The iteration's facts, and what it cost besides its training: sampling y′, and the reference's pass."""
    seconds = {"sampling_seconds": synthetic, "reference_seconds": reference}
    facts = trained.record["facts"] | {name: made.record["seconds"] for name, made in seconds.items() if made}
    measures = diagnosed[-1].record["facts"]
    return IterationResult(
        iteration.number,
        trained.path,
        trained.policy.fingerprint,
        synthetic.record["facts"] if synthetic else {},
        facts | {"commit": trained.record["provenance"]["commit"]},
        {name: value for made in diagnosed for name, value in made.record["facts"].items()},
        warnings(measures),
    )

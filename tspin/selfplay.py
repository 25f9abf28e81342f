"""Algorithm 1: the loop over iterations, and its Python interface.

    trainer = SelfPlayTrainer(model, args=SelfPlayConfig(output_dir="runs/mine", method="tspin"),
                              train_dataset=dataset, processing_class=tokenizer)
    trainer.train()

The steps are those of tspin.iteration. The loop keeps each one's output as a stage of the run's folder
(tspin.runs.stages), so that the same call continues after any crash.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tspin.config import SelfPlayConfig
from tspin.data.encoding import Example, encode_dataset
from tspin.data.responses import write_parquet
from tspin.data.turns import writes_date
from tspin.engines.engine import Engine
from tspin.engines.here import FIRST_STEP
from tspin.errors import UserError
from tspin.fits import check_rows, check_training
from tspin.iteration import (
    Earlier,
    Iteration,
    Run,
    diagnose,
    measure,
    sample,
    score_reference,
    score_tokens,
    take_generated,
    train,
)
from tspin.models import Policy, load_model, load_tokenizer, policy_fingerprint, resolve, tokenizer_fingerprint
from tspin.runs.claims import claim_folder
from tspin.runs.dates import date_of_run, record_date
from tspin.runs.files import atomic_path, fingerprint_of, folder_fingerprint, read_json, sha256, write_json
from tspin.runs.locks import owned
from tspin.runs.seeds import stage_seed
from tspin.runs.stages import DamagedStage, Stage, check_stage, note_damage, run_stage
from tspin.runs.unfinished import Unfinished
from tspin.schema import PROTO, SYNTHETIC

PROMPT_SCHEMA = pa.schema(
    [("prompt_id", pa.int64()), ("prompt", pa.string()), ("labelled", pa.string()), ("task", pa.string())]
)


@dataclass(frozen=True)
class IterationResult:
    """What one iteration left: the checkpoint's folder, its fingerprint, and facts of its steps."""

    iteration: int
    model_path: Path
    fingerprint: str
    synthetic: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)  # what has gone too far, see tspin.iteration.measure

    @property
    def policy(self) -> Policy:
        """π_θt+1."""
        return Policy(str(self.model_path), self.fingerprint)


class SelfPlayTrainer:
    """Runs a method for all its iterations, keeping every checkpoint.

    model: a folder, a hub name, "pocket", or a loaded model (which is then saved to the run's
        folder first: each iteration starts from files, so that a resumed run equals an uninterrupted one).
    train_dataset: rows of a known format (tspin.data.formats), a datasets.Dataset or any iterable of mappings; they may
        carry an integer "prompt_id". tspin.data.sources.source_of says more: other columns, all rounds, a split.
    processing_class: the tokenizer, loaded from `model` when left out.
    callbacks: transformers callbacks for every iteration's training.
    model_arguments: arguments of `from_pretrained`.

    Raises UserError for bad data, a folder that is no model, a tokenizer without an end token, what does not fit
    together (tspin.fits), and an output_dir that holds a run of another config.
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
        self.folder = Path(str(args.output_dir))
        self.shared = Path(args.shared_dir) if args.shared_dir else self.folder
        self.callbacks = list(callbacks)
        tokenizer = processing_class or load_tokenizer(str(self.source), model_arguments)
        self.args = args = copy.copy(args)
        self.proto_source = args.proto_model and _alike(args.proto_model, tokenizer, model_arguments)
        if args.date is None and writes_date(tokenizer):
            args.date = date_of_run(self.shared)
        self.examples = encode_dataset(train_dataset, tokenizer, args)
        loading = model_arguments or {}
        check_rows(self.source, loading, tokenizer, self.examples, new_tokens=args.max_new_tokens)
        check_training(self.source, loading, args, len(self.examples))
        self.run = Run(args, self.examples, Engine(args, tokenizer, loading))
        self.model: PreTrainedModel | None = None  # the final policy, after train()

    def algorithm_1(self) -> Iterator[IterationResult]:
        """Algorithm 1 of the paper (arXiv 2601.08198). SFT, which is no self-play, trains once, on y alone."""
        policy = initial = self._initial_policy()
        proto = self._sample(PROTO, self._proto_policy(initial))  # y0 ~ π_θ0, once
        earlier = Earlier()
        for number in range(self.run.iterations):
            synthetic = self._sample(SYNTHETIC, policy, number)  # y′ ~ π_θt
            iteration = self._iteration(number, policy, initial, synthetic, proto, earlier)
            reference = self._score_reference(iteration)
            trained = self._train(iteration, reference)  # π_θt+1
            diagnosed = self._diagnose(iteration, reference, trained)
            result = _result(number, synthetic, reference, trained, diagnosed)
            yield result
            policy, earlier = result.policy, _left(reference, diagnosed)

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
        inputs = {**self.run.decoding, "policy": result.fingerprint, "prompts": prompts, "seed": seed}
        run_stage(path, inputs, partial(sample, self.run, result.policy, examples, seed, of="examples"))
        return path

    def _initial_policy(self) -> Policy:
        """π_θ0, once the run's folder is known to be this run's; leaves the prompts there for those who read it."""
        policy = self._claimed()
        if self.args.date:
            record_date(self.shared, self.args.date)
        if self.examples.noted and not (self.folder / "rows.json").exists():
            write_json(self.folder / "rows.json", self.examples.noted)
        path = self.folder / "prompts.parquet"
        if not path.exists():
            rows = ((e.prompt_id, e.prompt, e.labelled.text, e.task) for e in self.examples)
            with atomic_path(path) as temporary:
                write_parquet(temporary, PROMPT_SCHEMA, rows)
        return policy

    def _proto_policy(self, initial: Policy) -> Policy:
        """What y0 is drawn from: π_θ0, or the model that args.proto_model names."""
        return Policy(self.proto_source, policy_fingerprint(self.proto_source)) if self.proto_source else initial

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

    def _sample(self, role: str, policy: Policy, number: int = 0) -> Stage | None:
        if not self.run.method.self_play:
            return None
        path = self.response_path(role, number)
        if role == SYNTHETIC and number == 0 and (generated := self.examples.generated):
            brought = {"data": self.examples.prompts_fingerprint, "generated": fingerprint_of(r.ids for r in generated)}
            with owned(path.parent, wait=True):
                return run_stage(path, brought, partial(take_generated, self.run))
        seed = stage_seed(self.args.seed, role, None if role == PROTO else number)
        prompts = self.examples.prompts_fingerprint
        inputs = {**self.run.decoding, "policy": policy.fingerprint, "data": prompts, "seed": seed}
        whose = f"iteration {number}'s policy" if number else "the initial policy"
        produce = partial(sample, self.run, policy, self.examples, seed, of=f"{role} responses of {whose}")
        with owned(path.parent, wait=True):  # runs of other methods may be at the same responses
            return run_stage(path, inputs, produce)

    def _iteration(
        self,
        number: int,
        policy: Policy,
        initial: Policy,
        synthetic: Stage | None,
        proto: Stage | None,
        earlier: Earlier,
    ) -> Iteration:
        responses = {role: stage.output for role, stage in ((SYNTHETIC, synthetic), (PROTO, proto)) if stage}
        first = max(number - self.args.history, 0) if responses else number
        history = [self.response_path(SYNTHETIC, earlier) for earlier in reversed(range(first, number))]
        drawn_by = {SYNTHETIC: policy, PROTO: self._proto_policy(initial)}
        if number == 0 and self.examples.generated:
            del drawn_by[SYNTHETIC]  # it came with the data
        folder = self.folder / f"iteration-{number}"
        return Iteration(self.run, number, policy, initial, folder, responses, history, drawn_by, earlier)

    def _score_reference(self, iteration: Iteration) -> Stage | None:
        if not self.run.method.uses_reference:
            return None
        source = iteration.reference_source
        roles = {"roles": sorted(iteration.trained_roles), "known": sha256(source) if source else None}
        inputs = {**iteration.inputs, **roles}
        return run_stage(iteration.folder / "reference.parquet", inputs, partial(score_reference, iteration))

    def _train(self, iteration: Iteration, reference: Stage | None) -> Stage:
        scores = reference.output if reference else None
        inputs = {**iteration.inputs, "reference": sha256(scores) if scores else None}
        unfinished = Unfinished(iteration.folder / "unfinished", inputs)
        produce = partial(
            train, iteration, scores, log_folder=iteration.folder, callbacks=self.callbacks, unfinished=unfinished
        )
        # Of checkpoints most are not read again: whoever loads one checks it.
        trained = run_stage(
            iteration.folder / "model", inputs, produce, beside=["steps.parquet", FIRST_STEP], check=False
        )
        self.run.engine.release()
        unfinished.forget()
        return trained

    def _diagnose(self, iteration: Iteration, reference: Stage | None, trained: Stage) -> list[Stage]:
        """The diagnostics, where they are wanted, and the measures of degeneration."""
        policy, scores = Policy(str(trained.output), trained.fingerprint), reference.output if reference else None
        inputs = {**iteration.inputs, "trained": policy.fingerprint, "reference": sha256(scores) if scores else None}
        stages, table = [], None
        if self.args.diagnostics:
            known, prompts = iteration.earlier.diagnostics, self.run.engine.diagnosed(len(self.examples))
            made_from = {**inputs, "known": sha256(known) if known else None, "prompts": len(prompts)}
            produce = partial(diagnose, iteration, scores, policy)
            stages.append(run_stage(iteration.folder / "diagnostics.parquet", made_from, produce))
            table = stages[0].output
            if places := self.run.engine.looked_at(len(self.examples)):
                made_from = {**inputs, "prompts": len(places)}
                run_stage(iteration.folder / "tokens.parquet", made_from, partial(score_tokens, iteration, policy))
        produce = partial(measure, iteration, scores, table, trained.facts.get("changed_share"))
        inputs = {**inputs, "diagnostics": sha256(table) if table else None}
        return [*stages, run_stage(iteration.folder / "guards.json", inputs, produce)]


def _alike(model: str, tokenizer: PreTrainedTokenizerBase, model_arguments: dict[str, Any] | None) -> str:
    """The folder of a model whose responses are tokens of this tokenizer's too. Raises UserError where they are not."""
    folder = resolve(model)
    if tokenizer_fingerprint(load_tokenizer(folder, model_arguments)) != tokenizer_fingerprint(tokenizer):
        raise UserError(f"proto_model: {model} has another tokenizer than the model: its y0 would be other texts")
    return folder


def _left(reference: Stage | None, diagnosed: Sequence[Stage]) -> Earlier:
    """What an iteration leaves to the next: its reference's log-probabilities, and its diagnostics if there are any."""
    *diagnostics, _ = diagnosed
    return Earlier(reference.output if reference else None, diagnostics[0].output if diagnostics else None)


def _result(
    number: int, synthetic: Stage | None, reference: Stage | None, trained: Stage, diagnosed: Sequence[Stage]
) -> IterationResult:
    """An iteration's facts, and what it cost besides its training: sampling y′, and the reference's pass."""
    seconds = {"sampling_seconds": synthetic, "reference_seconds": reference}
    costs = {name: stage.seconds for name, stage in seconds.items() if stage}
    return IterationResult(
        number,
        trained.output,
        trained.fingerprint,
        synthetic.facts if synthetic else {},
        {**trained.facts, **costs, "commit": trained.provenance["commit"]},
        {name: value for stage in diagnosed for name, value in stage.facts.items()},
        read_json(diagnosed[-1].output)["warnings"],
    )

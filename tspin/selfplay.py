"""Algorithm 1: the loop over iterations, and its Python interface.

    trainer = SelfPlayTrainer(model, args=SelfPlayConfig(output_dir="runs/mine", method="tspin"),
                              train_dataset=dataset, processing_class=tokenizer)
    trainer.train()

The steps are those of tspin.iteration. The loop keeps each one's output as a stage of the run's folder
(tspin.runs.stages), so that the same call continues after any crash.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any, Literal

import pyarrow as pa
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from tspin.cards import push, write_card, write_eval_results
from tspin.checkpoints import settle
from tspin.config import LoraSettings, SelfPlayConfig
from tspin.data.encoding import Example, encode_dataset
from tspin.data.responses import write_parquet
from tspin.data.turns import writes_date
from tspin.engines.adapters import ADAPTER, CONFIG, WEIGHTS, check_lora, check_source, check_targets, lora_settings
from tspin.engines.engine import Engine
from tspin.engines.here import FIRST_STEP
from tspin.engines.trackers import Tracked, check_trackers, end_trackers, run_id
from tspin.errors import UserError
from tspin.fits import check_engine, check_rows, check_training
from tspin.iteration import (
    Earlier,
    Iteration,
    Run,
    diagnose,
    measure,
    sample,
    score_held_out,
    score_reference,
    score_tokens,
    take_generated,
    train,
)
from tspin.models import (
    Adapter,
    Policy,
    load_model,
    load_tokenizer,
    loading_of,
    policy_fingerprint,
    resolve,
    say_sampling,
    tokenizer_fingerprint,
)
from tspin.runs.claims import claim_folder
from tspin.runs.dates import date_of_run, record_date
from tspin.runs.files import atomic_path, fingerprint, fingerprint_of, folder_fingerprint, read_json, sha256, write_json
from tspin.runs.locks import owned
from tspin.runs.seeds import stage_seed
from tspin.runs.signals import stopping_when_asked
from tspin.runs.stages import DamagedStage, Stage, check_stage, made_otherwise, note_damage, run_stage
from tspin.runs.unfinished import Unfinished
from tspin.schema import FIRST_RESPONSES, PROTO, RESPONSE_NAMES, SYNTHETIC
from tspin.states import HELD_OUT_NLL, IterationResult, advance, begun, best_of, write_state

PROMPT_SCHEMA = pa.schema(
    [("prompt_id", pa.int64()), ("prompt", pa.string()), ("labelled", pa.string()), ("task", pa.string())]
)


class SelfPlayTrainer:
    """Runs a method for all its iterations, keeping every checkpoint.

    model: a folder, a hub name, "pocket", or a loaded model (which is then saved to the run's
        folder first: each iteration starts from files, so that a resumed run equals an uninterrupted one).
    train_dataset: rows of a known format (tspin.data.formats), a datasets.Dataset or any iterable of mappings; they may
        carry an integer "prompt_id". tspin.data.sources.source_of says more: other columns, all rounds, a split.
    processing_class: the tokenizer, loaded from `model` when left out.
    callbacks: transformers callbacks for every iteration's training.
    model_arguments: arguments of `from_pretrained`; weights are float32 where they name no dtype.
    eval_dataset: labelled rows that are not trained on: −log π(y) of them is recorded after each iteration, and by it
        args.best_iteration can choose.
    peft_config: a peft.LoraConfig, in place of args.lora.

    `state` is a transformers.TrainerState of all iterations, kept in the folder's trainer_state.json.

    Raises UserError for bad data, a folder that is no model, a tokenizer without an end token, what does not fit
    together (tspin.fits), and an output_dir that holds a run of another config.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: SelfPlayConfig,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        model_arguments: dict[str, Any] | None = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
    ):
        if not isinstance(args, SelfPlayConfig):
            raise UserError(f"args: a SelfPlayConfig is needed, which has all options of {type(args).__name__}")
        if args.best_iteration == HELD_OUT_NLL and eval_dataset is None:
            raise UserError("best_iteration: held_out_nll is of held-out rows: give them as eval_dataset")
        if args.keep_checkpoints == "best" and args.best_iteration != HELD_OUT_NLL:
            raise UserError("keep_checkpoints: best is by the rule best_iteration, which is last: set it, or keep last")
        if isinstance(model, PreTrainedModel) and processing_class is None:
            raise UserError("processing_class: give the tokenizer along with a loaded model")
        check_source(model)
        self.source = model if isinstance(model, PreTrainedModel) else resolve(str(model))
        self.folder = Path(str(args.output_dir))
        self.shared = Path(args.shared_dir) if args.shared_dir else self.folder
        self._names: dict[str, str] = {}  # of y0 and the first y′ in `shared`, where they are not the usual ones
        self.callbacks: list[TrainerCallback] = []
        loading = loading_of(self.source, model_arguments)
        tokenizer = processing_class or load_tokenizer(str(self.source), loading)
        self.args = args = copy.copy(args)
        for callback in callbacks or ():
            self.add_callback(callback)
        if peft_config is not None:
            args.lora = self._lora(peft_config, loading)
        check_lora(args)
        check_trackers(args)
        self.proto_source = args.proto_model and _alike(args.proto_model, tokenizer, loading)
        if args.date is None and writes_date(tokenizer):
            args.date = date_of_run(self.shared)
        self.examples = encode_dataset(train_dataset, tokenizer, args)
        check_rows(self.source, loading, tokenizer, self.examples, new_tokens=args.max_new_tokens)
        check_engine(self.source, loading, args, self.examples)
        check_training(self.source, loading, args, len(self.examples))
        if args.lora:
            check_targets(self.source, loading, args.lora)
        self.held_out = None
        if eval_dataset is not None:
            self.held_out = encode_dataset(eval_dataset, tokenizer, args, "eval_dataset")
            check_rows(self.source, loading, tokenizer, self.held_out)
        self.run = Run(args, self.examples, Engine(args, tokenizer, loading))
        self.state = TrainerState()
        # The final policy, after train(); before it, what was handed over as a model.
        self.model = self.source if isinstance(self.source, PreTrainedModel) else None
        self.results: list[IterationResult] = []
        self.train_dataset = train_dataset

    @property
    def processing_class(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.run.engine.tokenizer

    tokenizer = processing_class

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback, or a class of one, for every training from now on. Raises UserError with args.launcher."""
        if self.args.launcher:
            raise UserError("callbacks: those of this process do not reach the processes that args.launcher starts")
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    def _lora(self, peft_config: Any, loading: dict[str, Any]) -> LoraSettings:
        if self.args.lora:
            raise UserError("peft_config: args.lora is given too; leave one of them out")
        if isinstance(self.source, PreTrainedModel):
            return lora_settings(peft_config, self.source.config.model_type)
        trusted = bool(loading.get("trust_remote_code"))
        return lora_settings(peft_config, AutoConfig.from_pretrained(self.source, trust_remote_code=trusted).model_type)

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
            ended = self._trained_policy(iteration, trained)
            diagnosed = self._diagnose(iteration, reference, trained, ended)
            held_out = self._score_held_out(iteration, ended)
            result = _result(number, synthetic, reference, trained, diagnosed, held_out, ended.adapter)
            yield result
            policy, earlier = result.policy, _left(reference, diagnosed, earlier.steps + trained.facts["steps"])

    def iterate(self) -> Iterator[IterationResult]:
        """The iterations one by one: a result is yielded when its checkpoint is on disk.

        Raises UserError when another process is at work in the run's folder, Stopped at SIGTERM or Ctrl-C in training.
        """
        damaged: set[Path] = set()
        self.results = []
        with owned(self.folder), self._tracking():
            while True:
                try:
                    for number, result in enumerate(self.algorithm_1()):
                        if number == len(self.results):
                            self._note(result)
                            yield result
                        if number + 1 == len(self.results):  # and evaluated, by whoever iterates
                            engine, keep = self.run.engine, self.args.keep_checkpoints
                            settle(self.results, best_of(self.state), keep, engine.loading, engine.tokenizer)
                    return
                except DamagedStage as error:  # an earlier iteration's: from the start, past all that is whole
                    note_damage(error, damaged)

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        try:
            yield
        finally:
            end_trackers(self.folder)

    def _note(self, result: IterationResult) -> None:
        """Add an iteration to the results and to the state."""
        rule = self.args.best_iteration
        if not self.results:
            self.state = begun(self.folder, rule)
        self.results.append(result)
        advance(self.state, result, rule)
        write_state(self.folder, self.state)
        self.write_card(result)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> list[IterationResult]:
        """Run what is missing of all iterations; `self.model` is the final policy afterwards.

        resume_from_checkpoint: a run always goes on from what its folder keeps, and None, True and that folder say so;
        False asks for a new one. Raises UserError where the folder has one already, and for any other folder.
        """
        self._check_resume(resume_from_checkpoint)
        damaged: set[Path] = set()
        while True:
            results = list(self.iterate())
            last = results[-1].model_path
            try:
                check_stage(last)
                self.model = load_model(str(last), self._merged_loading)
                return results
            except DamagedStage as error:
                note_damage(error, damaged)

    @property
    def _merged_loading(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for a checkpoint: of merged adapters in the type that it is written in."""
        lora = self.args.lora
        dtype = {"dtype": getattr(torch, lora.merged_dtype), "quantize": None} if lora else {}
        return self.run.engine.loading | dtype

    def _check_resume(self, asked: bool | str | Path | None) -> None:
        if asked is False and (self.folder / "config.json").exists():
            raise UserError(
                f"resume_from_checkpoint=False: {self.folder} holds a run already; leave it out to go on with "
                "that one, or choose another output_dir"
            )
        if isinstance(asked, str | Path) and Path(asked).resolve() != self.folder.resolve():
            raise UserError(
                f"resume_from_checkpoint: {asked} is not this run's folder, {self.folder}: a run goes on from what "
                "that keeps, whole iterations and a stopped training alike"
            )

    def result_of(self, which: int | Literal["last", "best"] = "last") -> IterationResult:
        """The result of an iteration: the last, the best by args.best_iteration, or by number. Raises UserError."""
        if not self.results:
            raise UserError("no iteration is trained yet: call train() first, which goes past all that is kept")
        if which == "best":
            which = best_of(self.state)
        number = self.results[-1].iteration if which == "last" else which
        if number not in range(len(self.results)):
            raise UserError(f"iteration {number}: the run has {len(self.results)}, counted from 0")
        return self.results[int(number)]

    def write_card(self, result: IterationResult) -> Path:
        """Write an iteration's model card anew, with the scores that are there by now; returns its folder."""
        return write_card(result, self.run, self.source)

    def save_model(self, output_dir: str | Path, which: int | Literal["last", "best"] = "last") -> None:
        """Copy an iteration's policy, with tokenizer and card, to a folder. Raises UserError."""
        result = self.result_of(which)
        check_stage(result.model_path)
        for folder in (result.model_path, self.write_card(result)):
            copytree(folder, output_dir, dirs_exist_ok=True)

    def push_to_hub(
        self,
        repo_id: str,
        which: int | Literal["last", "best"] = "last",
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        benchmarks: Mapping[str, tuple[str, str]] | None = None,
    ) -> str:
        """Upload an iteration's policy with its card; returns the repository's address.

        token: without, args.hub_token or the one that is logged in. benchmarks: evaluated benchmarks that the hub has
        leaderboards of, see tspin.cards.write_eval_results. Raises UserError, for a checkpoint that is no longer what
        was written too: it is set aside, and nothing uploaded.
        """
        result = self.result_of(which)
        try:
            check_stage(result.model_path)
        except DamagedStage as error:
            raise UserError(f"{error}, and is set aside: train() makes it again, upload it then") from error
        self.write_card(result)
        write_eval_results(result, benchmarks or {})
        message = commit_message or f"{self.args.method}, iteration {result.iteration}"
        return push(result, repo_id, token or self.args.hub_token, private, message)

    def response_path(self, role: str, number: int = 0) -> Path:
        """Where y0 (PROTO) or an iteration's y′ (SYNTHETIC) is kept, as read_responses reads it.

        All methods start from the same policy: y0 and the first y′ are sampled once for all of them that draw alike.
        """
        if number > 0:
            return self.folder / f"iteration-{number}" / f"{role}.parquet"
        return self.shared / self._names.get(role, FIRST_RESPONSES[role])

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
        begun(self.folder, self.args.best_iteration)
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
        if self.source.can_generate():
            say_sampling(self.source.generation_config)
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
        if role == SYNTHETIC and number == 0 and (generated := self.examples.generated):
            brought = {"data": self.examples.prompts_fingerprint, "generated": fingerprint_of(r.ids for r in generated)}
            with owned(self.shared, wait=True):
                return run_stage(self._shared_path(role, brought), brought, partial(take_generated, self.run))
        seed = stage_seed(self.args.seed, role, None if role == PROTO else number)
        prompts = self.examples.prompts_fingerprint
        inputs = {**self.run.decoding, "policy": policy.fingerprint, "data": prompts, "seed": seed}
        whose = f"iteration {number}'s policy" if number else "the initial policy"
        produce = partial(sample, self.run, policy, self.examples, seed, of=f"{role} responses of {whose}")
        folder = self.folder / f"iteration-{number}" if number else self.shared
        with owned(folder, wait=True):  # runs of other methods may be at the same responses
            path = self.response_path(role, number) if number else self._shared_path(role, inputs)
            return run_stage(path, inputs, produce)

    def _shared_path(self, role: str, inputs: Any) -> Path:
        """Where this run keeps y0 or the first y′: under a name of its own where another run has drawn otherwise there.

        The run's folder says so then, for who reads it: what a run has drawn stays, whatever others draw beside it.
        """
        usual = self.shared / FIRST_RESPONSES[role]
        own = usual.with_stem(f"{usual.stem}-{fingerprint(inputs)[:12]}")
        if not (own.exists() or made_otherwise(usual, inputs)):
            return usual
        self._names[role] = own.name
        write_json(self.folder / RESPONSE_NAMES, self._names)
        return own

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
        # What of it is known already is no input: policies and responses decide the numbers.
        inputs = {**iteration.inputs, "roles": sorted(iteration.trained_roles)}
        return run_stage(iteration.folder / "reference.parquet", inputs, partial(score_reference, iteration))

    def _train(self, iteration: Iteration, reference: Stage | None) -> Stage:
        scores = reference.output if reference else None
        inputs = {**iteration.inputs, "reference": sha256(scores) if scores else None}
        unfinished = Unfinished(iteration.folder / "unfinished", inputs)
        tracked = Tracked(self.folder, run_id(self.folder), iteration.earlier.steps)
        produce = partial(
            train,
            iteration,
            scores,
            log_folder=iteration.folder,
            callbacks=self.callbacks,
            unfinished=unfinished,
            tracked=tracked,
        )
        beside = ["steps.parquet", FIRST_STEP]
        if self.args.lora:
            beside += [f"{ADAPTER}/{name}" for name in (WEIGHTS, CONFIG)]
        with stopping_when_asked():  # a signal that comes while the checkpoint is written is heeded after that
            # Of checkpoints most are not read again: whoever loads one checks it.
            trained = run_stage(iteration.folder / "model", inputs, produce, beside=beside, check=False)
        self.run.engine.release()
        unfinished.forget()
        return trained

    def _trained_policy(self, iteration: Iteration, trained: Stage) -> Policy:
        """π_θt+1."""
        adapter = None
        if lora := self.args.lora:
            folder, base = str(iteration.folder / ADAPTER), iteration.initial.folder
            adapter = Adapter(folder, base, lora.quantize, lora.merged_dtype)
        return Policy(str(trained.output), trained.fingerprint, adapter)

    def _diagnose(self, iteration: Iteration, reference: Stage | None, trained: Stage, policy: Policy) -> list[Stage]:
        """The diagnostics, where they are wanted, and the measures of degeneration. policy: the trained one."""
        scores = reference.output if reference else None
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

    def _score_held_out(self, iteration: Iteration, policy: Policy) -> Stage | None:
        if self.held_out is None:
            return None
        inputs = {**self.run.inputs, "policy": policy.fingerprint, "held out": self.held_out.fingerprint}
        produce = partial(score_held_out, self.run, policy, self.held_out)
        return run_stage(iteration.folder / "held_out.json", inputs, produce)


def _alike(model: str, tokenizer: PreTrainedTokenizerBase, loading: dict[str, Any]) -> str:
    """The folder of a model whose responses are tokens of this tokenizer's too. Raises UserError where they are not."""
    folder = resolve(model)
    if tokenizer_fingerprint(load_tokenizer(folder, loading)) != tokenizer_fingerprint(tokenizer):
        raise UserError(f"proto_model: {model} has another tokenizer than the model: its y0 would be other texts")
    return folder


def _left(reference: Stage | None, diagnosed: Sequence[Stage], steps: int) -> Earlier:
    """What an iteration leaves to the next: its reference's log-probabilities, and its diagnostics if there are any.

    steps: of all iterations until then.
    """
    *diagnostics, _ = diagnosed
    return Earlier(reference.output if reference else None, diagnostics[0].output if diagnostics else None, steps)


def _result(
    number: int,
    synthetic: Stage | None,
    reference: Stage | None,
    trained: Stage,
    diagnosed: Sequence[Stage],
    held_out: Stage | None,
    adapter: Adapter | None,
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
        held_out.facts if held_out else {},
        trained.provenance,
        adapter,
    )

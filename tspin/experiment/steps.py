"""An iteration's steps one by one, on files: what `tspin sample`, `train`, `diagnose`, `tokens` and `evaluate` do."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tspin import iteration as steps
from tspin.config import RunSettings, build_config
from tspin.data.encoding import encode_dataset
from tspin.data.responses import Responses, read_responses
from tspin.data.turns import writes_date
from tspin.devices import device
from tspin.engines.adapters import check_lora, check_targets
from tspin.engines.engine import Engine
from tspin.errors import UserError
from tspin.evaluation.harness import evaluate
from tspin.evaluation.suites import check_chat_template, load_suite, tabulated
from tspin.experiment.preset import load_dataset, model_source, training_arguments
from tspin.fits import check_engine, check_rows, check_tokens, check_training
from tspin.iteration import Iteration, Run
from tspin.models import Policy, load_model, load_shape, load_tokenizer, policy_fingerprint, resolve
from tspin.runs.dates import date_of_run
from tspin.runs.files import atomic_path, write_text
from tspin.runs.locks import owned
from tspin.runs.signals import stopping_when_asked
from tspin.runs.unfinished import Unfinished
from tspin.schema import PROTO, SYNTHETIC


@dataclass(frozen=True)
class Step:
    """What a command is given: a policy, data, settings, and files of responses.

    number: the iteration, from 0. synthetic, proto: y′ and y0, as `tspin sample` writes them.
    history: y′ of earlier iterations, to train on too. before: π_θt, where `model` is what was trained from it.
    reference: π_θ0.
    """

    model: str
    dataset: str
    out: Path
    method: str = "tspin"
    number: int = 0
    seed: int = 0
    overrides: Sequence[str] = ()
    synthetic: Path | None = None
    proto: Path | None = None
    history: Sequence[Path] = ()
    before: str | None = None
    reference: str | None = None

    @cached_property
    def settings(self) -> RunSettings:
        """The method's settings. Raises UserError for unknown methods and settings."""
        tree = {"model": {"path": self.model}, "data": {"path": self.dataset}}
        return build_config(tree, self.overrides).for_method(self.method)

    @cached_property
    def policy(self) -> Policy:
        """`model` as a policy. Raises UserError where there is none."""
        return _policy(model_source(self.settings.model)[0])

    @cached_property
    def run(self) -> Run:
        """The settings, the encoded data and the engine. Raises UserError."""
        args = training_arguments(self.settings, Path("runs"), self.seed)
        check_lora(args)
        folder, loading = model_source(self.settings.model)
        tokenizer = load_tokenizer(folder, loading)
        if args.date is None and writes_date(tokenizer):
            args.date = date_of_run(self.out.parent)
        examples = encode_dataset(load_dataset(self.settings.data), tokenizer, args)
        return Run(args, examples, Engine(args, tokenizer, loading))

    def iteration(self) -> Iteration:
        """The iteration that the files belong to. Raises UserError for responses that fit other prompts or tokens."""
        policy = _policy(resolve(self.before)) if self.before else self.policy
        initial = _policy(resolve(self.reference)) if self.reference else policy
        responses = {role: path for role, path in ((SYNTHETIC, self.synthetic), (PROTO, self.proto)) if path}
        iteration = Iteration(self.run, self.number, policy, initial, self.out.parent, responses, self.history)
        given = {path: iteration.sampled[role] for role, path in responses.items()}
        given |= {path: read_responses(path) for path in self.history}
        if self.run.method.reference == "initial" and self.number > 0 and self.reference is None:
            raise UserError(f"--reference: {self.method} at iteration {self.number} needs the initial policy")
        for path, drawn in given.items():
            _check_responses(path, drawn, self._known_tokens, self.run.examples.prompt_ids)
        self.check_rows(iteration.sampled)
        return iteration

    @property
    def _known_tokens(self) -> int:
        """Of the tokenizer, or of the model's embedding, where that has rows past them, which are drawn at times."""
        shape = load_shape(self.policy.folder, self.run.engine.loading)
        return max(len(self.run.engine.tokenizer), len(next(shape.get_input_embeddings().parameters())))

    def check_rows(self, responses: Mapping[str, Responses], new_tokens: int = 0) -> None:
        """See tspin.fits.check_rows."""
        engine = self.run.engine
        check_rows(self.policy.folder, engine.loading, engine.tokenizer, self.run.examples, responses, new_tokens)


def sample_to_file(step: Step) -> dict[str, float]:
    """Sample one response per prompt into a Parquet file; returns response_statistics."""
    step.check_rows({}, new_tokens=step.run.args.max_new_tokens)
    check_engine(step.policy.folder, step.run.engine.loading, step.run.args, step.run.examples)
    with _new_file(step.out) as target:
        return steps.sample(step.run, step.policy, step.run.examples, step.seed, target)


def train_from_files(step: Step) -> dict[str, Any]:
    """Train one iteration into the folder `out`; returns tspin.engines.here.train's facts.

    The folder is a checkpoint with its step log (steps.parquet) beside the weights. A training that SIGTERM or Ctrl-C
    stopped left its state beside it, under a hidden name, and goes on from there. Raises UserError when a file of
    responses that the method needs is missing, and when another command is at work on `out`.
    """
    if step.out.exists():
        raise UserError(f"{step.out} exists: choose a new folder for the checkpoint, nothing is written over")
    method, iteration = step.run.method, step.iteration()
    args, loading = step.run.args, step.run.engine.loading
    check_training(step.policy.folder, loading, args, len(step.run.examples))
    if args.lora:
        check_targets(step.policy.folder, loading, args.lora)
    for role in method.gradient_roles(iteration.coefficients):
        if role in (SYNTHETIC, PROTO) and role not in iteration.responses:
            raise UserError(
                f"--{role}: {step.method} at iteration {step.number} needs these responses; make them by `tspin sample`"
            )
    unfinished = Unfinished(step.out.with_name(f".{step.out.name}.unfinished"), iteration.inputs)
    with owned(unfinished.folder), tempfile.TemporaryDirectory(prefix="tspin-reference-") as folder:
        try:
            if step.out.exists():
                raise UserError(f"{step.out} exists: another command has made it meanwhile; nothing is written over")
            reference = Path(folder) / "reference.parquet" if method.uses_reference else None
            if reference:
                steps.score_reference(iteration, reference)
            # A signal that comes while the checkpoint is written is heeded after that.
            with stopping_when_asked(), atomic_path(step.out) as target:
                return steps.train(iteration, reference, target, log_folder=target, unfinished=unfinished)
        finally:
            if step.out.exists() or not unfinished.steps():
                unfinished.forget()


def diagnose_to_file(step: Step) -> dict[str, float]:
    """Rewards and log-likelihoods of the labelled and the given responses, as a Parquet file; returns the summary."""
    iteration = step.iteration()
    with _new_file(step.out) as target:
        return steps.diagnose(iteration, None, step.policy, target)


def tokens_to_file(step: Step) -> int:
    """log π of every token of the labelled and the given responses, before and after training; returns the prompts.

    Of as many prompts as settings say (token_prompts), evenly spread. Raises UserError for none.
    """
    iteration = step.iteration()
    count = len(step.run.engine.looked_at(len(step.run.examples)))
    if not count:
        raise UserError("token_prompts=0: of no prompt are tokens asked for; write --token-prompts 1, or more")
    with _new_file(step.out) as target:
        steps.score_tokens(iteration, step.policy, target)
    return count


def evaluate_to_file(
    model: str, suite_name: str, out: Path | None, batch_size: int, limit: int | None, dtype: str = "float32"
) -> pd.DataFrame:
    """Scores of `model` on a suite, all metrics into `out`; returns the columns of the suite's table.

    dtype: of the weights, "float32" or "bfloat16".
    """
    suite = load_suite(suite_name)
    if out is not None and out.is_dir():
        raise UserError(f"{out} is a folder: --out is the CSV file to write")
    folder = resolve(model)
    tokenizer = load_tokenizer(folder)
    check_chat_template(suite, tokenizer)
    policy = load_model(folder, {"dtype": getattr(torch, dtype)})
    check_tokens(policy, tokenizer, {})
    policy.to(device())  # type: ignore[arg-type]
    evaluation = evaluate(policy, tokenizer, suite, batch_size=batch_size, limit=limit)
    if out is not None:
        write_text(out, evaluation.scores.to_csv(index=False))
    return tabulated(evaluation.scores, suite)


def _policy(folder: str) -> Policy:
    return Policy(folder, policy_fingerprint(folder))


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    """atomic_path of a file that a command writes. Raises UserError where a folder has its name."""
    if out.is_dir():
        raise UserError(f"{out} is a folder: --out is the Parquet file to write")
    with atomic_path(out) as target:
        yield target


def _check_responses(path: Path, responses: Responses, known: int, prompt_ids: np.ndarray) -> None:
    """Raise UserError where a file lacks a response to one of the prompts, or has tokens from `known` on."""
    for prompt_id, response in zip(responses, responses.of(responses.prompt_ids), strict=True):
        if max(response.ids) >= known:
            raise UserError(
                f"{path}: token {max(response.ids)} in the response to data row {prompt_id + 1} is not in this model's "
                f"vocabulary of {known}: sample the responses with a model of the same tokenizer"
            )
    missing = np.setdiff1d(prompt_ids, responses.prompt_ids)
    if len(missing):
        raise UserError(f"{path}: no response to data row {missing[0] + 1}; sample it with the same --data")

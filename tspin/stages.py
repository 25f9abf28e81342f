"""The steps of an iteration one by one, on files: what `tspin sample`, `train` and `evaluate` do."""

from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tspin.config import build_config, unknown
from tspin.data.encoding import Examples, encode_dataset
from tspin.data.responses import Responses, read_responses, response_statistics, write_responses
from tspin.diagnostics import diagnose, summary
from tspin.engines.here import Unfinished, response_logps, train_iteration
from tspin.engines.policies import sample_policy
from tspin.errors import UserError
from tspin.evaluation.suites import evaluate, load_suite, tabulated
from tspin.experiment.preset import load_dataset, model_source, training_arguments
from tspin.models import load_model, load_tokenizer, policy_fingerprint, resolve
from tspin.objectives import METHODS, PROTO, SYNTHETIC
from tspin.runs.locks import owned
from tspin.runs.stages import atomic_path, sha256, write_text
from tspin.selfplay_config import SelfPlayConfig
from tspin.triplets import make_triplets, reference_table, with_reference


def sample_to_file(model: str, dataset: str, out: Path, seed: int, overrides: Sequence[str]) -> dict[str, float]:
    """Sample one response a prompt from `model` into a Parquet file; returns response_statistics."""
    if out.is_dir():
        raise UserError(f"{out} is a folder: --out is the Parquet file to write")
    args, tokenizer, examples, _, (folder, model_arguments) = _prepare(model, dataset, "tspin", seed, overrides)
    responses = sample_policy(folder, model_arguments, tokenizer, examples.prompts, args, seed=seed)
    with atomic_path(out) as temporary:
        write_responses(temporary, examples.prompt_ids.tolist(), responses)
    return response_statistics(responses, examples.labelled)


def train_from_files(
    model: str,
    dataset: str,
    out: Path,
    method: str,
    iteration: int,
    synthetic: Path | None,
    proto: Path | None,
    reference: str | None,
    seed: int,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Train one iteration of `method` from `model` into the folder `out`; returns train_iteration's facts.

    reference: the policy in the loss of methods that have one; `model` itself when None.
    The folder is a checkpoint with its step log (steps.parquet) beside the weights. A training that SIGTERM or Ctrl-C
    stopped left its state beside it, under a hidden name, and goes on from there. Raises UserError when a file of
    responses that the method needs is missing or fits other prompts, and when another command is at work on `out`.
    """
    if method not in METHODS:
        raise UserError(unknown("method", method, METHODS))
    if METHODS[method].reference == "initial" and iteration > 0 and reference is None:
        raise UserError(f"--reference: {method} at iteration {iteration} needs the initial policy")
    if out.exists():
        raise UserError(f"{out} exists: choose a new folder for the checkpoint, nothing is written over")
    args, tokenizer, examples, load, (folder, model_arguments) = _prepare(model, dataset, method, seed, overrides)
    responses: dict[str, Responses] = {}
    for role, path in ((SYNTHETIC, synthetic), (PROTO, proto)):
        if path is not None:
            responses[role] = _responses_for(examples, path, tokenizer)
        elif role in METHODS[method].gradient_roles(METHODS[method].coefficients_at(iteration, args.coefficients)):
            raise UserError(
                f"--{role}: {method} at iteration {iteration} needs these responses; make them by `tspin sample`"
            )
    triplets = make_triplets(examples, responses)
    policy = load(None)
    if METHODS[method].uses_reference:
        source = load(reference) if reference else policy
        logps = response_logps(source, triplets, tokenizer, args, "the reference")
        del source  # its memory is for the training
        triplets = with_reference(triplets, reference_table(triplets, logps))
    inputs = {
        "policy": policy_fingerprint(folder),
        "loading": {name: str(value) for name, value in model_arguments.items()},
        "data": examples.fingerprint,
        "settings": args.computed(),
        "iteration": iteration,
        "reference": policy_fingerprint(resolve(reference)) if reference else None,
        "responses": {role: sha256(path) for role, path in ((SYNTHETIC, synthetic), (PROTO, proto)) if path},
    }
    state = Unfinished(out.with_name(f".{out.name}.unfinished"), inputs)
    with owned(state.folder):
        try:
            if out.exists():
                raise UserError(f"{out} exists: another command has made it meanwhile; nothing is written over")
            with atomic_path(out) as temporary:
                return train_iteration(
                    policy,
                    triplets,
                    tokenizer,
                    args,
                    iteration,
                    checkpoint=temporary,
                    log_folder=temporary,
                    unfinished=state,
                )
        finally:
            if out.exists() or not state.steps():
                rmtree(state.folder, ignore_errors=True)


def diagnose_to_file(
    model: str,
    dataset: str,
    out: Path,
    method: str,
    iteration: int,
    before: str | None,
    reference: str | None,
    synthetic: Path | None,
    proto: Path | None,
    seed: int,
    overrides: Sequence[str],
) -> dict[str, float]:
    """Rewards and log-likelihoods of `dataset`'s labelled and the given responses, a Parquet file (tspin.diagnostics).

    model: the policy after training. before: the one it was trained from, π_θt; `model` itself when None.
    reference: π_θ0, for methods whose reference it is; `before` when None. Returns diagnostics.summary.
    """
    if method not in METHODS:
        raise UserError(unknown("method", method, METHODS))
    if out.is_dir():
        raise UserError(f"{out} is a folder: --out is the Parquet file to write")
    args, tokenizer, examples, load, _ = _prepare(model, dataset, method, seed, overrides)
    given = {SYNTHETIC: synthetic, PROTO: proto}
    triplets = make_triplets(
        examples, {role: _responses_for(examples, path, tokenizer) for role, path in given.items() if path}
    )

    def logps(path: str | None) -> dict[str, list[float]]:
        return response_logps(load(path), triplets, tokenizer, args, path or model)

    after = logps(None)
    table = diagnose(
        METHODS[method],
        METHODS[method].coefficients_at(iteration, args.coefficients),
        triplets,
        trained=lambda: after,
        before=lambda: logps(before) if before else after,
        initial=(lambda: logps(reference)) if reference else None,
    )
    with atomic_path(out) as temporary:
        table.to_parquet(temporary, index=False)
    return summary(table)


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
    tokenizer, policy = load_tokenizer(folder), load_model(folder, {"dtype": getattr(torch, dtype)})
    if torch.cuda.is_available():
        policy.to("cuda")  # type: ignore[arg-type]
    evaluation = evaluate(policy, tokenizer, suite, batch_size=batch_size, limit=limit)
    if out is not None:
        write_text(out, evaluation.scores.to_csv(index=False))
    return tabulated(evaluation.scores, suite)


def _prepare(
    model: str, dataset: str, method: str, seed: int, overrides: Sequence[str]
) -> tuple[
    SelfPlayConfig,
    PreTrainedTokenizerBase,
    Examples,
    Callable[[str | None], PreTrainedModel],
    tuple[str, dict[str, Any]],
]:
    tree = {"model": {"path": model}, "data": {"path": dataset}}
    config = build_config(tree, overrides)
    settings = config.for_method(method)
    args = training_arguments(settings, Path("runs"), seed)
    folder, model_arguments = model_source(settings.model)
    tokenizer = load_tokenizer(folder, model_arguments)
    examples = encode_dataset(load_dataset(settings.data), tokenizer, args)
    return (
        args,
        tokenizer,
        examples,
        lambda other: load_model(folder if other is None else resolve(other), model_arguments),
        (folder, model_arguments),
    )


def _responses_for(examples: Examples, path: Path, tokenizer: PreTrainedTokenizerBase) -> Responses:
    responses = read_responses(path)
    for prompt_id, response in zip(responses, responses.of(responses.prompt_ids), strict=True):
        if max(response.ids) >= len(tokenizer):
            raise UserError(
                f"{path}: token {max(response.ids)} in the response to data row {prompt_id + 1} is not in this model's "
                f"vocabulary of {len(tokenizer)}: sample the responses with a model of the same tokenizer"
            )
    missing = np.setdiff1d(examples.prompt_ids, responses.prompt_ids)
    if len(missing):
        raise UserError(f"{path}: no response to data row {missing[0] + 1}; sample it with the same --data")
    return responses

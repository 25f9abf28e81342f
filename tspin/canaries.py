"""Canaries: numbers of an iteration that are known beforehand, compared with what came out.

first loss           the first step's loss is that of the stored log-probabilities: ln 2 for SPIN and DPO, whose policy
                     is its own reference then
first reward         at that step, rewards that are relative to a reference which the policy still equals are 0
sampler              log π(y′) as the sampler computed it, against the trainer's, nats per token; of a sample, where
                     the trainer need not compute the others
ended                the share of y′ that end
changed              the share of weights that training changed

Each has a bound, and is off where a layout, a data type, a template or a schedule is not what it should be. None stops
a run; what is past its bound is told in one line and kept in guards.json.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch

from tspin.data.responses import Response
from tspin.objectives import Coefficients, Method, SequenceLogps
from tspin.schema import SYNTHETIC

# Two passes over the same tokens differ by rounding alone: in float32 far below these, in bfloat16 well below.
ROUNDING = {"float32": 1e-3, "bfloat16": 5e-2}
ENDED = 0.5  # less than half have an end that could be learned
CHANGED = 0.5  # less than half of the weights took part


@dataclass(frozen=True)
class Canary:
    """A number, what it should be, and how far from that it may be: absolute, or the least that it may be."""

    value: float
    expected: float | None = None
    bound: float = 0.0
    least: float | None = None

    @property
    def sound(self) -> bool:
        """Whether the value is within its bound; what is no number never is."""
        if self.expected is not None:
            return abs(self.value - self.expected) <= self.bound
        return self.least is None or self.value >= self.least


def first_step(
    method: Method,
    coefficients: Coefficients,
    first: Mapping[str, Any],
    logps: pd.DataFrame | None,
    dtype: str,
    policy_is_reference: bool,
) -> dict[str, Canary]:
    """Of the first step: "first loss" and, for methods with a reference that the policy still equals, "first reward".

    first: what the trainer saw, {"loss", "prompt_ids", "reward/<role>" …}. logps: log-probabilities before the training
    (tspin.schema.DIAGNOSTICS) of these prompts at least; None where they are not known.
    dtype: "float32" or "bfloat16", of the arithmetic.
    """
    canaries = {}
    if logps is not None:
        expected = expected_loss(method, coefficients, logps, first["prompt_ids"])
        bound = ROUNDING[dtype] * max(abs(expected), 1.0)
        canaries["first loss"] = Canary(first["loss"], expected, bound)
    rewards = [abs(value) for name, value in first.items() if name.startswith("reward/")]
    if rewards and policy_is_reference:
        canaries["first reward"] = Canary(max(rewards), 0.0, ROUNDING[dtype])
    return canaries


def expected_loss(method: Method, coefficients: Coefficients, logps: pd.DataFrame, prompt_ids: Sequence[int]) -> float:
    """The mean loss over these prompts by the log-probabilities before training, in nats."""
    of_role = {
        role: logps[logps["role"] == role].set_index("prompt_id").loc[list(prompt_ids)]
        for role in map(str, logps["role"].unique())
    }

    def tensors(column: str) -> dict[str, torch.Tensor]:
        return {role: torch.tensor(rows[column].to_numpy(dtype=float)) for role, rows in of_role.items()}

    reference = tensors("reference") if method.uses_reference else {}
    known = SequenceLogps(tensors("before"), reference, tensors("tokens"))
    return float(method.loss(known, coefficients).mean())


def sampler(synthetic: Iterable[tuple[int, Response]], logps: pd.DataFrame, dtype: str) -> dict[str, Canary]:
    """The mean distance per token between the sampler's log π(y′), of responses that it watched, and the trainer's.

    synthetic: prompt_ids and responses. dtype: the coarser one of both arithmetics.
    """
    rows = logps[logps["role"] == SYNTHETIC].set_index("prompt_id")["before"]
    gaps = [
        abs(response.logp - float(rows[number])) / len(response.ids)
        for number, response in synthetic
        if response.logp is not None and number in rows
    ]
    return {"sampler": Canary(sum(gaps) / len(gaps), 0.0, ROUNDING[dtype])} if gaps else {}


def told(canaries: Mapping[str, Canary]) -> dict[str, str]:
    """Name → one line, of the canaries past their bounds; y′ that do not end are told as degeneration."""
    says = {
        "first loss": "the first step's loss is {value:.4g}, the stored log-probabilities give {expected:.4g}",
        "first reward": "rewards are {value:.3g} at the first step, where policy and reference are the same",
        "sampler": "log π(y′) by the sampler and by the trainer differ by {value:.3g} nats per token",
        "changed": "training changed {value:.1%} of the weights: the rate is too small for their data type; raise "
        "learning_rate, or train float32 weights (model.dtype=float32; bf16=true multiplies them in bfloat16)",
    }
    if "changed" in canaries and canaries["changed"].value == 0:
        says["changed"] = (
            "training changed no weight at all, and the checkpoint is what it started from: raise learning_rate, or "
            "train float32 weights (model.dtype=float32)"
        )
    past = {name: canary for name, canary in canaries.items() if not canary.sound and name != "ended"}
    return {name: says[name].format(**asdict(canary)) for name, canary in past.items()}


def plain(canaries: Mapping[str, Canary]) -> dict[str, dict[str, Any]]:
    """As JSON values."""
    kept = {name: {**asdict(canary), "sound": canary.sound} for name, canary in canaries.items()}
    return {
        name: {k: v if v is None or math.isfinite(v) else str(v) for k, v in of.items()} for name, of in kept.items()
    }

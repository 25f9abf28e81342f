"""Objectives of self-play fine-tuning: pure functions of sequence log-probabilities.

Notation (paper: arXiv 2601.08198): prompt x; labelled response y; synthetic response y′, sampled
from the previous iteration's policy π_θt; proto-synthetic response y0, sampled once from the
initial policy π_θ0. log π(z|x) is the *sum* over the response's tokens, the end token included.

A method is one entry in METHODS: an objective, the reward it defines and what it needs. Adding one
is adding an entry; nothing else in the package asks which method it is running.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tspin.schema import LABELLED, PROTO, ROLES, SYNTHETIC

# ℓ: monotone decreasing and convex. Logistic is the paper's default.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda u: -logsigmoid(u),
    "exponential": lambda u: torch.exp(-u),
}


@dataclass(frozen=True)
class Coefficients:
    """What the objectives are parametrised by.

    alpha: scale of the rewards of the T-SPIN family (paper: 1.0).
    beta: weight of the historical advantage (paper: 0.1); 0 at iteration 0, where y′ and y0 come
        from the same policy.
    lam: SPIN's λ (0.1 in its paper and code).
    loss: name of ℓ in LOSSES.
    length_scale, margin: SimPO's reward scale b and target margin γ (2 and 1, its paper's first setting).
    noise_ratio: SPACE's μ, how many synthetic responses there are to a labelled one (1: as many).
    """

    alpha: float = 1.0
    beta: float = 0.1
    lam: float = 0.1
    loss: str = "logistic"
    length_scale: float = 2.0
    margin: float = 1.0
    noise_ratio: float = 1.0


@dataclass(frozen=True)
class SequenceLogps:
    """Sequence log-probabilities of one batch, role → float32 tensor of shape (batch,), in nats.

    policy: log π_θ, carrying gradient. reference: log π_θt, constants; empty without a reference.
    lengths: response tokens, end token included, role → int64 (batch,).
    """

    policy: Mapping[str, Tensor]
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    lengths: Mapping[str, Tensor] = field(default_factory=dict)

    def log_ratio(self, role: str) -> Tensor:
        """log(π_θ / π_θt) of one role's responses, shape (batch,)."""
        return self.policy[role] - self.reference[role]


def sft_loss(labelled_logps: Tensor, labelled_lengths: Tensor) -> Tensor:
    """Supervised fine-tuning: −log π_θ(y|x) per token of y.

    Every example weighs the same whatever its length, so that the result does not depend on how a
    batch is split into micro-batches of equal size. All tensors have shape (batch,).
    """
    return -labelled_logps / labelled_lengths


def spin_loss(
    labelled_logps: Tensor,
    synthetic_logps: Tensor,
    reference_labelled_logps: Tensor,
    reference_synthetic_logps: Tensor,
    *,
    lam: float,
    loss: str = "logistic",
) -> Tensor:
    """SPIN (arXiv 2401.01335, eq. 4.7): ℓ(λ log π_θ(y)/π_θt(y) − λ log π_θ(y′)/π_θt(y′)).

    With the logistic ℓ this is DPO's sigmoid loss at beta = lam, y chosen and y′ rejected.
    All tensors, and the result, have shape (batch,).
    """
    labelled_ratio = labelled_logps - reference_labelled_logps
    synthetic_ratio = synthetic_logps - reference_synthetic_logps
    return LOSSES[loss](lam * (labelled_ratio - synthetic_ratio))


def tspin_loss(
    labelled_logps: Tensor,
    synthetic_logps: Tensor,
    proto_logps: Tensor | None,
    *,
    alpha: float,
    beta: float,
    loss: str = "logistic",
) -> Tensor:
    """T-SPIN: ℓ(α log π_θ(y) − α log π_θ(y′)) + β ℓ(α log π_θ(y′) − α log π_θ(y0)).

    The first term is the current advantage, the second the historical advantage; y0 carries
    gradient like the others. All tensors, and the result, have shape (batch,). proto_logps may be
    None only where beta = 0. Raises ValueError otherwise.

    With u and v the two log-probability gaps, the gradient is α(ℓ′(αu)∇u + β ℓ′(αv)∇v)
    (Theorem 1), where ℓ′(u) = −σ(−u) for the logistic ℓ; the paper's appendix prints −σ(u).
    """
    current = LOSSES[loss](alpha * (labelled_logps - synthetic_logps))
    if beta == 0:
        return current
    if proto_logps is None:
        raise ValueError("beta is not 0, so the historical advantage needs proto_logps")
    return current + beta * LOSSES[loss](alpha * (synthetic_logps - proto_logps))


def simpo_loss(
    labelled_logps: Tensor, synthetic_logps: Tensor, labelled_lengths: Tensor, synthetic_lengths: Tensor,
    *, length_scale: float, margin: float,
) -> Tensor:  # fmt: skip
    """SimPO (arXiv 2405.14734): −log σ(b log π_θ(y)/|y| − b log π_θ(y′)/|y′| − γ), y chosen and y′ rejected.

    length_scale is b, margin is γ. All tensors, and the result, have shape (batch,).
    """
    labelled, synthetic = labelled_logps / labelled_lengths, synthetic_logps / synthetic_lengths
    return -logsigmoid(length_scale * (labelled - synthetic) - margin)


def space_loss(labelled_ratio: Tensor, synthetic_ratio: Tensor, *, noise_ratio: float) -> Tensor:
    """SPACE (arXiv 2512.07175): −log σ_μ(r(y)) − μ log(1 − σ_μ(r(y′))), r = log(π_θ/π_θt).

    σ_μ(u) = 1 / (1 + μ e^{−u}) = σ(u − log μ), with μ = noise_ratio. The two terms are its noise-contrastive
    estimation as we read it. All tensors, and the result, have shape (batch,).
    """
    shift = math.log(noise_ratio)
    return -logsigmoid(labelled_ratio - shift) - noise_ratio * logsigmoid(shift - synthetic_ratio)


@dataclass(frozen=True)
class Method:
    """A training method.

    loss: (logps, coefficients) → per-example loss, shape (batch,).
    reward: (logps, coefficients, role) → the reward r(z) by the method's own definition, (batch,);
        None where the method defines none.
    trains_on: the roles whose responses can carry gradient.
    reference: whose log-probabilities of `trains_on` it needs, computed once per iteration: those of the
        "previous" policy π_θt, of the "initial" one π_θ0, or None.
    historical: whether β is used at all. One place decides: `coefficients_at`.
    """

    name: str
    loss: Callable[[SequenceLogps, Coefficients], Tensor]
    reward: Callable[[SequenceLogps, Coefficients, str], Tensor] | None
    trains_on: tuple[str, ...]
    reference: Literal["previous", "initial"] | None = None
    historical: bool = False

    @property
    def uses_reference(self) -> bool:
        """Whether the loss contains a reference policy."""
        return self.reference is not None

    @property
    def self_play(self) -> bool:
        """Whether the method needs responses sampled from a policy."""
        return SYNTHETIC in self.trains_on

    def coefficients_at(self, iteration: int, coefficients: Coefficients) -> Coefficients:
        """The coefficients in force at an iteration (0-based): β is 0 at iteration 0."""
        beta = coefficients.beta if self.historical and iteration > 0 else 0.0
        return replace(coefficients, beta=beta)

    def gradient_roles(self, coefficients: Coefficients) -> tuple[str, ...]:
        """The roles that carry gradient under these coefficients: y0 only where β is not 0."""
        return tuple(role for role in self.trains_on if role != PROTO or coefficients.beta != 0)


def _sft(logps: SequenceLogps, _: Coefficients) -> Tensor:
    return sft_loss(logps.policy[LABELLED], logps.lengths[LABELLED])


def _spin(logps: SequenceLogps, c: Coefficients) -> Tensor:
    return spin_loss(
        logps.policy[LABELLED],
        logps.policy[SYNTHETIC],
        logps.reference[LABELLED],
        logps.reference[SYNTHETIC],
        lam=c.lam,
        loss=c.loss,
    )


def _tspin(logps: SequenceLogps, c: Coefficients) -> Tensor:
    labelled, synthetic = logps.policy[LABELLED], logps.policy[SYNTHETIC]
    return tspin_loss(labelled, synthetic, logps.policy.get(PROTO), alpha=c.alpha, beta=c.beta, loss=c.loss)


def _tspin_reference(logps: SequenceLogps, c: Coefficients) -> Tensor:
    ratios = {role: logps.log_ratio(role) for role in logps.policy if role in logps.reference}
    return _tspin(SequenceLogps(ratios), c)


def _simpo(logps: SequenceLogps, c: Coefficients) -> Tensor:
    return simpo_loss(
        logps.policy[LABELLED], logps.policy[SYNTHETIC], logps.lengths[LABELLED], logps.lengths[SYNTHETIC],
        length_scale=c.length_scale, margin=c.margin,
    )  # fmt: skip


def _space(logps: SequenceLogps, c: Coefficients) -> Tensor:
    return space_loss(logps.log_ratio(LABELLED), logps.log_ratio(SYNTHETIC), noise_ratio=c.noise_ratio)


def _log_probability_reward(logps: SequenceLogps, c: Coefficients, role: str) -> Tensor:
    return c.alpha * logps.policy[role]


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sft", _sft, None, trains_on=(LABELLED,)),
        Method(
            "spin",
            _spin,
            lambda logps, c, role: c.lam * logps.log_ratio(role),
            trains_on=(LABELLED, SYNTHETIC),
            reference="previous",
        ),
        Method("tspin", _tspin, _log_probability_reward, trains_on=ROLES, historical=True),
        Method("tspin_no_history", _tspin, _log_probability_reward, trains_on=(LABELLED, SYNTHETIC)),
        Method(
            "tspin_reference",
            _tspin_reference,
            lambda logps, c, role: c.alpha * logps.log_ratio(role),
            trains_on=ROLES,
            reference="previous",
            historical=True,
        ),
        # Neighbours on the same pairs, which the paper does not compare with.
        Method(
            "dpo",
            _spin,
            lambda logps, c, role: c.lam * logps.log_ratio(role),
            trains_on=(LABELLED, SYNTHETIC),
            reference="initial",
        ),
        Method(
            "simpo",
            _simpo,
            lambda logps, c, role: c.length_scale * logps.policy[role] / logps.lengths[role],
            trains_on=(LABELLED, SYNTHETIC),
        ),
        Method(
            "space",
            _space,
            lambda logps, c, role: logps.log_ratio(role),
            trains_on=(LABELLED, SYNTHETIC),
            reference="previous",
        ),
    )
}

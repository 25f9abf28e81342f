"""Objectives of self-play fine-tuning: pure functions of sequence log-probabilities.

Notation (paper: arXiv 2601.08198): prompt x; labelled response y; synthetic response y′, sampled
from the previous iteration's policy π_θt; proto-synthetic response y0, sampled once from the
initial policy π_θ0. log π(z|x) is the *sum* over the response's tokens, the end token included.

A method is one entry in METHODS: an objective, the reward it defines, its coefficients and what it
needs. Adding one is adding an entry; nothing else in the package asks which method it is running.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from sys import float_info
from typing import TYPE_CHECKING, Any, Literal

from tspin.errors import UserError, unknown
from tspin.schema import LABELLED, PROTO, ROLES, SYNTHETIC

if TYPE_CHECKING:
    from torch import Tensor

PAIR = (LABELLED, SYNTHETIC)

# ℓ: monotone decreasing and convex. Logistic is the paper's default.
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda u: -log_sigmoid(u),
    "exponential": lambda u: (-u).exp(),
}
Coefficients = Mapping[str, Any]  # a method's, name → value


@dataclass(frozen=True)
class Coefficient:
    """A number or a choice that an objective is parametrised by.

    name: its key in YAML and `--set`, its field of SelfPlayConfig. source: the default's. allowed: numbers, of which a
    list has one per iteration, the last going on; or choices.
    """

    name: str
    default: float | str
    meaning: str
    source: str
    allowed: Literal["positive", "non-negative"] | tuple[str, ...] = "positive"

    def read(self, value: Any) -> float | str | list[float]:
        """`value` as a float, a list of some, or one of the choices. Raises UserError."""
        if isinstance(self.allowed, tuple):
            if value not in self.allowed:
                raise UserError(f"{self.name}: {unknown('choice', str(value), self.allowed)}")
            return str(value)
        return [self._number(one) for one in value] if isinstance(value, list) and value else self._number(value)

    def _number(self, value: Any) -> float:
        smallest = float_info.min if self.allowed == "positive" else 0.0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and smallest <= value <= float_info.max):
            raise UserError(f"{self.name}: a {self.allowed} number is expected (got {reprlib.repr(value)})")
        return float(value)


ALPHA = Coefficient("alpha", 1.0, "α, the scale of T-SPIN's rewards", "arXiv 2601.08198")
BETA = Coefficient("beta", 0.1, "β, the historical advantage's weight", "arXiv 2601.08198", "non-negative")
LAM = Coefficient("lam", 0.1, "λ of SPIN, DPO's beta", "arXiv 2401.01335 and its code")
LOSS_TYPE = Coefficient("loss_type", "logistic", "ℓ", "arXiv 2601.08198", tuple(LOSSES))


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


def of_iteration(values: Any, iteration: int) -> Any:
    """What holds at an iteration (0-based): of a list its own entry, the last going on; else what there is."""
    return values[min(iteration, len(values) - 1)] if isinstance(values, list) else values


def log_sigmoid(u: Tensor) -> Tensor:
    """log σ(u), of u's shape."""
    from torch.nn.functional import logsigmoid  # here, so that methods are known by name without PyTorch

    return logsigmoid(u)


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
    return -log_sigmoid(length_scale * (labelled - synthetic) - margin)


def space_loss(labelled_ratio: Tensor, synthetic_ratio: Tensor, *, noise_ratio: float) -> Tensor:
    """SPACE (arXiv 2512.07175): −log σ_μ(r(y)) − μ log(1 − σ_μ(r(y′))), r = log(π_θ/π_θt).

    σ_μ(u) = 1 / (1 + μ e^{−u}) = σ(u − log μ), with μ = noise_ratio. The second term is −μ log σ_{1/μ}(−r(y′)), which
    is how a summary of the paper has it. That μ weighs the one y′ of a prompt, where the paper draws more, is our
    reading. All tensors, and the result, have shape (batch,).
    """
    shift = math.log(noise_ratio)
    return -log_sigmoid(labelled_ratio - shift) - noise_ratio * log_sigmoid(shift - synthetic_ratio)


@dataclass(frozen=True)
class Method:
    """A training method.

    formula: the loss as text in this module's notation, for cards and reports; ℓ is loss_type.
    loss: (logps, coefficients) → per-example loss, shape (batch,).
    reward: (logps, coefficients, role) → the reward r(z) by the method's own definition, (batch,);
        None where the method defines none.
    trains_on: the roles whose responses can carry gradient.
    coefficients: what `loss` and `reward` find in their mapping.
    reference: whose log-probabilities of `trains_on` it needs, computed once per iteration: those of the
        "previous" policy π_θt, of the "initial" one π_θ0, or None.
    """

    name: str
    formula: str
    loss: Callable[[SequenceLogps, Coefficients], Tensor]
    reward: Callable[[SequenceLogps, Coefficients, str], Tensor] | None
    trains_on: tuple[str, ...]
    coefficients: tuple[Coefficient, ...] = ()
    reference: Literal["previous", "initial"] | None = None

    @property
    def uses_reference(self) -> bool:
        """Whether the loss contains a reference policy."""
        return self.reference is not None

    @property
    def self_play(self) -> bool:
        """Whether the method needs responses sampled from a policy."""
        return SYNTHETIC in self.trains_on

    def resolve(self, given: Mapping[str, Any]) -> dict[str, float | str | list[float]]:
        """All coefficients of the method: those given, checked, and the defaults of the others. Raises UserError."""
        names = [coefficient.name for coefficient in self.coefficients]
        for name in given:
            if name not in names:
                raise UserError(f"{name}: {unknown(f'coefficient of {self.name}', name, names)}")
        return {c.name: c.read(given.get(c.name, c.default)) for c in self.coefficients}

    def coefficients_at(
        self, iteration: int, coefficients: Coefficients, proto_is_initial: bool = True
    ) -> Coefficients:
        """Those in force at an iteration (0-based): β is 0 at iteration 0, where y′ and y0 are of one policy.

        proto_is_initial: whether y0 is of the initial policy, as in the paper; β acts at once where it is not.
        """
        now = {name: of_iteration(value, iteration) for name, value in coefficients.items()}
        alike = BETA in self.coefficients and iteration == 0 and proto_is_initial
        return {**now, "beta": 0.0} if alike else now

    def gradient_roles(self, coefficients: Coefficients) -> tuple[str, ...]:
        """The roles that carry gradient under these coefficients: y0 only where β is not 0."""
        return tuple(role for role in self.trains_on if role != PROTO or coefficients.get("beta") != 0)


def with_sft(method: Method, weight: float) -> Method:
    """`method` with weight · (−log π_θ(y) per token of y) added to its loss; its reward stays what it is.

    Per token and example, as in Iterative RPO (arXiv 2404.19733), whose weight is 1.
    """
    if weight == 0:
        return method
    formula = f"{weight:g} ({SFT}) + {method.formula}"
    return replace(method, formula=formula, loss=lambda logps, c: method.loss(logps, c) + weight * _sft(logps, c))


def _sft(logps: SequenceLogps, _: Coefficients) -> Tensor:
    return sft_loss(logps.policy[LABELLED], logps.lengths[LABELLED])


def _spin(logps: SequenceLogps, c: Coefficients) -> Tensor:
    policy, reference = ([of[role] for role in PAIR] for of in (logps.policy, logps.reference))
    return spin_loss(*policy, *reference, lam=c["lam"], loss=c["loss_type"])


def _tspin(logps: SequenceLogps, c: Coefficients) -> Tensor:
    labelled, synthetic, proto = logps.policy[LABELLED], logps.policy[SYNTHETIC], logps.policy.get(PROTO)
    return tspin_loss(labelled, synthetic, proto, alpha=c["alpha"], beta=c.get("beta", 0.0), loss=c["loss_type"])


def _tspin_reference(logps: SequenceLogps, c: Coefficients) -> Tensor:
    return _tspin(SequenceLogps({role: logps.log_ratio(role) for role in logps.policy if role in logps.reference}), c)


def _simpo(logps: SequenceLogps, c: Coefficients) -> Tensor:
    policy, lengths = ([of[role] for role in PAIR] for of in (logps.policy, logps.lengths))
    return simpo_loss(*policy, *lengths, length_scale=c["length_scale"], margin=c["margin"])


def _space(logps: SequenceLogps, c: Coefficients) -> Tensor:
    return space_loss(logps.log_ratio(LABELLED), logps.log_ratio(SYNTHETIC), noise_ratio=c["noise_ratio"])


def _log_probability(logps: SequenceLogps, c: Coefficients, role: str) -> Tensor:
    return c["alpha"] * logps.policy[role]


def _scaled_ratio(scale: Coefficient) -> Callable[[SequenceLogps, Coefficients, str], Tensor]:
    return lambda logps, c, role: c[scale.name] * logps.log_ratio(role)


SFT = "−log π_θ(y)/|y|"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sft", SFT, _sft, None, (LABELLED,)),
        Method(
            "spin", "ℓ(λ log π_θ(y)/π_θt(y) − λ log π_θ(y′)/π_θt(y′))",
            _spin, _scaled_ratio(LAM), PAIR, (LAM, LOSS_TYPE), reference="previous",
        ),
        Method(
            "tspin", "ℓ(α log π_θ(y) − α log π_θ(y′)) + β ℓ(α log π_θ(y′) − α log π_θ(y0))",
            _tspin, _log_probability, ROLES, (ALPHA, BETA, LOSS_TYPE),
        ),
        Method(
            "tspin_no_history", "ℓ(α log π_θ(y) − α log π_θ(y′))", _tspin, _log_probability, PAIR, (ALPHA, LOSS_TYPE)
        ),
        Method(
            "tspin_reference", "ℓ(α r(y) − α r(y′)) + β ℓ(α r(y′) − α r(y0)), r = log π_θ/π_θt",
            _tspin_reference, _scaled_ratio(ALPHA), ROLES, (ALPHA, BETA, LOSS_TYPE), reference="previous",
        ),
        # Neighbours on the same pairs, which the paper does not compare with.
        Method(
            "dpo", "ℓ(λ log π_θ(y)/π_θ0(y) − λ log π_θ(y′)/π_θ0(y′))",
            _spin, _scaled_ratio(LAM), PAIR, (LAM, LOSS_TYPE), reference="initial",
        ),
        Method(
            "simpo", "−log σ(b log π_θ(y)/|y| − b log π_θ(y′)/|y′| − γ)",
            _simpo, lambda logps, c, role: c["length_scale"] * logps.policy[role] / logps.lengths[role], PAIR,
            (
                Coefficient("length_scale", 2.0, "b, the scale of SimPO's reward", "arXiv 2405.14734"),
                Coefficient("margin", 1.0, "γ, SimPO's target margin", "arXiv 2405.14734", "non-negative"),
            ),
        ),
        Method(
            "space", "−log σ(r(y) − log μ) − μ log σ(log μ − r(y′)), r = log π_θ/π_θt",
            _space, lambda logps, c, role: logps.log_ratio(role), PAIR,
            (Coefficient("noise_ratio", 1.0, "μ of SPACE, the weight of y′ against y", "arXiv 2512.07175"),),
            reference="previous",
        ),
    )
}  # fmt: skip


def find_method(name: str, besides: Iterable[str] = ()) -> Method:
    """METHODS[name]. Raises UserError with the nearest name of a method, or of what is allowed besides."""
    if name not in METHODS:
        raise UserError(unknown("method", name, [*besides, *METHODS]))
    return METHODS[name]

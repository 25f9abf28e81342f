"""Where self-play comes to rest: policies over a small alphabet, expectations by enumeration, in double precision.

The derivation is in results/README.md, "The fixed point". A policy is a softmax of free logits; an iteration draws y
from the data and y′ from the previous policy at a temperature, as the suite does, and its loss is METHODS' own.
"""

import math

import pytest
import torch

from tspin.objectives import METHODS, SequenceLogps
from tspin.schema import LABELLED, PROTO, SYNTHETIC

ALPHAS, TEMPERATURES = [0.1, 0.3, 1.0], [1.0, 0.7]
DATA = torch.tensor([0.45, 0.3, 0.17, 0.08], dtype=torch.float64)
START = torch.tensor([0.9, -0.4, 0.3, -0.8], dtype=torch.float64)  # logits of π_θ0
FREE, RELATIVE = "tspin_no_history", ["spin", "tspin_reference"]
SCALE = {"spin": "lam", "tspin_no_history": "alpha", "tspin": "alpha", "tspin_reference": "alpha"}


def power(policy: torch.Tensor, exponent: float) -> torch.Tensor:
    """policy ** exponent, normalised."""
    return (exponent * policy.log()).softmax(0)


def loss_of(method: str, scale: float, loss: str = "logistic", beta: float = 0.0):
    """The expected loss as a function of logits, the previous policy's logits, the temperature, and y0's distribution.

    β = 0 is the first iteration, as METHODS has it.
    """
    own = METHODS[method]
    given = {SCALE[method]: scale, "loss_type": loss} | ({"beta": beta} if beta else {})
    coefficients = own.coefficients_at(1 if beta else 0, own.resolve(given))

    def expected(logits, previous, temperature, proto=None):
        drawn = (previous.detach() / temperature).softmax(0)
        roles = {LABELLED: DATA, SYNTHETIC: drawn} | ({PROTO: proto} if beta else {})
        places = torch.cartesian_prod(*[torch.arange(len(DATA))] * len(roles)).T
        weights = torch.stack([p[place] for p, place in zip(roles.values(), places, strict=True)]).prod(0)
        policy, reference = logits.log_softmax(0), previous.detach().log_softmax(0)
        of = dict(zip(roles, places, strict=True))
        logps = SequenceLogps({r: policy[i] for r, i in of.items()}, {r: reference[i] for r, i in of.items()})
        return (weights * own.loss(logps, coefficients)).sum()

    return expected


def gradient(expected, logits, *others):
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(expected(logits, *others), logits)[0]


def minimised(expected, previous, *others):
    """The logits of least loss, by Newton's method; of mean 0, since a constant changes nothing."""
    logits = previous.detach()
    for _ in range(100):
        slope = gradient(expected, logits, previous, *others)
        if slope.abs().max() < 1e-13:
            break
        curvature = torch.func.hessian(expected)(logits, previous, *others)
        step = torch.linalg.pinv(curvature, rtol=1e-10) @ slope
        logits = logits - step / max(1.0, float(step.abs().max()))
        logits = logits - logits.mean()
    return logits


def predicted(method: str, scale: float, temperature: float) -> torch.Tensor:
    exponent = temperature / (1 + scale * temperature) if method == FREE else temperature
    return power(DATA, exponent)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", ALPHAS)
@pytest.mark.parametrize("method", [FREE, *RELATIVE])
def test_the_gradient_vanishes_at_the_fixed_point(method, scale, temperature):
    """π ∝ p_data^(τ / (1 + ατ)) without a reference, p_data^τ with one; neither rests where the other does."""
    expected = loss_of(method, scale)
    rest = predicted(method, scale, temperature).log()
    assert gradient(expected, rest, rest, temperature).abs().max() < 1e-10
    elsewhere = predicted(FREE if method in RELATIVE else "spin", scale, temperature).log()
    assert gradient(expected, elsewhere, elsewhere, temperature).abs().max() > 1e-5


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", ALPHAS)
@pytest.mark.parametrize("method", [FREE, *RELATIVE])
def test_iterations_of_one_step_each_come_to_rest_there(method, scale, temperature):
    expected, logits = loss_of(method, scale), START
    slope = 1 / (scale * temperature) + (method == FREE)  # of the way from π_θt to the minimum, see below
    for _ in range(3000):
        step = gradient(expected, logits, logits, temperature)
        logits = logits - 4 / scale**2 / slope * step
        if step.abs().max() < 1e-13 * scale:
            break
    torch.testing.assert_close(logits.softmax(0), predicted(method, scale, temperature), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", [FREE, *RELATIVE])
def test_an_iteration_trained_to_its_minimum(method):
    """π_θt+1 ∝ (p_data / q)^(1/α), times π_θt with a reference, where q is what y′ is drawn from: a closed form."""
    for scale, temperature in [(1.0, 1.0), (0.3, 0.7)]:
        trained = minimised(loss_of(method, scale), START, temperature)
        drawn = (START / temperature).log_softmax(0)
        wanted = (DATA.log() - drawn) / scale + (START if method in RELATIVE else 0.0)
        torch.testing.assert_close(trained.softmax(0), wanted.softmax(0), rtol=0, atol=1e-9)


def test_full_minimisation_does_not_come_to_rest():
    """The distance to the fixed point is multiplied by −1/(ατ), with a reference by 1 − 1/(ατ)."""
    expected = loss_of(FREE, 1.0)
    policies = [DATA.log()]  # a policy that is the data's already
    for _ in range(3):
        policies.append(minimised(expected, policies[-1], 1.0))
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    for policy, wanted in zip(policies[1:], [uniform, DATA, uniform], strict=True):
        torch.testing.assert_close(policy.softmax(0), wanted, rtol=0, atol=1e-9)
    kept = minimised(loss_of("spin", 1.0), DATA.log(), 1.0)
    torch.testing.assert_close(kept.softmax(0), DATA, rtol=0, atol=1e-9)
    for method, factor in [(FREE, -2.0), ("spin", -1.0), ("tspin_reference", -1.0)]:  # at α = λ = 1/2
        rest = predicted(method, 0.5, 1.0).log()
        away = START - START.mean()
        moved = minimised(loss_of(method, 0.5), rest + away, 1.0) - (rest - rest.mean())
        torch.testing.assert_close(moved, factor * away, rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_exponential_loss_has_another_exponent(temperature):
    """Without a reference τ / (1 + 2ατ); with one it is the same as the logistic loss's."""
    rest = power(DATA, temperature / (1 + 2 * 0.3 * temperature)).log()
    assert gradient(loss_of(FREE, 0.3, "exponential"), rest, rest, temperature).abs().max() < 1e-10
    assert gradient(loss_of(FREE, 0.3), rest, rest, temperature).abs().max() > 1e-5
    rest = power(DATA, temperature).log()
    for method in RELATIVE:
        assert gradient(loss_of(method, 0.3, "exponential"), rest, rest, temperature).abs().max() < 1e-10


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
def test_history_moves_the_fixed_point(loss):
    """With a reference to q = (p_data − β q0) / (1 − β), away from q0; without, to no power of p_data."""
    beta, temperature = 0.1, 0.7
    proto = power(DATA, 0.5)
    rest = power((DATA - beta * proto) / (1 - beta), temperature).log()
    relative = loss_of("tspin_reference", 0.3, loss, beta)
    assert gradient(relative, rest, rest, temperature, proto).abs().max() < 1e-10
    free = loss_of("tspin", 0.3, loss, beta)
    for exponent in torch.linspace(0.05, 2, 40):
        power_of_data = power(DATA, float(exponent)).log()
        assert gradient(free, power_of_data, power_of_data, temperature, proto).abs().max() > 1e-5


@pytest.mark.parametrize("method", [FREE, *RELATIVE])
def test_greedy_decoding_has_no_fixed_point(method):
    """Where y′ is always the likeliest response, every other one that the data has gains, whatever the policy is."""
    torch.manual_seed(0)
    for _ in range(20):
        logits = 2 * torch.randn(4, dtype=torch.float64)
        slope = gradient(loss_of(method, 0.5), logits, logits, 1e-6)
        others = torch.arange(4) != logits.argmax()
        assert (slope[others] < 0).all() and slope.sum().abs() < 1e-12


def test_entropy_and_length_rise():
    """√p_data of all strings of up to eight tokens, a or b, that end after each with probability 0.4."""
    lengths, logs = [], []
    for length in range(1, 9):
        strings = torch.cartesian_prod(*[torch.tensor([0.8, 0.2], dtype=torch.float64)] * length).reshape(-1, length)
        lengths += [length] * len(strings)
        logs.append(strings.log().sum(1) + (length - 1) * math.log(0.6) + (math.log(0.4) if length < 8 else 0.0))
    length, data = torch.tensor(lengths), torch.cat(logs).exp()
    assert float(data.sum()) == pytest.approx(1)
    rest = power(data, 0.5)
    entropy = [float(-(policy * policy.log()).sum()) for policy in (data, rest)]
    assert entropy[0] + 2 < entropy[1]
    assert (rest * length).sum() > 1.5 * (data * length).sum()
    # Given its length, a string's log p_data is lost by half: KL(p_data ‖ π) grows with every token by as much.
    losses = []
    for tokens in (2, 4, 8):
        of, flat = (policy[length == tokens] / policy[length == tokens].sum() for policy in (data, rest))
        losses.append(float((of * (of / flat).log()).sum()) / tokens)
    assert losses[0] > 0 and losses == pytest.approx([losses[0]] * 3)

"""The losses against hand-computed values, against autograd, and against each other."""

import math

import pytest
import torch

from tspin.objectives import (
    METHODS,
    SequenceLogps,
    sft_loss,
    simpo_loss,
    space_loss,
    spin_loss,
    tspin_loss,
    with_sft,
)
from tspin.schema import LABELLED, PROTO, ROLES, SYNTHETIC


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_hand_computed_values():
    # u = −3 − (−5) = 2 and v = −5 − (−4) = −1
    labelled, synthetic, proto = tensor(-3.0), tensor(-5.0), tensor(-4.0)
    logistic = tspin_loss(labelled, synthetic, proto, alpha=0.5, beta=0.1)
    assert logistic.item() == pytest.approx(softplus(-1.0) + 0.1 * softplus(0.5))
    exponential = tspin_loss(labelled, synthetic, proto, alpha=0.5, beta=0.1, loss="exponential")
    assert exponential.item() == pytest.approx(math.exp(-1.0) + 0.1 * math.exp(0.5))
    # λ[(−3 + 4) − (−5 + 4.5)] = 0.1 · 1.5
    spin = spin_loss(labelled, synthetic, tensor(-4.0), tensor(-4.5), lam=0.1)
    assert spin.item() == pytest.approx(softplus(-0.15))
    assert sft_loss(tensor(-6.0), torch.tensor([3])).item() == pytest.approx(2.0)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("loss", ["logistic", "exponential"])
def test_theorem_1(loss, beta):
    """∇ = α(ℓ′(αu)∇u + β ℓ′(αv)∇v), with ℓ′(u) = −σ(−u) for the logistic loss."""
    alpha = 0.8
    logps = [tensor(-3.0, -1.2), tensor(-2.5, -4.0), tensor(-2.0, -3.0)]
    tspin_loss(*logps, alpha=alpha, beta=beta, loss=loss).sum().backward()
    y, synthetic, proto = (x.detach() for x in logps)
    slope = {"logistic": lambda u: -torch.sigmoid(-u), "exponential": lambda u: -torch.exp(-u)}[loss]
    du, dv = slope(alpha * (y - synthetic)), slope(alpha * (synthetic - proto))
    expected = [alpha * du, alpha * (-du + beta * dv), -alpha * beta * dv]
    for found, wanted in zip(logps, expected, strict=True):
        gradient = torch.zeros_like(wanted) if found.grad is None else found.grad
        torch.testing.assert_close(gradient, wanted)


def test_the_sign_that_the_appendix_prints_is_a_slip():
    u = tensor(0.7)
    tspin_loss(u, tensor(0.0), None, alpha=1.0, beta=0.0).backward()
    assert u.grad is not None
    assert u.grad.item() == pytest.approx(-1 / (1 + math.exp(0.7)))  # −σ(−u), not −σ(u)
    assert u.grad.item() != pytest.approx(-1 / (1 + math.exp(-0.7)))


def test_spin_is_dpo():
    """DPO (arXiv 2305.18290, eq. 7) written from its Bradley–Terry form, without log-sigmoid."""
    torch.manual_seed(0)
    chosen, rejected, reference_chosen, reference_rejected = torch.randn(4, 16, dtype=torch.float64) * 3
    beta = 0.3
    win = torch.exp(beta * (chosen - reference_chosen))
    lose = torch.exp(beta * (rejected - reference_rejected))
    torch.testing.assert_close(
        spin_loss(chosen, rejected, reference_chosen, reference_rejected, lam=beta), -torch.log(win / (win + lose))
    )


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
def test_equal_responses_make_spin_constant_but_not_tspin(loss):
    """Where y′ = y any policy minimises SPIN's loss; the historical advantage still has a gradient."""
    labelled, proto = tensor(-3.0), tensor(-4.0)
    reference = tensor(-2.0).detach()
    spin = spin_loss(labelled, labelled, reference, reference, lam=0.1, loss=loss)
    assert torch.autograd.grad(spin, labelled)[0].item() == 0.0
    tspin = tspin_loss(labelled, labelled, proto, alpha=1.0, beta=0.1, loss=loss)
    to_labelled, to_proto = torch.autograd.grad(tspin, [labelled, proto])
    assert to_labelled.item() < 0 < to_proto.item()


def test_beta_needs_proto_responses():
    with pytest.raises(ValueError, match="proto_logps"):
        tspin_loss(tensor(-1.0), tensor(-2.0), None, alpha=1.0, beta=0.1)


def batch(with_reference: bool = True) -> SequenceLogps:
    torch.manual_seed(1)
    policy = {role: -5 * torch.rand(4, dtype=torch.float64) for role in ROLES}
    reference = {role: -5 * torch.rand(4, dtype=torch.float64) for role in ROLES} if with_reference else {}
    return SequenceLogps(policy, reference, {role: torch.full((4,), 5) for role in ROLES})


def test_registry_agrees_with_the_pure_functions():
    given, logps = {"alpha": 0.7, "beta": 0.3, "lam": 0.2}, batch()
    y, synthetic, proto = (logps.policy[role] for role in ROLES)
    ratios = [logps.log_ratio(role) for role in ROLES]
    wanted = {
        "sft": sft_loss(y, logps.lengths[LABELLED]),
        "spin": spin_loss(y, synthetic, logps.reference[LABELLED], logps.reference[SYNTHETIC], lam=0.2),
        "tspin": tspin_loss(y, synthetic, proto, alpha=0.7, beta=0.3),
        "tspin_no_history": tspin_loss(y, synthetic, None, alpha=0.7, beta=0.0),
        "tspin_reference": tspin_loss(*ratios, alpha=0.7, beta=0.3),
        "dpo": spin_loss(y, synthetic, logps.reference[LABELLED], logps.reference[SYNTHETIC], lam=0.2),
        "simpo": -torch.nn.functional.logsigmoid(2 * (y - synthetic) / 5 - 1),
        "space": -torch.log(torch.sigmoid(ratios[0])) - torch.log(1 - torch.sigmoid(ratios[1])),
    }
    assert wanted.keys() == METHODS.keys()
    for name, method in METHODS.items():
        c = method.resolve({name: value for name, value in given.items() if name in method.resolve({})})
        found = method.loss(logps, method.coefficients_at(1, c))
        assert found.shape == (4,)
        torch.testing.assert_close(found, wanted[name])


def test_neighbours_by_hand():
    lengths = torch.tensor([2]), torch.tensor([4])
    # 2.5 · (−3/2 + 5/4) − 0.5 = −1.125
    simpo = simpo_loss(tensor(-3.0), tensor(-5.0), *lengths, length_scale=2.5, margin=0.5)
    assert simpo.item() == pytest.approx(softplus(1.125))
    # σ_μ(u) = 1 / (1 + μ e^−u) with μ = 3
    space = space_loss(tensor(0.5), tensor(-0.2), noise_ratio=3.0)
    sigma = [1 / (1 + 3 * math.exp(-u)) for u in (0.5, -0.2)]
    assert space.item() == pytest.approx(-math.log(sigma[0]) - 3 * math.log(1 - sigma[1]))
    assert 1 - sigma[1] == pytest.approx(1 / (1 + math.exp(-0.2) / 3))  # σ_{1/μ}(0.2), as its authors write it
    assert METHODS["dpo"].reference == "initial" and METHODS["spin"].reference == "previous"


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.self_play])
def test_an_sft_term_is_added_to_any_loss_of_pairs(name):
    """Per token, every example alike; the reward is untouched, and no weight leaves the method itself."""
    method, logps = METHODS[name], batch()
    lengths = torch.tensor([1, 2, 3, 4])
    logps = SequenceLogps(logps.policy, logps.reference, {**logps.lengths, LABELLED: lengths})
    weighted, c = with_sft(method, 0.5), method.resolve({})
    nll = -logps.policy[LABELLED] / lengths
    torch.testing.assert_close(weighted.loss(logps, c), method.loss(logps, c) + 0.5 * nll)
    assert weighted.reward is method.reward and weighted.coefficients == method.coefficients
    assert with_sft(method, 0.0) is method


def test_rewards_are_those_of_the_methods():
    c, logps = {"alpha": 0.7, "lam": 0.2}, batch()
    for name, scale, of in [("spin", 0.2, "ratio"), ("tspin", 0.7, "policy"), ("tspin_reference", 0.7, "ratio")]:
        reward = METHODS[name].reward
        assert reward is not None
        wanted = logps.log_ratio(PROTO) if of == "ratio" else logps.policy[PROTO]
        torch.testing.assert_close(reward(logps, c, PROTO), scale * wanted)


def test_beta_is_zero_at_iteration_0_and_without_history():
    for method in METHODS.values():
        beta = {"beta": 0.5} if method.name in {"tspin", "tspin_reference"} else {}
        c = method.resolve(beta)
        assert method.coefficients_at(0, c) == {**c, **dict.fromkeys(beta, 0.0)}
        assert method.coefficients_at(1, c) == c and c.get("beta") == beta.get("beta")
    listed = METHODS["tspin"].resolve({"alpha": [1, 0.5], "beta": [0.1, 0.2, 0.3]})
    at = [METHODS["tspin"].coefficients_at(number, listed) for number in range(4)]
    assert [(c["alpha"], c["beta"]) for c in at] == [(1.0, 0.0), (0.5, 0.2), (0.5, 0.3), (0.5, 0.3)]
    tspin, c = METHODS["tspin"], METHODS["tspin"].resolve({"beta": 0.5})
    assert PROTO not in tspin.gradient_roles(tspin.coefficients_at(0, c))
    assert PROTO in tspin.gradient_roles(tspin.coefficients_at(1, c))

"""What rules can decide: simulated experiments vary as the measured ones do."""

from types import SimpleNamespace

import numpy as np
import pytest

from tspin_analysis.power import EXPERIMENTS, Variation, chances

SEEDS, BENCHMARKS, PROBLEMS = 200, 4, 50
A, B = ("a", 0), ("b", 0)
BETWEEN = np.array([[4.0, 3.0], [3.0, 9.0]])  # of the averages, in squared points
HARDNESS = np.array([[400.0, 300.0], [300.0, 900.0]])  # of a problem's
NOISE = 100.0  # of an answer's, each method's its own
LEAD = {A: 1.0, B: -1.0}


def measured(seeds: int = SEEDS) -> SimpleNamespace:
    """Scores of two policies with these variances: (seeds, benchmarks, problems) each."""
    generator = np.random.default_rng(0)
    luck = generator.multivariate_normal([50.0, 40.0], BETWEEN, size=seeds).T[:, :, None, None]
    hardness = generator.multivariate_normal([0.0, 0.0], HARDNESS, size=(BENCHMARKS, PROBLEMS)).transpose(2, 0, 1)
    noise = NOISE**0.5 * generator.standard_normal((2, seeds, BENCHMARKS, PROBLEMS))
    values = dict(zip([A, B], luck + hardness[:, None] + noise, strict=True))
    return SimpleNamespace(
        common_seeds=lambda policies: list(range(seeds)), values=lambda policy, seeds: values[policy][: len(seeds)]
    )


def test_the_variances_are_those_of_the_experiment():
    found = Variation(measured(), [A, B])
    answers = BENCHMARKS * PROBLEMS
    assert found.count == SEEDS
    assert found.between_seeds == pytest.approx(BETWEEN + NOISE / answers * np.eye(2), rel=0.25)
    # Of what all seeds share: their own noise, averaged over them, is taken off.
    assert found.problems == pytest.approx(HARDNESS / answers, rel=0.3)
    assert found.noise == pytest.approx(NOISE / answers / SEEDS * np.eye(2), rel=0.05, abs=2e-5)
    assert found.noise_df == BENCHMARKS * (SEEDS - 1) * (PROBLEMS - 1)


def test_a_problem_that_a_seed_has_not_answered_is_left_out():
    known = measured(4)
    values = {policy: known.values(policy, range(4)).copy() for policy in (A, B)}
    values[A][1, :, 7] = np.nan
    some = SimpleNamespace(common_seeds=known.common_seeds, values=lambda policy, seeds: values[policy])
    rest = SimpleNamespace(
        common_seeds=known.common_seeds, values=lambda policy, seeds: np.delete(values[policy], 7, axis=-1)
    )
    ours, theirs = Variation(some, [A, B]), Variation(rest, [A, B])
    assert ours.problems == pytest.approx(theirs.problems) and ours.noise == pytest.approx(theirs.noise)


def test_simulated_experiments_vary_as_the_measured_one():
    seeds = 20
    variation = Variation(measured(seeds), [A, B])
    [single, lead] = variation.simulated([{A: 1.0}, LEAD], {A: 47.0, B: 45.0})
    for found, vector, mean in ((single, [1, 0], 47.0), (lead, [1, -1], 2.0)):
        between, shared = (
            np.array(vector) @ matrix @ vector for matrix in (variation.between_seeds, variation.problems)
        )
        assert found.mean.mean() == pytest.approx(mean, abs=3 * float(found.mean.std()) / EXPERIMENTS**0.5)
        assert found.mean.var() == pytest.approx(between / seeds + shared, rel=0.1)
        assert found.seed_variance.mean() == pytest.approx(between / seeds, rel=0.1)
        assert found.problem_variance == pytest.approx(shared)
        held = (found.low <= mean) & (mean <= found.high)
        assert 0.94 < held.mean() < 0.98


def test_chances_are_shares_of_the_verdicts():
    variation = Variation(measured(5), [A, B])

    def rule(found):
        return np.where(found[0].low > 0, "ahead", "open")

    alike = chances(variation, [LEAD], rule, {A: 45.0, B: 45.0})
    far = chances(variation, [LEAD], rule, {A: 95.0, B: 45.0})
    assert far == {"ahead": 1.0} and 0.01 < alike["ahead"] < 0.035
    assert sum(alike.values()) == pytest.approx(1)


def test_one_seed_tells_no_spread():
    with pytest.raises(ValueError, match="no spread"):
        Variation(measured(1), [A, B])

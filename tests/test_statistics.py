"""Intervals and p-values on data whose answer is known."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from tspin_analysis import intervals
from tspin_analysis.intervals import corrected, estimate, estimates, of_seeds, p_value


def scores(seeds: int, mean: float, between: float, problems: int = 50, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    level = mean + between * generator.standard_normal((seeds, 1, 1))
    return level + 10 * generator.standard_normal((seeds, 2, problems))


def test_interval_covers_the_truth_and_widens_with_the_spread_between_seeds():
    narrow, wide = estimate(scores(5, 40, 0)), estimate(scores(5, 40, 20))
    assert narrow.low < 40 < narrow.high and narrow.seeds == 5
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    # Problems alone: standard error 10 / sqrt(5 · 2 · 50); drawing seeds again adds as much once more.
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * 10 / 500**0.5 * 2**0.5, rel=0.35)


def test_missing_problems_and_single_seeds():
    values = scores(5, 40, 0)
    values[:, 1, 20:] = np.nan
    result = estimate(values)
    by_hand = np.mean([(seed[0].mean() + seed[1, :20].mean()) / 2 for seed in values])
    assert result.mean == pytest.approx(by_hand) and result.low < by_hand < result.high
    single = estimate(scores(1, 40, 0))
    assert single.high - single.low == pytest.approx(2 * 1.96 * 10 / 10, rel=0.2)


def test_many_seeds_have_the_interval_that_drawing_problems_gives(monkeypatch):
    values = scores(40, 40, 3)
    quick = estimate(values)
    monkeypatch.setattr("tspin_analysis.intervals.MANY", 100)
    slow = estimate(values)
    assert quick.mean == slow.mean
    assert (quick.low, quick.high) == pytest.approx((slow.low, slow.high), abs=0.1)
    assert 1.5 < slow.high - slow.low < 2.5  # so that 0.1 is little


def picked(values: np.ndarray, generator: np.random.Generator) -> float:
    """The mean of one resample, by the definition: seeds are picked, and within each of them each problem."""
    seeds = [values[seed] for seed in generator.integers(len(values), size=len(values))]
    real = [[row[~np.isnan(row)] for row in seed] for seed in seeds]
    return float(np.mean([[row[generator.integers(len(row), size=len(row))].mean() for row in seed] for seed in real]))


@pytest.mark.parametrize("few", [True, False], ids=["few values", "a value for each problem"])
def test_intervals_are_those_of_picking_problem_by_problem(monkeypatch, few):
    """An end that 4,000 resamples say is off by 0.04 of the spread between resamples, both ends' difference by 0.06."""
    values = scores(4, 5, 3)
    if few:
        values = 100.0 * (values > 0)
    values[:, 1, 40:] = np.nan
    monkeypatch.setattr(intervals, "RESAMPLES", 4000)
    resamples = [picked(values, np.random.default_rng(seed)) for seed in range(4000)]
    found, wanted = estimate(values), np.quantile(resamples, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(wanted), abs=4 * 0.06 * np.std(resamples))


def test_intervals_in_closed_form():
    """Two seeds with the same four problems, half of them right: a share of eight, binomial."""
    alike = np.tile([0.0, 0.0, 100.0, 100.0], (2, 1, 1))
    low, high = stats.binom.ppf([0.025, 0.975], 8, 0.5) / 8 * 100
    assert estimate(alike)[:3] == (50, low, high)
    settled = np.broadcast_to([[[10.0]], [[30.0]]], (2, 1, 20))  # only which seeds are drawn matters
    assert estimate(settled)[:3] == (20, 10, 30)


def test_each_benchmark_beside_the_whole():
    for seeds in (1, 5, 40):
        values = scores(seeds, 40, 3)
        first, second, whole = estimates(values)
        assert whole == estimate(values) and whole.mean == pytest.approx((first.mean + second.mean) / 2)
        for found, column in ((first, 0), (second, 1)):
            alone = estimate(values[:, [column]])
            assert found.mean == pytest.approx(alone.mean)
            width = alone.high - alone.low
            assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.1 * width)


def test_p_values_are_scipys():
    for seeds in (3, 8):
        values = scores(seeds, 1, 1)
        assert p_value(values) == pytest.approx(stats.ttest_1samp(intervals.seed_means(values), 0).pvalue)
        numbers = intervals.seed_means(values)
        wanted = stats.t.interval(0.95, seeds - 1, loc=numbers.mean(), scale=stats.sem(numbers))
        assert of_seeds(numbers)[1:3] == pytest.approx(wanted)
    several = [0.04, 0.01, 0.5, 0.011, 0.2]
    assert corrected(several) == pytest.approx(multipletests(several, method="holm")[1].tolist())


def test_p_values():
    assert p_value(scores(5, 0, 1)) > 0.05
    assert p_value(scores(5, 5, 1)) < 0.01
    assert p_value(scores(1, 5, 0)) < 0.01
    assert p_value(np.zeros((5, 2, 10))) == 1.0
    assert corrected([0.01, 0.04, 0.5]) == pytest.approx([0.03, 0.08, 0.5])
    assert corrected([]) == []


def test_a_number_per_seed():
    three = of_seeds([1.0, 2.0, 3.0])
    assert (three.mean, three.low) == (2.0, pytest.approx(2 - 4.3027 / 3**0.5, rel=1e-4))
    assert of_seeds([1.0]).high == float("inf") and of_seeds([1.0, 1.0])[:3] == (1.0, 1.0, 1.0)

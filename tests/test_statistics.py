"""Intervals and p-values on data whose answer is known."""

import numpy as np
import pytest

from tspin_analysis.intervals import corrected, estimate, of_seeds, p_value


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

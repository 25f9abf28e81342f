"""Intervals and p-values on data whose answer is known, and how often the intervals hold it."""

from dataclasses import replace
from math import inf, sqrt

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtr
from statsmodels.stats.multitest import multipletests

from tspin_analysis.intervals import (
    Estimate,
    at_least,
    corrected,
    estimate,
    estimates,
    none_of,
    of_errors,
    of_seeds,
    share,
)

EXPERIMENTS = 2000
LEVELS = np.linspace(-0.5, 0.5, 4)[:, None]  # of four benchmarks, on the scale of the answers' threshold
# Spread between seeds, between problems.
REGIMES = {"seeds": (0.3, 0.3), "problems": (0.0, 1.5), "both": (0.12, 1.0), "neither": (0.0, 0.3), "few": (0.06, 0.3)}
COVERAGE = {2: (0.90, 0.98), 3: (0.94, 0.985), 5: (0.94, 0.985), 10: (0.945, 0.975)}


def scores(seeds: int, mean: float, between: float, problems: int = 50, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    level = mean + between * generator.standard_normal((seeds, 1, 1))
    return level + 10 * generator.standard_normal((seeds, 2, problems))


def answered(generator: np.random.Generator, seeds: int, spread: float, problems: np.ndarray) -> np.ndarray:
    """Right and wrong answers (experiments, seeds, benchmarks, problems) of one method to problems of some hardness."""
    luck = generator.standard_normal((EXPERIMENTS, seeds, 1, 1)) * spread
    return 100.0 * (LEVELS + luck + problems + generator.standard_normal((EXPERIMENTS, seeds, 4, 50)) > 0)


def truth(level: np.ndarray, variance: float) -> float:
    """The expected score: over seeds, problems and what is left, all normal."""
    return 100 * float(ndtr(level / sqrt(1 + variance)).mean())


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("seeds", COVERAGE)
@pytest.mark.parametrize("paired", [False, True], ids=["scores", "differences"])
def test_intervals_hold_the_truth_as_often_as_they_say(paired, seeds, regime):
    """95 % where seeds differ; more where they hardly do, which nothing short of more seeds would tell for sure."""
    generator, (spread, hardness) = np.random.default_rng(0), REGIMES[regime]
    problems = hardness * generator.standard_normal((EXPERIMENTS, 1, 4, 50))
    values = answered(generator, seeds, spread, problems)
    wanted = truth(LEVELS, spread**2 + hardness**2)
    if paired:  # the other method finds other problems hard, a little
        own = 0.5 * hardness * generator.standard_normal(problems.shape)
        values = values - answered(generator, seeds, spread, problems + own)
        wanted -= truth(LEVELS, spread**2 + 1.25 * hardness**2)
    found = estimate(values)
    coverage = float(((found.low <= wanted) & (wanted <= found.high)).mean())
    low, high = COVERAGE[seeds]
    chance = 3 * sqrt(0.95 * 0.05 / EXPERIMENTS)
    assert low - chance < coverage < high + chance


def test_problems_that_are_drawn_anew_for_each_seed_would_be_too_narrow():
    """Where problems alone count, more seeds do not narrow the interval: they answer the same ones."""
    hardness = 30 * np.random.default_rng(0).standard_normal((1, 2, 50))
    alike = np.repeat(50 + hardness, 10, axis=0)
    few, many = estimate(alike[:2]), estimate(alike)
    error = sqrt(float(hardness[0].var(axis=-1, ddof=1).sum()) / 50) / 2
    assert few.error == pytest.approx(error) and many.error == pytest.approx(error)
    assert many.half == pytest.approx(1.96 * error, rel=0.02)


def test_the_variance_is_that_of_the_formula():
    generator = np.random.default_rng(0)
    values = 50 + 3 * generator.standard_normal((4, 1, 1)) + 8 * generator.standard_normal((1, 3, 20))
    values = values + 5 * generator.standard_normal((4, 3, 20))
    seeds = values.mean((1, 2))
    shared = 0.0
    for benchmark in range(3):
        part = values[:, benchmark]
        left = part - part.mean(0) - part.mean(1, keepdims=True) + part.mean()
        residual = (left**2).sum() / (3 * 19)
        shared += (part.mean(0).var(ddof=1) - residual / 4) / 20 / 9
    found = estimate(values)
    assert found.mean == pytest.approx(values.mean()) and found.seeds == 4
    assert found.seed_variance == pytest.approx(seeds.var(ddof=1) / 4)
    assert found.problem_variance == pytest.approx(shared)
    assert found.error**2 == pytest.approx(found.seed_variance + shared)
    by_hand = found.error**4 / (found.seed_variance**2 / 3 + shared**2 / found.problem_df)
    assert found.df == pytest.approx(by_hand) and 3 < found.df < 3 + 3 * 19


def test_seeds_that_agree_by_chance_are_no_surer_than_their_answers_allow():
    """Two seeds of one mean, whose answers differ: what answers leave unexplained is the least that seeds spread by."""
    generator = np.random.default_rng(0)
    first = generator.standard_normal((2, 100))
    second = np.take_along_axis(first, generator.permuted(np.tile(np.arange(100), (2, 1)), axis=1), axis=1)
    found = estimate(np.stack([first, second]))
    half_difference = (first - second) / 2
    noise = (half_difference**2).sum(-1) * 2 / 99 / (2 * 100)  # r / (n m), r with 99 degrees of freedom
    assert found.seed_variance == pytest.approx(noise.sum() / 4)
    own = ((first + second) / 2).var(-1, ddof=1) / 100 - noise
    assert found.problem_variance == pytest.approx(max(own.sum(), 0) / 4)
    assert found.df > 90 and found.half == pytest.approx(1.97 * found.error, rel=0.01) and found.p < 1
    # A third of the least: 1² · 3² = 9 degrees of freedom.
    spread, df = at_least(1.0, 2, 3.0, 1000.0)
    assert (spread, df) == (3.0, 9.0) and tuple(map(float, at_least(3.0, 2, 1.0, 1000.0))) == (3.0, 1.0)


def test_seeds_alone_give_students_interval_and_problems_alone_the_normal_one():
    levels = np.array([10.0, 30.0, 20.0])
    seeds = estimate(np.broadcast_to(levels[:, None, None], (3, 2, 200)))
    assert (seeds.low, seeds.high) == pytest.approx(stats.t.interval(0.95, 2, loc=20, scale=stats.sem(levels)))
    single = estimate(scores(1, 40, 0, problems=2000))
    assert single.seeds == 1 and single.seed_variance == 0
    assert single.half == pytest.approx(1.96 * 10 / 4000**0.5, rel=0.05)


def test_a_share_of_none_or_all_has_wilsons_interval():
    none, whole = (share(estimate(np.full((5, 1, 200), value)), 200, 100) for value in (0.0, 100.0))
    test = stats.binomtest(0, 200).proportion_ci(method="wilson")
    assert (none.low, none.high) == (0, pytest.approx(100 * test.high)) and none_of(200) == pytest.approx(test.high)
    assert (whole.low, whole.high) == (pytest.approx(100 - 100 * test.high), 100)
    assert f"{none:.1f}" == "0.0 [0.0, 1.9]" and none.at(20).high == none.high
    other = estimate(scores(5, 40, 3))
    assert (share(other, 50, 100).low, share(other, 50, 100).high) == (other.low, other.high)


def test_a_shares_interval_ends_where_shares_do():
    few = estimate(np.broadcast_to(np.array([0.0, 1.0, 8.0])[:, None, None], (3, 2, 200)))
    assert few.low < 0 and (share(few, 200, 100).low, share(few, 200, 100).high) == (0, few.high)
    many = estimate(100 - np.broadcast_to(np.array([0.0, 1.0, 8.0])[:, None, None], (3, 2, 200)))
    assert many.high > 100 and (share(many, 200, 100).low, share(many, 200, 100).high) == (many.low, 100)


def test_missing_problems():
    values = scores(5, 40, 0)
    values[:, 1, 20:] = np.nan
    by_hand = np.mean([(seed[0].mean() + seed[1, :20].mean()) / 2 for seed in values])
    found = estimate(values)
    assert found.mean == pytest.approx(by_hand) and found.low < by_hand < found.high
    assert estimates(values)[1].error == pytest.approx(estimate(values[:, [1], :20]).error)
    # Pairs of like length are others in each seed.
    some = scores(5, 40, 3, problems=400)
    some[np.random.default_rng(1).random(some.shape) < 0.5] = np.nan
    assert estimate(some).half == pytest.approx(estimate(scores(5, 40, 3, problems=400)).half, rel=0.3)


def test_each_benchmark_beside_the_whole():
    for seeds in (1, 5):
        values = scores(seeds, 40, 3)
        first, second, whole = estimates(values)
        assert whole == estimate(values) and whole.mean == pytest.approx((first.mean + second.mean) / 2)
        assert first == estimate(values[:, [0]]) and first.wide is None and whole.wide is not None


def test_the_wide_interval_draws_the_benchmarks():
    """Without spread between seeds: Student's t over the benchmarks' means."""
    means = np.array([10.0, 20.0, 40.0, 90.0])
    values = np.broadcast_to(means[:, None], (5, 4, 30))
    found = estimate(values)
    assert found.half == 0 and (found.mean, found.seeds) == (40, 5)
    wanted = stats.t.interval(0.95, 3, loc=40, scale=stats.sem(means))
    assert (found.wide.low, found.wide.high) == pytest.approx(wanted)
    generator, hits = np.random.default_rng(0), 0
    drawn = (
        50
        + 8 * generator.standard_normal((EXPERIMENTS, 1, 6, 1))
        + 3 * generator.standard_normal((EXPERIMENTS, 5, 1, 1))
    )
    wide = estimate(drawn + 4 * generator.standard_normal((EXPERIMENTS, 5, 6, 40))).wide
    hits = float(((wide.low <= 50) & (50 <= wide.high)).mean())
    assert 0.925 < hits < 0.975


def test_p_values_are_those_of_the_interval():
    for seeds in (1, 3, 8):
        found = estimate(scores(seeds, 1, 1))
        at_the_edge = replace(found, mean=found.half)
        assert at_the_edge.low == pytest.approx(0, abs=1e-12) and at_the_edge.p == pytest.approx(0.05)
    assert estimate(scores(5, 0, 1)).p > 0.05 and estimate(scores(5, 5, 1)).p < 0.01
    assert estimate(np.zeros((5, 2, 10))).p == 1 and estimate(np.ones((5, 2, 10))).p == 0
    seeds = [1.0, 2.0, 4.0]
    assert of_seeds(seeds).p == pytest.approx(stats.ttest_1samp(seeds, 0).pvalue)


def test_holm():
    several = [0.04, 0.01, 0.5, 0.011, 0.2]
    wanted = multipletests(several, method="holm")[1]
    assert corrected(several) == pytest.approx(wanted)
    assert corrected([0.01, 0.04, 0.5]) == pytest.approx([0.03, 0.08, 0.5]) and len(corrected([])) == 0
    columns = corrected(np.stack([several, several[::-1]], axis=1))  # each column by itself
    assert columns == pytest.approx(np.stack([wanted, wanted[::-1]], axis=1))


def test_a_difference_that_is_detectable_is_detected_with_its_power():
    """Five seeds, with a standard error of 1 that is estimated from them anew each time."""
    true = of_seeds([-1.0, 0.5, 0.0, 1.5, -1.0])
    assert true.detectable == pytest.approx((2.776 + 0.941) * true.error, rel=1e-3)
    generator, size = np.random.default_rng(0), (2.776 + 0.941)
    means = size + generator.standard_normal(20_000)
    error = np.sqrt(generator.chisquare(4, 20_000) / 4)
    drawn = Estimate(means, 5, error**2, 0.0)
    assert float(((drawn.p < 0.05) & (drawn.mean > 0)).mean()) == pytest.approx(0.8, abs=0.02)
    assert Estimate(0.0, 5, 0.0, 1.0).detectable == pytest.approx(1.96 + 0.8416, rel=1e-3)


def test_with_more_seeds():
    found = Estimate(1.0, 4, 2.0, 0.5, 100.0)
    assert found.at(8).seed_variance == 1.0 and found.at(8).problem_variance == 0.5
    forever = found.at(inf)
    assert forever.error == pytest.approx(0.5**0.5, rel=1e-6) and forever.df == pytest.approx(100, rel=1e-6)


def test_a_number_per_seed():
    three = of_seeds([1.0, 2.0, 3.0])
    assert (three.mean, three.low) == (2.0, pytest.approx(2 - 4.3027 / 3**0.5, rel=1e-4))
    assert of_seeds([1.0]).high == inf
    alike = of_seeds([1.0, 1.0])
    assert (alike.mean, alike.low, alike.high) == (1.0, 1.0, 1.0)
    assert f"{three:.1f}" == "2.0 [-0.5, 4.5]"


def test_errors_without_outcomes_are_taken_to_be_shared():
    found = of_errors([25.0, 29.0], [0.5, 0.5])
    assert found.error == pytest.approx((8 / 2 + 0.25) ** 0.5)
    assert of_errors([15.0], [2.0]).half == pytest.approx(1.96 * 2, rel=1e-3)
    assert np.isnan(of_errors([15.0], [np.nan]).error)


def test_other_numbers_of_seeds_have_other_degrees_of_freedom():
    """In proportion to what was seen: 12 of 4 seeds are 24 of 7."""
    seen = Estimate(1, 4, 2, 0.5, 100, 12)
    assert seen.at(7).seed_df == 24 and seen.at(7).seed_variance == pytest.approx(8 / 7)

"""Rules on estimates whose verdict is known; what it would take to decide; and how often a rule decides what."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import nctdtr, stdtrit

from tspin_analysis import grid, power, rules
from tspin_analysis.intervals import Estimate
from tspin_analysis.scores import Scores, minus
from tspin_analysis.verdicts import (
    BY_DEFINITION,
    CONTRADICTED,
    NOT_TESTED,
    REPLICATED,
    UNDECIDED,
    Part,
    above,
    all_above,
    all_below,
    below,
    judge,
    needs,
    overall,
    within,
)

POLICIES = [("spin", t) for t in range(5)]


def known(mean: float, error: float = 0.1, seeds: int = 5) -> Estimate:
    """Nearly normal: its interval is the mean ± 1.96 errors."""
    return Estimate(mean, seeds, 0.0, error**2)


def test_one_quantity():
    for rule, means, wanted in (
        (above(0), (0.3, -0.3, 0.1), (REPLICATED, CONTRADICTED, UNDECIDED)),
        (above(0, 0.5), (-0.2, -0.8, -0.4), (REPLICATED, CONTRADICTED, CONTRADICTED)),
        (below(3), (2.7, 3.3, 2.9), (REPLICATED, CONTRADICTED, UNDECIDED)),
        (within(0.8, 1.25), (1.0, 1.5, 1.2), (REPLICATED, CONTRADICTED, UNDECIDED)),
    ):
        assert tuple(rule([known(mean)]) for mean in means) == wanted
    assert above(0)([Estimate(np.array([1.0, -1.0, 0.0]), 5, 0.0, 0.01)]).tolist() == [
        REPLICATED, CONTRADICTED, UNDECIDED]  # fmt: skip


def test_all_of_several():
    assert all_above([known(0.3), known(0.4)]) == REPLICATED == all_below([known(-0.3), known(-0.4)])
    assert all_above([known(0.3), known(0.1)]) == UNDECIDED
    assert all_above([known(0.3), known(-0.3)]) == CONTRADICTED == all_below([known(-0.3), known(0.3)])
    # −0.21 ± 0.1 has p 0.036: below zero by itself, not as the lowest of five.
    assert all_above([known(-0.21)]) == CONTRADICTED and all_above([known(-0.21), *[known(0.1)] * 4]) == UNDECIDED


def test_a_course_that_never_falls():
    """Four steps, then the whole course."""
    rule = rules.none_below(4)
    assert rule([*map(known, (0.5, 0.0, 0.1, -0.1)), known(0.5)]) == REPLICATED
    assert rule([*map(known, (0.5, -0.5, 0.1, 0.1)), known(0.2)]) == CONTRADICTED
    assert rule([*map(known, (0.5, 0.0, -0.1, -0.1)), known(-0.4)]) == UNDECIDED


def test_a_course_that_falls_once():
    """Four steps, then final − iterations 0, 1, 2; the last step is final − iteration 3."""
    rule = rules.one_falls(4)
    assert rule([*map(known, (0.5, -0.5, 0.1, 0.1)), *map(known, (0.2, -0.3, 0.2))]) == REPLICATED
    assert rule([*map(known, (0.5, 0.1, 0.1, 0.0)), *map(known, (0.7, 0.2, 0.1))]) == CONTRADICTED
    # Rising as a whole contradicts no fall on the way: it may be below iteration 1 by more than the margin.
    assert rule([*map(known, (5.0, -0.2, -0.2, -0.2)), *map(known, (4.4, -0.6, -0.4))]) == UNDECIDED
    assert rule([*map(known, (0.5, 0.1, 0.1)), known(0.0, 0.3), *map(known, (0.7, 0.2, 0.1))]) == UNDECIDED


def test_what_would_decide():
    """5 seeds of variance 4: ± t · 2/√5. A mean of 1 needs 18 seeds: 2.11 · 2/√18 = 0.99."""
    five = Estimate(1.0, 5, 4 / 5, 0.0)
    assert needs([five], above(0)) == "needs 18 seeds"
    assert needs([Estimate(0.1, 5, 4 / 5, 0.0)], above(0)) == "needs more than 100 seeds"
    assert needs([Estimate(1.0, 5, 4 / 5, 0.6**2)], above(0)) == "needs more problems"
    part = judge("first − second", {"": five}, above(0))
    assert str(part) == "undecided (needs 18 seeds)" and part.text.startswith("first − second: +1.00 [")
    assert judge("", {"": known(9, seeds=1)}, above(0)).why.startswith("needs 3 seeds at least")
    assert judge("", {"": known(9)}, above(0)).why == ""


def test_the_word_of_a_claim():
    def word(*verdicts: str) -> str:
        return overall([Part("", verdict) for verdict in verdicts])

    assert word(REPLICATED, REPLICATED) == REPLICATED and word(REPLICATED, BY_DEFINITION) == REPLICATED
    assert word(NOT_TESTED) == NOT_TESTED
    assert word(REPLICATED, UNDECIDED) == "1 of 2 parts replicated, 1 undecided"
    assert word(CONTRADICTED, NOT_TESTED, CONTRADICTED) == "2 of 3 parts contradicted, 1 not tested here"


@pytest.fixture
def measured(tmp_path: Path) -> Scores:
    """SPIN's five policies, five seeds: each seed and iteration is off by 1 (standard deviation) on every problem."""
    folder, generator = tmp_path / "pocket", np.random.default_rng(0)
    folder.mkdir()
    columns = [{"benchmark": f"b{i}", "label": f"B{i}", "group": "g", "metric": "em"} for i in range(2)]
    (folder / "suite.json").write_text(json.dumps({"columns": columns}))
    hardness = 20 * generator.standard_normal((2, 30))
    offs = generator.standard_normal((5, 5))
    offs = (offs - offs.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(offs.T) + 1e-9 * np.eye(5))).T
    rows = [
        pd.DataFrame({"method": "spin", "seed": seed, "iteration": t, "benchmark": f"b{b}", "doc_id": range(30),
                      "value": 50 + hardness[b] + offs[seed, t]})
        for seed in range(5) for t in range(5) for b in range(2)
    ]  # fmt: skip
    pd.concat(rows).astype({"iteration": "Int8"}).to_parquet(folder / "problems.parquet")
    return Scores(folder)


def test_chances_are_those_of_the_t_test(measured):
    """One step, whose seeds' differences have a variance of 2: nothing changes, and a change of 2."""
    variation = power.Variation(measured, POLICIES)
    step = [minus(POLICIES[1], POLICIES[0])]
    covariance = variation.between_seeds
    spread = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert variation.problems == pytest.approx(variation.problems[0, 0])  # hard for all policies alike: no difference
    nothing = power.chances(variation, step, above(0), dict.fromkeys(POLICIES, 0.0))
    assert nothing[REPLICATED] == pytest.approx(0.025, abs=0.01) and nothing[CONTRADICTED] == pytest.approx(
        0.025, abs=0.01
    )
    gain = dict.fromkeys(POLICIES, 0.0) | {POLICIES[1]: 2.0}
    wanted = 1 - nctdtr(4, 2 / (spread / 5) ** 0.5, stdtrit(4, 0.975))
    assert power.chances(variation, step, above(0), gain)[REPLICATED] == pytest.approx(wanted, abs=0.02)


def test_simulated_experiments_vary_as_the_measured_ones(measured):
    variation = power.Variation(measured, POLICIES)
    weights = [minus(POLICIES[4], POLICIES[0]), minus(POLICIES[1], POLICIES[0])]
    drawn = variation.simulated(weights, {policy: float(policy[1]) for policy in POLICIES})
    for contrast, found, truth in zip(weights, drawn, (4, 1), strict=True):
        vector = np.array([contrast.get(policy, 0.0) for policy in POLICIES])
        assert found.mean.mean() == pytest.approx(truth, abs=0.05)
        assert found.mean.var() == pytest.approx(vector @ variation.between_seeds @ vector / 5, rel=0.1)
        assert found.seed_variance.mean() == pytest.approx(found.mean.var(), rel=0.1)
    with pytest.raises(ValueError, match="one seed"):
        power.Variation(measured, [("spin", 0), ("sft", None)])


def runs(effect: np.ndarray, seed: int, noise: float = 1.0, shared: float = 0.5, seeds: int = 5) -> np.ndarray:
    """A grid of runs; a share of their noise is common to the cells of one α, as that of their iteration 0 is."""
    generator = np.random.default_rng(seed)
    of_rows, of_cells = generator.standard_normal((seeds, 4, 1)), generator.standard_normal((seeds, 4, 4))
    return 40 + effect + noise * (shared**0.5 * of_rows + (1 - shared) ** 0.5 * of_cells)


@pytest.mark.parametrize("effect", [0.0, 3.0], ids=["equal cells", "one row better"])
def test_the_spread_of_a_grid_holds_the_truth_and_its_p_is_calibrated(monkeypatch, effect):
    """At least 92 % of intervals (up to 98 %: too wide with few seeds); 5 % of equal grids are significant."""
    monkeypatch.setattr(grid, "DRAWS", 200)
    truth = np.zeros((4, 4))
    truth[3] = effect
    found = [grid.spread_of(runs(truth, seed)) for seed in range(200)]
    assert np.mean([each.low <= effect <= each.high for each in found]) > 0.92
    significant = np.mean([each.p < 0.05 for each in found])
    assert significant < 0.09 if effect == 0 else significant > 0.9
    if effect:
        assert np.mean([each.spread for each in found]) == pytest.approx(effect, abs=0.6)
        assert np.mean([each.observed for each in found]) > effect + 0.8  # best of noisy cells
    else:
        assert found[0].noise == pytest.approx(np.mean([each.observed for each in found]), rel=0.35)


def test_a_grid_without_noise_and_with_more_seeds():
    exact = grid.spread_of(runs(np.arange(16).reshape(4, 4) / 5, 0, noise=0))
    assert (exact.low, exact.spread, exact.high, exact.noise) == pytest.approx((3, 3, 3, 0))
    noisy = grid.spread_of(runs(np.zeros((4, 4)), 0))
    assert noisy.at(20).noise == pytest.approx(noisy.noise / 2)
    assert noisy.at(20).high - noisy.at(20).low == pytest.approx((noisy.high - noisy.low) / 2)

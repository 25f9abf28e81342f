"""Intervals and tests, by SciPy and statsmodels: how sure a mean or a difference is.

Scores come as an array (seeds, benchmarks, problems) of values in percent, NaN where a benchmark has fewer problems
than another. A mean is over problems, then benchmarks, then seeds. Differences are arrays of that shape too: methods
share their problems, so that a difference is taken problem by problem before anything is averaged.
"""

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

RESAMPLES = 2000
MANY = 30  # seeds: what drawing their problems again adds is a normal error then, within a hundredth of a point
LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean with its 95 % interval and the number of seeds behind it; a format applies to all of its numbers."""

    mean: float
    low: float
    high: float
    seeds: int

    def __format__(self, form: str) -> str:
        form = form or ".2f"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def __str__(self) -> str:
        return format(self)


def seed_means(values: np.ndarray) -> np.ndarray:
    """The mean of each seed: over problems, then benchmarks."""
    means: np.ndarray = np.nanmean(values, axis=-1).mean(axis=-1)
    return means


def estimate(values: np.ndarray) -> Estimate:
    """The mean and its interval.

    Bootstrap percentiles: seeds are drawn again, and within each drawn seed the problems of every benchmark (of more
    than MANY seeds: the means of the drawn ones, each with the normal error of its problems). With one
    seed, whose spread nothing tells, the interval is that of the problems alone (normal).
    """
    mean, seeds = float(seed_means(values).mean()), len(values)
    if seeds < 2:
        half = stats.norm.ppf((1 + LEVEL) / 2) * _problem_error(values[0])
        return Estimate(mean, mean - half, mean + half, seeds)
    generator = np.random.default_rng(0)
    resampled = (_normal_means if seeds > MANY else _drawn_means)(values, generator)
    result = stats.bootstrap((np.arange(seeds),), resampled, n_resamples=RESAMPLES, batch=50, vectorized=True,
                             confidence_level=LEVEL, method="percentile", rng=generator)  # fmt: skip
    return Estimate(mean, float(result.confidence_interval.low), float(result.confidence_interval.high), seeds)


def _normal_means(values: np.ndarray, generator: np.random.Generator) -> Callable[..., np.ndarray]:
    """Drawn seeds, numbers of shape (…, seeds) → the mean of their means, each with the error of its problems."""
    means, errors = seed_means(values), np.array([_problem_error(seed) for seed in values])

    def resampled(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        drawn = drawn.astype(int)
        return (means[drawn] + errors[drawn] * generator.standard_normal(drawn.shape)).mean(-1)

    return resampled


def _drawn_means(values: np.ndarray, generator: np.random.Generator) -> Callable[..., np.ndarray]:
    """Drawn seeds, numbers of shape (…, seeds) → the mean over problems of theirs that are drawn again."""
    counts = (~np.isnan(values)).sum(-1)  # real problems stand first
    benchmark = np.arange(values.shape[1])[:, None]

    def resampled(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        drawn = drawn.astype(int)
        picks = generator.random((*drawn.shape, *values.shape[1:]), dtype=np.float32)
        picks = (picks * counts[drawn][..., None]).astype(np.int32)
        again = values[drawn[..., None, None], benchmark, picks]
        real = np.arange(values.shape[2]) < counts[drawn][..., None]
        sums = np.where(real, again, 0).sum(-1)  # (…, seeds, benchmarks)
        return (sums / counts[drawn]).mean((-1, -2))

    return resampled


def p_value(differences: np.ndarray) -> float:
    """Two-sided p of a mean difference of zero: a t test over seeds, or with fewer than three of them over problems.

    1 where every difference is zero.
    """
    means = seed_means(differences)
    if not differences[~np.isnan(differences)].any():
        return 1.0
    if len(means) >= 3 and means.std() > 0:
        return float(stats.ttest_1samp(means, 0).pvalue)
    error = np.sqrt(sum(_problem_error(seed) ** 2 for seed in differences)) / len(differences)
    return float(2 * stats.norm.sf(abs(means.mean()) / error)) if error > 0 else 0.0


def corrected(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm)."""
    return [float(p) for p in multipletests(list(p_values), method="holm")[1]] if len(p_values) else []


def of_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one number per seed, with its t interval (one seed: no interval)."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean, -inf, inf, len(array))
    if array.std() == 0:
        return Estimate(mean, mean, mean, len(array))
    low, high = stats.t.interval(LEVEL, len(array) - 1, loc=mean, scale=stats.sem(array))
    return Estimate(mean, float(low), float(high), len(array))


def _problem_error(values: np.ndarray) -> float:
    """Standard error of one seed's mean over benchmarks, from problems within them."""
    counts = (~np.isnan(values)).sum(-1)
    variances = np.nanvar(values, axis=-1, ddof=1) / counts
    return float(np.sqrt(variances.sum()) / len(values))

"""Intervals and tests: how sure a mean or a difference is.

Scores come as an array (seeds, benchmarks, problems) of values in percent, NaN where a benchmark has fewer problems
than another. A mean is over problems, then benchmarks, then seeds. Differences are arrays of that shape too: methods
share their problems, so that a difference is taken problem by problem before anything is averaged.

scipy.stats takes longer to import than all of this takes to compute: its distributions are in scipy.special too, which
tables do without.
"""

from collections.abc import Sequence
from math import inf
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
BATCH = 100  # resamples that are picked at once: little memory, and quicker than all of them
MANY = 30  # seeds: what drawing their problems again adds is a normal error then, within a hundredth of a point
LEVEL = 0.95
NORMAL = NormalDist()


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


def estimates(values: np.ndarray) -> list[Estimate]:
    """The mean of each benchmark, and last that of all of them, with their intervals.

    Bootstrap percentiles: seeds are drawn again, and within each drawn seed the problems of every benchmark (of more
    than MANY seeds: the means of the drawn ones, each with the normal error of its problems). With one
    seed, whose spread nothing tells, the interval is that of the problems alone (normal).
    """
    means = _with_all(_benchmark_means(values).mean(0))
    if len(values) < 2:
        errors = np.append(np.sqrt(_variances(values)[0]), _problem_error(values))
        half = NORMAL.inv_cdf((1 + LEVEL) / 2) * errors
        lows, highs = means - half, means + half
    else:
        resampled = (_normal_means if len(values) > MANY else _drawn_means)(values, np.random.default_rng(0))
        lows, highs = np.quantile(_with_all(resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    numbers = np.stack([means, lows, highs], axis=-1).tolist()
    return [Estimate(mean, low, high, len(values)) for mean, low, high in numbers]


def estimate(values: np.ndarray) -> Estimate:
    """The mean of all benchmarks and its interval, see `estimates`."""
    return estimates(values)[-1]


def seed_means(values: np.ndarray) -> np.ndarray:
    """The mean of each seed: over problems, then benchmarks."""
    return _benchmark_means(values).mean(-1)


def _benchmark_means(values: np.ndarray) -> np.ndarray:
    """(seeds, benchmarks): over problems."""
    means: np.ndarray = np.nanmean(values, axis=-1)
    return means


def _with_all(means: np.ndarray) -> np.ndarray:
    """(…, benchmarks) → (…, benchmarks + 1): the mean of all benchmarks beside theirs."""
    return np.concatenate([means, means.mean(-1, keepdims=True)], axis=-1)


def _normal_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of seeds that are drawn again, each with the normal error of its problems: (RESAMPLES, benchmarks)."""
    times = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)  # each seed is drawn
    errors = np.sqrt(times @ _variances(values))
    noise = errors * generator.standard_normal(errors.shape)
    return (times @ _benchmark_means(values) + noise) / len(values)


def _drawn_means(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of seeds that are drawn again, and within each of them of problems: (RESAMPLES, benchmarks)."""
    drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
    means = np.empty((*drawn.shape, values.shape[1]))
    for number, seed in enumerate(values):
        places = drawn == number
        count = int(places.sum())
        again = [_means_again(problems[~np.isnan(problems)], count, generator) for problems in seed]
        means[places] = np.stack(again, axis=-1)
    return means.mean(1)


def _means_again(problems: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` means of problems that are drawn again from these, as many as there are.

    Where few values are different, as those of right and wrong answers are, what is drawn is how often each occurs.
    """
    size, (distinct, times) = len(problems), np.unique(problems, return_counts=True)
    if 10 * len(distinct) < size:  # beyond, picking problem by problem is quicker
        again: np.ndarray = generator.multinomial(size, times / size, count) @ distinct / size
    else:
        parts = [min(BATCH, count - done) for done in range(0, count, BATCH)]
        again = np.concatenate([problems.take(generator.integers(size, size=(n, size))).mean(-1) for n in parts])
    return again


def _variances(values: np.ndarray) -> np.ndarray:
    """(seeds, benchmarks): of each mean, from its problems."""
    counts = (~np.isnan(values)).sum(-1)
    variances: np.ndarray = np.nanvar(values, axis=-1, ddof=1) / counts
    return variances


def _problem_error(values: np.ndarray) -> float:
    """Standard error of the mean over benchmarks and seeds, from problems within them."""
    variances = _variances(values)
    return float(np.sqrt(variances.sum()) / variances.size)


def p_value(differences: np.ndarray) -> float:
    """Two-sided p of a mean difference of zero: a t test over seeds, or with fewer than three of them over problems.

    1 where every difference is zero.
    """
    from scipy.special import stdtr  # Student's t

    means = seed_means(differences)
    if not differences[~np.isnan(differences)].any():
        return 1.0
    if len(means) >= 3 and means.std() > 0:
        t = means.mean() / _seed_error(means)
        return float(2 * stdtr(len(means) - 1, -abs(t)))
    error = _problem_error(differences)
    return 2 * NORMAL.cdf(-abs(means.mean()) / error) if error > 0 else 0.0


def corrected(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm)."""
    order = np.argsort(p_values)
    each = np.sort(p_values) * np.arange(len(p_values), 0, -1)  # the smallest by their number, the largest by 1
    found = np.empty(len(p_values))
    found[order] = np.maximum.accumulate(each).clip(max=1)
    return [float(p) for p in found]


def of_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one number per seed, with its t interval (one seed: no interval)."""
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean, -inf, inf, len(array))
    if array.std() == 0:
        return Estimate(mean, mean, mean, len(array))
    half = float(stdtrit(len(array) - 1, (1 + LEVEL) / 2) * _seed_error(array))
    return Estimate(mean, mean - half, mean + half, len(array))


def _seed_error(means: np.ndarray) -> float:
    """Standard error of a mean over seeds."""
    return float(means.std(ddof=1) / np.sqrt(len(means)))

"""Intervals and tests: how sure a mean or a difference is.

Scores come as an array (seeds, benchmarks, problems) of values in percent, NaN where a benchmark has fewer problems
than another. A mean is over problems, then benchmarks, then seeds. Differences are arrays of that shape too: methods
share their problems, so that a difference is taken problem by problem before anything is averaged.

All seeds answer the same problems. What one drew of them, all did, and more seeds do not average it away: seeds and
problems are crossed, and the variance of a mean is that of its seeds plus that of its problems,

    max(s² / n, e)  +  1 / K² · Σ_k (v_k − r_k / n) / m_k ,    e = 1 / K² · Σ_k r_k / (n m_k) ,

s² between the n seeds' means; v_k between the means (over seeds) of benchmark k's m_k problems; r_k what seeds and
problems leave unexplained. s² / n holds that noise e, so that it is not expected below it: two seeds that happen to
agree say nothing of a third. Degrees of freedom are Welch's and Satterthwaite's, of s², v and, below e, r: the interval
is Student's of n − 1 where seeds decide and normal where problems or single answers do.

Coverage of 95 % intervals, simulated (tests/test_statistics.py, scores and differences of right and wrong answers):
94 to 98 % from three seeds on, the more the less seeds differ, since e errs to the safe side; with two seeds 90 to
98 %, 90 where seeds differ much. Fewer than three (ENOUGH) decide nothing.

Of a share that is 0 or 1 nothing varies, and the formula gives no interval: it gets Wilson's (`share`).

With one seed the interval is that of the problems alone: nothing is known of the spread between seeds.

scipy.stats takes longer to import than all of this takes to compute: its distributions are in scipy.special too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
ENOUGH = 3  # seeds, for a p-value or a verdict
POWER = 0.8  # with which a minimum detectable difference is detected


@dataclass(frozen=True)
class Estimate:
    """A mean, and the variance that seeds and problems give it. Every number may be an array of many estimates.

    seed_variance, problem_variance: of the mean, see above; seed_df, problem_df: their degrees of freedom, the first
    seeds − 1 unless it is said.
    wide: the same mean where the benchmarks are drawn too, as a sample of the tasks there are; a mean over one
    benchmark has none. A format applies to all of its numbers.
    """

    mean: Any
    seeds: int
    seed_variance: Any
    problem_variance: Any
    problem_df: Any = inf
    seed_df: Any = None
    wide: Estimate | None = None

    @property
    def error(self) -> Any:
        """Standard error of the mean."""
        return np.sqrt(self.seed_variance + self.problem_variance)

    @property
    def df(self) -> Any:
        """Degrees of freedom of the standard error; infinite where nothing varies."""
        total = np.add(self.seed_variance, self.problem_variance)
        with np.errstate(divide="ignore", invalid="ignore"):
            seeds, problems = self.seed_variance / total, self.problem_variance / total
            df = 1 / (seeds**2 / self._seed_df + problems**2 / self.problem_df)
        return np.where(total > 0, df, inf)[()]

    @property
    def half(self) -> Any:
        """Half of the 95 % interval."""
        from scipy.special import stdtrit  # Student's t

        reach = stdtrit(self.df, (1 + LEVEL) / 2) * self.error
        return np.where(np.isinf(self.error), inf, reach)[()]

    @property
    def low(self) -> Any:
        """Lower end of the 95 % interval."""
        return self.mean - self.half

    @property
    def high(self) -> Any:
        """Upper end of the 95 % interval."""
        return self.mean + self.half

    @property
    def p(self) -> Any:
        """Two-sided p of a true mean of zero: below 0.05 where the interval is without zero."""
        from scipy.special import stdtr

        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(np.equal(self.mean, 0), 0.0, np.abs(self.mean) / self.error)
        return 2 * stdtr(self.df, -t)

    @property
    def detectable(self) -> Any:
        """The minimum detectable difference: a true mean of that size has p < 0.05 with a probability of POWER."""
        from scipy.special import stdtrit

        return (stdtrit(self.df, (1 + LEVEL) / 2) + stdtrit(self.df, POWER)) * self.error

    def at(self, seeds: float) -> Estimate:
        """The same mean and variances as they would be with so many seeds; infinitely many leave the problems'."""
        count = int(seeds) if np.isfinite(seeds) else 10**9
        variance, df = self.seed_variance * self.seeds / count, self._seed_df * (_free(count) / _free(self.seeds))
        return replace(self, seeds=count, seed_variance=variance, seed_df=df, wide=None)

    @property
    def _seed_df(self) -> Any:
        return _free(self.seeds) if self.seed_df is None else self.seed_df

    def __format__(self, form: str) -> str:
        form = form or ".2f"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class Share(Estimate):
    """A share of `count` outcomes, from 0 to `whole`, as its interval is: at an end Wilson's, (0, z² / (count + z²)).

    Seeds that answer the same problems are one sample of them: `count` is one seed's.
    """

    whole: float = 1.0
    count: int = 1

    @property
    def low(self) -> Any:
        """Lower end of the 95 % interval."""
        inner = np.maximum(super().low, 0)
        return np.where(np.greater_equal(self.mean, self.whole), self.whole - self._reach, inner)[()]

    @property
    def high(self) -> Any:
        """Upper end of the 95 % interval."""
        return np.where(np.less_equal(self.mean, 0), self._reach, np.minimum(super().high, self.whole))[()]

    @property
    def _reach(self) -> float:
        return self.whole * none_of(self.count)


def none_of(count: int) -> float:
    """The upper end of Wilson's 95 % interval of a share of 0 of `count`."""
    from scipy.special import ndtri

    square = float(ndtri((1 + LEVEL) / 2)) ** 2
    return square / (count + square)


def share(found: Estimate, count: int, whole: float = 1.0) -> Share:
    """An estimate that is one of a share, of `count` outcomes a seed."""
    wide = share(found.wide, count, whole) if found.wide else None
    return Share(**{**fields_of(found), "wide": wide}, whole=whole, count=count)


def fields_of(found: Estimate) -> dict[str, Any]:
    """An estimate's fields, for one that says more."""
    return {name: getattr(found, name) for name in Estimate.__dataclass_fields__}


def estimates(values: np.ndarray) -> list[Estimate]:
    """The mean of each benchmark, and last that of all of them."""
    return [*(estimate(values[:, [k]]) for k in range(values.shape[1])), estimate(values)]


def estimate(values: np.ndarray) -> Estimate:
    """The mean of all benchmarks. values: (…, seeds, benchmarks, problems): an estimate for each of the first."""
    means = _means(values, -1)  # (…, seeds, benchmarks)
    narrow = _crossed(values, means)
    if means.shape[-1] < 2:
        return narrow
    wide = _crossed(means[..., None, :], means)  # benchmarks are drawn as problems are
    most = np.maximum(wide.problem_variance, narrow.problem_variance)  # those that happen to agree have problems still
    return replace(narrow, wide=replace(wide, problem_variance=most, problem_df=means.shape[-1] - 1.0))


def of_seeds(values: ArrayLike) -> Estimate:
    """The mean of one number per seed, with its t interval (one seed: no interval)."""
    numbers = np.asarray(values, dtype=float)
    return Estimate(float(numbers.mean()), len(numbers), _seed_variance(numbers) if len(numbers) > 1 else inf, 0.0)


def of_errors(means: ArrayLike, errors: ArrayLike) -> Estimate:
    """The mean of one number per seed, each with the standard error of its problems, where outcomes are not known.

    How much of an error all seeds share is not known either: all of it is taken to be shared, which is too much rather
    than too little. An unknown error leaves the interval unknown.
    """
    numbers = np.asarray(means, dtype=float)
    shared = float(np.square(np.asarray(errors, dtype=float)).mean())
    return Estimate(float(numbers.mean()), len(numbers), _seed_variance(numbers), shared)


def corrected(p_values: Any) -> np.ndarray:
    """p-values corrected for their number (Holm). p_values: (tests, …); every column is corrected by itself."""
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, axis=0)
    factors = np.arange(len(values), 0, -1).reshape(-1, *[1] * (values.ndim - 1))
    each = np.take_along_axis(values, order, 0) * factors  # the smallest by their number, the largest by 1
    found = np.empty_like(values)
    np.put_along_axis(found, order, np.maximum.accumulate(each, axis=0).clip(max=1), 0)
    return found


def at_least(spread: Any, seeds: int, least: Any, least_df: Any) -> tuple[Any, Any]:
    """The seeds' part of a variance, and its degrees of freedom: spread = s² / n, least = e, as above."""
    variance = np.maximum(spread, least)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.minimum(_free(seeds) * (variance / spread) ** 2, least_df)
    return variance, np.where(spread < least, df, _free(seeds))


def _crossed(values: np.ndarray, means: np.ndarray) -> Estimate:
    """The estimate of values (…, seeds, benchmarks, problems) by the formula above. means: (…, seeds, benchmarks)."""
    whole, (seeds, count) = means.mean(-1), values.shape[-3:-1]
    shared, noise, df, noise_df = _problem_variances(values)
    least, least_df = noise.sum(-1) / count**2, _pooled(noise, noise_df)
    seed_variance, seed_df = at_least(_seed_variance(whole), seeds, least, least_df)
    problem_variance = np.maximum(shared.sum(-1), 0) / count**2
    return Estimate(whole.mean(-1), seeds, seed_variance, problem_variance, _pooled(shared + noise, df), seed_df)


def _free(seeds: int) -> float:
    """Degrees of freedom of the spread between seeds; 1 of one seed, which has no spread to weigh."""
    return max(seeds - 1.0, 1.0)


def _pooled(variances: np.ndarray, dfs: np.ndarray) -> np.ndarray:
    """Degrees of freedom of a sum of variances (Satterthwaite). Both (…, parts)."""
    squares = (variances**2 / dfs).sum(-1)
    return np.divide(variances.sum(-1) ** 2, squares, out=np.full_like(squares, inf), where=squares > 0)


def _means(values: np.ndarray, axis: int) -> np.ndarray:
    """Means of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = np.where(there, values, 0).sum(axis) / there.sum(axis)
    return means


def _seed_variance(means: np.ndarray) -> np.ndarray:
    """Of the mean of seeds' means (…, seeds); 0 of one seed, whose spread nothing tells."""
    count = means.shape[-1]
    return means.var(-1, ddof=1) / count if count > 1 else np.zeros(means.shape[:-1])[()]


def _problem_variances(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each benchmark's mean: (v − r / n) / m and r / (n m), above, and degrees of freedom of their sum and of r.

    The first may be below zero. A problem that some seeds lack weighs by its part of the seeds' means.
    """
    seeds, there = values.shape[-3], ~np.isnan(values)
    counts = there.sum(-3)  # (…, benchmarks, problems): seeds that have it
    present = counts > 0
    problems = present.sum(-1)
    means = _means(values, -3)
    centred = np.where(present, means - _means(means, -1)[..., None], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (centred**2).sum(-1) / np.where(problems > 1, problems - 1, np.nan)
        inverse = np.where(present, 1 / counts, 0.0).sum(-1) / problems  # 1 / seeds, where none lacks a problem
    residual, free = np.zeros_like(between), np.ones_like(between)
    if seeds > 1:
        left = np.where(there, values - _means(values, -1)[..., None] - centred[..., None, :, :], 0.0)
        free = np.maximum(there.sum((-3, -1)) - problems - (seeds - 1), 1.0)
        residual = (left**2).sum((-3, -1)) / free
    weights = (there / there.sum(-1)[..., None]).mean(-3)
    squares = (weights**2).sum(-1)  # 1 / problems, likewise
    noise = residual * inverse * squares
    return between * squares - noise, noise, np.maximum(problems - 1.0, 1.0), free

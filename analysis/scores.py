"""Scores problem by problem, and what follows from them: intervals of means and of paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tspin.schema import BASE, averaged, is_share

from .intervals import Estimate, corrected, estimate, estimates, share
from .reading import read_suite, read_table, unusable
from .writing import counted, seeds_in_words

Policy = tuple[str, int | None]  # method and iteration; None for base and sft
Weights = Mapping[Policy, float]  # of a contrast: a sum of policies' scores
AVG = "Avg"
CEILING = 97.0  # percent: nothing is left to gain
CONSTANT = 0.98  # share of a benchmark's problems that all policies and seeds answer alike


class Comparison(NamedTuple):
    """first − second, in points of percent: its interval, and p corrected for the comparisons made beside it."""

    first: Policy
    second: Policy
    difference: Estimate
    p: float

    def __str__(self) -> str:
        return f"{self.difference:+.2f} p {self.p:.2g}"


class Scores:
    """The problem-by-problem scores of a preset: `problems.parquet` of its results folder.

    labels: the table's columns that Avg is of (tspin.schema.averaged); shares: whether they are shares of problems.
    Raises UserError when a file is missing or malformed, or has no column's problems.
    """

    def __init__(self, folder: Path):
        table, columns = read_table(folder, "problems"), read_suite(folder)
        self.labels = averaged((column.named for column in columns), set(table["benchmark"]))
        columns = [column for column in columns if column.label in self.labels]
        if not columns:
            raise unusable(folder / "problems.parquet", "has the problems of no column of suite.json")
        self.shares = all(is_share(column.benchmark, column.metric) for column in columns)
        position = {column.benchmark: number for number, column in enumerate(columns)}
        table = table[table["benchmark"].isin(position)]
        table = table.assign(benchmark=table["benchmark"].map(position).astype(int))
        self._means: dict[Policy, dict[str, Estimate]] = {}
        self._values: dict[Policy, dict[int, np.ndarray]] = {}  # by policy and seed, both in order
        for (method, iteration, seed), values in outcomes(table, ["method", "iteration", "seed"]).items():
            self._values.setdefault((method, iteration), {})[seed] = values

    def policies(self) -> list[Policy]:
        """What there is, by method and iteration."""
        return list(self._values)

    def seeds(self, policy: Policy) -> list[int]:
        """The seeds of a policy; the base is one policy, whatever the seeds."""
        seeds = list(self._values.get(policy, {}))
        return seeds[:1] if policy[0] == BASE else seeds

    def last(self, method: str) -> Policy | None:
        """The policy that a method of self-play ended with; None where it was not run."""
        iterations = [t for name, t in self._values if name == method and t is not None]
        return (method, max(iterations)) if iterations else None

    def size(self, policies: Iterable[Policy]) -> str:
        """How many seeds some policies have, and problems a benchmark, in words."""
        seeds = {len(self.seeds(policy)) for policy in policies if policy[0] != BASE} or {1}
        values = next(iter(next(iter(self._values.values())).values()))
        problems = (~np.isnan(values)).sum(-1).tolist()
        return f"{seeds_in_words(seeds)}, {counted(problems)} problems a benchmark"

    def values(self, policy: Policy, seeds: list[int] | None = None) -> np.ndarray:
        """(seeds, benchmarks, problems) in percent; the base is repeated for every seed asked for."""
        values, first = self._values[policy], self.seeds(policy)[0]
        wanted = self.seeds(policy) if seeds is None else seeds
        return np.stack([values[first if policy[0] == BASE else seed] for seed in wanted])

    def has(self, *policies: Policy) -> bool:
        """Whether all of them were run."""
        return all(policy in self._values for policy in policies)

    def mean(self, policy: Policy, label: str = AVG) -> Estimate:
        """The mean of a column over seeds, with its interval; those of a policy are computed together, and once."""
        if policy not in self._means:
            values = self.values(policy)
            found = dict(zip([*self.labels, AVG], estimates(values), strict=True))
            problems = dict(zip(self.labels, (~np.isnan(values[0])).sum(-1).tolist(), strict=True))
            if self.shares:  # then their mean is one too
                problems[AVG] = sum(problems.values())
                found |= {name: share(found[name], count, 100) for name, count in problems.items()}
            self._means[policy] = found
        return self._means[policy][label]

    def common_seeds(self, policies: Sequence[Policy]) -> list[int]:
        """The seeds that all of them have; the base has every seed."""
        trained = [set(self.seeds(policy)) for policy in policies if policy[0] != BASE]
        return sorted(set.intersection(*trained)) if trained else self.seeds(policies[0])

    def contrast(self, weights: Weights, labels: Sequence[str] = ()) -> np.ndarray:
        """(seeds, benchmarks, problems): the weighted sum of policies problem by problem, over the seeds they share.

        labels: the benchmarks; all of them where none is named.
        """
        seeds = self.common_seeds(list(weights))
        whole = np.sum([weight * self.values(policy, seeds) for policy, weight in weights.items()], axis=0)
        return whole[:, [self.labels.index(label) for label in labels or self.labels]]

    def difference(self, first: Policy, second: Policy, labels: Sequence[str] = ()) -> Estimate:
        """first − second, paired by seed and problem."""
        return estimate(self.contrast(minus(first, second), labels))

    def compare(self, pairs: Sequence[tuple[Policy, Policy]], label: str = AVG) -> list[Comparison]:
        """Paired differences with p-values corrected for their number."""
        found = [self.difference(*pair, [] if label == AVG else [label]) for pair in pairs]
        p_values = corrected([difference.p for difference in found])
        return [Comparison(*pair, difference, p) for pair, difference, p in zip(pairs, found, p_values, strict=True)]

    def still(self, policies: Sequence[Policy]) -> dict[str, str]:
        """The benchmarks that cannot tell these policies apart, and why: label → reason."""
        reasons = {}
        values = np.concatenate([self.values(policy) for policy in policies])  # (runs, benchmarks, problems)
        levels = np.stack([np.nanmean(self.values(policy), axis=(0, -1)) for policy in policies])
        alike = (np.nanmax(values, 0, initial=-np.inf) == np.nanmin(values, 0, initial=np.inf)).sum(-1)
        problems = (~np.isnan(values)).any(0).sum(-1)
        for label, level, same in zip(self.labels, levels.min(0), alike / problems, strict=True):
            if same >= CONSTANT:
                reasons[label] = f"{same:.0%} of its problems are answered alike by all"
            elif level >= CEILING:
                reasons[label] = f"all at {level:.0f} % or more"
        return reasons


def outcomes(table: pd.DataFrame, keys: list[str]) -> dict[tuple[Any, ...], np.ndarray]:
    """(benchmarks, problems) of each run, NaN where there is none; by the run's `keys`, an iteration of NA as None.

    table: keys, iteration among them, then benchmark (its number), doc_id, value. A run without one of the benchmarks
    has no average, and is left out.
    """
    shape = 1 + int(table["benchmark"].max()), 1 + int(table["doc_id"].max())
    found = {}
    for key, rows in table.assign(iteration=table["iteration"].fillna(-1)).groupby(keys):
        values = np.full(shape, np.nan)
        values[rows["benchmark"].to_numpy(int), rows["doc_id"].to_numpy(int)] = rows["value"].to_numpy(float)
        if not np.isnan(values).all(-1).any():
            named: dict[str, Any] = dict(zip(keys, tuple(key), strict=True))  # type: ignore[arg-type]
            named["iteration"] = None if named["iteration"] < 0 else int(named["iteration"])
            found[tuple(named.values())] = values
    return found


def minus(first: Policy, second: Policy) -> Weights:
    """The contrast of two policies."""
    return {first: 1.0, second: -1.0}


@lru_cache(maxsize=8)
def scores_of(folder: Path) -> Scores:
    """`Scores`, read once."""
    return Scores(folder)


def means(scores: Scores) -> pd.DataFrame:
    """Every mean: method, iteration, benchmark, mean, low, high, wide_low, wide_high (of Avg), seeds."""
    rows = []
    for method, iteration in scores.policies():
        for label in [*scores.labels, AVG]:
            found = scores.mean((method, iteration), label)
            ends = {"mean": found.mean, "low": found.low, "high": found.high, "seeds": found.seeds}
            wide = {"wide_low": found.wide.low, "wide_high": found.wide.high} if found.wide else {}
            rows.append({"method": method, "iteration": iteration, "benchmark": label, **ends, **wide})
    return pd.DataFrame(rows).astype({"iteration": "Int64"})

"""Scores problem by problem, and what follows from them: intervals of means and of paired differences."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tspin.schema import BASE

from .intervals import Estimate, corrected, estimate, estimates, p_value
from .reading import read_suite, read_table

Policy = tuple[str, int | None]  # method and iteration; None for base and sft
AVG = "Avg"


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

    labels: the table's columns. Raises UserError when a file is missing or malformed.
    """

    def __init__(self, folder: Path):
        columns = read_suite(folder)
        self.labels = [column.label for column in columns]
        table = read_table(folder, "problems")
        position = {column.benchmark: number for number, column in enumerate(columns)}
        table = table.assign(benchmark=table["benchmark"].map(position), iteration=table["iteration"].fillna(-1))
        self._means: dict[Policy, dict[str, Estimate]] = {}
        shape = len(position), 1 + int(table["doc_id"].max())
        self._values: dict[Policy, dict[int, np.ndarray]] = {}  # by policy and seed, both in order
        for key, rows in table.groupby(["method", "iteration", "seed"]):
            method, iteration, seed = map(str, tuple(key))  # type: ignore[arg-type]
            values = np.full(shape, np.nan)
            values[rows["benchmark"].to_numpy(int), rows["doc_id"].to_numpy(int)] = rows["value"].to_numpy(float)
            if not np.isnan(values).all(-1).any():  # a run without one of the benchmarks has no average
                policy = method, None if int(iteration) < 0 else int(iteration)
                self._values.setdefault(policy, {})[int(seed)] = values

    def policies(self) -> list[Policy]:
        """What there is, by method and iteration."""
        return list(self._values)

    def seeds(self, policy: Policy) -> list[int]:
        """The seeds of a policy; the base is one policy, whatever the seeds."""
        seeds = list(self._values.get(policy, {}))
        return seeds[:1] if policy[0] == BASE else seeds

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
            columns = [*self.labels, AVG]
            self._means[policy] = dict(zip(columns, estimates(self.values(policy)), strict=True))
        return self._means[policy][label]

    def differences(self, first: Policy, second: Policy, label: str = AVG) -> np.ndarray:
        """first − second problem by problem, over the seeds that both have."""
        seeds = [s for s in self.seeds(first) if second[0] == BASE or s in self.seeds(second)]
        if first[0] == BASE:
            seeds = self.seeds(second)
        return self._column(self.values(first, seeds) - self.values(second, seeds), label)

    def compare(self, pairs: list[tuple[Policy, Policy]], label: str = AVG) -> list[Comparison]:
        """Paired differences with p-values corrected for their number."""
        differences = [self.differences(first, second, label) for first, second in pairs]
        p_values = corrected([p_value(values) for values in differences])
        rows = zip(pairs, differences, p_values, strict=True)
        return [Comparison(*pair, estimate(values), p) for pair, values, p in rows]

    def _column(self, values: np.ndarray, label: str) -> np.ndarray:
        return values if label == AVG else values[:, [self.labels.index(label)]]


@lru_cache(maxsize=8)
def scores_of(folder: Path) -> Scores:
    """`Scores`, read once."""
    return Scores(folder)


def means(scores: Scores) -> pd.DataFrame:
    """Every mean: method, iteration, benchmark, mean, low, high, seeds."""
    rows = [
        {"method": method, "iteration": iteration, "benchmark": label}
        | scores.mean((method, iteration), label)._asdict()
        for method, iteration in scores.policies()
        for label in [*scores.labels, AVG]
    ]
    return pd.DataFrame(rows).astype({"iteration": "Int64"})

"""Scores problem by problem, and what follows from them: intervals of means and of paired differences."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from . import reading as load
from .intervals import Estimate, corrected, estimate, p_value

Policy = tuple[str, int | None]  # method and iteration; None for base and sft
AVG = "Avg"


class Comparison(NamedTuple):
    """first − second, in points of percent: its interval, and p corrected for the comparisons made beside it."""

    first: Policy
    second: Policy
    difference: Estimate
    p: float


class Scores:
    """The problem-by-problem scores of a preset: results/<preset>/problems.parquet.

    labels: the table's columns. Raises UserError when a file is missing or malformed.
    """

    def __init__(self, preset: str, results: Path = Path("results")):
        columns = load.suite(preset, results)
        self.labels = [column.label for column in columns]
        table = load.parquet("problems", preset, results)
        order = {column.benchmark: position for position, column in enumerate(columns)}
        table = table.assign(benchmark=table["benchmark"].map(order), iteration=table["iteration"].fillna(-1))
        problems = 1 + int(table["doc_id"].max())
        self._values: dict[tuple[str, int, int], np.ndarray] = {}
        for key, rows in table.groupby(["method", "seed", "iteration"]):
            method, seed, iteration = map(str, tuple(key))  # type: ignore[arg-type]
            array = np.full((len(order), problems), np.nan)
            array[rows["benchmark"].to_numpy(int), rows["doc_id"].to_numpy(int)] = rows["value"].to_numpy(float)
            if not np.isnan(array).all(-1).any():  # a run without one of the benchmarks has no average
                self._values[str(method), int(iteration), int(seed)] = array

    def policies(self) -> list[Policy]:
        """What there is, by method and iteration."""
        found = sorted({(method, iteration) for method, iteration, _ in self._values})
        return [(method, None if iteration < 0 else iteration) for method, iteration in found]

    def seeds(self, policy: Policy) -> list[int]:
        """The seeds of a policy; the base is one policy, whatever the seeds."""
        method, iteration = policy[0], -1 if policy[1] is None else policy[1]
        seeds = sorted(seed for name, at, seed in self._values if (name, at) == (method, iteration))
        return seeds[:1] if method == "base" else seeds

    def values(self, policy: Policy, seeds: list[int] | None = None) -> np.ndarray:
        """(seeds, benchmarks, problems) in percent; the base is repeated for every seed asked for."""
        own = self.seeds(policy)
        chosen = own if seeds is None else seeds
        method, iteration = policy[0], -1 if policy[1] is None else policy[1]
        return np.stack([self._values[method, iteration, own[0] if method == "base" else seed] for seed in chosen])

    def has(self, *policies: Policy) -> bool:
        """Whether all of them were run."""
        return all(self.seeds(policy) for policy in policies)

    def mean(self, policy: Policy, label: str = AVG) -> Estimate:
        """The mean of a column over seeds, with its interval."""
        return estimate(self._column(self.values(policy), label))

    def differences(self, first: Policy, second: Policy, label: str = AVG) -> np.ndarray:
        """first − second problem by problem, over the seeds that both have."""
        seeds = [s for s in self.seeds(first) if second[0] == "base" or s in self.seeds(second)]
        if first[0] == "base":
            seeds = self.seeds(second)
        return self._column(self.values(first, seeds) - self.values(second, seeds), label)

    def compare(self, pairs: list[tuple[Policy, Policy]], label: str = AVG) -> list[Comparison]:
        """Paired differences with p-values corrected for their number."""
        found = [self.differences(first, second, label) for first, second in pairs]
        p_values = corrected([p_value(one) for one in found])
        rows = zip(pairs, found, p_values, strict=True)
        return [Comparison(first, second, estimate(values), p) for (first, second), values, p in rows]

    def _column(self, values: np.ndarray, label: str) -> np.ndarray:
        return values if label == AVG else values[:, [self.labels.index(label)]]


@lru_cache(maxsize=8)
def scores_of(preset: str, results: Path = Path("results")) -> Scores:
    """`Scores`, read once."""
    return Scores(preset, results)


def intervals(scores: Scores) -> pd.DataFrame:
    """Every mean: method, iteration, benchmark, mean, low, high, seeds."""
    rows = []
    for policy in scores.policies():
        for label in [*scores.labels, AVG]:
            found = scores.mean(policy, label)
            rows.append({"method": policy[0], "iteration": policy[1], "benchmark": label, **found._asdict()})
    return pd.DataFrame(rows).astype({"iteration": "Int64"})

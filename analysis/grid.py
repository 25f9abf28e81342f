"""How much the cells of the α × β grid differ beyond what runs of equal cells would.

Runs are permuted between cells within a seed. The cells of one α share their iteration 0, so that their runs are alike
by more than their settings: whole rows of the grid are permuted, and then the cells of each row.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

DRAWS = 1000
SCALES = np.linspace(0, 3, 31)  # multiples of the observed cell means that are tried as true ones


class Spread(NamedTuple):
    """Best − worst of the true cell means, with its 95 % interval: spread, low, high.

    observed: best − worst as measured, which noise makes larger. noise: what equal cells would span by noise alone, on
    average. p: of equal cells.
    """

    seeds: int
    cells: int
    observed: float
    noise: float
    spread: float
    low: float
    high: float
    p: float

    def at(self, seeds: int) -> "Spread":
        """The same cells as they would be with so many seeds: noise and interval shrink with their root."""
        scale = (self.seeds / seeds) ** 0.5
        low, high = (self.spread + scale * (end - self.spread) for end in (self.low, self.high))
        return self._replace(seeds=seeds, noise=scale * self.noise, low=low, high=high)


def grid_of(table: pd.DataFrame) -> np.ndarray:
    """(seeds, α, β): T-SPIN's averages at iteration 1, where β acts first, of the seeds that have every cell.

    table: of the study `grid`. Raises ValueError where it has no T-SPIN with a column alpha and beta, or sets more.
    """
    table = cells_of(table)
    cells = table.pivot(index="seed", columns=["alpha", "beta"], values="avg")
    alphas, betas = (sorted(table[name].unique()) for name in ("alpha", "beta"))
    cells = cells.reindex(columns=pd.MultiIndex.from_product([alphas, betas])).dropna()
    return cells.to_numpy(float).reshape(-1, len(alphas), len(betas))


def cells_of(table: pd.DataFrame) -> pd.DataFrame:
    """The grid's cells: T-SPIN's rows at iteration 1 of a study that sets α and β. Raises ValueError as `grid_of`."""
    if absent := {"method", "alpha", "beta"} - set(table):
        raise ValueError(f"it has no column {' and none '.join(sorted(absent))}")
    rows = table[(table["method"] == "tspin") & (table["iteration"] == 1)].dropna(subset=["alpha", "beta"])
    if rows.empty:
        raise ValueError("it has no cell of T-SPIN at iteration 1 yet")
    if rows.duplicated(["alpha", "beta", "seed"]).any():
        raise ValueError("it sets more than α and β")
    return rows


def spread_of(values: np.ndarray) -> Spread:
    """The spread of a grid (seeds, α, β) of two seeds at least.

    Noise is what cells and seeds leave of the runs, permuted. The interval holds every multiple of the observed cell
    means that, were it the truth, would lead to a studentized range (best − worst over the noise's standard deviation)
    like the observed one; the spread is the multiple at which half of the draws exceed it. It speaks of these problems:
    all cells answer the same.
    """
    count, cells = len(values), values.mean(0)
    shape, width = cells - cells.mean(), float(np.ptp(cells))
    centred = values - values.mean((1, 2), keepdims=True)
    left = (centred - shape) * np.sqrt(count / (count - 1))
    noise, error = permuted_means(left), float((left**2).mean())
    around = np.sqrt(
        np.maximum(error - noise.var((1, 2)), 0) * count / (count - 1)
    )  # of permuted runs, around their own cells
    if error == 0:  # nothing but the cells: they are known
        return Spread(count, cells.size, width, 0.0, width, width, width, _p_of_equal(centred, shape))
    ranges = np.ptp(SCALES[:, None, None, None] * shape + noise, axis=(2, 3))  # (SCALES, DRAWS)
    # The share of draws that exceed the observed one, by the multiple: rising, from near 0 to 1.
    exceeding = np.maximum.accumulate((ranges * np.sqrt(error) >= width * around).mean(1))
    low, middle, high = (width * float(np.interp(share, exceeding, SCALES)) for share in (0.025, 0.5, 0.975))
    return Spread(count, cells.size, width, float(ranges[0].mean()), middle, low, high, _p_of_equal(centred, shape))


def _p_of_equal(centred: np.ndarray, shape: np.ndarray) -> float:
    """How often permuted runs have a variance of cell means as large as the observed one."""
    permuted = permuted_means(centred).var((1, 2))
    return float((1 + (permuted >= shape.var() * (1 - 1e-9)).sum()) / (1 + DRAWS))  # rounding breaks no tie


def permuted_means(values: np.ndarray) -> np.ndarray:
    """(DRAWS, α, β): means over seeds, of runs (seeds, α, β) permuted within each seed: rows, then each row's cells."""
    generator = np.random.default_rng(0)
    rows = generator.random((DRAWS, *values.shape[:2])).argsort(-1)
    columns = generator.random((DRAWS, *values.shape)).argsort(-1)
    drawn = values[np.arange(len(values))[None, :, None], rows]
    means: np.ndarray = np.take_along_axis(drawn, columns, -1).mean(1)
    return means

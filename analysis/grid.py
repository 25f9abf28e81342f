"""How much the cells of the α × β grid differ beyond what runs of equal cells would.

Runs are permuted between cells within a seed. The cells of one α share their iteration 0, so that their runs are alike
by more than their settings: whole rows of the grid are permuted, and then the cells of each row.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

DRAWS = 2000
SCALES = np.linspace(0, 3, 301)  # multiples of the observed cell means that are tried as true ones


@dataclass(frozen=True)
class Spread:
    """Best − worst of the true cell means. seeds; cells; observed: best − worst as measured; noise: what equal cells
    would span by noise alone, on average; spread: the observed one without the noise; low, high: its 95 % interval;
    p: of equal cells."""

    seeds: int
    cells: int
    observed: float
    noise: float
    spread: float
    low: float
    high: float
    p: float


def grid_of(table: pd.DataFrame) -> np.ndarray:
    """(seeds, α, β): averages at iteration 1, where β acts first, of the seeds that have every cell."""
    cells = table[table["iteration"] == 1].pivot(index="seed", columns=["alpha", "beta"], values="avg")
    alphas, betas = (sorted(table[name].dropna().unique()) for name in ("alpha", "beta"))
    cells = cells.reindex(columns=pd.MultiIndex.from_product([alphas, betas])).dropna()
    return cells.to_numpy(float).reshape(-1, len(alphas), len(betas))


def spread_of(values: np.ndarray, seeds: int | None = None) -> Spread:
    """The spread of a grid (seeds, α, β), two seeds at least; `seeds`: as it would be with so many of them.

    The interval holds every multiple of the observed cell means that, were it the truth, would lead to a variance of
    cell means like the observed one; the noise around it is what cells and seeds leave of the runs, permuted. It speaks
    of these problems: all cells answer the same.
    """
    count, seeds = len(values), seeds or len(values)
    cells = values.mean(0)
    shape = cells - cells.mean()
    left = values - values.mean((1, 2), keepdims=True) - shape
    noise = permuted_means(left * np.sqrt(count / (count - 1))) * np.sqrt(count / seeds)
    own, added = float(shape.var()), noise.var((1, 2))
    true = max(own - float(added.mean()) * seeds / count, 0.0)  # the variance of the true cell means
    observed = own if seeds == count else true + float(added.mean())
    # The variance of cell means, were a multiple of `shape` the truth: (SCALES, DRAWS).
    possible = SCALES[:, None] ** 2 * own + 2 * SCALES[:, None] * (noise * shape).mean((1, 2)) + added
    inside = SCALES[((possible >= observed).mean(1) > 0.025) & ((possible <= observed).mean(1) > 0.025)]
    low, high = (inside.min(), inside.max()) if len(inside) else (0.0, 0.0)
    equal = permuted_means(values - values.mean((1, 2), keepdims=True)).var((1, 2))
    width = float(np.ptp(cells))
    return Spread(
        seeds=seeds,
        cells=cells.size,
        observed=width,
        noise=float(np.ptp(noise, axis=(1, 2)).mean()),
        spread=width * float(np.sqrt(true / own)) if own > 0 else 0.0,
        low=width * float(low),
        high=width * float(high),
        p=float((1 + (equal >= own * (1 - 1e-9)).sum()) / (1 + DRAWS)),  # rounding breaks no tie
    )


def permuted_means(values: np.ndarray) -> np.ndarray:
    """(DRAWS, α, β): means over seeds, of runs (seeds, α, β) permuted within each seed: rows, then each row's cells."""
    generator = np.random.default_rng(0)
    rows = generator.random((DRAWS, *values.shape[:2])).argsort(-1)
    columns = generator.random((DRAWS, *values.shape)).argsort(-1)
    drawn = values[np.arange(len(values))[None, :, None], rows]
    means: np.ndarray = np.take_along_axis(drawn, columns, -1).mean(1)
    return means

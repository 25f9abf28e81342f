"""How much the cells of the α × β grid differ beyond what runs of equal cells would.

Runs are permuted between cells within a seed. The cells of one α share their iteration 0, so that their runs are alike
by more than their settings: whole rows of the grid are permuted, and then the cells of each row.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

DRAWS = 1000
SCALES = np.linspace(0, 3, 301)  # multiples of the observed cell means that are tried as true ones


class Spread(NamedTuple):
    """How far the true means of cells are apart: their standard deviation, as the range that so many normal ones span.

    observed: best − worst as measured. noise: what equal cells would span by noise alone, on average.
    spread: of the true means, with its 95 % interval, low and high. p: of equal cells.
    """

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

    The interval holds every multiple of the observed cell means that, were it the truth, would lead to a ratio of the
    cells' variance to the noise's like the observed one (F); noise is what cells and seeds leave of the runs, permuted.
    It speaks of these problems: all cells answer the same.
    """
    count, cells = len(values), values.mean(0)
    planned = seeds or count
    shape = cells - cells.mean()
    left = (values - values.mean((1, 2), keepdims=True) - shape) * np.sqrt(count / (count - 1))
    noise = permuted_means(left)
    added, error = noise.var((1, 2)), float((left**2).mean())
    around = (error - added) * count / (count - 1)  # what permuted runs vary by around their own cells
    own = float(shape.var())
    true = max(own - error / count, 0.0)
    scale = np.sqrt(count / planned)
    # The variance of the cell means, were a multiple of the observed ones the truth: (SCALES, DRAWS).
    possible = (
        SCALES[:, None] ** 2 * own + 2 * SCALES[:, None] * scale * (noise * shape).mean((1, 2)) + scale**2 * added
    )
    observed = own if planned == count else true + error / planned
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios, ratio = possible / around, np.divide(observed, error)
    inside = SCALES[((ratios >= ratio).mean(1) > 0.025) & ((ratios <= ratio).mean(1) > 0.025)]
    if error == 0:  # nothing but the cells: they are known
        inside = np.ones(1)
    low, high = (float(inside.min()), float(inside.max())) if len(inside) else (0.0, 0.0)
    equal = permuted_means(values - values.mean((1, 2), keepdims=True)).var((1, 2))
    span = expected_range(cells.size) * float(shape.std(ddof=1))
    return Spread(
        seeds=planned,
        cells=cells.size,
        observed=float(np.ptp(cells)),
        noise=float(np.ptp(noise, axis=(1, 2)).mean() * scale),
        spread=span * float(np.sqrt(true / own)) if own > 0 else 0.0,
        low=span * low,
        high=span * high,
        p=float((1 + (equal >= own * (1 - 1e-9)).sum()) / (1 + DRAWS)),  # rounding breaks no tie
    )


def expected_range(count: int) -> float:
    """Expected best − worst of so many standard normal numbers."""
    from scipy.special import ndtr

    x = np.linspace(-10, 10, 4001)
    return float(np.trapezoid(1 - ndtr(x) ** count - ndtr(-x) ** count, x))


def permuted_means(values: np.ndarray) -> np.ndarray:
    """(DRAWS, α, β): means over seeds, of runs (seeds, α, β) permuted within each seed: rows, then each row's cells."""
    generator = np.random.default_rng(0)
    rows = generator.random((DRAWS, *values.shape[:2])).argsort(-1)
    columns = generator.random((DRAWS, *values.shape)).argsort(-1)
    drawn = values[np.arange(len(values))[None, :, None], rows]
    means: np.ndarray = np.take_along_axis(drawn, columns, -1).mean(1)
    return means

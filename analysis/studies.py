"""Figures of studies: results/<preset>/studies/<name>.csv, each made by `make study STUDY=<name>`."""

from pathlib import Path

import matplotlib
import pandas as pd
import seaborn
from matplotlib.figure import Figure

from analysis.style import COLUMN_WIDTH, RC
from tspin.errors import UserError


def study(name: str, preset: str, results: Path = Path("results")) -> pd.DataFrame:
    """A study's table: the setting's columns, then seed, iteration, avg, avg_se (percent). Raises UserError."""
    path = results / preset / "studies" / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"{path}: not run; make it with: make study STUDY={name}")
    return pd.read_csv(path)


def figure4c(preset: str, results: Path = Path("results")) -> Figure:
    """The α × β grid of T-SPIN: Avg at iteration 1, the mean over seeds."""
    table = study("grid", preset, results)
    table = table[table["iteration"] == 1]
    cells = table.pivot_table(index="alpha", columns="beta", values="avg").sort_index(ascending=False)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(COLUMN_WIDTH, 2.7), layout="constrained")
        axes = figure.subplots()
        seaborn.heatmap(cells, ax=axes, annot=True, fmt=".1f", cmap="viridis", linewidths=1,
                        cbar_kws={"label": "Avg at iteration 1 (%)"})  # fmt: skip
        seeds, error = table["seed"].nunique(), table["avg_se"].mean()
        axes.set_title(f"T-SPIN ({preset}), {seeds} seed{'s' * (seeds > 1)}; ± {1.96 * error:.1f} a cell", loc="left")
        axes.set(xlabel="β", ylabel="α")
        return figure

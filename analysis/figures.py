"""The paper's figures, from `results/<preset>/`."""

import io
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import reading as load
from .style import COLUMN_WIDTH, METHODS, RC
from .tables import ITERATIONS, table1

DODGE = {"spin": -0.06, "tspin": 0.06}  # so that the error bars of one iteration stand beside each other
BASE_X = -1


def average_by_iteration(preset: str, results: Path = Path("results")) -> list[Path]:
    """Draw Avg (percent, 95 % intervals) against the iteration, SPIN against T-SPIN, above the paper's curves.

    Returns the paths written, `results/<preset>/average_by_iteration.png` and `.svg`. Raises `UserError` as
    `analysis.tables.table1` does.
    """
    table = table1(preset, results)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(COLUMN_WIDTH, 3.7), layout="constrained")
        ours, paper = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        # Two panels, because the paper's levels (another model, other benchmarks) would flatten ours on shared axes.
        _curves(ours, table, "avg", intervals=True)
        _curves(paper, table, "paper_avg")
        ours.set_title(f"Ours ({preset}), 95 % intervals", loc="left")
        paper.set_title("The paper's (Zephyr-7B, its Table 1)", loc="left")
        for axes in (ours, paper):
            axes.set_ylabel("Avg (%)")
            axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
        paper.set_xticks([BASE_X, *ITERATIONS], ["base", *map(str, ITERATIONS)])
        paper.set_xlabel("Iteration")
        figure.align_ylabels()
        handles = dict(zip(*reversed(ours.get_legend_handles_labels()), strict=True))
        names = [look.label for look in METHODS.values() if look.label in handles]
        figure.legend([handles[name] for name in names], names, loc="outside upper center", ncols=4, frameon=False,
                      columnspacing=1.2, handlelength=1.8)  # fmt: skip
        return save(figure, results / preset / "average_by_iteration")


def _curves(axes: Axes, table: pd.DataFrame, value: str, intervals: bool = False) -> None:
    """Draw a column of `table1`; without intervals, it is the paper's: thin and dashed."""
    fixed = {row["method"]: row for row in load.records(table[table["iteration"].isna()])}
    base, error = fixed["base"][value], intervals
    for method in ("spin", "tspin"):
        look, rows = METHODS[method], table[table["method"] == method]
        x = [BASE_X, *(rows["iteration"].astype(float) + (DODGE[method] if error else 0.0))]
        y = [base, *rows[value]]
        # The base has one error bar, drawn below, and not one per method.
        bars = [[float("nan"), *side] for side in _sides(rows)] if intervals else None
        axes.errorbar(x, y, bars, label=look.label, color=look.colour, marker=look.marker, markevery=slice(1, None),
                      linestyle="-" if error else "--", linewidth=1.4 if error else 0.9, markersize=4 if error else 2.5,
                      elinewidth=0.9, capsize=2, zorder=3)  # fmt: skip
    for method, dashes in {"sft": (0, (5, 1.5, 1, 1.5)), "base": (0, (1, 1.5))}.items():
        look = METHODS[method]
        axes.axhline(fixed[method][value], color=look.colour, linestyle=dashes, linewidth=0.9, label=look.label)
    if error:
        # SFT has no iteration to put an error bar at: its interval is a band.
        axes.axhspan(
            fixed["sft"]["avg_low"], fixed["sft"]["avg_high"], color=METHODS["sft"].colour, alpha=0.1, linewidth=0
        )
    bar = _sides(table[table["method"] == "base"]) if error else None
    axes.errorbar(BASE_X, base, bar, color=METHODS["base"].colour, marker=METHODS["base"].marker,
                  markersize=3.5 if error else 2.5, elinewidth=0.9, capsize=2, zorder=4)  # fmt: skip


def _sides(rows: pd.DataFrame) -> list[pd.Series]:
    """How far the interval of Avg reaches below and above it."""
    return [rows["avg"] - rows["avg_low"], rows["avg_high"] - rows["avg"]]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as `<stem>.png` and `.svg`; return both paths."""
    paths = []
    for form in ("png", "svg"):
        content = io.BytesIO()
        # A date or a library version in the file would change it with nothing to see.
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        with matplotlib.rc_context(RC):
            figure.savefig(content, format=form, dpi=300, metadata=metadata)
        paths.append(load.write_atomically(stem.with_suffix(f".{form}"), content.getvalue()))
    return paths

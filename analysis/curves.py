"""Avg by iteration, and figures 2, 4b, 5 and 6: scores by iteration, method against method, ours above the paper's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .drawing import (
    BASE_X,
    beside,
    draw_band,
    draw_level,
    draw_means,
    draw_paper,
    label_iterations,
    new_figure,
    put_legend,
)
from .reading import read_paper, read_suite
from .scores import AVG, Scores, scores_of
from .style import look
from .tables import ITERATIONS


class Curves(NamedTuple):
    """A figure: its methods, how many benchmarks beside Avg, the paper's model and the benchmarks shown there."""

    methods: tuple[str, ...]
    benchmarks: int
    model: str
    paper_benchmarks: tuple[str, ...]


def average_by_iteration(table: pd.DataFrame, preset: str) -> Figure:
    """Avg of Table 1 (`tables.score_table`) against the iteration, SPIN against T-SPIN, above the paper's curves."""
    with new_figure(1, 3.7) as figure:
        ours, paper = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        # Two panels, because the paper's levels (another model, other benchmarks) would flatten ours on shared axes.
        _draw_column(ours, table, "avg", intervals=True)
        _draw_column(paper, table, "paper_avg", intervals=False)
        ours.set_title(f"Ours ({preset}), 95 % intervals", loc="left")
        paper.set_title("The paper's (Zephyr-7B, its Table 1)", loc="left")
        for axes in (ours, paper):
            axes.set_ylabel("Avg (%)")
            axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
        label_iterations(paper, ITERATIONS, base=True)
        paper.set_xlabel("Iteration")
        figure.align_ylabels()
        labels = [look(method).label for method in ("base", "sft", "spin", "tspin")]
        put_legend(figure, [ours], labels=labels, columnspacing=1.2, handlelength=1.8)
        return figure


def _draw_column(axes: Axes, table: pd.DataFrame, value: str, intervals: bool) -> None:
    """Draw a column of Table 1; without intervals, it is the paper's: thin and dashed."""
    rows = {str(method): part for method, part in table.groupby("method")}
    sides = {method: [part["avg"] - part["avg_low"], part["avg_high"] - part["avg"]] for method, part in rows.items()}
    base, style = rows["base"][value].item(), look("base")
    thickness = {"linestyle": "-", "linewidth": 1.4} if intervals else {"linestyle": "--", "linewidth": 0.9}
    for method, shift in zip(("spin", "tspin"), beside(2, 0.12), strict=True):
        x = [BASE_X, *(rows[method]["iteration"].astype(float) + shift * intervals)]
        # The base has one error bar, drawn below, and not one per method.
        bars = [[float("nan"), *side] for side in sides[method]] if intervals else None
        draw_means(axes, x, [base, *rows[method][value]], bars, look(method), markevery=slice(1, None),
                   markersize=4 if intervals else 2.5, zorder=3, **thickness)  # fmt: skip
    for method in ("sft", "base"):
        draw_level(axes, method, rows[method][value].item())
    if intervals:
        draw_band(axes, "sft", rows["sft"]["avg_low"].item(), rows["sft"]["avg_high"].item())
    draw_means(axes, BASE_X, base, sides["base"] if intervals else None, style, label=None,
               markersize=3.5 if intervals else 2.5, zorder=4)  # fmt: skip


def curves_figure(curves: Curves, folder: Path) -> Figure:
    """Ours above the paper's: a column per benchmark. Raises UserError where a file is missing."""
    scores, paper = scores_of(folder), read_paper(curves.model)
    labels = chosen(scores, folder, curves)
    if curves.benchmarks < 3:
        labels.append(AVG)
    with new_figure(2 if len(labels) > 1 else 1, 3.6) as figure:
        panels = figure.subplots(2, len(labels), sharex=True, squeeze=False, height_ratios=[3, 2])
        for axes, label in zip(panels[0], labels, strict=True):
            draw_ours(axes, scores, curves.methods, label)
            axes.set_title(f"{label}, ours ({folder.name})", loc="left")
        for axes, label in zip(panels[1], curves.paper_benchmarks, strict=True):
            for method in curves.methods:
                rows = paper[paper["method"] == method]
                if len(rows):  # it prints none for some methods
                    draw_paper(axes, rows["iteration"], rows[label], look(method), markersize=2.5)
            axes.set_xticks(ITERATIONS)
            axes.set_title(f"{label}, the paper's ({curves.model})", loc="left")
            axes.set_xlabel("Iteration")
        for row in panels:
            row[0].set_ylabel("Score (%)")
        put_legend(figure, panels.flat)
        return figure


def chosen(scores: Scores, folder: Path, curves: Curves) -> list[str]:
    """The paper's benchmarks where the suite has them, then the first of each group, as many as the figure shows."""
    first = {column.group: column.label for column in reversed(read_suite(folder))}
    shared = [label for label in curves.paper_benchmarks if label != AVG and label in scores.labels]
    names = list(dict.fromkeys([*shared, *reversed(first.values())]))[: curves.benchmarks]
    return [label for label in scores.labels if label in names]


def draw_ours(axes: Axes, scores: Scores, methods: tuple[str, ...], label: str) -> None:
    """Means over seeds with their 95 % intervals, against the iteration; base and SFT as lines."""
    for method, shift in zip(methods, beside(len(methods)), strict=True):
        course = [t for name, t in scores.policies() if name == method and t is not None]
        means = [scores.mean((method, t), label) for t in course]
        draw_means(axes, np.array(course) + shift, [each.mean for each in means], [each.half for each in means],
                   look(method))  # fmt: skip
    for method in ("sft", "base"):
        if scores.has((method, None)):
            mean = scores.mean((method, None), label)
            draw_level(axes, method, mean.mean)
            if method == "sft":
                draw_band(axes, method, mean.low, mean.high)
    bottom, top = axes.get_ylim()
    if bottom < 0:  # no score is
        axes.set_ylim(0, max(top, 1))


CURVES = {
    "2": Curves(("spin", "tspin"), 2, "Zephyr-7B", ("GSM8K", "IFEval", AVG)),
    "4b": Curves(("tspin", "tspin_reference"), 0, "Zephyr-7B", (AVG,)),
    "5": Curves(("tspin", "tspin_no_history"), 3, "Zephyr-7B", ("GSM8K", "BBH", "IFEval")),
    "6": Curves(("spin", "tspin"), 2, "Mistral-7B", ("GSM8K", "IFEval", AVG)),
}
FIGURES: dict[str, Callable[[Path], Figure]] = {name: partial(curves_figure, curves) for name, curves in CURVES.items()}

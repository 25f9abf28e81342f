"""Figures 2, 4b, 5 and 6: scores by iteration, method against method, ours above the paper's."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import reading as load
from .scores import AVG, Scores, scores_of
from .style import COLUMN_WIDTH, METHODS, RC

SPREAD = 0.08  # methods stand beside each other, so that intervals do not hide each other


class Curves(NamedTuple):
    """A figure: its methods, how many benchmarks beside Avg, and the paper's benchmarks and files."""

    methods: tuple[str, ...]
    benchmarks: int
    model: str
    paper_benchmarks: tuple[str, ...]
    published: tuple[str, ...]


FIGURES = {
    "2": Curves(("spin", "tspin"), 2, "Zephyr-7B", ("GSM8K", "IFEval", AVG), ("table1_zephyr",)),
    "4b": Curves(("tspin", "tspin_reference"), 0, "Zephyr-7B", (AVG,), ("table1_zephyr",)),
    "5": Curves(("tspin", "tspin_no_history"), 3, "Zephyr-7B", ("GSM8K", "BBH", "IFEval"),
                ("table1_zephyr", "table2_without_historical_advantage")),
    "6": Curves(("spin", "tspin"), 2, "Mistral-7B", ("GSM8K", "IFEval", AVG), ("table4_mistral",)),
}  # fmt: skip


def draw(number: str, preset: str, results: Path = Path("results")) -> Figure:
    """A figure of FIGURES. Raises UserError where a file is missing."""
    curves, scores = FIGURES[number], scores_of(preset, results)
    labels = chosen(scores, preset, results, curves)
    if curves.benchmarks < 3:
        labels.append(AVG)
    paper = pd.concat([load.published(name) for name in curves.published]).drop_duplicates(["method", "iteration"])
    with matplotlib.rc_context(RC):
        wide = len(labels) > 1
        figure = Figure(figsize=((2 if wide else 1) * COLUMN_WIDTH, 3.6), layout="constrained")
        panels = figure.subplots(2, len(labels), sharex=True, squeeze=False, height_ratios=[3, 2])
        for axes, label in zip(panels[0], labels, strict=True):
            ours(axes, scores, curves.methods, label)
            axes.set_title(f"{label}, ours ({preset})", loc="left")
        for axes, label in zip(panels[1], curves.paper_benchmarks, strict=True):
            published(axes, paper, curves.methods, label)
            axes.set_title(f"{label}, the paper's ({curves.model})", loc="left")
            axes.set_xlabel("Iteration")
        for row in panels:
            row[0].set_ylabel("Score (%)")
        found: dict[str, Any] = {}
        for axes in panels.flat:
            found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=4, frameon=False)
        return figure


def chosen(scores: Scores, preset: str, results: Path, curves: Curves) -> list[str]:
    """The paper's benchmarks where the suite has them, then the first of each group, as many as the figure shows."""
    first = {column.group: column.label for column in reversed(load.suite(preset, results))}
    shared = [label for label in curves.paper_benchmarks if label != AVG and label in scores.labels]
    names = list(dict.fromkeys([*shared, *reversed(first.values())]))[: curves.benchmarks]
    return [label for label in scores.labels if label in names]


def ours(axes: Axes, scores: Scores, methods: tuple[str, ...], label: str) -> None:
    """Means over seeds with their 95 % intervals, against the iteration; base and SFT as lines."""
    for position, method in enumerate(methods):
        look = METHODS[method]
        course = [t for m, t in scores.policies() if m == method and t is not None]
        found = [scores.mean((method, t), label) for t in course]
        shift = (position - (len(methods) - 1) / 2) * SPREAD
        below = [one.mean - one.low for one in found], [one.high - one.mean for one in found]
        axes.errorbar([t + shift for t in course], [one.mean for one in found], below, label=look.label,
                      color=look.colour, marker=look.marker, elinewidth=0.9, capsize=2)  # fmt: skip
    for method, dashes in {"sft": (0, (5, 1.5, 1, 1.5)), "base": (0, (1, 1.5))}.items():
        if scores.has((method, None)):
            look, found_once = METHODS[method], scores.mean((method, None), label)
            axes.axhline(found_once.mean, color=look.colour, linestyle=dashes, linewidth=0.9, label=look.label)
            if method == "sft":
                axes.axhspan(found_once.low, found_once.high, color=look.colour, alpha=0.1, linewidth=0)
    low, high = axes.get_ylim()
    if low < 0:  # no score is
        axes.set_ylim(0, max(high, 1))


def published(axes: Axes, paper: pd.DataFrame, methods: tuple[str, ...], label: str) -> None:
    """The paper's curves, thin and dashed; where it prints none for a method, nothing."""
    for method in methods:
        rows, look = paper[paper["method"] == method], METHODS[method]
        if len(rows):
            axes.plot(rows["iteration"].astype(float), rows[label], "--", color=look.colour, marker=look.marker,
                      linewidth=0.9, markersize=2.5)  # fmt: skip
    axes.set_xticks(range(5))

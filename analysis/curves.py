"""Avg by iteration, and figures 2, 4b, 5 and 6: scores by iteration, method against method, beside the paper's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tspin.schema import BASE

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
    put_note,
)
from .reading import read_paper, read_suite
from .scores import AVG, Policy, Scores, scores_of
from .style import look
from .tables import iterations_of

# Of each group the paper's benchmark: those of its figures, and of knowledge the one that moves most in its tables.
PAPERS = {"math": "GSM8K", "knowledge": "GPQA", "reasoning": "BBH", "instruction": "IFEval"}
GROUPS = 4  # that are shown of a suite with groups of its own
INTERVALS = "95 % intervals, seeds and problems crossed"


class Curves(NamedTuple):
    """A figure: its methods, the paper's model, the groups of benchmarks shown, and whether Avg is."""

    methods: tuple[str, str]
    model: str
    groups: tuple[str, ...] = tuple(PAPERS)
    average: bool = True


def average_by_iteration(table: pd.DataFrame, folder: Path) -> Figure:
    """Avg of Table 1 (`tables.score_table`) against the iteration, SPIN against T-SPIN, above the paper's curves."""
    counts = sorted({len(seeds.split()) for seeds in table.loc[table["method"] != BASE, "seeds"]} - {0})
    seeds = f"{' or '.join(map(str, counts))} {'seed' if counts == [1] else 'seeds'}"
    known = (folder / "problems.parquet").is_file()
    size = scores_of(folder).size([("tspin", 0)]).split(", ")[1] if known else ""
    with new_figure(1, 4) as figure:
        ours, paper = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        # Two panels, because the paper's levels (another model, other benchmarks) would flatten ours on shared axes.
        _draw_column(ours, table, "avg", intervals=True)
        _draw_column(paper, table, "paper_avg", intervals=False)
        ours.set_title(f"Ours ({folder.name})", loc="left")
        paper.set_title("The paper's (Zephyr-7B, its Table 1)", loc="left")
        for axes in (ours, paper):
            axes.set_ylabel("Avg (%)")
            axes.locator_params(axis="y", nbins=6, steps=[1, 2, 5, 10])
        label_iterations(paper, range(int(table["iteration"].max()) + 1), base=True)
        paper.set_xlabel("Iteration")
        figure.align_ylabels()
        labels = [look(method).label for method in ("base", "sft", "spin", "tspin")]
        put_legend(figure, [ours], labels=labels, columnspacing=1.2, handlelength=1.8)
        put_note(figure, f"Ours: {', '.join(filter(None, [seeds, size]))}; {INTERVALS}. Each panel has its own scale.")
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
    """Ours beside the paper's: a row per group of benchmarks, and Avg. Raises UserError where a file is missing."""
    scores, paper = scores_of(folder), read_paper(curves.model)
    rows = [*chosen(scores, folder, curves), *([(AVG, AVG)] if curves.average else [])]
    with new_figure(1.15, 1.1 + (1.35 if len(rows) > 1 else 1.9) * len(rows)) as figure:
        panels = figure.subplots(len(rows), 2, sharex=True, squeeze=False, width_ratios=[5, 4])
        for (ours, theirs), (label, printed) in zip(panels, rows, strict=True):
            draw_ours(ours, scores, curves.methods, label)
            ours.set_title(f"{label}, ours", loc="left")
            ours.set_ylabel("Score (%)")
            if printed is None:
                theirs.set_axis_off()
                continue
            for method in curves.methods:
                course = paper[paper["method"] == method]
                if len(course):  # it prints none for some methods
                    draw_paper(theirs, course["iteration"], course[printed], look(method), markersize=2.5)
            theirs.set_title(f"{printed}, the paper's", loc="left")
        ran = [policy for policy in scores.policies() if policy[0] in curves.methods]
        for axes in panels[-1]:
            axes.set_xticks(iterations_of(ran))
            axes.set_xlabel("Iteration")
        figure.align_ylabels()
        put_legend(figure, panels.flat)
        why = (" Of each group the benchmark on which the last policies differ most, beside one of the paper's in the "
               "same group.") if len(rows) > 1 else ""  # fmt: skip
        put_note(figure, f"Ours: {folder.name}, {scores.size(ran)}; {INTERVALS}.{why} The paper's: {curves.model}, one "
                         "run. Each panel has its own scale.")  # fmt: skip
        return figure


def chosen(scores: Scores, folder: Path, curves: Curves) -> list[tuple[str, str | None]]:
    """Of each group our benchmark and the paper's: the same where the suite has it, else that which decides Avg.

    Of a suite without the paper's groups, those benchmarks of its own that decide, beside none of the paper's.
    """
    if not curves.groups:
        return []
    columns = [column for column in read_suite(folder) if column.label in scores.labels]
    there = dict.fromkeys(column.group for column in columns)
    groups = [group for group in curves.groups if group in there] or list(there)[:GROUPS]
    first, second = map(scores.last, curves.methods)
    rows = []
    for group in groups:
        labels = [column.label for column in columns if column.group == group]
        printed = PAPERS.get(group)
        apart = [_apart(scores, first, second, label) for label in labels]
        deciding = labels[int(np.argmax(apart))]  # the first of those that are level
        rows.append((printed if printed in labels else deciding, printed))
    return rows


def _apart(scores: Scores, first: Policy | None, second: Policy | None, label: str) -> float:
    """How far two policies are apart on a benchmark; 0 where one was not run, or they share no seed."""
    if first is None or second is None or not scores.common_seeds([first, second]):
        return 0.0
    return float(abs(scores.difference(first, second, [label]).mean))


def draw_ours(axes: Axes, scores: Scores, methods: tuple[str, ...], label: str) -> None:
    """Means over seeds with their 95 % intervals, against the iteration; base and SFT as lines."""
    for method, shift in zip(methods, beside(len(methods)), strict=True):
        course = [t for name, t in scores.policies() if name == method and t is not None]
        means = [scores.mean((method, t), label) for t in course]
        sides = [[each.mean - each.low for each in means], [each.high - each.mean for each in means]]
        draw_means(axes, np.array(course) + shift, [each.mean for each in means], sides, look(method))
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
    "2": Curves(("spin", "tspin"), "Zephyr-7B"),
    "4b": Curves(("tspin", "tspin_reference"), "Zephyr-7B", groups=()),
    "5": Curves(("tspin", "tspin_no_history"), "Zephyr-7B", groups=("math", "reasoning", "instruction"), average=False),
    "6": Curves(("spin", "tspin"), "Mistral-7B"),
}
FIGURES: dict[str, Callable[[Path], Figure]] = {name: partial(curves_figure, curves) for name, curves in CURVES.items()}

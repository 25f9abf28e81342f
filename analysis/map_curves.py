"""Figures of the study `map` by iteration: Avg of every arm (map_course), and what y′ tell of them.

map_entropy: y′ drawn at temperature 1, whose −log π has the policy's entropy as its mean; map_greedy: the modes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tspin.errors import UserError

from .drawing import BASE_X, beside, draw_band, draw_level, draw_means, new_figure, put_legend, put_note
from .entropy import by_iteration
from .intervals import ENOUGH, Estimate, none_of
from .map import DECODINGS, SFT, START, Map, Place, map_of
from .reading import labels_of
from .style import Look, arm_look


class Measure(NamedTuple):
    """A small multiple: a column of STUDY_MEASURES; rows of one `scale` have the same limits. share: 0 to 1."""

    column: str
    title: str
    scale: str = ""
    share: bool = False


MEASURES = [
    Measure("nats", "−log π(y′), nats a response"),
    Measure("nats_per_token", "−log π(y′), nats a token"),
    Measure("held_out_nats", "Held-out −log π(y), nats"),
    Measure("equal_share", "y′ that are y, share", share=True),
    Measure("gradient_signal", "Gradient signal"),
    Measure("weight_ess", "Effective sample size", share=True),
    Measure("misaligned", "Misaligned", "misaligned", share=True),
    Measure("misaligned_matched", "Misaligned, like lengths", "misaligned", share=True),
    Measure("misaligned_per_token", "Misaligned, per token", "misaligned", share=True),
]


def course(folder: Path) -> Figure:
    """Avg by iteration of every arm, a panel per start and decoding; at −1 the start itself."""
    known = map_of(folder)
    starts, decodings = known.starts, known.temperatures
    with new_figure(1.3, 1.3 + 1.5 * len(starts)) as figure:
        grid = figure.subplots(len(starts), len(decodings), sharex=True, sharey="row", squeeze=False)
        for row, start in zip(grid, starts, strict=True):
            for axes, temperature in zip(row, decodings, strict=True):
                _draw_course(axes, known, Place(start, temperature))
            row[0].set_ylabel("Avg (%)")
        for axes in grid[-1]:
            axes.set_xlabel("Iteration")
        put_legend(figure, grid.flat, columns=3, fontsize=7, columnspacing=1, handlelength=2.4)
        put_note(figure, f"{folder.name}: means over n seeds; 95 % intervals at the last iteration, of SFT as a band "
                         f"(seeds and problems crossed; of three seeds at least). {known.study.size}. "
                         f"{known.left_out('Lines that are not there')}")  # fmt: skip
        return figure


def _draw_course(axes: Axes, known: Map, place: Place) -> None:
    start, sft = known.last(START, place), known.last(SFT, place)
    base = known.study.averaged(["method"], start)["avg"].item() if len(start) else np.nan
    counts, last = set(), 0
    arms = [arm for arm in known.arms if len(known.rows(arm, place))]
    if not arms:
        axes.set_axis_off()
        axes.set_title(f"{place}: not run", loc="left", fontsize=7)
        return
    for arm, shift in zip(arms, beside(len(arms), 0.06), strict=True):
        means = known.study.averaged(["iteration"], known.rows(arm, place))
        last = max(last, int(means["iteration"].max()))
        counts |= set(means["seeds"])
        ends = (means["iteration"] == means["iteration"].max()) & (means["seeds"] >= ENOUGH)
        bars = [np.nan, *means["half"].where(ends)]
        draw_means(axes, [BASE_X, *(means["iteration"] + shift)], [base, *means["avg"]], bars, arm_look(arm),
                   markersize=3, linewidth=1, markevery=slice(1, None))  # fmt: skip
    if len(sft):
        level = known.study.averaged(["method"], sft).iloc[0]
        draw_level(axes, "sft", level["avg"])
        draw_band(axes, "sft", level["avg"] - level["half"], level["avg"] + level["half"])
    if len(start):
        draw_means(axes, BASE_X, base, None, arm_look(START)._replace(label="start"), markersize=3.5, zorder=4)
    numbers = sorted(counts)
    count = f"n {numbers[0]}" if len(numbers) == 1 else f"n {numbers[0]}–{numbers[-1]}"
    axes.set_title(f"{place}, {count}", loc="left", fontsize=7)
    axes.set_xticks([BASE_X, *range(last + 1)], ["start", *map(str, range(last + 1))])


def entropy(folder: Path, temperature: float = 1.0) -> Figure:
    """What y′ of a decoding tell by iteration: a row per measure of MEASURES, a column per start.

    Raises UserError where nothing ran with it.
    """
    known = map_of(folder)
    places = [place for place in known.places if place.temperature == temperature and known.ran(place)]
    if not places:
        raise UserError(f"{known.study.path}: nothing was run with y′ {DECODINGS[temperature]}; {known.study.again}")
    measures = [measure for measure in MEASURES if measure.column in known.table]
    prompts = labels_of(folder)
    with new_figure(max(1.3, 0.32 * len(places)), 0.9 + 0.92 * len(measures)) as figure:
        grid = figure.subplots(len(measures), len(places), sharex=True, sharey="row", squeeze=False)
        for row, measure in zip(grid, measures, strict=True):
            for axes, place in zip(row, places, strict=True):
                for arm in known.arms:
                    _draw_measure(axes, known.rows(arm, place), measure, arm_look(arm), prompts)
            if measure.share:  # once all are drawn: limits that are set are kept, and the row has one
                row[0].set_ylim(bottom=0)
            row[0].set_title(measure.title, loc="left", fontsize=7.5)
        _share_limits(grid, measures)
        for axes, place in zip(grid[0], places, strict=True):
            name = axes.annotate(place.start_name, (0, 1), (0, 15), "axes fraction", "offset points", fontsize=7.5,
                                 fontweight="bold")  # fmt: skip
            name.set_in_layout(axes is grid[0, 0])  # one holds the room for all: the columns stay as wide
        for axes in grid[-1]:
            axes.set_xlabel("Iteration")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        put_legend(figure, grid.flat, columns=3, fontsize=7, columnspacing=1, handlelength=2.4)
        counts = [known.last(arm, place)["seed"].nunique() for arm in known.arms for place in places]
        low, high = min(filter(None, counts), default=0), max(counts, default=0)
        seeds = f"{low}" if low == high else f"{low} to {high}"
        shares = f" Shares are of {prompts:,} prompts; at 0 and 1 the interval is Wilson's." if prompts else ""
        what = " The mean of −log π(y′) is the policy's entropy." if temperature == 1 else ""
        put_note(figure, f"{folder.name}, y′ {DECODINGS[temperature]}: means over {seeds} seeds, 95 % t intervals of "
                         f"three at least.{shares}{what} Gradient signal: norm of the mean "
                         "gradient over a step's noise. Effective sample size: of the pairs, by their weights. "
                         "Misaligned: y has the higher reward, the lower likelihood.")  # fmt: skip
        return figure


def _draw_measure(axes: Axes, rows: pd.DataFrame, measure: Measure, of: Look, prompts: int | None) -> None:
    """Mean and 95 % interval (Student's t over seeds) by iteration, as a line and a band."""
    found = by_iteration(rows, measure.column)
    if not found:
        return
    ends = np.array([_ends(each, measure.share, prompts) for each in found.values()])
    means = [each.mean for each in found.values()]
    draw_means(axes, list(found), means, None, of, markersize=2.5, linewidth=1)
    axes.fill_between(list(found), *ends.T, color=of.colour, alpha=0.12, linewidth=0)


def _ends(found: Estimate, share: bool, prompts: int | None) -> tuple[float, float]:
    """The interval; of a share that is 0 or 1 for every seed, Wilson's; of fewer seeds than ENOUGH else, nothing."""
    if share and prompts and found.mean in (0, 1):
        reach = none_of(prompts)
        return (0.0, reach) if found.mean == 0 else (1 - reach, 1.0)
    return (found.low, found.high) if found.seeds >= ENOUGH else (found.mean, found.mean)


def _share_limits(grid: Any, measures: list[Measure]) -> None:
    """The same limits for the rows of one scale."""
    for scale in {measure.scale for measure in measures} - {""}:
        rows = [row for row, measure in zip(grid, measures, strict=True) if measure.scale == scale]
        top = max(axes.get_ylim()[1] for row in rows for axes in row)
        for row in rows:
            row[0].set_ylim(0, top)


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "map_course": course,
    "map_entropy": entropy,
    "map_greedy": partial(entropy, temperature=0.0),
}

"""Figure map_benchmarks: what an average of the study `map` is made of, benchmark by benchmark, short answers first."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tspin.errors import UserError
from tspin.schema import LABELLED

from .benchmarks import draw_interval
from .drawing import new_figure, put_note
from .intervals import ENOUGH, estimates
from .map import CONTRASTS, SPIN, TSPIN, map_of
from .scores import AVG
from .style import look

ABREAST = 4  # panels in a row
ROW = 0.15  # inches
ROOM = 2  # a panel's half width, as a multiple of its farthest mean, or of the end of Avg's interval


def by_benchmark(folder: Path) -> Figure:
    """T-SPIN − SPIN at the papers' scales after the last iteration: a panel per place, a row per benchmark; Avg below.

    Avg has two intervals: of these benchmarks, and thin that of benchmarks drawn like these. Raises UserError where
    both ran nowhere.
    """
    known = map_of(folder)
    tried = {place: known.values(TSPIN, SPIN, place) for place in known.places}
    found = {place: values for place, values in tried.items() if values is not None}
    if not found:
        raise UserError(
            f"{known.study.path}: no seed of both spin and tspin at the papers' scales; {known.study.again}"
        )
    tokens = answer_tokens(folder, known.study.benchmarks)
    order = sorted(range(len(known.study.labels)), key=lambda k: (tokens[k], k) if tokens else (0, k))
    rows = [known.study.labels[k] + (f" ({tokens[k]:.0f})" if tokens else "") for k in order] + [AVG]
    abreast = min(len(found), ABREAST)
    lines = -(-len(found) // abreast)
    with new_figure(0.35 + 0.3 * max(abreast, 2), 0.8 + lines * (0.4 + ROW * len(rows))) as figure:
        grid = figure.subplots(lines, abreast, sharey=True, squeeze=False)
        for axes in grid.flat[len(found) :]:
            axes.set_axis_off()
        for axes, (place, values) in zip(grid.flat, found.items(), strict=False):
            _draw_place(axes, values[:, order])
            axes.set_title(f"{place.start_name},\n{place.decoding}, n {len(values)}", loc="left", fontsize=7)
        grid[0, 0].set_yticks(range(len(rows)), rows, fontsize=7)
        grid[0, 0].set_ylim(len(rows) - 0.5, -0.6)
        few = f" Hollow: fewer than {ENOUGH} seeds, without interval." if min(map(len, found.values())) < ENOUGH else ""
        length = " In brackets: the mean length of its labels, tokens." if tokens else ""
        put_note(figure, f"{folder.name}: final {CONTRASTS[0].words} (points), 95 % intervals, paired by seed and "
                         f"problem, not corrected for their number; n: seeds. {known.study.size}. Avg, thin: "
                         f"benchmarks drawn too. Each panel has a scale of its own, by its means; at a "
                         f"triangle an interval goes on.{few}{length}")  # fmt: skip
        return figure


def answer_tokens(folder: Path, benchmarks: list[str]) -> list[float]:
    """The mean length of each benchmark's labels in tokens; empty where the results do not have every one's.

    A benchmark is a task's when its name ends with the task's.
    """
    prompts, samples = folder / "prompts.parquet", folder / "diagnostics.parquet"
    if not (prompts.is_file() and samples.is_file()):
        return []
    tasks = pd.read_parquet(prompts).drop_duplicates("prompt_id")
    if "task" not in tasks:
        return []
    every = pd.read_parquet(samples, columns=["prompt_id", "role", "tokens"])
    labels = every[every["role"] == LABELLED].drop_duplicates("prompt_id")
    lengths = tasks.merge(labels, on="prompt_id").groupby("task")["tokens"].mean()
    found = [[float(mean) for task, mean in lengths.items() if name.endswith(str(task))] for name in benchmarks]
    return [means[0] for means in found] if all(found) else []


def _draw_place(axes: Axes, values: np.ndarray) -> None:
    """values: (seeds, benchmarks, problems), of a difference in percent.

    A benchmark's interval of a few seeds can be ten times as wide as all means are far: such ones are cut, and marked.
    """
    *each, whole = estimates(values)
    enough = len(values) >= ENOUGH
    for row, found in enumerate(each):
        draw_interval(axes, row, found, look(TSPIN.method).colour, TSPIN.method, bare=not enough)
    bottom = len(each)
    axes.axhline(bottom - 0.5, color="black", linewidth=0.6)
    if whole.wide is not None and enough:
        draw_interval(axes, bottom, whole.wide, "black", TSPIN.method, elinewidth=0.6, capsize=2)
    draw_interval(axes, bottom, whole, "black", TSPIN.method, bare=not enough, elinewidth=2.2)
    reach = ROOM * max(*(abs(found.mean) for found in each), abs(whole.mean) + whole.half * enough) or 1.0
    for row, found in enumerate(each if enough else []):
        for sign in (-1, 1):
            if found.half > reach - sign * found.mean:
                axes.plot(
                    sign * reach, row, "<>"[sign > 0], color=look(TSPIN.method).colour, markersize=4, clip_on=False
                )
    axes.set_xlim(-reach, reach)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.grid(axis="x")


FIGURES: dict[str, Callable[[Path], Figure]] = {"map_benchmarks": by_benchmark}

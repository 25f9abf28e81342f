"""What the figures share: their size and style, a method's scores over iterations, and what has no iterations."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .style import COLUMN_WIDTH, RC, Look, contrast, look

BASE_X = -1  # where the base stands on an axis of iterations
SPREAD = 0.08  # methods stand beside each other, so that intervals do not hide each other
NOTE_SIZE, LETTERS = 7, 19  # points; of them so many fit in an inch
DASHES = {"sft": (0, (5, 1.5, 1, 1.5)), "base": (0, (1, 1.5))}


@contextmanager
def new_figure(columns: float, height: float) -> Iterator[Figure]:
    """A figure in our style, `columns` page columns wide and `height` inches high, to draw on inside the block."""
    with matplotlib.rc_context(RC):
        yield Figure(figsize=(columns * COLUMN_WIDTH, height), layout="constrained")


def beside(count: int, spread: float = SPREAD) -> list[float]:
    """By how much each of `count` curves is moved along x."""
    return [(position - (count - 1) / 2) * spread for position in range(count)]


def draw_means(axes: Axes, x: Any, means: Any, sides: Any, of: Look, **options: Any) -> None:
    """A curve with error bars. sides: how far they reach, one number for both ways, or those below and those above."""
    options = {"label": of.label, "elinewidth": 0.9, "capsize": 2, "linestyle": of.line, **options}
    options |= {"marker": of.marker, "markerfacecolor": of.colour if of.filled else "white"}
    axes.errorbar(np.asarray(x, float), means, sides, color=of.colour, **options)


def draw_paper(axes: Axes, x: Any, scores: Any, of: Look, **options: Any) -> None:
    """A curve of the paper's: thin and dashed."""
    axes.plot(np.asarray(x, float), scores, "--", color=of.colour, marker=of.marker, linewidth=0.9, **options)


def draw_level(axes: Axes, method: str, score: float) -> None:
    """The score of a method without iterations, as a line across the axes."""
    style = look(method)
    axes.axhline(score, color=style.colour, linestyle=DASHES[method], linewidth=0.9, label=style.label)


def draw_band(axes: Axes, method: str, low: float, high: float) -> None:
    """The interval of a method without iterations, as a band: there is no iteration to put an error bar at."""
    axes.axhspan(low, high, color=look(method).colour, alpha=0.1, linewidth=0)


def contrast_texts(axes: Axes) -> None:
    """The texts of a heat map in black or white, whichever its cell lets be read better."""
    (mesh,) = (each for each in axes.collections if isinstance(each, QuadMesh))
    mesh.update_scalarmappable()
    for text, colour in zip(axes.texts, np.asarray(mesh.get_facecolor()), strict=True):
        cell = colour[:3].tolist()
        text.set_color(max("black", "white", key=lambda ink: contrast(to_rgb(ink), cell)))


def label_iterations(axes: Axes, iterations: Iterable[int], base: bool) -> None:
    """Tick the iterations, and the base before them if it is drawn."""
    numbers = list(iterations)
    axes.set_xticks([BASE_X] * base + numbers, ["base"] * base + list(map(str, numbers)))


def put_legend(
    figure: Figure, panels: Iterable[Axes], columns: int = 4, labels: Sequence[str] = (), **options: Any
) -> None:
    """One legend above the figure, with each label of its panels once, or with `labels` in their order."""
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [label for label in labels or handles if label in handles]
    figure.legend([handles[name] for name in names], names, loc="outside upper center", ncols=columns, frameon=False,
                  **options)  # fmt: skip


def put_note(figure: Figure, text: str) -> None:
    """What a reader must know of a figure (seeds, problems, smoothing), small and below it."""
    lines = textwrap.wrap(text, int(LETTERS * figure.get_figwidth()), break_on_hyphens=False)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=NOTE_SIZE, color="#444444")

"""Benchmark by benchmark: the last policies of T-SPIN, SPIN and SFT against each other, with every interval."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tspin.errors import UserError

from .drawing import new_figure, put_note
from .intervals import Estimate
from .scores import AVG, Policy, Scores, scores_of
from .style import look

SFT: Policy = ("sft", None)
ROW = 0.17  # inches


def benchmarks(folder: Path) -> Figure:
    """A panel per comparison, a row per benchmark: the paired difference and its 95 % interval; Avg below.

    Avg has two: of these benchmarks, and thin that of benchmarks drawn like these. Grey: a benchmark that cannot tell
    the policies apart (`Scores.still`). A comparison is drawn where both of its policies were run.
    Raises UserError where none was.
    """
    pairs = pairs_of(folder)
    if not pairs:
        raise UserError(f"no two of spin, tspin and sft of the same seed in {folder}: tspin run --preset {folder.name}")
    scores = scores_of(folder)
    with new_figure(1.4, 1.3 + ROW * (len(scores.labels) + 1)) as figure:
        panels = figure.subplots(1, len(pairs), sharex=True, sharey=True, squeeze=False)[0]
        for axes, pair in zip(panels, pairs, strict=True):
            _draw_pair(axes, scores, pair)
        rows = [*scores.labels, AVG]
        panels[0].set_yticks(range(len(rows)), rows)
        panels[0].invert_yaxis()
        panels[len(pairs) // 2].set_xlabel("Difference of scores (points)")
        policies = {policy for pair in pairs for policy in pair}
        put_note(figure, f"{folder.name}: 95 % intervals, paired by seed and problem; {scores.size(policies)}. Grey: a "
                         "benchmark that cannot tell the two apart. Avg, thin: benchmarks drawn too.")  # fmt: skip
        return figure


def pairs_of(folder: Path) -> list[tuple[Policy, Policy]]:
    """The last policies of T-SPIN, SPIN and SFT, two by two, that share a seed; none without recorded outcomes."""
    if not (folder / "problems.parquet").is_file():
        return []
    scores = scores_of(folder)
    spin, tspin = scores.last("spin"), scores.last("tspin")
    pairs = [(a, b) for a, b in ((tspin, spin), (tspin, SFT), (spin, SFT)) if a and b and scores.has(a, b)]
    return [pair for pair in pairs if scores.common_seeds(pair)]


def _draw_pair(axes: Axes, scores: Scores, pair: tuple[Policy, Policy]) -> None:
    still = scores.still(pair)
    found = {label: scores.difference(*pair, [label]) for label in scores.labels}
    whole = scores.difference(*pair)
    for row, (label, difference) in enumerate(found.items()):
        draw_interval(axes, row, difference, "#999999" if label in still else look(pair[0][0]).colour, pair[0][0])
    bottom = len(found)
    axes.axhline(bottom - 0.5, color="black", linewidth=0.6)
    if whole.wide is not None:
        draw_interval(axes, bottom, whole.wide, "black", pair[0][0], elinewidth=0.6, capsize=2)
    draw_interval(axes, bottom, whole, "black", pair[0][0], elinewidth=2.2)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.grid(axis="x")
    axes.set_title(f"{_name(pair[0])} − {_name(pair[1])}", loc="left")


def draw_interval(
    axes: Axes, row: int, found: Estimate, colour: str, method: str, *, bare: bool = False, elinewidth: float = 1.2,
    capsize: float = 0,
) -> None:  # fmt: skip
    """A difference and its interval in a row. bare: without it, its mark hollow."""
    axes.errorbar(found.mean, row, xerr=None if bare else found.half, color=colour, marker=look(method).marker,
                  markersize=3.5, elinewidth=elinewidth, capsize=capsize,
                  markerfacecolor="white" if bare else colour)  # fmt: skip


def _name(policy: Policy) -> str:
    method, iteration = policy
    return look(method).label if iteration is None else f"{look(method).label} {iteration}"


FIGURES: dict[str, Callable[[Path], Figure]] = {"benchmarks": benchmarks}

"""Figures of the study `map` after the last iteration: what helps where (map), and against continued SFT (map_sft)."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from .drawing import (
    new_figure,
    put_note,
)
from .intervals import ENOUGH
from .map import CONTRASTS, SFT, STARTS, Map, Paired, Place, known_start, map_of, points
from .style import Look, arm_look

ROW = 0.15  # inches
STROKES = 0.33  # of a row: how far above a difference its seeds' are
# The starts in their order, apart without colour too.
COLOURS = [("#332288", "o"), ("#0F6CA8", "P"), ("#882255", "^"), ("#117A65", "s"), ("#AA4400", "D"), ("#555555", "v")]
INTERVALS = "95 % intervals, paired by seed and problem"


class Section(NamedTuple):
    """A difference, and what it is at each place where it could be taken."""

    title: str
    found: dict[Place, Paired]

    def starts(self, known: Map) -> list[str]:
        """Those of any of its places, in the map's order."""
        there = {place.start for place in self.found}
        return [start for start in known.starts if start in there]


def differences(folder: Path) -> Figure:
    """The contrasts of CONTRASTS after the last iteration: a panel per decoding, a row per start."""
    known = map_of(folder)
    found = known.contrasts
    sections = []
    for contrast in CONTRASTS:
        here = {each.place: each.difference for each in found if each.contrast == contrast}
        why = "" if contrast.question == CONTRASTS[0].question else f"{contrast.question}: "
        sections.append(Section(f"{why}{contrast.words}", here))
    return _forest(known, sections, f"{folder.name}: final difference of Avg")


def over_sft(folder: Path) -> Figure:
    """Every arm − SFT continued from the same start, after the last iteration."""
    known = map_of(folder)
    sections = []
    for arm in known.arms:
        found = {place: known.difference(arm, SFT, place) for place in known.places}
        here = {place: each for place, each in found.items() if each is not None}
        sections.append(Section(f"{arm_look(arm).label} − SFT", here))
    return _forest(known, sections, f"{folder.name}: final Avg − Avg of SFT continued from the same start")


def _forest(known: Map, sections: list[Section], title: str) -> Figure:
    """A row per section and start, a panel per decoding; sections and starts without any difference are left out."""
    shown = [section for section in sections if section.found]
    rows = [(section, start) for section in shown for start in ("", *section.starts(known))]  # "": its title
    few = any(found.seeds < ENOUGH for section in shown for found in section.found.values())
    hollow = " Hollow, without interval: fewer than three seeds, which decide nothing." if few else ""
    absent = known.left_out("Rows that are not there")
    note = f"{title} (points), {INTERVALS}; n: seeds, a stroke above each. {known.study.size}.{hollow} {absent}"
    with new_figure(0.85 + 0.5 * len(known.temperatures), 1.2 + len(note) / 700 + ROW * len(rows)) as figure:
        panels = figure.subplots(1, len(known.temperatures), sharex=True, sharey=True, squeeze=False)[0]
        for axes, temperature in zip(panels, known.temperatures, strict=True):
            axes.axvline(0, color="black", linewidth=0.6, zorder=1)
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set_title(Place("", temperature).decoding, loc="left")
            axes.set_xlabel("Difference (points)")
            axes.patch.set_visible(False)  # the sections' titles reach from the first panel over the others
        first, names = panels[0], {}
        first.set_zorder(2)
        where = blended_transform_factory(figure.transFigure, first.transData)
        for y, (section, start) in enumerate(rows):
            if not start:
                head = first.text(0.012, y, section.title, transform=where, va="center", fontsize=7, fontweight="bold",
                                  zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
                head.set_in_layout(False)
                continue
            names[y] = Place(start, 1.0).start_name
            for axes, temperature in zip(panels, known.temperatures, strict=True):
                _draw_row(axes, y, section.found.get(Place(start, temperature)), _start_look(start))
        first.set_yticks(list(names), list(names.values()), fontsize=7)
        first.set_ylim(len(rows) - 0.5, -0.6)
        put_note(figure, note)
        return figure


def _draw_row(axes: Axes, y: float, found: Paired | None, of: Look) -> None:
    middle = axes.get_yaxis_transform()
    if found is None:
        axes.text(0.05, y, "not run", transform=middle, va="center_baseline", fontsize=6.5, color="#666666")
        return
    enough = found.seeds >= ENOUGH
    axes.errorbar(found.mean, y, xerr=found.half if enough else None, color=of.colour, marker=of.marker, markersize=3.5,
                  elinewidth=1.2, markerfacecolor=of.colour if enough else "white")  # fmt: skip
    axes.plot(found.by_seed, [y - STROKES] * found.seeds, color="#777777", linestyle="", marker="|", markersize=2.6,
              markeredgewidth=0.6)  # fmt: skip
    axes.text(1.02, y, f"{points(found)}, n {found.seeds}", transform=middle, va="center_baseline", fontsize=6.5,
              color="#222222")  # fmt: skip


def _start_look(start: str) -> Look:
    known = known_start(start)
    position = list(STARTS).index(known) if known in STARTS else len(STARTS)
    return Look(start, *COLOURS[position])


FIGURES: dict[str, Callable[[Path], Figure]] = {"map": differences, "map_sft": over_sft}

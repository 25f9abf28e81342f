"""Every figure that `tspin figure` draws: who draws it, where it goes, and what is written with it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from tspin.errors import UserError

from . import benchmarks, curves, dynamics, entropy, map_benchmarks, map_curves, map_figures, map_text, studies
from .map import BESIDE


class Drawn(NamedTuple):
    """A figure: what draws it from a preset's results, its file there without ending, and texts by their files."""

    draw: Callable[[Path], Figure]
    stem: str
    texts: dict[str, Callable[[Path], str]] = {}


def figure_of(number: str) -> Drawn:
    """A figure by its number in the paper, or by its name. Raises UserError where there is none."""
    if number not in FIGURES:
        raise UserError(f"there is no figure {number}; there are: {', '.join(sorted(FIGURES))}")
    return FIGURES[number]


def _numbered(number: str) -> str:
    return f"figure{number}" if number[0].isdigit() else number


def _of_study(number: str, draw: Callable[[Path], Figure]) -> Drawn:
    study = studies.STUDY_OF[number]
    stem = f"studies/{number}" if number == study else _numbered(number)
    return Drawn(draw, stem, {f"studies/{study}.md": partial(studies.study_text, study)})


OF_RESULTS = {**curves.FIGURES, **dynamics.FIGURES, **entropy.FIGURES, **benchmarks.FIGURES}
OF_MAP = {**map_figures.FIGURES, **map_curves.FIGURES, **map_benchmarks.FIGURES}
FIGURES = {
    **{number: Drawn(draw, _numbered(number)) for number, draw in OF_RESULTS.items()},
    **{number: _of_study(number, draw) for number, draw in studies.FIGURES.items()},
    **{name: Drawn(draw, f"studies/{name}") for name, draw in OF_MAP.items()},
    "map": Drawn(map_figures.FIGURES["map"], "studies/map", {"studies/map.md": map_text.map_text}),
}
STUDIES = {*studies.STUDY_OF.values(), "map", *BESIDE}  # those that are drawn

"""How a method looks, in every table and figure: its display name, colour and marker, in the order of the rows."""

import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple


class Look(NamedTuple):
    """Display name, colour (told apart by colour-blind readers) and Matplotlib marker of a method.

    The colours are Okabe and Ito's but for their yellow, which white paper swallows.
    """

    label: str
    colour: str
    marker: str


METHODS = {
    "base": Look("base", "#000000", "D"),
    "sft": Look("SFT", "#009E73", "^"),
    "spin": Look("SPIN", "#D55E00", "s"),
    "tspin": Look("T-SPIN", "#0072B2", "o"),
    "tspin_no_history": Look("T-SPIN w/o H-A", "#56B4E9", "v"),
    "tspin_reference": Look("T-SPIN_ref", "#CC79A7", "P"),
    "dpo": Look("DPO", "#E69F00", "X"),
    "simpo": Look("SimPO", "#661100", "<"),
    "space": Look("SPACE", "#7F7F7F", ">"),
}
SPARE = [("#882255", "*"), ("#44AA99", "p"), ("#999933", "h"), ("#332288", "d"), ("#AA4499", "8")]

COLUMN_WIDTH = 3.5  # inches: one column of a two-column page
MISSING = "–"

RC: Any = {  # Any: Matplotlib types the keys as a Literal of every parameter there is
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "text.parse_math": False,  # a label of the user's may hold a dollar sign
    # Matplotlib draws SVG ids from a random salt; a fixed one keeps an unchanged figure out of the diff.
    "svg.hashsalt": "tspin",
}


def look(method: str) -> Look:
    """How a method is drawn. One that METHODS lacks gets its name, and a colour and marker that follow from it."""
    if method in METHODS:
        return METHODS[method]
    return Look(method, *SPARE[zlib.crc32(method.encode()) % len(SPARE)])


def in_order(methods: Iterable[str]) -> list[str]:
    """The different methods among some names: in the order of METHODS, then those that it lacks, by name."""
    order = {method: position for position, method in enumerate(METHODS)}
    return sorted(set(methods), key=lambda method: (order.get(method, len(order)), method))

"""How a method looks, in every table and figure: its display name, colour and marker, in the order of the rows."""

from typing import Any, NamedTuple


class MethodStyle(NamedTuple):
    """Display name, Okabe–Ito colour (told apart by colour-blind readers) and Matplotlib marker of a method."""

    label: str
    colour: str
    marker: str


METHODS = {
    "base": MethodStyle("base", "#000000", "D"),
    "sft": MethodStyle("SFT", "#009E73", "^"),
    "spin": MethodStyle("SPIN", "#D55E00", "s"),
    "tspin": MethodStyle("T-SPIN", "#0072B2", "o"),
    "tspin_no_history": MethodStyle("T-SPIN w/o H-A", "#56B4E9", "v"),
    "tspin_reference": MethodStyle("T-SPIN_ref", "#CC79A7", "P"),
    "dpo": MethodStyle("DPO", "#E69F00", "X"),
    "simpo": MethodStyle("SimPO", "#F0E442", "<"),
    "space": MethodStyle("SPACE", "#7F7F7F", ">"),
}

LABELLED, SYNTHETIC = "labelled", "synthetic"  # roles, as in tspin.objectives (which needs torch)
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

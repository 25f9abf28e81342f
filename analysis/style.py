"""How methods and arms look, in every table and figure: display name, colour and marker, in the order of the rows."""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Look(NamedTuple):
    """Display name, colour (told apart by colour-blind readers), Matplotlib marker and line of a method.

    The colours are Okabe and Ito's but for their yellow, which white paper swallows.
    filled: else the marker is an outline.
    """

    label: str
    colour: str
    marker: str
    line: Any = "-"
    filled: bool = True


class Arm(NamedTuple):
    """A method at a setting. scale: λ or α of its reward; None where it has none, or none was asked for.

    history: it trains on the earlier iteration's pairs too, as SPIN was released. proto: whose y0 it takes, in words;
    empty where they are the initial policy's.
    """

    method: str
    scale: float | None = None
    history: bool = False
    proto: str = ""


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
SCALES = {"spin": ("λ", 0.1), "dpo": ("λ", 0.1)}  # the symbol of a method's scale, and the paper's value
TSPIN_SCALE = ("α", 1.0)
# Lines of an arm that is not at the paper's settings.
OTHER_SCALE, RELEASED, OTHER_PROTO = (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2))
BETWEEN, PAPERS = (0, (1.5, 1.5)), (0.1, 1.0)  # a scale that is neither of the papers'
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


def scale_of(method: str) -> tuple[str, float] | None:
    """The symbol of a method's scale and the value that the paper gives it; None where a method has none."""
    return TSPIN_SCALE if method.startswith("tspin") else SCALES.get(method)


def arm_look(arm: Arm) -> Look:
    """How an arm is drawn: its method's colour; an outline and a broken line where it is not at the paper's scale."""
    of, scale = look(arm.method), scale_of(arm.method)
    if arm.proto:
        own = arm_look(arm._replace(proto=""))
        return own._replace(label=f"{own.label}, {arm.proto} y0", marker="p", line=OTHER_PROTO, filled=False)
    if arm.history:
        return of._replace(label=f"{of.label} as released", marker="d", line=RELEASED, filled=False)
    if scale is None or arm.scale is None:
        return of
    symbol, papers = scale
    named = of._replace(label=f"{of.label} {symbol} {arm.scale:g}")
    if arm.scale == papers:
        return named
    other = named._replace(line=OTHER_SCALE, filled=False)
    return other if arm.scale in PAPERS else other._replace(line=BETWEEN, marker="*")


def in_order(methods: Iterable[str]) -> list[str]:
    """The different methods among some names: in the order of METHODS, then those that it lacks, by name."""
    order = {method: position for position, method in enumerate(METHODS)}
    return sorted(set(methods), key=lambda method: (order.get(method, len(order)), method))


def contrast(first: Sequence[float], second: Sequence[float]) -> float:
    """The contrast of two colours (red, green, blue from 0 to 1) by WCAG 2, from 1 to 21."""
    dark, light = sorted(map(_luminance, (first, second)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Sequence[float]) -> float:
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in colour[:3]]
    return sum(weight * value for weight, value in zip([0.2126, 0.7152, 0.0722], linear, strict=True))

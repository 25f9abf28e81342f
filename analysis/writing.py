"""The files that tables and figures end as, each written whole or not at all: CSV, Markdown, LaTeX, PNG and SVG."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from tspin.runs.files import atomic_path, write_text

from .style import MISSING, RC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEX = {**{sign: "\\" + sign for sign in "&%$#_{}"}, "\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$", MISSING: "--"}


def write_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as `<stem>.png` and `.svg`; return both paths."""
    import matplotlib  # tables and claims do without it

    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    # A date or a library version in the file would change it with nothing to see.
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
        with atomic_path(path) as temporary, matplotlib.rc_context(RC):
            figure.savefig(temporary, format=path.suffix[1:], dpi=300, metadata=metadata)
        figure.set_layout_engine("none")  # what was laid out for the first file stands in the second
    return paths


def write_table(stem: Path, table: pd.DataFrame, cells: pd.DataFrame, caption: str, align: str = "right") -> list[Path]:
    """Write `<stem>.csv` of a table, `.md` and `.tex` of its cells as texts with their caption; return the paths."""
    paths = [write_csv(stem.with_suffix(".csv"), table), stem.with_suffix(".md"), stem.with_suffix(".tex")]
    write_text(paths[1], f"{markdown(cells, align)}\n\n{caption}\n")
    write_text(paths[2], latex(cells, caption, align))
    return paths


def write_csv(path: Path, table: pd.DataFrame) -> Path:
    """Write a table with four decimals, missing cells empty; return the path."""
    write_text(path, csv_text(table))
    return path


def csv_text(table: pd.DataFrame) -> str:
    """What `write_csv` writes."""
    return str(table.to_csv(index=False, float_format="%.4f", lineterminator="\n"))


def number(value: float | None, form: str = ".2f") -> str:
    """`value` as text, or the sign for missing."""
    if value is None or pd.isna(value):
        return MISSING
    return re.sub(r"^-(?=[0.]*%?$)", "+" if "+" in form else "", format(value, form))  # a small loss is no -0.00


def counted(counts: Iterable[int]) -> str:
    """Whole numbers that may differ, in words: 5, or 3 to 5."""
    low, high = (f"{end(counts):,}" for end in (min, max)) if (counts := list(counts)) else ("0", "0")
    return low if low == high else f"{low} to {high}"


def seeds_in_words(counts: Iterable[int]) -> str:
    """How many seeds there are of each of several things, in words: 1 seed, 5 seeds, 3 to 5 seeds."""
    words = counted(counts)
    return f"{words} {'seed' if words == '1' else 'seeds'}"


def pipes(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that nothing aligns: a cell that changes leaves the others' lines as they are."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def markdown(cells: pd.DataFrame, align: str = "right") -> str:
    """A table of texts of any characters as Markdown; the first column is aligned to the left, the rest as asked."""
    texts = cells.rename(columns=_for_markdown).map(_for_markdown)
    sides = ["left", *[align] * (len(cells.columns) - 1)]
    return str(texts.to_markdown(index=False, disable_numparse=True, colalign=sides))


def latex(cells: pd.DataFrame, caption: str, align: str = "right") -> str:
    """The same as a LaTeX table (needs booktabs)."""
    texts = cells.rename(columns=_for_latex).map(_for_latex)
    body = texts.style.hide(axis="index").to_latex(hrules=True, column_format="l" + align[0] * (len(cells.columns) - 1))
    return f"\\begin{{table}}\n\\centering\n{body}\\caption{{{_for_latex(caption)}}}\n\\end{{table}}\n"


def _for_markdown(text: str) -> str:
    """The text on a line of its own, with nothing in it that Markdown or HTML would take for theirs."""
    lines = (" ".join(line.split()) for line in text.replace("|", r"\|").splitlines())
    return "<br>".join(re.sub("<(?=[A-Za-z/!])", "&lt;", line) for line in lines)


def _for_latex(text: str) -> str:
    return "".join(TEX.get(sign, sign) for sign in text)

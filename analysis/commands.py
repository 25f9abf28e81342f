"""`tspin table`: draw a table of the paper from a preset's results. Heavy imports wait until a command runs."""

import re
from pathlib import Path
from typing import Annotated

import typer

FULL_WIDTH = 120  # characters: ten benchmarks fit from here on


def table(
    number: Annotated[str, typer.Argument(help="Number of the table in the paper: 1.")],
    preset: Annotated[str, typer.Option(help="Preset whose results are drawn.")] = "pocket",
    results: Annotated[Path, typer.Option(help="Folder that holds one folder of results a preset.")] = Path("results"),
) -> None:
    """Draw a table of the paper, and its figure, from a preset's results: ours beside the paper's.

    Example: tspin table 1 --preset pocket
    """
    from tspin.errors import UserError

    drawn = {"1": _table1}
    if number not in drawn:
        raise UserError(f"there is no table {number}; there is: {', '.join(drawn)}")
    drawn[number](preset, results)


def _table1(preset: str, results: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from analysis import figures, tables

    written = tables.write_table1(preset, results) + figures.average_by_iteration(preset, results)
    console = Console(highlight=False)
    full = console.width >= FULL_WIDTH
    cells = tables.table1_cells(tables.table1(preset, results))
    if not full:
        cells = cells[["Method", "Avg", "Paper's Avg"]]
    view = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in map(str, cells):
        text = name in ("Method", "Avg", "Paper's Avg")
        header = name if text else _short(name)
        view.add_column(Text(header), justify="left" if name == "Method" else "right", vertical="bottom",
                        overflow="fold", no_wrap=text, min_width=None if text else 5)  # fmt: skip
    for line in cells.to_numpy().tolist():
        view.add_row(*line)
    console.print(view)
    console.print(f"\n{tables.table1_caption(preset, results)}", markup=False)
    if not full:
        console.print(f"Every benchmark: in {written[1]}, and here from {FULL_WIDTH} columns on.", markup=False)
    console.print("Wrote " + ", ".join(str(path) for path in written), markup=False)


def _short(label: str, width: int = 6) -> str:
    """`label` on lines of at most `width` characters: HellaSwag as Hella, Swag; Simple equations as Simple, equat."""
    words = [label]
    for boundary in (r" |(?<=-)", r"(?<=[a-z])(?=[A-Z])"):
        words = [part for word in words for part in (re.split(boundary, word) if len(word) > width else [word])]
    return "\n".join(word if len(word) <= width else f"{word[: width - 1]}." for word in words)

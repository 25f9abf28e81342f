"""`tspin table`, `figure`, `claims` and `compare`: the paper from results. Heavy imports wait until a command runs."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

    from .tables import Layout

FULL_WIDTH = 130  # characters: ten benchmarks fit from here on


Preset = Annotated[str, typer.Option(help="Preset whose results are drawn.")]
Results = Annotated[Path, typer.Option(help="Folder that holds one folder of results a preset.")]


def table(
    number: Annotated[str, typer.Argument(help="Number of the table in the paper: 1, 2, 4 or 5.")],
    preset: Preset = "pocket",
    results: Results = Path("results"),
    prompt: Annotated[int | None, typer.Option(help="Table 5: which training prompt.")] = None,
) -> None:
    """Draw a table of the paper from a preset's results: ours beside the paper's; Markdown, CSV and LaTeX.

    Example: tspin table 1 --preset pocket
    """
    from tspin.errors import UserError

    from . import responses, tables

    layouts = {str(found): layout for found, layout in tables.LAYOUTS.items()}
    if number == "5":
        written = responses.write_table5(preset, results, prompt)
        _print(responses.table5(preset, results, prompt).map(lambda text: " ".join(str(text).split())))
        _wrote(written)
    elif number in layouts:
        _scores(preset, results, layouts[number])
    else:
        raise UserError(f"there is no table {number}; there are: {', '.join([*layouts, '5'])}")


def figure(
    number: Annotated[
        str, typer.Argument(help="Number in the paper: 2, 3, 4a, 4b, 4c, 5, 6, 7; or base, decoding, neighbours, ten.")
    ],
    preset: Preset = "pocket",
    results: Results = Path("results"),
) -> None:
    """Draw a figure of the paper, or of a study of ours, from a preset's results: PNG and SVG.

    Example: tspin figure 7 --preset pocket
    """
    from tspin.errors import UserError

    from . import curves, dynamics, studies
    from .figures import save
    from .reading import write_atomically

    folder = results / preset
    others: dict[str, studies.Draw] = {"3": dynamics.figure3, "7": dynamics.figure7}
    if number in studies.FIGURES:
        name, draw_study = studies.FIGURES[number]
        table = write_atomically(folder / "studies" / f"{name}.md", studies.markdown(name, preset, results).encode())
        stem = folder / f"figure{number}" if number != name else folder / "studies" / name
        _wrote([*save(draw_study(preset, results), stem), table])
    elif number in others:
        _wrote(save(others[number](preset, results), folder / f"figure{number}"))
    elif number in curves.FIGURES:
        _wrote(save(curves.draw(number, preset, results), folder / f"figure{number}"))
    else:
        known = ", ".join(sorted([*curves.FIGURES, *others, *studies.FIGURES]))
        raise UserError(f"there is no figure {number}; there are: {known}")


def claims(preset: Preset = "pocket", results: Results = Path("results")) -> None:
    """Judge each of the paper's claims by a preset's results: claims.md and claims.json, with every interval.

    Example: tspin claims --preset pocket
    """
    import pandas as pd

    from . import claims as scorecard
    from .reading import write_atomically
    from .scores import intervals, scores_of

    written = scorecard.write_claims(preset, results)
    rows = scorecard.scorecard(preset, results)
    _print(pd.DataFrame([{"Claim": f"{r['claim']} {r['statement']}", "Verdict": r["verdict"]} for r in rows]))
    table = intervals(scores_of(preset, results))
    content = table.to_csv(index=False, float_format="%.4f", lineterminator="\n")
    written.append(write_atomically(results / preset / "intervals.csv", content.encode()))
    _wrote(written)


def compare(
    run_a: Annotated[str, typer.Argument(help="A run's folder, or <results folder>:<method>:<seed>.")],
    run_b: Annotated[str, typer.Argument(help="Another one.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("compare.html"),
) -> None:
    """Put two runs side by side: a table here, and one HTML page with everything in it.

    Example: tspin compare results/pocket:spin:0 results/pocket:tspin:0
    """
    from .compare import summary, write_page
    from .runs import load_run

    first, second = load_run(run_a), load_run(run_b)
    written = write_page(first, second, out)
    _print(summary(first, second))
    _wrote([written])


def _wrote(paths: list[Path]) -> None:
    from rich.console import Console

    Console(highlight=False).print("Wrote " + ", ".join(map(str, paths)), markup=False)


def _print(cells: "pd.DataFrame") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, padding=(0, 1, 1, 0), pad_edge=False, header_style="bold")
    for name in map(str, cells):
        view.add_column(Text(name), overflow="fold")
    for line in cells.to_numpy().tolist():
        view.add_row(*(Text(str(cell)) for cell in line))
    Console(highlight=False).print(view)


def _scores(preset: str, results: Path, layout: "Layout") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from . import figures, tables

    written = tables.write_table1(preset, results, layout)
    if layout is tables.TABLE1:
        written += figures.average_by_iteration(preset, results)
    console = Console(highlight=False)
    full = console.width >= FULL_WIDTH
    cells = tables.table1_cells(tables.table1(preset, results, layout))
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
    console.print(f"\n{tables.table1_caption(preset, results, layout)}", markup=False)
    if not full:
        console.print(f"Every benchmark: in {written[1]}, and here from {FULL_WIDTH} columns on.", markup=False)
    _wrote(written)


def _short(label: str, width: int = 6) -> str:
    """`label` on lines of at most `width` characters: HellaSwag as Hella, Swag; Simple equations as Simple, equat."""
    words = [label]
    for boundary in (r" |(?<=-)", r"(?<=[a-z])(?=[A-Z])"):
        words = [part for word in words for part in (re.split(boundary, word) if len(word) > width else [word])]
    return "\n".join(word if len(word) <= width else f"{word[: width - 1]}." for word in words)

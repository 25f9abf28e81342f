"""The commands that read results: the paper's tables and figures, claims, pages. Heavy imports wait for a command."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

FULL_WIDTH = 130  # characters: ten benchmarks fit from here on
COMMITTED_WIDTH = 26  # what the committed results take beside them
TEXTS = ["Method", "Avg", "Committed", "Agrees", "Paper's Avg"]  # the columns of scores that are no benchmark

SECOND = ("4", "6")  # Table 4 and Figure 6 are of a second base model: the numbers of Table 1 are none
Preset = Annotated[str, typer.Option(help="Preset whose results are drawn.")]
AnyPreset = Annotated[
    str | None,
    typer.Option(help="Preset whose results are drawn.", show_default="pocket, but none for Table 4 and Figure 6"),
]
Results = Annotated[Path, typer.Option(help="Folder that holds one folder of results a preset.")]


def table(
    number: Annotated[str, typer.Argument(help="Number of the table in the paper: 1, 2, 4 or 5.")],
    preset: AnyPreset = None,
    results: Results = Path("results"),
    prompt: Annotated[int | None, typer.Option(help="Table 5: which training prompt.")] = None,
) -> None:
    """Draw a table of the paper from a preset's results: yours, the committed, the paper's; Markdown, CSV and LaTeX.

    Example: tspin table 1 --preset pocket
    """
    from tspin.errors import UserError

    from .tables import LAYOUTS

    if number == "5":
        _texts(_folder(number, preset, results), prompt)
    elif number in LAYOUTS:
        _scores(_folder(number, preset, results), number)
    else:
        raise UserError(f"there is no table {number}; there are: {', '.join([*LAYOUTS, '5'])}")


def figure(
    number: Annotated[
        str,
        typer.Argument(
            help="Number in the paper: 2, 3, 4a, 4b, 4c, 5, 6, 7; or a figure of ours: benchmarks, entropy, ten, map, "
            "map_benchmarks, map_sft, map_course, map_entropy, map_greedy."
        ),
    ],
    preset: AnyPreset = None,
    results: Results = Path("results"),
) -> None:
    """Draw a figure of the paper, or of a study of ours, from a preset's results: PNG and SVG.

    Example: tspin figure 7 --preset pocket
    """
    from tspin.runs.files import write_text

    from .figures import figure_of
    from .writing import write_figure

    drawn = figure_of(number)
    folder = _folder(number, preset, results)
    written = write_figure(drawn.draw(folder), folder / drawn.stem)
    for name, text in drawn.texts.items():
        write_text(folder / name, text(folder))
        written.append(folder / name)
    _wrote(written)


def claims(preset: Preset = "pocket", results: Results = Path("results")) -> None:
    """Judge each of the paper's claims by a preset's results: claims.md and claims.json, with every interval.

    Example: tspin claims --preset pocket
    """
    import pandas as pd

    from .claims import scorecard, write_claims
    from .scores import means, scores_of
    from .writing import write_csv

    folder = results / preset
    rows = scorecard(folder)
    written = write_claims(rows, folder)
    _print(pd.DataFrame([{"Claim": f"{r['claim']} {r['statement']}", "Verdict": r["verdict"]} for r in rows]))
    _wrote([*written, write_csv(folder / "intervals.csv", means(scores_of(folder)))])


def compare(
    run_a: Annotated[str, typer.Argument(help="A run's folder, or RESULTS:METHOD, or RESULTS:METHOD:SEED.")],
    run_b: Annotated[str, typer.Argument(help="Another one.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("compare.html"),
) -> None:
    """Put two runs side by side: a table here, and one HTML page to look into both, down to the token.

    Example: tspin compare results/reference/pocket:spin:10 results/reference/pocket:tspin:10
    """
    _look([run_a, run_b], out)


def inspect(
    run: Annotated[str, typer.Argument(help="A run's folder, or RESULTS:METHOD, or RESULTS:METHOD:SEED.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("inspect.html"),
) -> None:
    """Look into a run: one HTML page with its samples, prompts, tokens, curves and benchmarks.

    Example: tspin inspect runs/mine/tspin
    """
    _look([run], out)


def _look(specs: list[str], out: Path) -> None:
    from tspin.runs.files import write_text

    from .compare import facts_table
    from .inspector import page
    from .runs import load_run

    runs = [load_run(spec) for spec in specs]
    write_text(out, page(runs))
    _print(facts_table(runs))
    _wrote([out])


def report(
    preset: Preset = "pocket",
    results: Results = Path("results"),
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("report.html"),
    pdf: Annotated[Path | None, typer.Option(help="Write it as PDF too (pip install 'tspin\\[report]').")] = None,
) -> None:
    """Write one page of everything that a preset's results hold: set-up, tables, figures, claims, limits, provenance.

    Example: tspin report --preset pocket --results results/reference
    """
    from tspin.runs.files import write_text

    from .report import page, write_pdf

    text = page(results / preset)
    write_text(out, text)
    _wrote([out])
    if pdf is not None:
        write_pdf(text, pdf)
        _wrote([pdf])


def _folder(number: str, preset: str | None, results: Path) -> Path:
    """The results that a table or figure is drawn from."""
    from tspin.errors import UserError

    if preset is None and number in SECOND:
        raise UserError(f"{number} is of a second base model: name the preset that trained it, --preset smollm2")
    return results / (preset or "pocket")


def _texts(folder: Path, prompt: int | None) -> None:
    from .responses import response_caption, response_cells, response_table
    from .writing import write_table

    table = response_table(folder, prompt)
    cells = response_cells(table)
    written = write_table(folder / "table5", table, cells, response_caption(folder), align="left")
    _print(cells)
    _wrote(written)


def _scores(folder: Path, number: str) -> None:
    from rich.console import Console

    from .agreement import beside
    from .reading import read_scores
    from .tables import LAYOUTS, score_caption, score_cells, score_table
    from .writing import write_figure, write_table

    scores, layout = read_scores(folder), LAYOUTS[number]
    ours = score_table(folder, layout, scores)
    caption = score_caption(ours, folder, layout, scores)
    table, agreement = beside(ours, folder, layout)
    cells = score_cells(table)
    written = write_table(folder / f"table{number}", table, cells, f"{caption} {agreement}".strip())
    if number == "1":
        from . import benchmarks
        from .curves import average_by_iteration

        written += write_figure(average_by_iteration(table, folder), folder / "average_by_iteration")
        if benchmarks.pairs_of(folder):
            written += write_figure(benchmarks.benchmarks(folder), folder / "benchmarks")
    console = Console(highlight=False)
    texts = [name for name in TEXTS if name in cells]
    width = FULL_WIDTH + COMMITTED_WIDTH * ("Committed" in texts)
    full = console.width >= width
    _print(cells if full else cells[texts], benchmarks=[str(name) for name in cells if name not in texts], padding=0)
    console.print(f"\n{caption}", markup=False)
    if agreement:
        console.print(f"\n{agreement}", markup=False)
    if not full:
        console.print(f"Every benchmark: in {written[1]}, and here from {width} columns on.", markup=False)
    _wrote(written)


def _wrote(paths: list[Path]) -> None:
    from rich.console import Console

    Console(highlight=False).print("Wrote " + ", ".join(map(str, paths)), markup=False)


def _print(cells: "pd.DataFrame", benchmarks: list[str] | None = None, padding: int = 1) -> None:
    """Print a table of texts; one of scores has numbers in every column but the first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, padding=(0, 1, padding, 0), pad_edge=False, header_style="bold")
    for position, name in enumerate(map(str, cells)):
        scores, label = benchmarks is not None, benchmarks is not None and name in benchmarks
        number = scores and position > 0
        view.add_column(Text(_short(name) if label else name), justify="right" if number else "left",
                        vertical="bottom" if scores else "top", overflow="fold", no_wrap=number and not label,
                        min_width=5 if label else None)  # fmt: skip
    for line in cells.to_numpy().tolist():
        view.add_row(*(Text(str(cell)) for cell in line))
    Console(highlight=False).print(view)


def _short(label: str, width: int = 6) -> str:
    """`label` on lines of at most `width` characters: HellaSwag as Hella, Swag; Simple equations as Simple, equat."""
    words = [label]
    for boundary in (r" |(?<=-)", r"(?<=[a-z])(?=[A-Z])"):
        words = [part for word in words for part in (re.split(boundary, word) if len(word) > width else [word])]
    return "\n".join(word if len(word) <= width else f"{word[: width - 1]}." for word in words)

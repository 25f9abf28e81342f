"""`tspin report`: one paper-like page of what a results folder holds, as self-contained HTML, and as PDF.

Nothing is computed here: tables, figures, claims and texts are those of the other commands. Numbers in sentences are
cells by reference (`cells.py`); a sentence whose number is not there is left out, and what could not be made is listed
with the reason.
"""

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
import matplotlib
import pandas as pd
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from tspin.errors import UserError, tell
from tspin.objectives import find_method
from tspin.runs.files import atomic_path, json_text, read_json
from tspin.schema import BASE, unit
from tspin.yaml_files import find_yaml, lineage

from . import benchmarks
from .agreement import beside
from .cells import Absent, Cell, Cells, sentence
from .claims import scorecard
from .curves import CURVES, average_by_iteration
from .figures import FIGURES
from .map import study_of
from .map_text import map_text
from .reading import COMMITTED, read_scores, read_suite
from .responses import response_caption, response_cells, response_table
from .scorecard import chance_rows
from .scores import AVG, means, scores_of
from .style import RC, in_order, look
from .tables import LAYOUTS, score_caption, score_cells, score_table
from .verdicts import BY_DEFINITION, VERDICTS
from .writing import csv_text, number

T = TypeVar("T")
DYNAMICS = {
    "2": "Benchmarks by iteration, beside the paper's",
    "4b": "With and without a reference policy",
    "5": "With and without the historical advantage",
    "3": "Rewards against log-likelihoods",
    "7": "Log-likelihoods during training",
    "entropy": "Entropy of the policies",
}
STUDIES = {"4a": "The share of labels", "4c": "α against β", "ten": "Ten iterations"}
MAP = {
    "map": "Differences after the last iteration",
    "map_benchmarks": "Differences benchmark by benchmark",
    "map_sft": "Against continued SFT",
    "map_course": "Average by iteration",
    "map_entropy": "What changes on the way",
    "map_greedy": "What changes on the way, y′ greedy",
}
PRESETS = "experiments/presets"
OURS = re.compile(r"( *)(\w+):.*?(?:#\s*ours\b[:;,]?\s*(.*))?")
ESTIMATE = re.compile(r": ([+−-]?[\d.]+%? \[.*?\])")


class Shown(NamedTuple):
    """A table of texts: its name, the file that has its numbers, and what a reader must know of it."""

    title: str
    source: str
    cells: pd.DataFrame
    caption: str
    texts: bool = False


class Picture(NamedTuple):
    """A figure as a data URI."""

    title: str
    uri: str


class Setting(NamedTuple):
    """A setting: its key, its value, and where it is ours, not the paper's, why; else None."""

    key: str
    value: Cell
    ours: str | None


class Gathered:
    """What a folder's results give. left_out: what could not be made, and why.

    Raises UserError where there are no evaluations.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.left_out: list[str] = []
        self.scores = read_scores(folder)
        self.methods = in_order(self.scores["method"])
        ours = score_table(folder, LAYOUTS["1"], self.scores)
        self.table, agreement = beside(ours, folder, LAYOUTS["1"])
        self.agreement = agreement.replace(f"{COMMITTED}/", "reference/")  # not where they are on this machine
        self.files: dict[str, Any] = {"table1.csv": self.table}
        if "tspin_no_history" in self.methods:
            self.files["table2.csv"] = score_table(folder, LAYOUTS["2"], self.scores)
        for name in ("suite.json", "config.json", "provenance.json"):
            if (folder / name).is_file():
                self.files[name] = read_json(folder / name)
            else:
                self.left_out.append(f"{name}: no such file")
        intervals = self.attempt(lambda: means(scores_of(folder)))
        if intervals is not None:
            self.files["intervals.csv"] = intervals
            if (rows := self.attempt(lambda: scorecard(folder))) is not None:
                self.files["claims.json"] = json.loads(json_text({"preset": folder.name, "claims": rows}))
        self.cells = Cells(self.files)

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What is made, or None where the results do not hold what it needs: the reason goes to `left_out`."""
        try:
            return make()
        except UserError as error:
            reason = str(error).partition("; ")[0].replace(f"{self.folder}/", "")  # a page has readers elsewhere
            if reason not in self.left_out:
                self.left_out.append(reason)
            return None

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The rows of the scorecard; none where nothing could be judged."""
        return list(self.files.get("claims.json", {}).get("claims", []))

    def derived(self) -> dict[str, str]:
        """The files that the numbers are cells of and that this page was made with, as `tspin` writes them."""
        return {
            name: json_text(content) if name.endswith(".json") else csv_text(content)
            for name, content in self.files.items()
            if name.endswith(".csv") or name == "claims.json"
        }


def page(folder: Path) -> str:
    """The HTML page; what comes from data is escaped. Raises UserError where a folder has no evaluations."""
    gathered = Gathered(folder)
    for name, text in gathered.derived().items():
        path = folder / name
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            command = f"tspin table {name[5]}" if name.startswith("table") else "tspin claims"
            tell(f"{path} is older than the results beside it; the report has their numbers: {command} writes it anew")
    cells = gathered.cells
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = [(column.benchmark, column.metric, column.label) for column in read_suite(folder)]
    return environment.get_template("report.html.j2").render(
        preset=folder.name,
        suite=read_suite(folder),
        versions=gathered.files.get("provenance.json", {}).get("versions", {}),
        uncommitted=gathered.files.get("provenance.json", {}).get("uncommitted_changes", False),
        version=metadata.version("tspin"),
        cell=cells.cell,
        value=cells.value,
        count=cells.count,
        sentence=sentence,
        estimate=_estimate,
        claim=lambda name: _position(gathered.claims, name),
        seeds=partial(_seeds, cells),
        single=lambda method: gathered.scores.loc[gathered.scores["method"] == method, "seed"].nunique() == 1,
        label=lambda method: look(method).label,
        formula=lambda method: find_method(method).formula.replace("0", "₀"),  # y₀, π_θ₀, as the page writes them
        unit=unit(columns),
        methods=gathered.methods,
        trained=[method for method in gathered.methods if method != BASE],
        course=_course(gathered.table),
        tables=_tables(gathered),
        averages=_averages(gathered),
        dynamics=[*_figures(gathered, _drawable(gathered)), *_figures(gathered, _studies(folder))],
        map_text=_map_text(gathered),
        map_pictures=_figures(gathered, MAP) if _has_map(folder) else [],
        settings=settings_of(gathered),
        claims=gathered.claims,
        chances=chance_rows(gathered.claims),
        verdicts=(*VERDICTS, BY_DEFINITION),
        ledger=_ledger(folder),
        runs=_runs(gathered),
        warnings=_warnings(gathered),
        left_out=gathered.left_out,
        downloads={name: _uri("application/octet-stream", text) for name, text in gathered.derived().items()},
    )


def write_pdf(html: str, path: Path) -> None:
    """Write the page as PDF. Raises UserError where WeasyPrint, or pango which it stands on, is not there."""
    try:
        from weasyprint import HTML
        from weasyprint.urls import URLFetcher
    except (ImportError, OSError) as error:  # OSError: the system's libraries
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path}: not written, the HTML is: WeasyPrint cannot be loaded ({reason}); pip install 'tspin[report]', "
            "and pango by the system's packages (apt-get install libpango-1.0-0 libpangoft2-1.0-0)"
        ) from error
    with atomic_path(path) as temporary:  # the page holds all that it needs: nothing is fetched
        HTML(string=html, url_fetcher=URLFetcher(allowed_protocols={"data"})).write_pdf(temporary)


def settings_of(gathered: Gathered) -> list[Setting]:
    """Every setting of config.json that has a value, as its preset's file, where it is here, marks it."""
    config = gathered.files.get("config.json", {}).get("config", {})
    name = gathered.folder.name
    try:
        preset = find_yaml(name, PRESETS, "preset")
        texts = [file.read_text(encoding="utf-8") for file in lineage(preset, PRESETS, "preset")]
        marks = {key: mark for text in texts for key, mark in ours_of(text).items()}
    except UserError:
        marks = {}
        gathered.left_out.append(f"no preset {name} is here: which of the settings are ours is not said")
    found = []
    for path in _leaves(config):
        key = ".".join(path)
        found.append(Setting(key, gathered.cells.value("config.json", "config", *path), marks.get(key)))
    return found


def ours_of(preset: str) -> dict[str, str]:
    """The keys that a preset's file marks as ours, not the paper's, with the reason that it gives ("" for none)."""
    marks: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # indentation and name of the mappings around a line
    for line in preset.splitlines():
        if (found := OURS.fullmatch(line)) is None:
            continue
        indentation = len(found[1])
        above = [*(outer for outer in above if outer[0] < indentation), (indentation, found[2])]
        if found[3] is not None:
            marks[".".join(name for _, name in above)] = found[3]
    return marks


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths to the values of a tree of settings, without those that are empty."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, (*path, key))]
    return [path] if tree not in (None, "", []) else []


def _estimate(text: str) -> str | None:
    """The first mean and interval that a part of a claim states."""
    found = ESTIMATE.search(text)
    return found[1] if found else None


def _position(claims: Sequence[dict[str, Any]], name: str) -> int:
    """Where a claim stands in the scorecard. Raises Absent."""
    for position, row in enumerate(claims):
        if row["claim"] == name:
            return position
    raise Absent(name)


def _seeds(cells: Cells, method: str) -> Cell:
    """The seeds of the last row that a method has in a table of the paper. Raises Absent."""
    for file in ("table1.csv", "table2.csv"):
        rows = cells.files.get(file, pd.DataFrame(columns=["method", "seeds"]))
        rows = rows[(rows["method"] == method) & (rows["seeds"] != "")]
        if len(rows):
            iteration = rows["iteration"].iloc[-1]
            return cells.cell(file, "seeds", method=method, iteration=None if pd.isna(iteration) else int(iteration))
    raise Absent(f"seeds of {method}")


def _course(table: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """The first and the last iteration with an average, of each method of Table 1 that has iterations."""
    rows = table[table["iteration"].notna() & table["avg"].notna()]
    ends = rows.groupby("method", sort=False)["iteration"].agg(["min", "max"])
    return {str(method): (int(low), int(high)) for method, low, high in ends.itertuples()}


def _tables(gathered: Gathered) -> list[Shown]:
    folder, methods = gathered.folder, gathered.methods
    shown = [_scores(gathered, "1", gathered.table, gathered.agreement)]
    if "table2.csv" in gathered.files:
        shown.append(_scores(gathered, "2", gathered.files["table2.csv"]))
    if (folder / "table4.csv").is_file():  # of a second base model, which nobody but its user knows
        shown.append(_scores(gathered, "4", score_table(folder, LAYOUTS["4"], gathered.scores)))
    shown.append(_others(gathered, [m for m in methods if all(m not in LAYOUTS[n].methods for n in ("1", "2"))]))
    texts = gathered.attempt(lambda: response_table(folder)) if (folder / "responses.parquet").is_file() else None
    if texts is not None and len(texts.columns) > 1:
        shown.append(Shown("Table 5", "responses.parquet", response_cells(texts), response_caption(folder), texts=True))
    return [table for table in shown if len(table.cells)]


def _scores(gathered: Gathered, name: str, table: pd.DataFrame, agreement: str = "") -> Shown:
    """A table of scores, without the rows that were not run."""
    ran = table[table["seeds"] != ""]
    caption = score_caption(ran, gathered.folder, LAYOUTS[name], gathered.scores) if len(ran) else ""
    return Shown(f"Table {name}", f"table{name}.csv", score_cells(ran), f"{caption} {agreement}".strip())


def _others(gathered: Gathered, methods: list[str]) -> Shown:
    """The averages of methods that no table of the paper has."""
    table = gathered.files.get("intervals.csv", pd.DataFrame(columns=["method", "benchmark"]))
    rows = table[table["method"].isin(methods) & (table["benchmark"] == AVG)].to_dict("records")
    if methods and not rows:
        names = ", ".join(look(method).label for method in methods)
        gathered.left_out.append(f"{names}: in none of the paper's tables, and without problems.parquet no interval")
    cells = [
        {
            "Method": look(row["method"]).label + ("" if pd.isna(row["iteration"]) else f" {row['iteration']}"),
            AVG: f"{number(row['mean'])} [{number(row['low'], '.1f')}, {number(row['high'], '.1f')}]",
            "Seeds": str(row["seeds"]),
        }
        for row in rows
    ]
    return Shown("Other methods", "intervals.csv", pd.DataFrame(cells), "Avg with its 95 % interval.")


def _averages(gathered: Gathered) -> list[Picture]:
    """Avg by iteration, and beside it the picture by benchmark."""
    folder, pictures = gathered.folder, []
    if gathered.table["avg"].notna().any():
        pictures.append(Picture("Average by iteration", _image(average_by_iteration(gathered.table, folder))))
    if benchmarks.pairs_of(folder):
        pictures.append(Picture("Benchmark by benchmark", _image(benchmarks.benchmarks(folder))))
    return pictures


def _drawable(gathered: Gathered) -> dict[str, str]:
    """The figures of DYNAMICS that these methods are enough for."""
    there = set(gathered.methods)
    needs = {name: set(curves.methods) for name, curves in CURVES.items()}
    known = "intervals.csv" in gathered.files
    wanted = {
        "2": known and bool(there & needs["2"]),
        **{name: known and needs[name] <= there for name in ("4b", "5")},
        **dict.fromkeys(("3", "7"), bool(there & needs["2"])),
        "entropy": bool(there - {BASE, "sft"}),
    }
    return {name: title for name, title in DYNAMICS.items() if wanted[name]}


def _studies(folder: Path) -> dict[str, str]:
    from .studies import STUDY_OF

    return {name: title for name, title in STUDIES.items() if (folder / f"studies/{STUDY_OF[name]}.csv").is_file()}


def _has_map(folder: Path) -> bool:
    return study_of(folder).is_file()


def _figures(gathered: Gathered, titles: dict[str, str]) -> list[Picture]:
    """Those that can be drawn."""
    pictures = []
    for name, title in titles.items():
        figure = gathered.attempt(lambda name=name: FIGURES[name].draw(gathered.folder))  # type: ignore[misc]
        if figure is not None:
            numbered = f"Figure {name}: {title}" if name[0].isdigit() else title
            pictures.append(Picture(numbered, _image(figure)))
    return pictures


def _image(figure: Figure) -> str:
    drawing = io.StringIO()
    with matplotlib.rc_context(RC):
        figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    return _uri("image/svg+xml", drawing.getvalue())


def _uri(kind: str, text: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def _map_text(gathered: Gathered) -> str:
    text = gathered.attempt(lambda: map_text(gathered.folder)) if _has_map(gathered.folder) else None
    return html_of(text) if text else ""


def _ledger(folder: Path) -> str:
    """results/ledger.md as HTML: beside the preset's results, or beside the committed ones."""
    found = (path / "ledger.md" for path in (folder.parent, folder.parent.parent))
    path = next((path for path in found if path.is_file()), None)
    return html_of(path.read_text(encoding="utf-8")) if path else ""


def html_of(markdown: str) -> str:
    """Markdown as HTML without anything active: HTML in it is text; of links, those into the web are kept.

    Its headings stand two levels below the page's.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        for child in token.children or ():
            if child.type == "link_open" and not str(child.attrGet("href")).startswith(("https://", "http://")):
                child.attrs.pop("href")
    return parser.renderer.render(tokens, parser.options, {})


def _runs(gathered: Gathered) -> list[dict[str, str]]:
    """The runs by method and commit: method, seeds, iterations, commit; each as text."""
    runs = pd.DataFrame(gathered.files.get("provenance.json", {}).get("runs", []))
    if runs.empty:
        return []
    runs["commit"] = runs["commit"].fillna("").str[:12] if "commit" in runs else ""
    rows = []
    for (method, commit), group in runs.groupby(["method", "commit"], sort=False):
        texts = {name: ", ".join(map(str, sorted(group[name].unique()))) for name in ("seed", "iteration")}
        rows.append({"method": look(str(method)).label, **texts, "commit": str(commit)})
    return rows


def _warnings(gathered: Gathered) -> list[str]:
    """The names of warnings that any run ended with."""
    runs = gathered.files.get("provenance.json", {}).get("runs", [])
    return sorted({name for run in runs for name in run.get("warnings", [])})

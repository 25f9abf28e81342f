"""The report: its sentences hold no number but cells, each of which is where it says; any results folder has a page."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from io import StringIO
from pathlib import Path

import jinja2
import pandas as pd
import pytest
from jinja2 import nodes

from tspin.errors import UserError
from tspin_analysis import commands, report
from tspin_analysis.cells import Absent, Cells, sentence

POCKET = Path("results/reference/pocket")
TEMPLATE = Path(report.__file__).with_name("report.html.j2")
CELL = re.compile(r'<span class="cell" title="([^"]*)">(.*?)</span>', re.DOTALL)
# What may have digits in the template's words: papers' numbers, and tags and styles.
ALLOWED = re.compile(r"arXiv \d{4}\.\d{5}|<style>.*?</style>|<[^>]*>", re.DOTALL)
# In its expressions: names of files and claims, formats of numbers, places in lists.
NAMES = re.compile(r"table[1245]\.csv|C[1-9]|,|\.\df")


def tables(kept: dict[str, str]) -> dict[str, pd.DataFrame]:
    """The committed tables with the runs of seed 10 of some methods, each by another name."""
    read = {name: pd.read_parquet(POCKET / f"{name}.parquet") for name in ("problems", "diagnostics", "steps")}
    read["evaluations"] = pd.read_csv(POCKET / "evaluations.csv", dtype={"iteration": "Int64"})
    rows = {name: table[table["method"].isin(list(kept)) & (table["seed"] == 10)] for name, table in read.items()}
    return {name: table.assign(method=table["method"].map(kept)) for name, table in rows.items()}


def results(root: Path, kept: dict[str, str], *files: str) -> Path:
    """A user's folder: evaluations and the suite, and of the rest what is named."""
    folder = root / "pocket"
    folder.mkdir(parents=True)
    for name, table in tables(kept).items():
        if name == "evaluations":
            table.to_csv(folder / "evaluations.csv", index=False)
        elif f"{name}.parquet" in files:
            table.to_parquet(folder / f"{name}.parquet")
    for name in ("suite.json", *(name for name in files if name.endswith(".json"))):
        shutil.copy(POCKET / name, folder)
    return folder


@pytest.fixture(scope="module")
def committed() -> str:
    return report.page(POCKET)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One seed of two methods, one of them in none of the paper's tables."""
    files = ("problems.parquet", "diagnostics.parquet", "steps.parquet", "config.json")
    folder = results(tmp_path_factory.mktemp("single"), {"tspin": "tspin", "tspin_no_history": "dpo"}, *files)
    return folder, report.page(folder)


def embedded(page: str) -> dict[str, str]:
    """The files that a page holds."""
    found = re.findall(r'<a download="([^"]+)" href="data:[^,]*,([^"]+)">', page)
    return {name: base64.b64decode(text).decode() for name, text in found}


def resolve(source: str, texts: dict[str, str]) -> object:
    """The value that a source names, read from its file's text without the code that wrote it."""
    file, *path = source.split(" · ")
    if file.endswith(".csv"):
        *keys, column = path
        rows = pd.read_csv(StringIO(texts[file]), dtype=str, keep_default_na=False)
        for key in keys:
            name, _, value = key.partition("=")
            rows = rows[rows[name] == value]
        (value,) = rows[column]
        return value
    found = [json.loads(texts[file])]
    for key in path:
        if key == "count" or key.startswith("count of "):
            wanted = key.removeprefix("count of ")
            return len(found) if key == "count" else found.count(wanted)
        if key == "*":
            found = [each for value in found for each in value]
        else:
            found = [value[int(key)] if isinstance(value, list) else value[key] for value in found]
    (value,) = found
    return value


def assert_is_cell(text: str, source: str, texts: dict[str, str]) -> None:
    value = resolve(source, texts)
    plain = text.replace(",", "")
    try:
        shown, there = float(plain), float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        named = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value  # type: ignore[call-overload]
        assert text in str(named), source
        return
    decimals = len(plain.partition(".")[2])
    assert shown == pytest.approx(there, rel=1e-4, abs=0.5 * 10**-decimals + 1e-4), source


def test_the_template_has_no_number_of_its_own() -> None:
    tree = jinja2.Environment().parse(TEMPLATE.read_text(encoding="utf-8"))
    words = "".join(data.data for data in tree.find_all(nodes.TemplateData))
    assert not re.findall(r".*\d.*", ALLOWED.sub("", words))
    constants = [const.value for const in tree.find_all(nodes.Const) if const.value is not None]
    assert not [text for text in constants if isinstance(text, str) and re.search(r"\d", NAMES.sub("", text))]
    assert {number for number in constants if not isinstance(number, str | bool)} <= {0, 2}  # first of a list; a split


@pytest.mark.parametrize("which", ["committed", "single"])
def test_every_number_is_where_it_says(which: str, committed: str, single: tuple[Path, str]) -> None:
    folder, page = (POCKET, committed) if which == "committed" else single
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    found = [(unescape(source), unescape(text)) for source, text in CELL.findall(page)]
    assert len(found) > 50
    for source, text in found:
        assert_is_cell(text, source, {**texts, **embedded(page)})
    # What a committed folder has of these files is what the page was made with.
    if which == "committed":
        for name in ("table1.csv", "intervals.csv", "claims.json"):
            assert embedded(page)[name] == (folder / name).read_text(encoding="utf-8")


def test_what_the_committed_page_says(committed: str) -> None:
    words = " ".join(re.sub("<[^>]*>", "", unescape(committed)).split())
    table = pd.read_csv(POCKET / "table1.csv")
    last = table[table["method"] == "tspin"].iloc[-1]
    assert f"to {last['avg']:.2f} [{last['avg_low']:.1f}, {last['avg_high']:.1f}] after iteration 4." in words
    for heading in ("Set-up", "Results", "What happens in training", "The paper’s claims", "Limits", "The ledger"):
        assert f">{heading}</h2>" in committed
    assert "learning_rate 3e-06 ours: the best of the sweep" in words
    claims = json.loads((POCKET / "claims.json").read_text())["claims"]
    assert all(part in words for claim in claims for part in (" ".join(text.split()) for text in claim["ours"]))
    assert committed.count("<figure>") >= 5 and "not run: the α × β grid" in words
    assert "Not in this report" not in words


def test_one_seed_of_two_methods(single: tuple[Path, str]) -> None:
    _, page = single
    words = " ".join(re.sub("<[^>]*>", "", unescape(page)).split())
    assert "T-SPIN goes from" in words and "SPIN’s average less" not in words
    assert "T-SPIN has one seed" in words and "DPO has one seed" in words
    assert "Other methods" in words and "DPO 4" in words
    assert "Not in this report: provenance.json: no such file." in words
    assert str(single[0].parent) not in page  # nor where it was on this machine


def test_evaluations_alone(tmp_path: Path) -> None:
    page = report.page(results(tmp_path, {"base": "base", "tspin": "tspin"}))
    words = " ".join(re.sub("<[^>]*>", "", unescape(page)).split())
    assert "The initial policy has" in words and "T-SPIN goes from" in words
    assert "Not judged here." in words and "problems.parquet: no such file" in words
    assert "<h3>Settings" not in page and "What happens in training" not in page and "The map" not in page
    assert not [text for _, text in CELL.findall(page) if text in ("", "nan", "None", "–")]


def test_nothing_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="suite.json: no such file"):
        report.page(tmp_path / "pocket")


def test_the_map_where_it_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = results(tmp_path, {"base": "base", "tspin": "tspin"})
    (folder / "studies").mkdir()
    (folder / "studies" / "map.csv").write_text("method\n")
    page = report.page(folder)
    assert "studies/map.csv: lacks the columns" in page  # said, and no error
    monkeypatch.setattr(report, "map_text", lambda folder: "# Where T-SPIN helps\n\n| arm |\n| --- |\n| <b>x</b> |\n")
    page = report.page(folder)
    assert "<h3>Where T-SPIN helps</h3>" in page and "&lt;b&gt;x&lt;/b&gt;" in page


def test_markdown_has_nothing_active() -> None:
    html = report.html_of("# A\n\n<script>x</script> [in](../x) [js](javascript:x) [out](https://example.org)")
    assert "<h3>A</h3>" in html and "<script>" not in html and "<a>in</a>" in html
    assert 'href="https://example.org"' in html and 'href="javascript' not in html and 'href="../x' not in html


def test_hostile_names_are_text(tmp_path: Path) -> None:
    folder = results(tmp_path, {"base": "base", "tspin": "tspin"}, "config.json")
    config = json.loads((folder / "config.json").read_text())
    config["config"]["model"]["path"] = '"><script>alert(1)</script>'
    (folder / "config.json").write_text(json.dumps(config))
    page = report.page(folder)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:|https://github)', page.replace(report._ledger(folder), ""))


def test_cells_and_sentences() -> None:
    table = pd.DataFrame({"method": ["a", "b"], "iteration": pd.array([1, None], "Int64"), "avg": [1.5, None]})
    cells = Cells({"t.csv": table, "j.json": {"a": [1, "x", "x"], "b": None, "c": "p: +1.00 [0.5, 1.5]; q"}})
    one = cells.cell("t.csv", "avg", ".1f", method="a", iteration=1)
    assert (str(one), one.source) == ("1.5", "t.csv · method=a · iteration=1 · avg")
    assert str(cells.count("j.json", "a", "*", equal="x")) == "2" and str(cells.value("j.json", "a", 0)) == "1"
    assert str(cells.value("j.json", "c", cut=report._estimate)) == "+1.00 [0.5, 1.5]"
    for absent in (
        lambda: cells.cell("t.csv", "avg", method="b", iteration=None),
        lambda: cells.cell("t.csv", "avg", method="c"),
        lambda: cells.cell("t.csv", "method"),  # of two rows
        lambda: cells.cell("u.csv", "avg"),
        lambda: cells.value("j.json", "b"),
        lambda: cells.value("j.json", "a", 7),
        lambda: cells.count("u.json", "a"),
    ):
        with pytest.raises(Absent):
            absent()
        assert sentence(lambda make=absent: f"It is {make()}.") == ""


def test_marks_of_a_preset() -> None:
    marks = report.ours_of("a: 1  # ours: why\nb:\n  c: 2  # ours\n  d: 3  # theirs\ne: 4  # ours, too\n")
    assert marks == {"a": "why", "b.c": "", "e": "too"}


def test_the_command_and_a_machine_without_weasyprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    results(tmp_path, {"base": "base", "tspin": "tspin"})
    monkeypatch.setitem(sys.modules, "weasyprint", None)
    with pytest.raises(UserError, match="report.pdf: not written, the HTML is: .*pango"):
        commands.report("pocket", tmp_path, tmp_path / "report.html", tmp_path / "report.pdf")
    assert (tmp_path / "report.html").stat().st_size > 10_000 and not (tmp_path / "report.pdf").exists()
    assert "report.html" in capsys.readouterr().out.replace("\n", "")


def test_pdf(tmp_path: Path) -> None:
    pytest.importorskip("weasyprint", reason="pip install 'tspin[report]'")
    report.write_pdf(report.page(results(tmp_path, {"base": "base"})), tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_a_number_that_is_older_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = results(tmp_path, {"base": "base"})
    (folder / "table1.csv").write_text("method\n")
    report.page(folder)
    assert "table1.csv is older than the results beside it" in capsys.readouterr().err


def test_nothing_is_wider_than_a_phone(tmp_path: Path, committed: str) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    # In a frame, because a headless window is never so narrow.
    measure = "document.title=frames[0].document.documentElement.scrollWidth"
    outside = (
        '<body style="margin:0"><iframe width="375" height="800" style="border:0" '
        f'srcdoc="{escape(committed)}"></iframe>'
        f"<script>onload=()=>{{{measure}}}</script></body>"
    )
    (tmp_path / "page.html").write_text(outside, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *options, "--dump-dom", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    (width,) = re.findall(r"<title>(\d+)</title>", shown)
    assert 0 < int(width) <= 375

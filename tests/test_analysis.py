"""The analysis half: published numbers, Table 1 against sums by hand, its files, and its errors in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from tspin.errors import UserError
from tspin.schema import ONCE
from tspin_analysis import commands, curves, style, tables, writing
from tspin_analysis.reading import COMMITTED, read_paper, read_suite, reference_of

LABELS = ["Chain sum", "Syllogism"]
HEADER = "preset,method,seed,iteration,benchmark,metric,value,stderr,n"


def write_results(root: Path, rows: list[str], labels: list[str] = LABELS) -> Path:
    """A folder of results, `<root>/pocket`."""
    folder = root / "pocket"
    folder.mkdir(parents=True, exist_ok=True)
    columns = [{"benchmark": f"b{i}", "label": label, "group": "g", "metric": "em"} for i, label in enumerate(labels)]
    (folder / "suite.json").write_text(json.dumps({"name": "pocket", "columns": columns}))
    (folder / "evaluations.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return folder


def scores(method: str, seed: int, iteration: int | str, *values: float, stderr: float = 1.0) -> list[str]:
    return [f"pocket,{method},{seed},{iteration},b{i},em,{v},{stderr},200" for i, v in enumerate(values)]


def row(table: pd.DataFrame, method: str, iteration: int | None = None) -> pd.Series:
    at = table["iteration"].isna() if iteration is None else (table["iteration"] == iteration).fillna(False)
    return table[(table["method"] == method) & at].iloc[0]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Base and SFT with one seed, SPIN 0 with one and 1 with two, T-SPIN 0 and 1 with two; nothing after that."""
    return write_results(
        tmp_path,
        scores("base", 0, "", 10, 20, stderr=3)
        + scores("sft", 0, "", 30, 40)
        + scores("spin", 0, 0, 20, 30)
        + scores("spin", 0, 1, 10, 30)
        + scores("spin", 1, 1, 20, 20)
        + scores("tspin", 0, 0, 20, 30)
        + scores("tspin", 1, 0, 26, 32)
        + scores("tspin", 0, 1, 24, 36)
        + scores("tspin", 1, 1, 30, 38)
        # A metric that the suite does not tabulate.
        + ["pocket,base,0,,b0,other,99,1,200"],
    )


@pytest.mark.parametrize("model", ["Zephyr-7B", "Mistral-7B"])
def test_published_average_is_the_mean_of_its_columns_but_for_one_slip(model: str) -> None:
    paper = read_paper(model)
    means = paper.iloc[:, 2:-1].mean(axis=1)
    assert paper.shape[1] == 2 + 10 + 1
    off = paper[(means - paper["Avg"]).abs() > 0.005 + 1e-9]
    slips = {(r.method, r.iteration): (r.Avg, round(means[r.Index], 2)) for r in off.itertuples()}
    slip = {("tspin_no_history", 3): (41.64, 41.69)}
    assert slips == (slip if model == "Zephyr-7B" else {})


def test_rows_averages_changes_and_errors(results: Path) -> None:
    table = tables.score_table(results)
    names = [(m, None if pd.isna(t) else t) for m, t in zip(table["method"], table["iteration"], strict=True)]
    assert names == [("base", None), ("sft", None), *(("spin", t) for t in range(5)), *(("tspin", t) for t in range(5))]

    base = row(table, "base")
    assert (base["Chain sum"], base["Syllogism"], base["avg"], base["seeds"]) == (10, 20, 15, "0")
    assert base["avg_se"] == pytest.approx((3**2 + 3**2) ** 0.5 / 2)
    assert pd.isna(base["avg_change"]) and pd.isna(base["paper_change"])

    first, second = row(table, "tspin", 0), row(table, "tspin", 1)
    assert (first["Chain sum"], first["Syllogism"], first["avg"], first["seeds"]) == (23, 31, 27, "0 1")
    assert first["avg_change"] == 27 - 15
    # Averages by seed: 25 and 29, whose variance (ddof = 1) is 8; each has a problems' variance of (1 + 1) / 4.
    assert first["avg_se"] == pytest.approx((8 / 2 + 0.5) ** 0.5)
    assert (second["avg"], second["avg_change"]) == (32, 5)
    assert (second["paper_avg"], second["paper_change"]) == (42.56, pytest.approx(42.56 - 39.75))
    assert row(table, "tspin", 0)["paper_change"] == pytest.approx(39.75 - 38.56)


def test_what_was_not_run_is_missing(results: Path) -> None:
    table = tables.score_table(results)
    assert row(table, "spin", 4)[[*LABELS, "avg", "avg_se", "avg_change"]].isna().all()
    # Iteration 0 rests on seed 0, iteration 1 on two seeds: a difference would compare other runs.
    assert pd.isna(row(table, "spin", 1)["avg_change"])
    assert pd.isna(row(table, "tspin", 2)["avg_change"])

    cells = tables.score_cells(table).set_index("Method")
    assert cells.loc["SPIN 4", LABELS].tolist() == ["–", "–"]
    assert cells.loc["SPIN 4", "Avg"] == "–"
    assert cells.loc["SPIN 1", "Avg"] == "20.00 [18.6, 21.4] (–)"
    # Two seeds, 30 and 34: variance 4 of them and 0.5 of problems, Student's t of 1 · (4.5 / 4)² = 1.27 degrees.
    assert cells.loc["T-SPIN 1", "Avg"] == "32.00 [15.3, 48.7] (+5.00)"
    assert cells.loc["T-SPIN 1", "Paper's Avg"] == "42.56 (+2.81)"
    assert cells.loc["base", "Avg"] == "15.00 [10.8, 19.2]"


def test_iterations_beyond_the_papers_have_rows(results: Path) -> None:
    path = results / "evaluations.csv"
    known = pd.read_csv(path)
    more = known[(known["method"] == "tspin") & (known["iteration"] == 1)].assign(iteration=6)
    pd.concat([known, more]).to_csv(path, index=False)
    table = tables.score_table(results)
    assert table[table["method"] == "tspin"]["iteration"].tolist() == list(range(7))
    assert pd.notna(table.iloc[-1]["avg"]) and pd.isna(table.iloc[-1]["paper_avg"])
    assert tables.score_cells(table).iloc[-1]["Paper's Avg"] == "–"


def test_a_seed_without_a_benchmark(tmp_path: Path) -> None:
    half = scores("tspin", 1, 0, 90)
    table = tables.score_table(write_results(tmp_path, scores("tspin", 0, 0, 20, 30, stderr=2) + half))
    both = row(table, "tspin", 0)
    assert (both["Chain sum"], both["avg"], both["seeds"]) == (20, 25, "0")
    assert both["avg_se"] == pytest.approx(8**0.5 / 2)
    assert pd.isna(both["avg_change"])

    only = row(tables.score_table(write_results(tmp_path, half)), "tspin", 0)
    assert only["Chain sum"] == 90
    assert only[["Syllogism", "avg", "avg_se"]].isna().all()


def test_an_unknown_stderr_leaves_the_error_unknown(tmp_path: Path) -> None:
    rows = scores("base", 0, "", 10, 20)[:1] + ["pocket,base,0,,b1,em,20,,200"]
    table = tables.score_table(write_results(tmp_path, rows))
    assert tables.score_cells(table)["Avg"][0] == "15.00 [–, –]"


def test_caption(results: Path) -> None:
    caption = tables.score_caption(tables.score_table(results), results)
    for part in (
        "Table 1 (pocket): scores in percent, seeds 0, 1.",
        "Rows with fewer seeds: base (seed 0), SFT (seed 0), SPIN 0 (seed 0).",
        "Problems per benchmark: 200; metric: em.",
        "in square brackets its 95 % interval, by seeds, and problems' errors as if all seeds shared them.",
        "In rows with one seed it is that of the problems: nothing is known of the seeds' spread.",
        "compare shapes, not levels",
        "–: not there yet.",
    ):
        assert part in caption
    single = write_results(results.parent, scores("base", 3, "", 1, 2))
    assert "seed 3." in tables.score_caption(tables.score_table(single), single)


def test_files(results: Path) -> None:
    table = tables.score_table(results)
    csv, markdown, latex = writing.write_table(results / "table1", table, tables.score_cells(table), "Table 1")
    again = pd.read_csv(csv, dtype={"iteration": "Int64"}, keep_default_na=False, na_values={"avg": [""]})
    assert again["avg"].tolist()[:3] == [15, 35, 25]
    assert again["avg"].isna().sum() == 6
    lines = markdown.read_text().splitlines()
    assert re.split(r" *\| *", lines[0])[1:-1] == ["Method", "Chain sum", "Syllogism", "Avg", "Paper's Avg"]
    assert len(lines) == 2 + 12 + 2 and len({len(line) for line in lines[:14]}) == 1
    assert lines[-1] == "Table 1"

    stem = results / "average_by_iteration"
    png, svg = writing.write_figure(curves.average_by_iteration(table, results), stem)
    assert png.read_bytes().startswith(b"\x89PNG")
    before = svg.read_bytes()
    writing.write_figure(curves.average_by_iteration(table, results), stem)
    assert svg.read_bytes() == before and b"<dc:date>" not in before
    assert latex.read_text().count(r"\\") == 13 and r"\begin{tabular}{lrrrr}" in latex.read_text()
    written = {csv.name, latex.name, markdown.name, png.name, svg.name}
    assert {path.name for path in results.iterdir()} == written | {"evaluations.csv", "suite.json"}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = writing.write_csv(tmp_path / "table.csv", pd.DataFrame({"x": [1]}))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        writing.write_csv(path, pd.DataFrame({"x": [2]}))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["x\n1\n"]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "has no rows"),
        (["pocket,base,0,,b0,em,ten,1,200"], "cannot be read"),
        (["pocket,base,0,,b0,em,10,1,200"] * 2, "line 3: a score is there twice"),
        (["smollm2,base,0,,b0,em,10,1,200"], "line 2: the preset is not pocket"),
        (["pocket,spin,0,,b0,em,10,1,200"], "line 2: iteration must be empty for base and sft, and only there"),
        (["pocket,base,,,b0,em,10,1,200"], "line 2: a preset, method, seed, benchmark or metric is empty"),
        (["pocket,base,0,,b0,f1,10,1,200"], "has no score that suite.json tabulates"),
    ],
)
def test_a_bad_evaluations_file_is_named_in_one_line(tmp_path: Path, rows: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        tables.score_table(write_results(tmp_path, rows))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/pocket/evaluations.csv: {problem}")
    assert message.endswith(f"make it with: tspin run --preset pocket --results {tmp_path}")
    assert "\n" not in message


def test_missing_files_and_columns_are_named(results: Path) -> None:
    (results / "evaluations.csv").write_text("method,seed\nbase,0\n")
    with pytest.raises(UserError, match=r"evaluations\.csv: lacks the columns preset, iteration, benchmark"):
        tables.score_table(results)
    for content, problem in {
        "{": "is not a suite",
        "[]": "is not a suite",
        "{}": "lacks 'columns'",
        '{"columns": []}': "has no columns",
        '{"columns": [{"benchmark": "b0"}]}': "lacks 'label'",
    }.items():
        (results / "suite.json").write_text(content)
        with pytest.raises(UserError, match=rf"suite\.json: {problem}; make it with"):
            read_suite(results)
    with pytest.raises(UserError, match=r"absent/suite\.json: no such file; .* --preset absent --results \S+$"):
        tables.score_table(results.parent / "absent")


def test_who_has_no_results_is_told_what_to_run_and_where_the_committed_ones_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results(Path("results/reference"), scores("base", 0, "", 1, 2))
    with pytest.raises(UserError) as caught:
        tables.score_table(Path("results/pocket"))
    assert str(caught.value) == (
        "results/pocket/suite.json: no such file; make it with: tspin run --preset pocket; "
        "or take the committed results: --results results/reference"
    )
    assert reference_of(Path("results/pocket")) == Path("results/reference/pocket")
    assert reference_of(Path("results/reference/pocket")) is None  # nothing is beside the committed results
    assert reference_of(Path("runs/pocket")) == COMMITTED / "pocket"
    assert reference_of(Path("results/absent")) is None


PAPER_LABELS = ["GSM8K", "MATH", "MuSR", "MMLU", "MMLU-Pro", "GPQA", "HellaSwag", "WinoGrande", "BBH", "IFEval"]
LONG_LABELS = ["Simple equations", "Color cube rotation", "Leg counting", "Word sequence reversal", "Syllogism",
               "Family relationships", "Complex arithmetic", "Needle haystack", "Number filtering", "GCD"]  # fmt: skip


@pytest.mark.parametrize("labels", [PAPER_LABELS, LONG_LABELS])
@pytest.mark.parametrize("width", [80, 130])
def test_the_terminal_table_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, labels: list[str]
) -> None:
    rows = [line for t in range(5) for m in ("spin", "tspin") for line in scores(m, 0, t, *[100 - 9.99 * t] * 10)]
    write_results(tmp_path, scores("base", 0, "", *[12.34] * 10) + rows, labels)
    monkeypatch.setenv("COLUMNS", str(width))
    commands.table("1", "pocket", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    shown = next(line for line in lines if line.startswith("T-SPIN 1"))
    assert shown.count("90.01") == (11 if width == 130 else 1)
    assert "90.01 [89.4, 90.6] (-9.99)" in shown and "42.56 (+2.81)" in shown
    assert max(map(len, lines)) <= width
    if width == 130:
        assert {word for name in labels for word in commands._short(name).split()} <= set(" ".join(lines[:4]).split())


def test_long_labels_are_cut_between_words() -> None:
    for label, lines in {
        "MuSR": "MuSR",
        "IFEval": "IFEval",
        "MMLU-Pro": "MMLU-\nPro",
        "WinoGrande": "Wino\nGrande",
        "Simple equations": "Simple\nequat.",
    }.items():
        assert commands._short(label) == lines


def test_an_unknown_table_lists_those_that_exist(results: Path) -> None:
    with pytest.raises(UserError, match="there is no table 3; there are: 1, 2, 4, 5"):
        commands.table("3", "pocket", results.parent)


def test_help_carries_an_example() -> None:
    app = typer.Typer()
    app.command()(commands.table)
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0 and "tspin table 1 --preset pocket" in shown.output


def test_analysis_imports_no_torch_and_the_command_nothing_heavy() -> None:
    code = "import sys, tspin_analysis.commands; assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules); "
    code += "from tspin_analysis import claims, compare, curves, studies; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_labels_of_any_characters_keep_the_tables_whole():
    label = "A|B $x_1$ \\input{f} <script>\n5 < 6"
    cells = pd.DataFrame({"Method": [label], "GSM8K": ["1.0 ± 0.2"]})
    (row,) = writing.markdown(cells).splitlines()[2:]
    assert row == r"| A\|B $x_1$ \input{f} &lt;script><br>5 < 6 | 1.0 ± 0.2 |"
    assert r"A|B \$x\_1\$ \textbackslash{}input\{f\}" in writing.latex(cells, "")


def test_every_method_has_a_look_and_one_without_gets_one_from_its_name() -> None:
    from tspin.objectives import METHODS

    assert {*METHODS, "base"} == set(style.METHODS)
    assert {name for name, method in METHODS.items() if not method.self_play} == set(ONCE) - {"base"}
    assert style.in_order(["zpo", "tspin", "base", "apo", "tspin"]) == ["base", "tspin", "apo", "zpo"]
    new = style.look("zpo")
    assert new.label == "zpo" and new == style.look("zpo")
    assert not {(new.colour, new.marker)} & {(look.colour, look.marker) for look in style.METHODS.values()}


@pytest.mark.parametrize("method", style.METHODS)
def test_colours_can_be_read_on_white(method: str) -> None:
    """Contrast by WCAG 2. Okabe and Ito's orange and sky blue are lighter than the others: markers help there."""
    colour = style.METHODS[method].colour
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    luminance = sum(weight * value for weight, value in zip([0.2126, 0.7152, 0.0722], linear, strict=True))
    assert 1.05 / (luminance + 0.05) >= (2 if method in ("dpo", "tspin_no_history") else 3)
    assert [look.colour for look in style.METHODS.values()].count(colour) == 1


@pytest.mark.parametrize(("value", "form", "text"), [
    (1.005, ".1f", "1.0"), (-0.001, ".2f", "0.00"), (-0.001, "+.2f", "+0.00"), (-0.0001, ".1%", "0.0%"),
    (-0.01, "+.2f", "-0.01"), (-1200.4, ",.0f", "-1,200"), (None, ".2f", "–"), (float("nan"), "+.2f", "–"),
])  # fmt: skip
def test_numbers_as_text(value: float | None, form: str, text: str) -> None:
    assert writing.number(value, form) == text

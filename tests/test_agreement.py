"""A user's results beside the committed: these are never written to, and Table 1 says which rows agree with them."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tspin import cli
from tspin_analysis import agreement, commands, tables
from tspin_analysis.figures import FIGURES
from tspin_analysis.reading import COMMITTED

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = tables.LAYOUTS["1"]
TINY = ["methods.sft.data.labels=8", "batch_size=8", "evaluation.limit=2"]
SPREAD = {0: 30.0, 1: 34.0, 2: 38.0}  # s = 4, t(2) = 4.3027: 34 ± 4.3027 · 4 · √(1 + 1/3) = 34 ± 19.87


def written(folder: Path, averages: dict[str, dict[int, float]], config: dict | None = None) -> Path:
    """A folder of results of one benchmark: by policy ("base", "tspin 0") and seed its value, each ± 1."""
    folder.mkdir(parents=True, exist_ok=True)
    column = {"benchmark": "b", "label": "B", "group": "g", "metric": "em"}
    (folder / "suite.json").write_text(json.dumps({"columns": [column]}))
    rows = []
    for policy, values in averages.items():
        method, _, iteration = policy.partition(" ")
        rows += [f"{folder.name},{method},{seed},{iteration},b,em,{value},1,200" for seed, value in values.items()]
    header = "preset,method,seed,iteration,benchmark,metric,value,stderr,n"
    (folder / "evaluations.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "config.json").write_text(json.dumps({"config": config or {"alpha": 1.0}, "checksum": str(folder)}))
    return folder


def beside(folder: Path) -> tuple[pd.DataFrame, str]:
    table, line = agreement.beside(tables.score_table(folder, LAYOUT), folder, LAYOUT)
    return tables.score_cells(table).set_index("Method"), line


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, with committed results of two rows over three seeds and one over a single seed."""
    monkeypatch.chdir(tmp_path)
    committed = {"base": dict.fromkeys(SPREAD, 20.0), "tspin 0": SPREAD, "tspin 1": SPREAD, "spin 0": {0: 30.0}}
    written(Path("results/reference/pocket"), committed)
    return Path("results/pocket")


def test_a_prediction_interval():
    assert agreement.expected(list(SPREAD.values())) == pytest.approx((34 - 19.8731, 34 + 19.8731), abs=1e-3)
    low, high = agreement.expected(list(SPREAD.values()), more=3)  # √(1/3 + 1/3) in place of √(1 + 1/3)
    assert (high - low) / 2 == pytest.approx(19.8731 / 2**0.5, abs=1e-3)
    assert np.isnan(agreement.expected([30.0])).all() and np.isnan(agreement.expected([])).all()


@pytest.mark.parametrize("more", [1, 3])
def test_it_holds_the_mean_of_new_seeds_in_19_of_20_cases(more):
    draw = np.random.default_rng(0)
    known, new = draw.normal(40, 2, (4000, 5)), draw.normal(40, 2, (4000, more)).mean(1)
    ends = np.array([agreement.expected(seeds.tolist(), more) for seeds in known])
    assert ((ends[:, 0] <= new) & (new <= ends[:, 1])).mean() == pytest.approx(0.95, abs=0.01)


def test_rows_within_what_one_more_seed_would_give_agree(place):
    cells, line = beside(
        written(place, {"base": {7: 20.5}, "tspin 0": {7: 53.8}, "tspin 1": {7: 53.9}, "spin 0": {7: 30}})
    )
    assert list(cells) == ["B", "Avg", "Committed", "Agrees", "Paper's Avg"]
    assert cells["Agrees"][["base", "T-SPIN 0", "T-SPIN 1", "SPIN 0", "SPIN 4"]].tolist() == [
        "yes",
        "yes",
        "no",
        "–",
        "–",
    ]
    assert cells.loc["T-SPIN 0", ["Avg", "Committed"]].tolist() == ["53.80 [51.8, 55.8] (+33.30)", "34.00 [25.7, 42.3]"]
    assert cells.loc["SPIN 4", "Committed"] == "–"
    for part in (
        "Committed: Avg in results/reference/pocket, seeds 0, 1, 2,",
        "Agrees: 2 of 3 rows within what one more seed would give",
        "the spread of 3 seeds",
        "; not: T-SPIN 1.",
        "not judged: SPIN 0.",
    ):
        assert part in line


def test_a_mean_of_seeds_is_held_against_as_many_new_ones(place):
    mine = dict.fromkeys((7, 8, 9), 48.5)  # beyond 34 ± 19.87 / √2
    cells, line = beside(written(place, {"base": dict.fromkeys(mine, 23.0), "tspin 0": mine, "tspin 1": {7: 48.5}}))
    assert cells["Agrees"][["base", "T-SPIN 0", "T-SPIN 1"]].tolist() == ["no", "no", "yes"]
    assert "1 of 3 rows within what as many more seeds would give" in line and "not: base, T-SPIN 0." in line


def test_without_like_to_hold_against_the_table_stays_and_the_line_says_why(place):
    rows = {"base": {7: 20.0}, "tspin 0": {7: 34.0}}
    cells, line = beside(written(place, rows, {"alpha": 0.3}))
    assert "Committed" not in cells
    assert line == (
        "results/reference/pocket is not held against these: another config (config.alpha is 1.0 there, 0.3 here)."
    )
    (place / "config.json").unlink()
    assert beside(place)[1].endswith("results/pocket/config.json is missing.")
    assert (
        beside(written(place.with_name("mine"), rows))[1]
        == "No committed results of mine are here to hold these against."
    )
    written(place.parent / "reference" / "pocket", {"dpo 0": SPREAD})
    assert beside(written(place, rows))[1].endswith("it has none of the rows.")


def test_the_longest_rows_fit_a_terminal(place, monkeypatch, capsys):
    rows = {
        f"{method} {t}": {0: 10.0 + 10 * t, 1: 12.0 + 10 * t}
        for method in ("tspin", "tspin_no_history")
        for t in (0, 1)
    }
    written(Path("results/reference/pocket"), rows)
    written(place, {**rows, "base": {0: 0.0}})
    monkeypatch.setenv("COLUMNS", "80")
    commands.table("2", "pocket", Path("results"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "21.00 [17.1, 24.9] (+10.00) 21.00 [17.1, 24.9]    yes 39.45 (-0.30)" in "\n".join(lines)


def test_the_committed_results_are_held_against_nothing():
    cells, line = beside(COMMITTED / "pocket")
    assert "Committed" not in cells and line == ""


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path} {path.stat().st_mtime_ns}".encode() + path.read_bytes())
    return found.hexdigest()


def test_a_users_run_leaves_the_committed_results_alone(tmp_path, monkeypatch):
    """The commands of `make reproduce-table1`, small: the committed made on purpose, then a user's run beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str) -> str:
        done = CliRunner().invoke(cli.app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.output

    run = ["run", "--preset", "pocket", "--methods", "base,sft", *(part for text in TINY for part in ("--set", text))]
    call(*run, "--seeds", "0,1", "--results", "results/reference")
    call("table", "1", "--results", "results/reference")
    reference = tmp_path / "results" / "reference"
    before = digest(reference)
    call(*run, "--seeds", "2")
    shown = call("table", "1")
    call("claims")
    call("compare", "results/reference/pocket:sft:0", "results/pocket:sft:2")
    assert digest(reference) == before
    assert "Agrees: " in shown and "of 2 rows within what one more seed would give" in " ".join(shown.split())
    mine = pd.read_csv("results/pocket/evaluations.csv")
    assert set(mine["seed"]) == {2}
    head = (tmp_path / "results" / "pocket" / "table1.md").read_text().splitlines()[0]
    assert re.split(r" *\| *", head)[-5:-1] == ["Avg", "Committed", "Agrees", "Paper's Avg"]
    assert "committed,committed_low" in (tmp_path / "results" / "pocket" / "table1.csv").read_text()
    assert "Committed" not in (reference / "pocket" / "table1.md").read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("results", [None, "results/reference"])
def test_make_writes_where_it_is_told(results):
    """Every command that writes or draws results has its folder from RESULTS."""
    given = [f"RESULTS={results}"] if results else []
    targets = ["reproduce-table1", "reproduce-all", "studies", "sweep"]
    outside = {"PATH": os.environ["PATH"]}  # of a make that may run these tests
    done = subprocess.run(["make", "-n", *targets, *given], cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"bin/tspin (?:run|table|figure|claims|sweep) [^;\n]*", done.stdout)
    assert {line.split()[1] for line in lines} == {"run", "table", "figure", "claims", "sweep"}
    assert {re.findall(r"--results (\S+)", line)[0] for line in lines} == {results or "results"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("study", sorted(path.stem for path in (ROOT / "experiments" / "studies").glob("*.yaml")))
def test_what_make_draws_of_a_study_is_there_to_draw(study):
    outside = {"PATH": os.environ["PATH"]}
    words = ["make", "-n", "study", f"STUDY={study}"]
    said = subprocess.run(words, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    (names,) = re.findall(r"for name in (.*?); do", said)
    assert set(names.split()) <= FIGURES.keys()
    assert names or study.startswith(("sweep", "smollm2", "zephyr", "pocket"))  # tables, or another preset's

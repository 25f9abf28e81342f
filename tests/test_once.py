"""What a command computes once: counted, because seconds depend on the machine."""

import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from tspin_analysis import agreement, commands, evidence, reading, scores, tables
from tspin_analysis.scores import Scores

POCKET = Path("results/reference/pocket")
INPUTS = ("evaluations.csv", "suite.json", "config.json", "provenance.json", "problems.parquet", "diagnostics.parquet")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A user's results, which are the committed ones, beside these."""
    for folder in (tmp_path / "pocket", tmp_path / "reference" / "pocket"):
        folder.mkdir(parents=True)
        for name in INPUTS:
            shutil.copy(POCKET / name, folder)
    scores.scores_of.cache_clear()
    return tmp_path


def count(monkeypatch: pytest.MonkeyPatch, counts: Counter, place: object, name: str, key: int | slice = 0) -> None:
    """Count the calls of `place.name` by what is called and one argument, or some."""
    real = getattr(place, name)

    def counted(*arguments, **options):
        counts[name, str(arguments[key])] += 1
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, counted)


def test_table_1_computes_each_folder_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter = Counter()
    for place in (tables, agreement):
        count(monkeypatch, counts, place, "score_table")
    count(monkeypatch, counts, Scores, "__init__", 1)
    count(monkeypatch, counts, pd, "read_parquet")
    commands.table("1", "pocket", results)
    folders = [results / "pocket", results / "reference" / "pocket"]
    assert counts == {
        (what, str(place / file)): 1
        for place in folders
        for what, file in (("score_table", ""), ("__init__", ""), ("read_parquet", "problems.parquet"))
    }


def test_a_figure_is_laid_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from tspin_analysis.drawing import new_figure
    from tspin_analysis.writing import write_figure

    counts: Counter = Counter()
    count(monkeypatch, counts, ConstrainedLayoutEngine, "execute", slice(0, 0))
    with new_figure(1, 2) as figure:
        figure.subplots().plot([1, 2])
    assert [path.suffix for path in write_figure(figure, tmp_path / "drawn")] == [".png", ".svg"]
    assert counts == {("execute", "()"): 1}


def test_claims_read_and_pair_everything_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter = Counter()
    count(monkeypatch, counts, reading.pd, "read_parquet")
    count(monkeypatch, counts, Scores, "__init__", 1)
    count(monkeypatch, counts, evidence.Evidence, "_gaps_of", slice(1, 3))
    commands.claims("pocket", results)
    assert counts.pop(("read_parquet", str(results / "pocket" / "problems.parquet"))) == 1
    assert counts.pop(("read_parquet", str(results / "pocket" / "diagnostics.parquet"))) == 1
    assert counts.pop(("__init__", str(results / "pocket"))) == 1
    runs = {("_gaps_of", str((method, t))): 1 for method, last in (("spin", 2), ("tspin", 4)) for t in range(last + 1)}
    runs.pop(("_gaps_of", str(("spin", 0))))  # no claim is about it
    assert counts == runs

"""Figures and tables of studies, from tables of the studies' shape."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from typer.testing import CliRunner

from tspin.cli import app
from tspin.errors import UserError
from tspin_analysis import studies
from tspin_analysis.intervals import estimate
from tspin_analysis.readme_labels import by_labels, own_labels, own_lead
from tspin_analysis.style import contrast

SETTINGS = {
    "data": ("labels", [250, 1000, 4000], ("sft", "tspin")),
    "ten": (None, [None], ("spin", "tspin")),
    "own-labels": (None, [None], ("base", "sft", "spin", "tspin")),
}
FIGURES = ("data", "ten", "own-labels")


def table(name: str) -> pd.DataFrame:
    column, values, methods = SETTINGS[name]
    rows = []
    for (position, value), method, seed in itertools.product(enumerate(values), methods, (0, 1)):
        for iteration in [None] if method in ("base", "sft") else range(3):
            avg = 30 + 3 * position + 2 * seed + (iteration or 0)
            cell = f"{method} seed {seed} {value}"
            row = {"cell": cell, "method": method, "seed": seed, "iteration": iteration, "avg": avg, "avg_se": 1.0}
            if name == "own-labels":
                row["learning_rate"] = 1e-5 if method == "sft" else None
            row |= {"mean_tokens": 7.5 + seed, "end_token_share": 0.9}  # of no setting
            rows.append({column: value, **row} if column else row)
    return pd.DataFrame(rows)


def outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """Problems of two benchmarks around each row's average, as hard for all."""
    parts = [
        pd.DataFrame({"cell": row.cell, "iteration": row.iteration, "benchmark": benchmark, "doc_id": range(20),
                      "value": row.avg + np.linspace(-10, 10, 20)})
        for row in rows.itertuples() for benchmark in ("b0", "b1")
    ]  # fmt: skip
    return pd.concat(parts).astype({"iteration": "Int8"})


def write(root: Path, name: str) -> Path:
    """The files of a study; returns their folder."""
    folder = root / "pocket" / "studies"
    folder.mkdir(parents=True)
    table(name).to_csv(folder / f"{name}.csv", index=False)
    outcomes(table(name)).to_parquet(folder / f"{name}_problems.parquet")
    return folder


@pytest.mark.parametrize("name", FIGURES)
def test_drawn_and_tabulated(name, tmp_path):
    folder = write(tmp_path, name)
    number = "4a" if name == "data" else name
    result = CliRunner().invoke(app, ["figure", number, "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    stem = tmp_path / "pocket" / "figure4a" if name == "data" else folder / name
    assert all(stem.with_suffix(f".{form}").stat().st_size > 10_000 for form in ("png", "svg"))
    text = (folder / f"{name}.md").read_text()
    assert "2 seeds" in text and text.count("\n|") == 2 + len(table(name).drop_duplicates(_keys(name)))
    assert "cell" not in text


def _keys(name: str) -> list[str]:
    return ["method", *([SETTINGS[name][0]] if SETTINGS[name][0] else [])]


def test_the_grid_is_drawn(tmp_path):
    folder = tmp_path / "pocket" / "studies"
    folder.mkdir(parents=True)
    cells = itertools.product([0.1, 1.0], [0.1, 1.0], (0, 1), (0, 1))
    columns = ["alpha", "beta", "seed", "iteration"]
    rows = pd.DataFrame(list(cells), columns=columns).assign(method="tspin")
    rows["avg"] = 40 + 2 * rows["alpha"] + rows["seed"]
    rows["cell"] = [f"{row.alpha} {row.beta} {row.seed}" for row in rows.itertuples()]
    rows.to_csv(folder / "grid.csv", index=False)
    outcomes(rows).to_parquet(folder / "grid_problems.parquet")
    (axes, *_) = studies.figure4c(tmp_path / "pocket").axes
    assert sorted(float(text.get_text()) for text in axes.texts) == [40.7, 40.7, 42.5, 42.5]
    assert "2 seeds, 40 problems of 2 benchmarks" in axes.figure.get_supxlabel()
    (mesh,) = (each for each in axes.collections if isinstance(each, QuadMesh))
    pairs = zip(axes.texts, mesh.get_facecolor(), strict=True)
    assert min(contrast(to_rgb(text.get_color()), cell) for text, cell in pairs) > 4.5  # WCAG 2, level AA


def test_labels_are_shares_of_all(tmp_path):
    write(tmp_path, "data")
    ours, paper = studies.figure4a(tmp_path / "pocket").axes
    assert ours.containers[0].lines[0].get_xdata().tolist() == [0.0625, 0.25, 1]  # of 4,000
    assert paper.lines[0].get_xdata().tolist() == [0.25, 1] and ours.get_xlim() == paper.get_xlim()


def test_labels_of_an_unfinished_study(tmp_path):
    """The share is of the labels that the preset's SFT has; SFT alone, whose cells come first, is no figure yet."""
    folder = write(tmp_path, "data")
    whole = pd.read_csv(folder / "data.csv")
    settings = {"data": {"labels": 1000}, "methods": {"sft": {"data": {"labels": 4000}}}}
    (tmp_path / "pocket" / "config.json").write_text(json.dumps({"config": settings}))
    whole[whole["labels"] < 4000].to_csv(folder / "data.csv", index=False)
    ours, _ = studies.figure4a(tmp_path / "pocket").axes
    assert ours.containers[0].lines[0].get_xdata().tolist() == [0.0625, 0.25] and "of 4,000" in ours.get_title("left")
    whole[whole["method"] == "sft"].to_csv(folder / "data.csv", index=False)
    with pytest.raises(UserError, match="no cell of T-SPIN has finished yet; make it with: make study STUDY=data"):
        studies.figure4a(tmp_path / "pocket")


def test_settings_with_fewer_seeds_are_told_apart(tmp_path):
    folder = write(tmp_path, "data")
    whole = pd.read_csv(folder / "data.csv")
    whole[(whole["labels"] < 4000) | (whole["seed"] == 0)].to_csv(folder / "data.csv", index=False)
    text = studies.study_text("data", tmp_path / "pocket")
    assert "1 to 2 seeds" in text and [row.split("|")[-2].strip() for row in text.splitlines()[4:7]] == ["2", "2", "1"]


def test_seeds_of_a_setting_are_crossed_with_their_problems(tmp_path):
    """Two seeds of 30 and 32 with the same problems: variances of 1 between seeds, and of 40 problems."""
    write(tmp_path, "ten")
    study = studies.Study(tmp_path / "pocket", "ten")
    rows = study.table.query("iteration == 0 and method == 'spin'")
    values = study.values(rows)
    assert values.shape == (2, 2, 20)
    mean = study.averaged(["method"], rows).iloc[0]
    assert (mean["method"], mean["seeds"]) == ("spin", 2) and mean["avg"] == pytest.approx(31)
    problems = np.linspace(-10, 10, 20).var(ddof=1) / 40
    assert mean["half"] == estimate(values).half and estimate(values).error ** 2 == pytest.approx(1 + problems)


def test_a_study_that_was_not_run_says_how(tmp_path):
    result = CliRunner().invoke(app, ["figure", "ten", "--results", str(tmp_path)])
    assert result.exit_code == 2 and "make study STUDY=ten" in " ".join(result.output.split())
    (tmp_path / "pocket" / "studies").mkdir(parents=True)
    (tmp_path / "pocket" / "studies" / "ten.csv").write_text("method,seed\nspin,0\n")
    result = CliRunner().invoke(app, ["figure", "ten", "--results", str(tmp_path)])
    assert result.exit_code == 2 and "lacks the columns cell, iteration" in " ".join(result.output.split())


def test_outcomes_that_are_not_there(tmp_path):
    folder = write(tmp_path, "ten")
    path = folder / "ten_problems.parquet"
    rows = pd.read_parquet(path)
    rows[rows["cell"] != "spin seed 1 None"].to_parquet(path)
    with pytest.raises(
        UserError, match="ten_problems.parquet: lacks spin seed 1 None; make it with: make study STUDY=ten"
    ):
        studies.study_text("ten", tmp_path / "pocket")
    path.unlink()
    with pytest.raises(UserError, match="ten_problems.parquet: no such file.*make study STUDY=ten"):
        studies.study_text("ten", tmp_path / "pocket")


def test_what_is_said_of_self_play_and_sft_on_the_same_labels(tmp_path):
    """The averages are 31 for SFT, two more after the last iteration; a seed alone, and a cell that is missing."""
    folder = write(tmp_path / "data", "data")
    whole = pd.read_csv(folder / "data.csv")
    whole[(whole["method"] == "sft") | (whole["labels"] < 4000)].to_csv(folder / "data.csv", index=False)
    head, _, sft, tspin, difference = by_labels(folder.parent).splitlines()
    assert head == "| labels | 250 | 1,000 | 4,000 |" and sft.startswith("| SFT | 31.0 [") and "| 37.0 [" in sft
    assert tspin.startswith("| T-SPIN | 33.0 [") and tspin.endswith(" | – |")
    assert difference == "| T-SPIN − SFT | +2.0 | +2.0 | – |"  # two seeds decide nothing
    folder = write(tmp_path / "own", "own-labels").parent
    rows = [row.split(" | ") for row in own_labels(folder).splitlines()[2:]]
    assert [row[0] for row in rows] == ["| SFT", "| SPIN", "| T-SPIN"] and rows[0][-1] == "– |"
    assert rows[2][1] == "2" and rows[2][3:] == ["+3.0", "+2.0 |"]
    assert own_lead(folder, "tspin", "spin") == "+0.0"
    assert [own_lead(folder, "tspin", "sft", iteration) for iteration in (0, 1, None)] == ["+0.0", "+1.0", "+2.0"]
    settings = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in
                studies.study_text("own-labels", folder).splitlines()[4:]}  # fmt: skip
    assert settings["SFT"] == "1e-05" and settings["SPIN"] == "–"

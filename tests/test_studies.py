"""Figures and tables of studies, from tables of the studies' shape."""

import itertools

import pandas as pd
import pytest
from typer.testing import CliRunner

from tspin.cli import app
from tspin_analysis import studies

SETTINGS = {
    "base": ("path", ["runs/pocket-bases/weak", "pocket", "runs/pocket-bases/strong"], ("base", "spin", "tspin")),
    "data": ("labels", [250, 1000, 4000], ("sft", "tspin")),
    "decoding": ("temperature", [0.0, 0.7, 1.0], ("spin", "tspin")),
    "neighbours": (None, [None], ("spin", "tspin", "dpo", "simpo", "space")),
    "scale": ("alpha", [0.1, 1.0], ("spin", "tspin")),
    "ten": (None, [None], ("spin", "tspin")),
}


def table(name: str) -> pd.DataFrame:
    column, values, methods = SETTINGS[name]
    rows = []
    for (position, value), method, seed in itertools.product(enumerate(values), methods, (0, 1)):
        for iteration in [None] if method in ("base", "sft") else range(3):
            avg = 30 + 3 * position + 2 * seed + (iteration or 0)
            row = {"method": method, "seed": seed, "iteration": iteration, "avg": avg, "avg_se": 1.0}
            row |= {"mean_tokens": 7.5 + seed, "end_token_share": 0.9}  # of no setting
            rows.append({column: value, **row} if column else row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", SETTINGS)
def test_drawn_and_tabulated(name, tmp_path):
    folder = tmp_path / "pocket" / "studies"
    folder.mkdir(parents=True)
    table(name).to_csv(folder / f"{name}.csv", index=False)
    number = "4a" if name == "data" else name
    result = CliRunner().invoke(app, ["figure", number, "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    stem = tmp_path / "pocket" / "figure4a" if name == "data" else folder / name
    assert all(stem.with_suffix(f".{form}").stat().st_size > 10_000 for form in ("png", "svg"))
    text = (folder / f"{name}.md").read_text()
    assert "2 seeds" in text and text.count("\n|") == 2 + len(table(name).drop_duplicates(_keys(name)))


def _keys(name: str) -> list[str]:
    return ["method", *([SETTINGS[name][0]] if SETTINGS[name][0] else [])]


def test_seeds_and_problems_both_count():
    """Two seeds of 30 and 32, each ± 1 over the same problems: variance 1 + 2 / 2."""
    mean = studies.averaged(table("ten").query("iteration == 0 and method == 'spin'"), ["method"])
    assert mean["avg"].item() == 31 and mean["half"].item() == pytest.approx(1.96 * 2**0.5)


def test_a_study_that_was_not_run_says_how(tmp_path):
    result = CliRunner().invoke(app, ["figure", "decoding", "--results", str(tmp_path)])
    assert result.exit_code == 2 and "make study STUDY=decoding" in " ".join(result.output.split())
    (tmp_path / "pocket" / "studies").mkdir(parents=True)
    (tmp_path / "pocket" / "studies" / "ten.csv").write_text("method,seed\nspin,0\n")
    result = CliRunner().invoke(app, ["figure", "ten", "--results", str(tmp_path)])
    assert result.exit_code == 2 and "avg" in result.output

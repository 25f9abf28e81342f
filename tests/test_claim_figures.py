"""Figures and commands of the same results: what they draw, what they say, what they read."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from judging import LEVELS, PROBLEMS, made
from typer.testing import CliRunner

from tspin.cli import app
from tspin.errors import UserError
from tspin_analysis import benchmarks, curves, dynamics, entropy, scores, tables


def counted(monkeypatch, module, name: str) -> Counter:
    """How often a function is called, by its first argument."""
    calls, real = Counter(), getattr(module, name)

    def call(first, *args, **kwargs):
        calls[str(first)] += 1
        return real(first, *args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize(
    ("command", "files", "policies"),
    [("table 1", {"evaluations.csv", "problems.parquet"}, 12), ("claims", {"diagnostics.parquet", "grid.csv"}, 22)],
)
def test_a_command_reads_and_computes_everything_once(results, monkeypatch, command, files, policies):
    root = results()
    folder = root / "pocket"
    scored = made(LEVELS, 5).groupby(["method", "seed", "iteration", "benchmark"], dropna=False)["value"].mean()
    evaluations = scored.reset_index().assign(preset="pocket", metric="em", stderr=1.0, n=PROBLEMS)
    evaluations.to_csv(folder / "evaluations.csv", index=False)
    (folder / "studies").mkdir()
    cells = {"method": "tspin", "alpha": [0.1, 1.0], "beta": 0.1, "seed": 0, "iteration": 1, "avg": [40.0, 41.0]}
    pd.DataFrame(cells).to_csv(folder / "studies" / "grid.csv", index=False)
    read = [counted(monkeypatch, pd, name) for name in ("read_csv", "read_parquet")]
    drawn, computed = counted(monkeypatch, tables, "score_table"), counted(monkeypatch, scores, "estimates")
    result = CliRunner().invoke(app, [*command.split(), "--results", str(root)])
    assert result.exit_code == 0, result.output
    paths = Counter(read[0] + read[1])
    assert {Path(path).name for path in paths} >= files and set(paths.values()) == {1}
    assert drawn.total() == (command == "table 1") and computed.total() == policies


def test_figures_say_which_iterations_were_not_run(results):
    root = results(seeds=1)
    for name in ("steps", "diagnostics"):
        path = root / "pocket" / f"{name}.parquet"
        table = pd.read_parquet(path)
        table[(table["method"] == "spin") | (table["iteration"] == 0)].to_parquet(path)
    for draw, missing in ((dynamics.figure3, [1]), (dynamics.figure7, [1, 2])):
        said = [text.get_text() for axes in draw(root / "pocket").axes for text in axes.texts]
        wanted = [f"T-SPIN:\niteration {t} was not run" for t in missing]
        assert set(wanted) == {text for text in said if "not run" in text}
    with pytest.raises(UserError, match="no steps of iteration 3"):
        dynamics.figure3(root / "pocket", iteration=3)
    with pytest.raises(UserError, match="no samples of iteration 9"):
        dynamics.figure3(root / "pocket", iteration=9)


@pytest.mark.parametrize("seeds", [1, 5])
def test_commands_draw(results, seeds, monkeypatch):
    root = results(seeds=seeds)
    run = CliRunner()
    for number in ("2", "3", "4b", "5", "6", "7"):
        result = run.invoke(app, ["figure", number, "--preset", "pocket", "--results", str(root)])
        assert result.exit_code == 0, result.output
        for form in ("png", "svg"):
            assert (root / "pocket" / f"figure{number}.{form}").stat().st_size > 10_000
    result = run.invoke(app, ["claims", "--results", str(root)])
    assert result.exit_code == 0, result.output
    text = (root / "pocket" / "claims.md").read_text()
    assert all(text.count(f"\n| C{n} ") >= 2 for n in range(1, 10)) and text.count("| 2026-11-26 ") == 9
    assert json.loads((root / "pocket" / "claims.json").read_text())["claims"][0]["verdict"]
    assert run.invoke(app, ["figure", "4c", "--results", str(root)]).exit_code == 2
    assert run.invoke(app, ["figure", "9", "--results", str(root)]).exit_code == 2


def test_a_second_base_model_is_named(results):
    root = results(seeds=1)
    for command in (["figure", "6"], ["table", "4"]):
        result = CliRunner().invoke(app, [*command, "--results", str(root)])
        said = " ".join(result.output.split())
        assert result.exit_code == 2 and f"{command[1]} is of a second base model: name the preset" in said


def test_figure_2_pairs_what_decides_with_the_papers_of_the_same_group(results):
    """B0 and B2 are in one group: T-SPIN is ahead by 10 more points on B2."""
    folder = results() / "pocket"
    groups = zip(["B0", "B1", "B2"], ["math", "instruction", "math"], strict=True)
    columns = [{"benchmark": name.lower(), "label": name, "group": group, "metric": "em"} for name, group in groups]
    (folder / "suite.json").write_text(json.dumps({"columns": columns}))
    table = pd.read_parquet(folder / "problems.parquet")
    ahead = (table["benchmark"] == "b2") & (table["method"] == "tspin") & (table["doc_id"] >= 36)
    table.assign(value=table["value"].mask(ahead, 100.0)).to_parquet(folder / "problems.parquet")
    scores.scores_of.cache_clear()
    figure = curves.FIGURES["2"](folder)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "B2, ours",
        "GSM8K, the paper's",
        "B1, ours",
        "IFEval, the paper's",
        "Avg, ours",
        "Avg, the paper's",
    ]
    assert f"5 seeds, {PROBLEMS} problems a benchmark" in " ".join(figure.get_supxlabel().split())


def test_like_scales(results):
    folder = results() / "pocket"
    three, seven = dynamics.figure3(folder).axes, dynamics.figure7(folder).axes
    assert three[0].get_ylim() == three[1].get_ylim()  # log π of both methods
    assert len({axes.get_ylim() for axes in seven[:6]}) == 1 and len({axes.get_ylim() for axes in seven[6:]}) == 1
    assert "running mean of 5 steps" in " ".join(dynamics.figure7(folder).get_supxlabel().split())
    cells = [text.get_text() for text in three[4].texts]  # of SPIN's 20 prompts all have one sign
    assert "100.0%" in cells and cells.count("0%\n(< 16.1%)") == 8


def test_the_entropy_curve(results):
    folder = results() / "pocket"
    table = pd.read_parquet(folder / "diagnostics.parquet")
    prompts = table["prompt_id"].astype(float)
    table = table.assign(before=-3.0 - table["seed"] - prompts % 2, tokens=5 + 10 * (prompts % 2).astype(int))
    table.to_parquet(folder / "diagnostics.parquet")
    found = entropy.nats(table).set_index(["method", "seed", "iteration"])
    assert len(found) == 2 * 5 * 5 and found.loc[("spin", 0, 0)].tolist() == [3.5, 3.5 / 10, 20]  # 5 or 15 tokens each
    response, token = entropy.figure(folder).axes
    assert response.containers[0].lines[0].get_ydata().tolist() == [5.5] * 5  # seeds 0 to 4
    assert token.containers[1].lines[0].get_ydata() == pytest.approx([0.55] * 5)
    note = " ".join(response.figure.get_supxlabel().split())
    assert "20 prompts, 5 seeds" in note and "at temperature 1, top-p 1" in note
    table[table["role"] == "labelled"].to_parquet(folder / "diagnostics.parquet")
    with pytest.raises(UserError, match="no responses of self-play"):
        entropy.figure(folder)


def test_a_picture_benchmark_by_benchmark(results):
    figure = benchmarks.FIGURES["benchmarks"](results() / "pocket")
    panels = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "T-SPIN 4 − SPIN 4", "T-SPIN 4 − SFT", "SPIN 4 − SFT"]  # fmt: skip
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["B0", "B1", "B2", "Avg"]
    assert len(panels[0].containers) == 5  # Avg has two intervals
    known = scores.scores_of(results() / "pocket").difference(("tspin", 4), ("spin", 4))
    assert [container.lines[0].get_xdata()[0] for container in panels[0].containers][-1] == pytest.approx(known.mean)
    assert f"5 seeds, {PROBLEMS} problems a benchmark" in " ".join(figure.get_supxlabel().split())
    with pytest.raises(UserError, match="no two of spin, tspin and sft"):
        benchmarks.benchmarks(results({"base": [20], "sft": [50]}) / "pocket")

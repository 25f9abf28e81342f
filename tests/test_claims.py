"""Scores, claims, dynamics and their figures, on results whose verdicts are known in advance."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tspin.cli import app
from tspin.errors import UserError
from tspin_analysis import claims, curves, dynamics, scores, tables
from tspin_analysis.reading import read_paper

PROBLEMS, BENCHMARKS = 40, 3
LEVELS = {  # percent; the shapes that the paper prints
    "base": [20],
    "sft": [50],
    "spin": [40, 30, 45, 40, 35],
    "tspin": [45, 50, 55, 60, 65],
    "tspin_no_history": [45, 35, 40, 45, 45],
    "tspin_reference": [40, 45, 50, 55, 60],
}


def made(levels: dict[str, list[int]], seeds: int) -> pd.DataFrame:
    """Problems right in the share that `levels` says; the same ones first, so that methods are paired."""
    rows = []
    for method, course in levels.items():
        for seed in range(seeds):
            for iteration, level in enumerate(course):
                right = np.arange(PROBLEMS) < level / 100 * PROBLEMS + (seed % 2) * 0.5
                for benchmark in range(BENCHMARKS):
                    rows.append(pd.DataFrame({
                        "method": method, "seed": seed, "iteration": pd.NA if len(course) == 1 else iteration,
                        "benchmark": f"b{benchmark}", "doc_id": range(PROBLEMS), "value": 100.0 * right,
                    }))  # fmt: skip
    return pd.concat(rows).astype({"iteration": "Int8"})


def diagnostics(seeds: int) -> pd.DataFrame:
    """After every iteration SPIN's y has the higher reward and the lower log-likelihood; T-SPIN's has both."""
    rows = []
    for method, gap in (("spin", -2.0), ("tspin", 3.0)):
        for seed in range(seeds):
            for iteration in range(5):
                for role, value in (("labelled", gap), ("synthetic", 0.0), ("proto", 0.0)):
                    reward = {"labelled": 1.0}.get(role, 0.0)
                    noise = np.random.default_rng(seed).normal(0, 0.1, 20)
                    rows.append(pd.DataFrame({
                        "method": method, "seed": seed, "iteration": iteration, "prompt_id": range(20), "role": role,
                        "after": value + noise * (role == "labelled"), "reward_after": reward,
                    }))  # fmt: skip
    return pd.concat(rows).astype({"iteration": "Int8"})


def steps(seeds: int) -> pd.DataFrame:
    cells = [(m, s, t, n) for m in ("spin", "tspin") for s in range(seeds) for t in range(3) for n in range(1, 7)]
    table = pd.DataFrame(cells, columns=["method", "seed", "iteration", "step"])
    for kind in ("reward", "log_likelihood"):
        for role, sign in (("labelled", 1), ("synthetic", -1)):
            table[f"{kind}/{role}"] = sign * table["step"] + table["seed"]
    return table.astype({"iteration": "Int8"})


@pytest.fixture
def results(tmp_path):
    def write(levels=LEVELS, seeds=5):
        scores.scores_of.cache_clear()
        folder = tmp_path / "pocket"
        folder.mkdir(exist_ok=True)
        columns = [{"benchmark": f"b{i}", "label": f"B{i}", "group": f"g{i}", "metric": "em"} for i in range(3)]
        (folder / "suite.json").write_text(json.dumps({"columns": columns}))
        made(levels, seeds).to_parquet(folder / "problems.parquet")
        diagnostics(seeds).to_parquet(folder / "diagnostics.parquet")
        steps(seeds).to_parquet(folder / "steps.parquet")
        facts = {"training_seconds": 10.0, "sampling_seconds": 5.0, "peak_memory_bytes": 1000}
        runs = [(m, s, t) for m in ("spin", "tspin") for s in range(seeds) for t in range(5)]
        costs = [{"method": m, "seed": s, "iteration": t, **facts} for m, s, t in runs]
        (folder / "provenance.json").write_text(json.dumps({"runs": costs}))
        return tmp_path

    return write


def verdicts(results) -> dict[str, str]:
    return {row["claim"]: row["verdict"] for row in claims.scorecard(results / "pocket")}


def test_the_papers_shapes_replicate(results):
    judged = verdicts(results())
    assert judged.pop("C8") == claims.OPEN  # the grid is a study of its own
    assert set(judged.values()) == {claims.REPLICATED}, judged


def test_the_opposite_is_contradicted(results):
    swapped = {**LEVELS, "spin": LEVELS["tspin"], "tspin": LEVELS["spin"], "tspin_reference": [60] * 5}
    judged = verdicts(results({**swapped, "tspin_no_history": [35, 45, 45, 45, 65]}))
    contradicted = {name for name, verdict in judged.items() if verdict == claims.CONTRADICTED}
    assert contradicted == {"C1", "C2", "C5", "C6", "C7"}


def test_what_was_not_run_is_said(results):
    root = results({name: LEVELS[name] for name in ("base", "spin", "tspin")})
    rows = {row["claim"]: row for row in claims.scorecard(root / "pocket")}
    assert rows["C5"]["verdict"] == claims.OPEN and "--methods sft" in rows["C5"]["ours"][0]
    assert "tspin_no_history" in rows["C6"]["ours"][0] and "STUDY=grid" in rows["C8"]["ours"][0]


def test_a_method_that_was_not_run_leaves_room_for_the_other(results):
    folder = results({name: LEVELS[name] for name in ("base", "tspin")}, seeds=1) / "pocket"
    first, *_ = curves.FIGURES["5"](folder).axes
    assert sorted(len(curve.lines[0].get_xdata()) for curve in first.containers) == [0, 5]


def test_paired_differences(results):
    known = scores.Scores(results() / "pocket")
    assert known.seeds(("base", None)) == [0] and known.seeds(("spin", 1)) == [0, 1, 2, 3, 4]
    difference = known.differences(("tspin", 4), ("base", None))
    assert difference.shape == (5, 3, PROBLEMS) and set(np.unique(difference)) <= {0.0, 100.0}
    (step,) = known.compare([(("tspin", 1), ("tspin", 0))])
    assert step.difference.mean == pytest.approx(5, abs=1) and step.p < 0.01
    assert len(scores.means(known)) == len(known.policies()) * 4


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
    cells = {"alpha": [0.1, 1.0], "beta": 0.1, "seed": 0, "iteration": 1, "avg": [40.0, 41.0], "avg_se": 0.1}
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
        result = run.invoke(app, ["figure", number, "--results", str(root)])
        assert result.exit_code == 0, result.output
        for form in ("png", "svg"):
            assert (root / "pocket" / f"figure{number}.{form}").stat().st_size > 10_000
    result = run.invoke(app, ["claims", "--results", str(root)])
    assert result.exit_code == 0, result.output
    text = (root / "pocket" / "claims.md").read_text()
    assert all(text.count(f"\n| C{n} ") == 2 for n in range(1, 10))
    assert json.loads((root / "pocket" / "claims.json").read_text())["claims"][0]["verdict"]
    assert run.invoke(app, ["figure", "4c", "--results", str(root)]).exit_code == 2
    assert run.invoke(app, ["figure", "9", "--results", str(root)]).exit_code == 2
    # Iteration 0, before β acts, is far apart and must not count.
    settings = [(a, b) for a in (0.1, 1.0) for b in (0.1, 1.0)]
    cells = [(a, b, "tspin", 0, t, 40 + (a if t else 20 * a), 0.1) for a, b in settings for t in (0, 1)]
    grid = pd.DataFrame(cells, columns=["alpha", "beta", "method", "seed", "iteration", "avg", "avg_se"])
    (root / "pocket" / "studies").mkdir()
    grid.to_csv(root / "pocket" / "studies" / "grid.csv", index=False)
    assert run.invoke(app, ["figure", "4c", "--results", str(root)]).exit_code == 0
    assert verdicts(root)["C8"] == claims.REPLICATED


def test_the_papers_numbers_are_those_of_its_tables():
    """The scorecard prints differences of published averages; the CSV files have the averages."""
    average = {name: rows["Avg"].tolist() for name, rows in read_paper("Zephyr-7B").groupby("method")}
    printed = {claim.name: claim.paper for claim in claims.CLAIMS}

    def signed(value: float) -> str:
        return f"{value:+.2f}".replace("-", "−")

    changes = {m: ", ".join(signed(b - a) for a, b in zip(average[m], average[m][1:], strict=False))
               for m in ("spin", "tspin")}  # fmt: skip
    assert printed["C1"] == f"SPIN {changes['spin']}; T-SPIN {changes['tspin']}"
    final = average["tspin"][-1]
    assert printed["C2"] == f"{signed(final - average['spin'][-1])}; {signed(final - average['sft'][0])}"
    assert printed["C5"] == signed(final - average["sft"][0])
    without = average["tspin_no_history"]
    assert printed["C6"] == f"{signed(without[1] - without[0])}; {signed(final - without[-1])}"

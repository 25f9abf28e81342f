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
from tspin_analysis import benchmarks, claims, curves, dynamics, entropy, evidence, scores, tables, verdicts
from tspin_analysis.reading import read_paper, read_settings
from tspin_analysis.verdicts import BY_DEFINITION, CONTRADICTED, NOT_TESTED, REPLICATED, UNDECIDED

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


def diagnostics(seeds: int, tokens: int = 10) -> pd.DataFrame:
    """After every iteration SPIN's y has the higher reward and the lower log-likelihood; T-SPIN's has both.

    tokens: of y; every y′ has 10.
    """
    rows = []
    for method, gap in (("spin", -2.0), ("tspin", 3.0)):
        for seed in range(seeds):
            for iteration in range(5):
                for role, value in (("labelled", gap - 5), ("synthetic", -5.0), ("proto", -5.0)):
                    reward = {"labelled": 1.0}.get(role, 0.0)
                    noise = np.random.default_rng(seed).normal(0, 0.1, 20)
                    rows.append(pd.DataFrame({
                        "method": method, "seed": seed, "iteration": iteration, "prompt_id": range(20), "role": role,
                        "after": value + noise * (role == "labelled"), "reward_after": reward,
                        "tokens": tokens if role == "labelled" else 10,
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
    def write(levels=LEVELS, seeds=5, tokens=10):
        scores.scores_of.cache_clear()
        folder = tmp_path / "pocket"
        folder.mkdir(exist_ok=True)
        columns = [{"benchmark": f"b{i}", "label": f"B{i}", "group": f"g{i}", "metric": "em"} for i in range(3)]
        (folder / "suite.json").write_text(json.dumps({"columns": columns}))
        made(levels, seeds).to_parquet(folder / "problems.parquet")
        diagnostics(seeds, tokens).to_parquet(folder / "diagnostics.parquet")
        steps(seeds).to_parquet(folder / "steps.parquet")
        settings = {"model": {"fine_tuned": True}, "temperature": 1.0, "top_p": 1.0}
        (folder / "config.json").write_text(json.dumps({"config": settings}))
        facts = {"training_seconds": 10.0, "sampling_seconds": 5.0, "peak_memory_bytes": 1000}
        runs = [(m, s, t) for m in ("spin", "tspin") for s in range(seeds) for t in range(5)]
        costs = [{"method": m, "seed": s, "iteration": t, **facts} for m, s, t in runs]
        (folder / "provenance.json").write_text(json.dumps({"runs": costs}))
        return tmp_path

    return write


def judged(root: Path, *names: str) -> dict[str, dict]:
    asked = [claim for claim in claims.CLAIMS if not names or claim.name in names]
    return {row["claim"]: row for row in claims.scorecard(root / "pocket", asked)}


def test_the_papers_shapes_replicate(results):
    rows = judged(results())
    assert rows.pop("C8")["verdict"] == NOT_TESTED  # the grid is a study of its own
    assert {name: row["verdict"] for name, row in rows.items()} == dict.fromkeys(rows, REPLICATED)
    assert rows["C3"]["parts"] == [REPLICATED] * 3 + [BY_DEFINITION]


def test_the_opposite_is_contradicted(results):
    swapped = {**LEVELS, "spin": LEVELS["tspin"], "tspin": LEVELS["spin"], "tspin_reference": [60] * 5}
    rows = judged(results({**swapped, "tspin_no_history": [35, 45, 45, 45, 65]}))
    contradicted = {name for name, row in rows.items() if row["verdict"] == CONTRADICTED}
    assert contradicted == {"C1", "C2", "C5", "C6", "C7"}


def test_a_claim_is_not_contradicted_because_a_part_is(results):
    rows = judged(results({**LEVELS, "sft": [80]}), "C2")
    assert rows["C2"]["parts"] == [REPLICATED, CONTRADICTED]
    assert rows["C2"]["verdict"] == "1 of 2 parts replicated, 1 contradicted"


def test_what_was_not_run_is_said(results):
    rows = judged(results({name: LEVELS[name] for name in ("base", "spin", "tspin")}))
    assert rows["C5"]["verdict"] == NOT_TESTED and "--methods sft" in rows["C5"]["ours"][0]
    assert rows["C2"]["parts"] == [REPLICATED, NOT_TESTED]
    assert "tspin_no_history" in rows["C6"]["ours"][0] and "STUDY=grid" in rows["C8"]["ours"][0]


def test_one_seed_decides_nothing(results):
    rows = judged(results(seeds=1))
    assert set(rows["C1"]["parts"] + rows["C2"]["parts"] + rows["C4"]["parts"] + rows["C9"]["parts"]) == {UNDECIDED}
    assert "needs 3 seeds at least" in rows["C2"]["why"][0] and rows["C1"]["chances"] == []


def test_preconditions_of_the_claim_about_labels(results):
    root = results()
    path = root / "pocket" / "config.json"
    for settings in ({"model": {"fine_tuned": False}}, {"model": {}}):
        path.write_text(json.dumps({"config": settings}))
        row = judged(root, "C5")["C5"]
        assert (row["parts"], row["why"]) == ([NOT_TESTED], ["π_θ0 was not fine-tuned on the labels"])
        assert "+15.00" in row["ours"][0]  # what was measured is shown
    row = judged(results({**LEVELS, "sft": [20]}), "C5")["C5"]
    assert row["parts"] == [NOT_TESTED] and "does not surely gain over π_θ0" in row["why"][0]


def test_sft_with_other_than_four_times_the_labels_says_nothing_of_a_quarter(results):
    root = results()
    path = root / "pocket" / "config.json"
    for own, sft, why in (
        (1000, {"labels": 1000}, "SFT had 1 times the labels of self-play, not four"),
        (1000, None, "SFT had 1 times the labels of self-play, not four"),
        (None, None, "SFT trained on the labels that self-play had"),
        (1000, {"labels": 4000}, ""),
        (1500, {"labels": 5000}, ""),
        (50000, {"labels": None}, ""),  # all, however many
    ):
        methods = {"sft": {"data": sft} if sft else {}}
        settings = {"model": {"fine_tuned": True}, "data": {"labels": own}, "methods": methods}
        path.write_text(json.dumps({"config": settings}))
        rows = judged(root, "C2", "C5")
        assert (rows["C5"]["why"][0], rows["C2"]["why"][1]) == (why, why)
        assert len(rows["C5"]["chances"]) == (0 if why else 2)
        assert rows["C5"]["ours"][0].startswith("T-SPIN on 30 %" if own == 1500 else "T-SPIN on ")


def test_methods_that_share_no_seed_are_not_compared(results):
    root = results()
    path = root / "pocket" / "problems.parquet"
    table = pd.read_parquet(path)
    table[(table["method"] != "tspin") | (table["seed"] == 3)].query("method != 'spin' or seed != 3").to_parquet(path)
    rows = judged(root, "C1", "C2")
    assert rows["C2"]["parts"][0] == NOT_TESTED and "no seed in common: tspin (3), spin (0 1 2 4)" in str(
        rows["C2"]["ours"]
    )
    assert len(benchmarks.pairs_of(root / "pocket")) == 2  # each against SFT
    curves.FIGURES["2"](root / "pocket")


def test_the_last_iteration_that_both_have_is_compared(results):
    rows = judged(results({**LEVELS, "spin": [40, 30], "tspin_no_history": [45, 35, 40]}), "C2", "C6", "C7")
    assert rows["C2"]["ours"][0].startswith("final T-SPIN − final SPIN (at iteration 1, the last of both): +20")
    assert rows["C6"]["ours"][1].startswith("final with it − final without it (at iteration 2, the last of both): +15")
    (of_reference,) = judged(results({**LEVELS, "tspin": [45, 50, 55]}), "C7")["C7"]["ours"]
    assert "mean of 1–2" in of_reference and "3 " not in of_reference.partition(":")[2].split(";")[-1]


def test_columns_that_are_no_shares_of_problems_are_shown_and_not_averaged(results):
    """Perplexity, for which less is better, and a metric without a number for each problem."""
    root = results()
    folder = root / "pocket"
    before = judged(root, "C1", "C2")
    columns = json.loads((folder / "suite.json").read_text())["columns"]
    more = {"b3": ("Wiki", "word_perplexity,none"), "b4": ("Inst", "inst_level_strict_acc,none")}
    columns += [{"benchmark": b, "label": label, "group": "g", "metric": m} for b, (label, m) in more.items()]
    (folder / "suite.json").write_text(json.dumps({"columns": columns}))
    table = pd.read_parquet(folder / "problems.parquet")
    wiki = table[table["benchmark"] == "b0"].assign(benchmark="b3", value=12.0)
    pd.concat([wiki, table]).to_parquet(folder / "problems.parquet")
    scored = made(LEVELS, 5).groupby(["method", "seed", "iteration", "benchmark"], dropna=False)["value"].mean()
    scored = scored.reset_index()
    rest = [scored[scored["benchmark"] == "b0"].assign(benchmark=b, metric=m, value=12.0) for b, (_, m) in more.items()]
    whole = pd.concat([scored.assign(metric="em"), *rest]).assign(preset="pocket", stderr=1.0, n=PROBLEMS)
    whole.to_csv(folder / "evaluations.csv", index=False)
    scores.scores_of.cache_clear()
    assert judged(root, "C1", "C2") == before
    drawn = tables.score_table(folder)
    assert drawn["avg"].tolist() == pytest.approx(drawn[["B0", "B1", "B2"]].mean(axis=1).tolist())
    assert set(drawn[["Wiki", "Inst"]].stack()) == {12.0}
    assert "the mean of the columns but Wiki, Inst (no share of problems" in tables.score_caption(drawn, folder)
    curves.FIGURES["2"](folder)
    # Where none is a share all are averaged, and nothing is claimed.
    (folder / "suite.json").write_text(json.dumps({"columns": columns[3:4]}))
    scores.scores_of.cache_clear()
    assert scores.scores_of(folder).labels == ["Wiki"]
    assert "no column is a share of problems" in judged(root, "C2")["C2"]["ours"][0]


def test_two_seeds_have_no_chances(results):
    assert judged(results(seeds=2), "C2")["C2"]["chances"] == []


def test_sums_over_responses_of_other_lengths_are_no_test(results):
    """y is twice as long as y′ at the same sum: sums and pairs of like length say nothing, means per token do."""
    rows = judged(results(tokens=20), "C3", "C4")
    assert rows["C3"]["parts"] == [NOT_TESTED, NOT_TESTED, CONTRADICTED, BY_DEFINITION]
    assert "2.00 at iteration 1" in rows["C3"]["why"][0] and "0 pairs of like length" in rows["C3"]["ours"][1]
    assert rows["C4"]["parts"] == [NOT_TESTED, CONTRADICTED, NOT_TESTED, REPLICATED]  # SPIN's y has −7/20 a token
    assert rows["C3"]["verdict"] == "1 of 3 parts contradicted, 2 not tested here"


def test_per_token(results):
    table = evidence.Evidence(results(tokens=20) / "pocket").pairs("spin", 1)
    assert table["log_likelihood"].mean() == pytest.approx(-2, abs=0.1)
    assert table["log_likelihood_per_token"].mean() == pytest.approx(-7 / 20 + 5 / 10, abs=0.01)
    assert table["reward_per_token"].unique() == pytest.approx([1 / 20])


def test_how_responses_were_decoded_is_said(results):
    root = results()
    path = root / "pocket" / "config.json"
    for settings, said in (
        ({"temperature": 0.0, "top_p": 1.0}, "decoded greedily"),
        ({"temperature": 0.7, "top_p": 0.9}, "at temperature 0.7, top-p 0.9"),
        ({}, "not recorded"),
    ):
        path.write_text(json.dumps({"config": settings}))
        assert said in evidence.decoding(read_settings(root / "pocket"))


def test_benchmarks_that_cannot_move(results):
    """The first is solved by all, the second is answered alike by all; the third says what Avg says, three times."""
    root = results()
    path = root / "pocket" / "problems.parquet"
    table = pd.read_parquet(path)
    solved, alike = table["benchmark"] == "b0", (table["benchmark"] == "b1") & (table["method"] != "base")
    table["value"] = table["value"].mask(solved, 100.0 * (table["doc_id"] != table["seed"]))
    table["value"] = table["value"].mask(alike, 100.0 * (table["doc_id"] < 10))
    table.to_parquet(path)
    scores.scores_of.cache_clear()
    known = scores.Scores(root / "pocket")
    assert known.still([("tspin", 4), ("spin", 4)]) == {
        "B0": "all at 98 % or more", "B1": "100% of its problems are answered alike by all"}  # fmt: skip
    assert set(known.still([("tspin", 4), ("base", None)])) == {"B0"}
    row = judged(root, "C2")["C2"]
    third = known.difference(("tspin", 4), ("spin", 4), ["B2"])
    assert f"over the 1 benchmarks that can move: {third:+.2f}" in row["ours"][0] and set(row["still"]) == {"B0", "B1"}
    caption = " ".join(tables.what_rows_tell(known, [("tspin", 4), ("spin", 4)]))
    least = known.difference(("tspin", 4), ("spin", 4)).detectable
    assert f"With 5 seeds a difference between two rows below {least:.1f} points" in caption
    assert "Columns that cannot tell these rows apart: B0 (all at 98 % or more), B1 (100%" in caption


def test_a_method_that_was_not_run_leaves_room_for_the_other(results):
    folder = results({name: LEVELS[name] for name in ("base", "tspin")}, seeds=1) / "pocket"
    first, *_ = curves.FIGURES["5"](folder).axes
    assert sorted(len(curve.lines[0].get_xdata()) for curve in first.containers) == [0, 5]


def test_paired_differences(results):
    known = scores.Scores(results() / "pocket")
    assert known.seeds(("base", None)) == [0] and known.seeds(("spin", 1)) == [0, 1, 2, 3, 4]
    weights = {("tspin", 4): 1.0, ("base", None): -1.0}
    difference = known.contrast(weights)
    assert difference.shape == (5, 3, PROBLEMS) and set(np.unique(difference)) <= {0.0, 100.0}
    assert known.contrast(weights, ["B2", "B0"]).shape == (5, 2, PROBLEMS)
    (step,) = known.compare([(("tspin", 1), ("tspin", 0))])
    assert step.difference.mean == pytest.approx(5, abs=1) and step.p < 0.01
    means = scores.means(known)
    assert len(means) == len(known.policies()) * 4
    average = means[means["benchmark"] == "Avg"]
    assert (average["wide_low"] <= average["low"]).all() and means["wide_low"].isna().sum() == len(means) * 3 // 4


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


def grid(root: Path, effect: float, noise: float, seeds: int = 5) -> None:
    """An α × β study: α = 1 is `effect` points better; iteration 0, before β acts, is far apart and must not count."""
    generator, settings = np.random.default_rng(0), [0.1, 0.3, 0.5, 1.0]
    rows = [
        (a, b, "tspin", seed, t, 40 + (effect * (a == 1) + noise * generator.standard_normal() if t else 20 * a))
        for seed in range(seeds) for a in settings for b in settings for t in (0, 1)
    ]  # fmt: skip
    (root / "pocket" / "studies").mkdir(exist_ok=True)
    table = pd.DataFrame(rows, columns=["alpha", "beta", "method", "seed", "iteration", "avg"])
    table.to_csv(root / "pocket" / "studies" / "grid.csv", index=False)


def test_the_grid(results):
    root = results()
    for effect, noise, verdict in (
        (0, 0.3, REPLICATED),
        (8, 0.3, CONTRADICTED),
        (2.5, 1.0, UNDECIDED),
        (0, 3.0, NOT_TESTED),
    ):
        grid(root, effect, noise)
        row = judged(root, "C8")["C8"]
        assert row["verdict"] == verdict, row["ours"]
        assert ("16 equal cells would span" in row["why"][0]) == (verdict == NOT_TESTED)
        assert ("needs" in row["why"][0]) == (verdict == UNDECIDED)
    grid(root, 0, 0.3, seeds=1)
    assert "fewer than two seeds" in judged(root, "C8")["C8"]["ours"][0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda table: table.drop(columns="beta"), "it has no column beta"),
        (lambda table: table.assign(method="base"), "it has no cell of T-SPIN at iteration 1 yet"),
        (lambda table: pd.concat([table, table.assign(lam=1.0)]), "it sets more than α and β"),
    ],
)
def test_a_grid_of_another_shape(results, change, why):
    root = results()
    grid(root, 0, 0.3)
    path = root / "pocket" / "studies" / "grid.csv"
    table = pd.read_csv(path)
    pd.concat([table, table.assign(method="simpo")]).to_csv(path, index=False)
    assert judged(root, "C8")["C8"]["verdict"] == REPLICATED  # of T-SPIN alone
    change(table).to_csv(path, index=False)
    assert why in judged(root, "C8")["C8"]["ours"][0]


def test_what_the_rules_can_decide(results):
    rows = judged(results())
    chances = {(row["words"], row["truth"]): row for row in rows["C1"]["chances"]}
    assert len(chances) == 6 and len(rows["C2"]["chances"]) == 5 and len(rows["C7"]["chances"]) == 1
    for row in chances.values():
        assert sum(share for name, share in row.items() if name in verdicts.VERDICTS) == pytest.approx(1)


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
    assert printed["C6"] == f"{signed(average['tspin'][1] - without[1])}; {signed(final - without[-1])}"


def test_an_iteration_costs_all_of_its_parts_and_iteration_0_is_none(results):
    root = results()
    path = root / "pocket" / "provenance.json"
    runs = json.loads(path.read_text())["runs"]
    for run in runs:
        if run["method"] == "spin":
            run["reference_seconds"] = 15.0
        elif run["iteration"] == 0:
            run["training_seconds"] *= 9
    path.write_text(json.dumps({"runs": runs}))
    assert "T-SPIN / SPIN: 0.50" in judged(root, "C9")["C9"]["ours"][0]


def test_as_good_as_is_within_the_margin(results):
    """SFT on all labels may be up to a point ahead: T-SPIN does as well."""
    assert judged(results({**LEVELS, "sft": [65]}), "C5")["C5"]["verdict"] == REPLICATED


def test_the_reference_is_judged_from_iteration_1_on(results):
    row = judged(results({**LEVELS, "tspin_reference": [5, 45, 50, 55, 60]}), "C7")["C7"]
    assert "mean of 1–4 +5" in row["ours"][0]


def test_pairs_of_like_length_are_those_within_a_fifth(results):
    assert any("0 pairs of like length" in text for text in judged(results(tokens=13), "C3")["C3"]["ours"])

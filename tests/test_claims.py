"""Claims and their verdicts, on results whose verdicts are known in advance."""

import json

import numpy as np
import pandas as pd
import pytest
from judging import LEVELS, PROBLEMS, grid, judged, made

from tspin_analysis import benchmarks, claims, curves, evidence, scores, tables, verdicts
from tspin_analysis.reading import read_paper, read_settings
from tspin_analysis.verdicts import BY_DEFINITION, CONTRADICTED, NOT_TESTED, REPLICATED, UNDECIDED


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

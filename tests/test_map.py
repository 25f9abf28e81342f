"""The study `map`: arms, pairs and contrasts by hand, and its figures and table, from a made-up study."""

import json
from math import isnan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from tspin.cli import app
from tspin.errors import UserError
from tspin_analysis import figures, map_benchmarks, map_curves, map_figures
from tspin_analysis import map as of_map
from tspin_analysis.drawing import new_figure
from tspin_analysis.map import (
    COLD_TSPIN,
    CONTRASTS,
    FAST,
    LONGER,
    RELEASED,
    SFT,
    SPIN,
    SPIN_AT_1,
    START,
    TSPIN,
    TSPIN_AT_01,
    Map,
    Place,
    map_of,
)
from tspin_analysis.map_text import map_text
from tspin_analysis.readme_map import contrast, ends, leads
from tspin_analysis.style import Arm, arm_look

ABSENT = 2  # contrasts: no ablation at α 0.1 was run
HALF = "runs/pocket-starts/half"
# Of the final average: an arm's settings → points above the start; T-SPIN's seed 11 has one more.
ARMS = {
    ("spin", ()): 2.0,
    ("spin", (("lam", 1.0),)): 4.0,
    ("spin", (("history", 1.0),)): 3.0,
    ("tspin", ()): 5.0,
    ("tspin", (("alpha", 0.1),)): 1.0,
    ("tspin_no_history", ()): 5.5,
    ("tspin_reference", ()): 4.5,
    ("space", ()): 0.0,
    ("tspin", (("proto_model", "pocket-cold"),)): 5.25,
}
MEASURES = {"nats": 3.0, "nats_per_token": 0.4, "held_out_nats": 2.5, "equal_share": 0.0, "gradient_signal": 0.3,
            "weight_ess": 0.6, "misaligned": 0.07, "misaligned_matched": 0.05,
            "misaligned_per_token": 0.02}  # fmt: skip


def table() -> pd.DataFrame:
    """Two starts, of which `half` has no greedy cells; SPIN has three seeds at the fine-tuned start, all others two."""
    rows = []

    def add(path: str, method: str, seed: int, averages: list[float], **settings: object) -> None:
        cell = f"{method} {seed} {path} {settings}"
        for iteration, avg in enumerate(averages):
            once = len(averages) == 1
            row = {"cell": cell, "path": path, "method": method, "seed": seed, "avg": avg, **settings}
            rows.append({**row, "iteration": pd.NA if once else iteration, **({} if once else MEASURES)})

    for path, level in (("pocket", 50.0), (HALF, 40.0)):
        add(path, "base", 10, [level])
        for seed in (10, 11):
            add(path, "sft", seed, [level + 3])
        for (method, settings), gain in ARMS.items():
            for temperature in (1.0, 0.0) if path == "pocket" else (1.0,):
                many = method == "spin" and not settings and path == "pocket"
                for seed in (10, 11, 12) if many else (10, 11):
                    more = 1.0 if method == "tspin" and seed == 11 else 0.0
                    add(path, method, seed, [level, level + gain + more], temperature=temperature, **dict(settings))
    for method, gain in (("spin", -2.0), ("tspin", -8.0)):
        for seed in (10, 11):
            add("pocket", method, seed, [50.0, 50 + gain], learning_rate=3e-5)
            add("pocket", method, seed, [50.0, 50 + gain / 2], num_train_epochs=3)
    return pd.DataFrame(rows).astype({"iteration": "Int64"})


def write(root: Path, rows: pd.DataFrame) -> Path:
    """The study's files; returns the preset's folder."""
    map_of.cache_clear()
    folder = root / "pocket" / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    beside = {"proto": "proto_model", "rate": "learning_rate", "epochs": "num_train_epochs"}
    for study, column in beside.items():
        write_study(folder, study, rows[rows[column].notna()].dropna(axis="columns", how="all"))
    write_study(folder, "map", rows[rows[[*beside.values()]].isna().all(axis="columns")].drop(columns=beside.values()))
    (root / "pocket" / "config.json").write_text(json.dumps({"config": {"data": {"labels": 1000}}}))
    return root / "pocket"


def write_study(folder: Path, name: str, rows: pd.DataFrame) -> None:
    rows.to_csv(folder / f"{name}.csv", index=False)
    parts = [
        pd.DataFrame({"cell": row.cell, "iteration": row.iteration, "benchmark": benchmark, "doc_id": range(10),
                      "value": row.avg + np.linspace(-9, 9, 10)})
        for row in rows.itertuples() for benchmark in ("b0", "b1")
    ]  # fmt: skip
    pd.concat(parts).astype({"iteration": "Int8"}).to_parquet(folder / f"{name}_problems.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, table())


SAMPLED, GREEDY, HALF_WAY = Place("pocket", 1.0), Place("pocket", 0.0), Place(HALF, 1.0)
FOR_LONGER, FASTER = Place(LONGER, 1.0), Place(FAST, 1.0)


def test_arms_at_their_places(folder):
    known = Map(folder)
    assert known.places == [
        Place(start, temperature) for start in ("pocket", LONGER, FAST, HALF) for temperature in (1.0, 0.0)
    ]
    assert [str(place) for place in known.places[1:5:3]] == ["fine-tuned, greedy", "rate × 10, temperature 1"]
    assert known.arms == [SPIN, SPIN_AT_1, RELEASED, TSPIN, TSPIN_AT_01, COLD_TSPIN, Arm("tspin_no_history", 1.0),
                          Arm("tspin_reference", 1.0), Arm("space")]  # fmt: skip
    assert known.last(SPIN, SAMPLED)["avg"].tolist() == [52, 52, 52]
    assert known.last(TSPIN, HALF_WAY)["seed"].tolist() == [10, 11] and known.last(TSPIN, Place(HALF, 0.0)).empty
    assert known.last(SFT, GREEDY)["avg"].tolist() == known.last(SFT, SAMPLED)["avg"].tolist() == [53, 53]
    assert known.last(SFT, FASTER)["avg"].tolist() == [53, 53]
    assert known.last(START, FASTER)["avg"].tolist() == [50] and known.last(TSPIN, FASTER)["avg"].tolist() == [42, 42]
    assert known.last(START, FOR_LONGER)["avg"].tolist() == [50] and known.last(SPIN, FOR_LONGER)["avg"].tolist() == [
        49,
        49,
    ]
    nothing = "Not run: anything (3 epochs, greedy), anything (rate × 10, greedy), anything (half fine-tuned, greedy)"
    assert known.absent([SPIN, TSPIN]) == f"{nothing}."
    assert known.absent([TSPIN, Arm("dpo", 0.1)]) == f"{nothing}, DPO λ 0.1 (anywhere)."
    assert known.absent([Arm("space")]) == f"{nothing}, SPACE (3 epochs, temperature 1; rate × 10, temperature 1)."


def test_differences_are_paired(folder):
    """T-SPIN − SPIN is +3 and +4 with the two seeds that both have: one problem is as hard for both."""
    known = Map(folder)
    found = known.difference(TSPIN, SPIN, SAMPLED)
    assert (found.mean, found.seeds) == (pytest.approx(3.5), 2)
    assert found.by_seed == pytest.approx((3, 4))
    assert found.error == pytest.approx(0.5)  # of two seeds, half a point apart from their mean each
    assert known.difference(TSPIN, SPIN, SAMPLED, 0).by_seed == pytest.approx((0, 0))  # where both begin
    assert found.by_benchmark == pytest.approx((3.5, 3.5))
    assert known.difference(SPIN, START, SAMPLED).mean == pytest.approx(2)
    assert known.difference(SPIN, SFT, GREEDY).seeds == 2
    assert known.difference(SPIN, Arm("dpo", 0.1), SAMPLED) is None


def test_contrasts(folder, monkeypatch):
    monkeypatch.setattr(of_map, "ENOUGH", 2)
    found = {(each.contrast.words, each.place): each for each in Map(folder).contrasts}
    assert len({words for words, _ in found}) == len(CONTRASTS) - ABSENT
    means = {words: round(each.difference.mean, 6) for (words, place), each in found.items() if place == SAMPLED}
    assert means == {
        "T-SPIN − SPIN, the papers' scales: α 1, λ 0.1": 3.5,
        "T-SPIN − SPIN, both scales 0.1": -0.5,
        "T-SPIN − SPIN, both scales 1": 1.5,
        "T-SPIN − SPIN, SPIN as released": 2.5,
        "T-SPIN − T-SPIN w/o H-A, α 1": 0.0,
        "T-SPIN_ref − SPIN, both scales 1": 0.5,
        "T-SPIN_ref − T-SPIN, α 1": -1.0,
        "T-SPIN, α 1 − α 0.1": 4.0,
        "SPIN, λ 1 − λ 0.1": 2.0,
        "T-SPIN, y0 of the cold base − of its own start": 0.25,
    }
    assert all(each.corrected >= each.p == each.difference.p for each in found.values())
    assert [words for words, place in found if place == FASTER] == ["T-SPIN − SPIN, the papers' scales: α 1, λ 0.1"]


def test_too_few_seeds_have_no_p(folder, monkeypatch):
    assert all(isnan(each.p) for each in Map(folder).contrasts)  # two seeds
    monkeypatch.setattr(of_map, "ENOUGH", 2)
    path = folder / "studies" / "map.csv"
    table = pd.read_csv(path)
    table[(table["method"] != "tspin_reference") | (table["seed"] == table["seed"].min())].to_csv(path, index=False)
    before = Map(folder).contrasts
    alone = [each for each in before if each.difference.seeds == 1]
    assert {each.contrast.question for each in alone} == {"What a reference adds", "What the history adds"}
    assert all(isnan(each.p) and isnan(each.corrected) for each in alone)
    assert all(each.corrected >= each.p for each in before if each not in alone)
    text = map_text(folder)
    cells = [[cell.strip() for cell in row.split("|")] for row in text.splitlines() if "What a reference adds" in row]
    assert cells and all(row[-3:-1] == ["–", "–"] for row in cells)
    note = map_figures.differences(folder).texts[-1].get_text().replace("\n", " ")
    assert "Hollow, without interval: fewer than three seeds" in note


def test_the_map_without_the_studies_beside_it(folder):
    for path in (folder / "studies").glob("[epr]*"):
        path.unlink()
    known = Map(folder)
    assert known.places == [SAMPLED, GREEDY, HALF_WAY, Place(HALF, 0.0)] and COLD_TSPIN not in known.arms


def test_settings_that_the_map_does_not_know(tmp_path):
    with pytest.raises(UserError, match="map.csv: sets beta, which the map does not know"):
        Map(write(tmp_path, table().assign(beta=0.3)))


def test_looks_of_arms():
    looks = [
        arm_look(arm)
        for arm in (
            SPIN,
            SPIN_AT_1,
            RELEASED,
            TSPIN,
            TSPIN_AT_01,
            Arm("tspin", 0.3),
            Arm("dpo", 0.1),
            Arm("space"),
            COLD_TSPIN,
        )  # fmt: skip
    ]
    assert [look.label for look in looks] == [
        "SPIN λ 0.1", "SPIN λ 1", "SPIN as released", "T-SPIN α 1", "T-SPIN α 0.1", "T-SPIN α 0.3", "DPO λ 0.1",
        "SPACE", "T-SPIN α 1, cold y0",
    ]  # fmt: skip
    assert len({(look.colour, look.line) for look in looks}) == len(looks)
    assert [look.filled for look in looks] == [True, False, False, True, False, False, True, True, False]


@pytest.mark.parametrize("name", sorted(figures.OF_MAP))
def test_drawn(folder, name):
    result = CliRunner().invoke(app, ["figure", name, "--results", str(folder.parent)])
    assert result.exit_code == 0, result.output
    assert all((folder / "studies" / f"{name}.{form}").stat().st_size > 10_000 for form in ("png", "svg"))
    assert (folder / "studies" / "map.md").is_file() == (name == "map")


def test_the_map_says_seeds_and_what_was_not_run(folder):
    figure = map_figures.differences(folder)
    sampled, greedy = figure.axes
    texts = [text.get_text() for text in sampled.texts]
    assert sum(text.endswith(", n 2") for text in texts) == 2 * (len(CONTRASTS) - ABSENT) + 2 and "not run" not in texts
    assert [text.get_text() for text in greedy.texts].count("not run") == len(CONTRASTS) - ABSENT + 2
    note = " ".join(figure.get_supxlabel().split())
    assert "20 problems of 2 benchmarks" in note and "Rows that are not there were not run" in note
    assert [label.get_text() for label in sampled.get_yticklabels()][:4] == [
        "fine-tuned",
        "3 epochs",
        "rate × 10",
        "half fine-tuned",
    ]
    assert sampled.get_xlim() == greedy.get_xlim()


def test_benchmarks_stand_by_the_length_of_their_labels(folder):
    tasks = pd.DataFrame({"prompt_id": ["p0", "p1", "p2"], "task": ["0", "1", "1"]})
    tasks.to_parquet(folder / "prompts.parquet")
    samples = tasks[["prompt_id"]].assign(role="labelled", tokens=[9, 3, 5])
    pd.concat([samples, samples.assign(role="synthetic", tokens=1)]).to_parquet(folder / "diagnostics.parquet")
    figure = map_benchmarks.by_benchmark(folder)
    first, *others = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["b1 (4)", "b0 (9)", "Avg"]
    titles = [axes.get_title("left") for axes in (first, *others)]
    assert titles[:2] == ["fine-tuned,\ntemperature 1, n 2", "fine-tuned,\ngreedy, n 2"] and sum(map(bool, titles)) == 5
    assert [container.lines[0].get_xdata()[0] for container in first.containers[:2]] == pytest.approx([3.5, 3.5])
    assert "Hollow: fewer than 3 seeds" in " ".join(figure.get_supxlabel().split())
    (folder / "prompts.parquet").unlink()
    assert map_benchmarks.by_benchmark(folder).axes[0].get_yticklabels()[0].get_text() == "b0"


def test_an_interval_that_leaves_its_panel_is_marked_there():
    rng = np.random.default_rng(0)
    values = 2 + rng.normal(size=(3, 6, 50))
    values[:, 1] += np.array([-40, 0, 40])[:, None]  # of three seeds: an interval of a hundred points
    with new_figure(1, 1) as figure:
        axes = figure.subplots()
        map_benchmarks._draw_place(axes, values)
    low, high = axes.get_xlim()
    marks = [line for line in axes.lines if line.get_marker() in ("<", ">")]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(low, 1), (high, 1)]
    assert -low == high > np.abs(values.mean((0, 2))).max()


def test_benchmarks_need_both_methods(tmp_path):
    folder = write(tmp_path, table().query("method != 'spin' or lam == 1"))
    with pytest.raises(UserError, match="no seed of both spin and tspin"):
        map_benchmarks.by_benchmark(folder)


def test_a_course_begins_at_the_start(folder):
    first, *_ = map_curves.course(folder).axes
    lines = {container.get_label(): container.lines[0] for container in first.containers}
    assert lines["T-SPIN α 1"].get_xdata()[0] == -1 and lines["T-SPIN α 1"].get_ydata().tolist() == [50, 50, 55.5]


def test_scales_of_like_measures_and_shares_of_none(folder):
    figure = map_curves.entropy(folder)
    rows = [figure.axes[4 * row : 4 * row + 4] for row in range(len(map_curves.MEASURES))]
    assert len({axes.get_ylim() for row in rows[-3:] for axes in row}) == 1  # the three shares of misaligned prompts
    band = rows[3][0].collections[0].get_paths()[0].vertices[:, 1]  # y′ = y: 0 of 1,000 for every seed
    assert band.max() == pytest.approx(3.8415 / 1003.8415, rel=1e-4) and band.min() == 0


def test_greedy_responses_have_a_figure_of_their_own(folder, tmp_path):
    drawn, modes = map_curves.entropy(folder), map_curves.FIGURES["map_greedy"](folder)
    assert [len(figure.axes) // len(map_curves.MEASURES) for figure in (drawn, modes)] == [4, 1]
    assert (
        "y′ greedy: means" in modes.get_supxlabel()
        and "entropy" in drawn.get_supxlabel()
        and "entropy" not in modes.get_supxlabel()
    )
    sampled = write(tmp_path, table().query("temperature != 0"))
    with pytest.raises(UserError, match="nothing was run with y′ greedy; "):
        map_curves.FIGURES["map_greedy"](sampled)


def test_a_share_that_is_largest_at_the_last_start_is_inside(tmp_path):
    rows = table()
    rows.loc[(rows["path"] == HALF) & rows["equal_share"].notna(), "equal_share"] = 0.5
    figure = map_curves.entropy(write(tmp_path, rows))
    shares = next(row for row, measure in enumerate(map_curves.MEASURES) if measure.column == "equal_share")
    low, high = figure.axes[4 * shares].get_ylim()
    assert low == 0 and high > 0.5


def test_the_table(folder):
    text = map_text(folder)
    arms, contrasts = (text.split("## ")[part].split("\n| ")[2:] for part in (0, 1))
    assert len(arms) == 4 + 3 * len(ARMS) + 4 and len(contrasts) == 3 * (len(CONTRASTS) - ABSENT) + 2
    (row,) = (row for row in arms if row.startswith("T-SPIN α 1 ") and " fine-tuned |" in row and "greedy" in row)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == "2" and cells[4].startswith("50.0 [") and cells[5].startswith("55.5 [")
    assert cells[6].startswith("+5.5 [") and cells[7:12] == ["3.0 → 3.0", "0% → 0%", "60% → 60%", "0.30 → 0.30",
                                                             "7.0% → 7.0%"]  # fmt: skip
    assert "Not run: anything (3 epochs, greedy), anything (rate × 10, greedy), anything (half fine-tuned" in text


def test_the_map_in_a_readme(folder):
    header, _, *rows = (line.split(" | ") for line in ends(folder).splitlines())
    assert header[1:3] == ["fine-tuned, temperature 1", "fine-tuned, greedy"]
    cells = {row[0].removeprefix("| "): row[1:3] for row in rows}
    assert cells["start"] == ["50.0", "50.0"] and cells["SFT"] == ["53.0 (n=2)", "53.0 (n=2)"]
    assert cells["T-SPIN α 1"] == ["55.5; 3.0 (n=2)"] * 2 and "DPO λ 0.1" not in cells
    by_iteration = leads(folder).splitlines()[2]
    assert by_iteration.startswith("| fine-tuned, temperature 1, n=2 | +0.00 [") and "| +3.50 [" in by_iteration
    assert contrast(folder, CONTRASTS[0].words, SAMPLED) == "2 seeds yet"
    assert contrast(folder, CONTRASTS[0].words, Place("pocket", 0.5)) == "not run"


def test_every_figure_has_a_place():
    assert figures.FIGURES["2"].stem == "figure2" and figures.FIGURES["entropy"].stem == "entropy"
    assert figures.FIGURES["ten"].stem == "studies/ten" and figures.FIGURES["4a"].stem == "figure4a"
    assert set(figures.FIGURES["4a"].texts) == {"studies/data.md"}


@pytest.mark.parametrize(
    ("start", "name"),
    [(HALF, "half fine-tuned"), (f"{HALF} at 3e-05", "half fine-tuned at 3e-05"), (FAST, "rate × 10"),
     ("pocket at 1e-05, 6 epochs", "fine-tuned at 1e-05, 6 epochs"), ("pockets", "pockets")],
)  # fmt: skip
def test_a_start_that_is_trained_in_another_way_is_named_for_both(start, name):
    assert Place(start, 1.0).start_name == name


def test_a_start_that_only_sft_went_on_from_is_no_place_of_self_play(tmp_path):
    rows = table()
    rows.loc[(rows["path"] == HALF) & ~rows["method"].isin(["base", "sft"]), "learning_rate"] = 1e-5
    known = Map(write(tmp_path, rows))
    there = Place(f"{HALF} at 1e-05", 1.0)
    assert known.places[-2:] == [there, there._replace(temperature=0.0)] and HALF not in known.starts
    assert known.last(SFT, there)["avg"].tolist() == [43, 43]
    assert known.difference(SPIN, START, there).mean == pytest.approx(2)


def test_what_a_study_leaves_empty_is_the_presets(tmp_path):
    """Scales, history and start of another preset than pocket."""
    folder = write(tmp_path, table())
    for beside in ("proto", "rate", "epochs"):
        (folder / "studies" / f"{beside}.csv").unlink()
    path = folder / "studies" / "map.csv"
    rows = pd.read_csv(path)
    settings = ["lam", "alpha", "history"]
    own = (rows["path"] == "pocket") & rows[settings].isna().all(axis=1) & (rows["temperature"] != 0)
    rows[own].drop(columns=["path", "temperature", *settings]).to_csv(path, index=False)
    methods = {"spin": {"lam": 0.3}, "tspin": {"alpha": 0.5}, "tspin_reference": {"alpha": 1.0}}
    own = {"data": {"history": 1}, "model": {"path": "mine/model", "fine_tuned": False}, "methods": methods}
    (folder / "config.json").write_text(json.dumps({"config": {**own, "temperature": 0.0}}))
    known = Map(folder)
    assert known.starts == ["mine/model"] and known.temperatures == [0.0]
    arms = {arm.method: (arm.scale, arm.history) for arm in known.arms}
    assert arms["spin"] == (0.3, True) and arms["tspin"] == (0.5, True) and arms["tspin_reference"] == (1.0, True)


def test_a_map_without_an_arm_yet_is_told(tmp_path):
    folder = tmp_path / "studies"
    folder.mkdir()
    write_study(
        folder, "map", table().query("method == 'base'")[["cell", "path", "method", "seed", "iteration", "avg"]]
    )
    with pytest.raises(UserError, match="no arm of self-play was run yet; make it with: make study STUDY=map"):
        Map(tmp_path)


@pytest.mark.parametrize(("preset", "decoding"), [("smollm2-short", "temperature 1"), ("pocket-greedy", "greedy")])
def test_the_map_of_another_preset_is_the_study_of_its_name(preset, decoding):
    known = Map(Path(__file__).parents[1] / "results" / "reference" / preset)
    assert [(place.start_name, place.decoding) for place in known.places] == [("fine-tuned", decoding)]
    assert known.difference(TSPIN, SPIN, known.places[0]).seeds >= 3

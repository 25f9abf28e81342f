"""`tspin rerun`: the record is enough to run it again, and differences are told."""

import json
from shutil import copytree

import pandas as pd
import pytest
from typer.testing import CliRunner

from tspin.cli import app
from tspin.config import REPOSITORY, load_config
from tspin.errors import UserError
from tspin.evaluation.suites import load_suite
from tspin.experiment import rerun
from tspin.experiment.preset import Where, run_experiment
from tspin.experiment.results import Collected, read_results, write_results

OVERRIDES = ["data.labels=8", "batch_size=4", "evaluation.limit=3", "iterations=2"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    place = tmp_path_factory.mktemp("record")
    config = load_config("pocket", OVERRIDES)
    return run_experiment("pocket", config, ["base", "tspin"], [0], Where(place / "runs", place / "results"))


def test_a_record_is_run_again_to_the_same_numbers(record, tmp_path):
    result = CliRunner().invoke(app, ["rerun", str(record / "provenance.json"), "--out", str(tmp_path), "--exact"])
    assert result.exit_code == 0, result.output
    table = rerun.compare(record, tmp_path / "results" / "pocket")
    assert len(table) == 3 and (table["largest"] == 0).all() and (table["problems"] == 1).all()
    assert table["loss"].dropna().tolist() == [0.0, 0.0]
    one = rerun.load_recorded(record / "provenance.json", ["tspin"], [0], 1)
    assert (one.methods, one.seeds, one.config.training.iterations) == (["tspin"], [0], 1)


def test_numbers_that_moved_are_told(record, tmp_path):
    copytree(record, tmp_path / "pocket")
    path = tmp_path / "pocket" / "evaluations.csv"
    table = pd.read_csv(path)
    table.loc[table["method"] == "tspin", "value"] += 60
    table.to_csv(path, index=False)
    moved = rerun.compare(record, tmp_path / "pocket")
    assert len(rerun.verdict(moved, exact=True)) == 2 and len(rerun.verdict(moved, exact=False)) == 2
    assert rerun.verdict(rerun.compare(record, record), exact=True) == []


def test_what_differs_here_is_listed_and_strict_refuses(record, tmp_path):
    copytree(record, tmp_path / "pocket")
    path = tmp_path / "pocket" / "provenance.json"
    found = json.loads(path.read_text())
    found["versions"]["torch"], found["hardware"]["threads"] = "1.0", 64
    path.write_text(json.dumps(found))
    differing = rerun.differences(found)
    assert {"versions.torch", "hardware.threads"} <= differing.keys()
    result = CliRunner().invoke(app, ["rerun", str(path), "--strict", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "versions.torch" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["sft"]}, "no run of sft"),
        ({"seeds": [7]}, "no run of seed 7"),
    ],
)
def test_what_was_not_run_cannot_be_run_again(arguments, message, record):
    given = {"methods": None, "seeds": None, "iterations": None, **arguments}
    with pytest.raises(UserError, match=message):
        rerun.load_recorded(record / "provenance.json", **given)


def test_other_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "provenance.json").write_text("{}")
    for path in (tmp_path / "provenance.json", tmp_path / "nothing.json"):
        with pytest.raises(UserError) as error:
            rerun.load_recorded(path, None, None, None)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_committed_evidence_can_be_run_again():
    found = rerun.load_recorded(REPOSITORY / "results" / "reference" / "pocket" / "provenance.json", None, None, None)
    assert found.seeds == [10, 11, 12, 13, 14] and found.config.training.iterations == 5
    assert {"base", "sft", "spin", "tspin"} <= set(found.methods)


def test_what_changes_no_number_can_be_set_and_nothing_else(record, tmp_path):
    recorded = rerun.load_recorded(record / "provenance.json", ["base"], [0], 1)
    with pytest.raises(UserError, match="temperature is 1.0 on record, 0.0 here"):
        rerun.rerun(recorded, tmp_path, ["temperature=0"])
    assert not list(tmp_path.iterdir())
    rerun.rerun(recorded, tmp_path, ["engine.data_parallel=2", "micro_batch_tokens=512"])
    assert (tmp_path / "results" / "pocket" / "evaluations.csv").is_file()


def test_costs_are_those_of_the_rows(tmp_path):
    """Run again with fewer iterations: what it replaces is gone from both."""
    suite = load_suite("pocket")
    for iterations in (3, 2):
        collected = Collected()
        for method, seed in (("spin", 0), ("spin", iterations)):
            for t in range(iterations):
                score = {"benchmark": suite.columns[0].benchmark, "metric": "em", "value": 1.0, "stderr": 0.1, "n": 1}
                collected.add("evaluations", pd.DataFrame([score]), method, seed, t)
                collected.costs.append({"method": method, "seed": seed, "iteration": t})
        write_results(tmp_path, "pocket", suite, collected)
    found = read_results(tmp_path)
    rows = found["evaluations"][["method", "seed", "iteration"]].itertuples(index=False, name=None)
    assert sorted(rows) == sorted(found["runs"]) and len(found["runs"]) == 2 + 2 + 3

"""Studies: their files, their cells, here and in jobs on this machine, what is gathered and chosen."""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pandas as pd
import pytest
import torch
from sweeps import TINY, load, run, write_study

from tspin.errors import UserError
from tspin.experiment import gathering
from tspin.experiment.grid import Cell, Choice, load_sweep
from tspin.experiment.jobs import Fleet, prepare, slices
from tspin.runs.files import read_json, write_json
from tspin.schema import CELL, RUN, STUDY_MEASURES


def logs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "runs").rglob("*_log.err"))


def test_cells_are_methods_by_settings_by_seeds(tmp_path):
    grid = {"methods.spin.lam": [0.1, 1.0], "iterations": [2]}
    sweep = load(tmp_path, methods=["base", "spin"], seeds=[0, 1], grid=grid)
    bases = [f"base seed 0 lam={lam} iterations=2" for lam in (0.1, 1.0)]
    runs = [f"spin seed {seed} lam={lam} iterations=2" for seed in (0, 1) for lam in (0.1, 1.0)]
    assert [cell.title for cell in sweep.cells] == [*bases, *runs]  # all of a seed, then those of the next
    assert len({cell.folder for cell in sweep.cells}) == 6
    # Another setting of the preset makes other cells; the same one, the same.
    again, changed = (
        load(tmp_path, overrides=[*TINY, *more]).cells[0].folder for more in ([], ["methods.sft.num_train_epochs=7"])
    )
    assert again == load(tmp_path).cells[0].folder != changed


def test_methods_may_have_grids_of_their_own_and_keys_may_change_together(tmp_path):
    grids = {"spin": {"methods.spin.lam,methods.tspin.alpha": [0.1, 1.0]}}
    sweep = load(tmp_path, methods=["spin", "tspin"], grid={"data.labels": [4, None]}, grids=grids)
    titles = ["spin seed 0 alpha=0.1", "spin seed 0 alpha=1.0", "tspin seed 0 labels=4", "tspin seed 0 labels=null"]
    assert [cell.title for cell in sweep.cells] == titles
    assert sweep.cells[0].overrides == (*TINY, "methods.spin.lam=0.1", "methods.tspin.alpha=0.1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": []}, "parts: a list of mappings"),
        ({"parts": [{"method": ["sft"]}]}, "method: unknown key 'method'"),
        ({"parts": [{}, {"seeds": [1]}], "choose": {}}, "choose: a rule of choice is for a study without parts"),
        ({"method": ["sft"]}, "method: unknown key 'method': did you mean 'methods'"),
        ({"methods": ["spinn"]}, "methods: unknown method 'spinn': did you mean 'spin'"),
        ({"methods": []}, "methods: list should have at least 1 item"),
        ({"methods": "spin"}, "methods: input should be a valid list"),
        ({"grid": {"iterations": 3}}, "grid.iterations: input should be a valid list"),
        ({"grid": {"iterations": []}}, "grid.iterations: list should have at least 1 item"),
        ({"grid": ["iterations"]}, "grid: input should be a valid dictionary"),
        ({"grid": {"methods.sft.data.labels": [1], "data.labels": [2]}}, "two columns .* called labels"),
        ({"grid": {"a.method": [1]}}, "called method"),
        ({"grids": {"spin": {"iterations": [2]}}}, "grids: unknown method 'spin'"),
        ({"seeds": 0}, "seeds: input should be a valid list"),
        ({"seeds": [-1]}, "seeds.0: input should be greater than or equal to 0"),
        ({"seeds": [2**15]}, "seeds.0: input should be less than 32768"),
        ({"seeds": [True]}, "seeds.0: input should be a valid integer"),
        ({"overrides": ["iteration=3"]}, "iteration: unknown key"),
        ({"suite": "pockets"}, "unknown suite 'pockets'"),
        ({"prepare": {"runs/x": "rm -r runs"}}, "prepare: value error, a command begins with python"),
        ({"choose": {"iteration": 1}}, "choose.iteration: input should be 'last'"),
        ({"choose": {"common": ["heat"]}}, "name the methods that decide"),
        ({"choose": {"over": ["tspin"]}}, "choose.over: unknown method 'tspin'"),
        ({"choose": {"common": ["heat"], "over": ["sft"]}}, "choose.common: unknown setting of sft 'heat'"),
        ({"results": "results", "grid": {"iterations": [2]}}, "results: the settings of a grid"),
        ({"runs": "runs", "across": {"iterations": [2]}}, "runs: the settings of a grid have runs of their own"),
        ({"runs": "/elsewhere"}, "runs: unknown value '/elsewhere': .known: study, runs"),
    ],
)
def test_a_study_that_cannot_run_is_refused_before_anything_runs(changes, message, tmp_path):
    with pytest.raises(UserError, match=f"tiny.yaml: .*{message}") as error:
        load(tmp_path, **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_a_grid_from_its_file_to_its_report(tmp_path, data_file, model_folder):
    given = [*TINY, f"model.path={model_folder}", f"data.path={data_file}", "iterations=2", "batch_size=4"]
    temperature = {"temperature": [1.0, 0.0]}
    changes = {
        "methods": ["base", "sft", "spin"],
        "overrides": [*given, "max_new_tokens=4"],
        "grids": {"spin": {**temperature, "methods.spin.learning_rate": [1e-5, 1e-3]}},
        "choose": {"common": ["temperature"], "over": ["spin"]},
        "rule": "The best.",
    }
    sweep = load(tmp_path, **changes)
    states, shown = run(sweep)
    assert states == {"finished": 1 + 1 + 4} and f"wrote {sweep.target}.csv" in shown
    table = pd.read_csv(sweep.target.with_suffix(".csv"))
    assert list(table) == [CELL, "temperature", "learning_rate", *RUN, *STUDY_MEASURES]
    assert len(table) == 1 + 1 + 4 * 2 and list(table[CELL].unique()) == [cell.name for cell in sweep.cells]
    spin, often = table[table["method"] == "spin"], {"misaligned_matched"}  # no pair of like length: no share
    assert spin[["temperature", "iteration", *(set(STUDY_MEASURES) - often)]].notna().all(axis=None)
    problems = pd.read_parquet(sweep.target.with_name("tiny_problems.parquet"))
    averages = problems.groupby([CELL, "iteration", "benchmark"])["value"].mean().groupby([CELL, "iteration"]).mean()
    wanted = spin.set_index([CELL, "iteration"])["avg"].sort_index()
    assert averages.tolist() == pytest.approx(wanted.tolist(), abs=1e-3)
    assert table[table["method"] != "spin"][["temperature", "iteration", "mean_tokens"]].isna().all(axis=None)
    # A cell is an ordinary run; its average is that of its columns.
    cell = sweep.cells[-1]
    scores = pd.read_csv(cell.results_folder / "evaluations.csv")
    columns = read_json(cell.results_folder / "suite.json")["columns"]
    last = scores[scores["iteration"] == 1].merge(pd.DataFrame(columns)[["benchmark", "metric"]])
    assert len(last) == len(columns) and table["avg"].iloc[-1] == pytest.approx(last["value"].mean(), abs=1e-4)
    # y0 and the first y′: once per decoding, whatever the learning rate.
    assert len(list((sweep.folder / "shared").rglob("proto.parquet"))) == 2
    assert not list(sweep.folder.glob("*/pocket/*/shared"))
    record = read_json(sweep.target.with_name("tiny_provenance.json"))
    own = [read_json(path) for path in sweep.folder.rglob("*.stage.json") if "shared" not in path.parts]
    assert record["seconds"] == pytest.approx(sum(stage["seconds"] for stage in own), abs=len(sweep.cells))
    used = {key for made in record["made"].values() for key in made["provenance"]}
    assert used == set(record["provenance"]) and set(record["made"]) == {cell.name for cell in sweep.cells}
    assert record["cells"] == {"finished": 6, "missing": []} and "date" in record
    report = sweep.target.with_suffix(".md").read_text()
    assert "Settings per method: sft 1, spin 4." in report and "The best." in report
    assert report.count("**") >= 2 * 2 and "after the last iteration" in report
    # Lines of cells that have just ended are written as those that were read back.
    text = sweep.target.with_suffix(".csv").read_text()
    sweep.target.with_suffix(".csv").unlink()
    gathering.gather(sweep, sweep.cells)
    assert sweep.target.with_suffix(".csv").read_text() == text
    # Called again, nothing runs; nor on another machine, which has what was gathered and not the runs.
    assert "cell 1 of" not in run(sweep)[1]
    shutil.rmtree(sweep.folder)
    assert run(sweep)[0] == {"finished": 6}
    assert pd.read_csv(sweep.target.with_suffix(".csv")).equals(table)
    # What is missing there is run, and comes to stand where it was; until then the rule waits for it.
    forget(sweep, cell.name)
    assert gathering.gather(sweep, []).endswith(f"missing: {cell.title}")
    assert "nothing is chosen yet" in sweep.target.with_suffix(".md").read_text()
    assert f"cell 1 of 1: {cell.title}" in run(sweep)[1]
    again = pd.read_csv(sweep.target.with_suffix(".csv"))
    assert again.drop(columns=["gradient_signal"]).equals(table.drop(columns=["gradient_signal"]))
    # Two machines that have run different cells have all of them together; of those that both have, one's own stay.
    files = [path.read_bytes() for path in sorted(sweep.target.parent.glob("tiny*"))]
    shutil.copytree(sweep.results, tmp_path / "theirs")
    forget(sweep, cell.name)
    assert gathering.join(sweep, tmp_path / "theirs").startswith("1 of 6 cells are new; wrote")
    assert [path.read_bytes() for path in sorted(sweep.target.parent.glob("tiny*"))] == files
    with pytest.raises(UserError, match="none of the study's cells is in"):
        gathering.join(sweep, tmp_path / "nowhere")
    # Cells from other weights under the same path are not joined, and said where they are gathered.
    made = record["made"]
    assert {what["start"] for what in made.values()} == {str(model_folder)} and not gathering.other_weights(made)
    forget(sweep, cell.name)
    there = tmp_path / "theirs" / sweep.target.relative_to(sweep.results).with_name("tiny_provenance.json")
    theirs = read_json(there)
    theirs["made"][cell.name]["policy"] = "another"
    write_json(there, theirs)
    with pytest.raises(UserError, match=r"had other weights in some cells than in others \(.*another in spin-0"):
        gathering.join(sweep, tmp_path / "theirs")
    # What a study no longer names is kept apart.
    fewer = load(tmp_path, **{**changes, "methods": ["base", "sft"], "grids": {}, "choose": None})
    assert "; 3 cells that the study no longer names are kept in" in gathering.gather(fewer, [])
    assert len(pd.read_csv(sweep.target.with_suffix(".csv"))) == 2
    assert pd.read_csv(sweep.target.with_name("tiny.old-1.csv"))[CELL].nunique() == 5
    assert (sweep.target.parent / "tiny.old-1_problems.parquet").exists()
    other = load(tmp_path, **{**changes, "methods": ["sft"], "grids": {}, "choose": None, "overrides": TINY})
    assert gathering.gather(other, []) == "no cell has finished: there is nothing to gather"
    assert len(pd.read_csv(sweep.target.with_suffix(".csv"))) == 2  # and nothing is taken away
    gathering.gather(load(tmp_path, **{**changes, "methods": ["base"], "grids": {}, "choose": None}), [])
    kept = [pd.read_csv(sweep.target.with_name(f"tiny.old-{n}.csv"))[CELL].nunique() for n in (1, 2)]
    assert kept == [5, 2]


def forget(sweep, name: str) -> None:
    """Take a cell out of what was gathered."""
    path = sweep.target.with_suffix(".csv")
    table = pd.read_csv(path)
    table[table[CELL] != name].to_csv(path, index=False)
    record = read_json(sweep.target.with_name("tiny_provenance.json"))
    del record["made"][name]
    write_json(sweep.target.with_name("tiny_provenance.json"), record)


def test_parts_follow_each_other_and_settings_can_be_given_one_by_one(tmp_path):
    arms = [{"methods.spin.lam": 1.0}, {"methods.spin.lam": 0.1, "data.history": 1}]
    first = {"methods": ["spin", "sft"], "seeds": [3], "grids": {"spin": arms}}
    second = {"methods": ["spin"], "seeds": [3, 4], "across": {"temperature": [0.0]}, "grids": {"spin": arms[:1]}}
    sweep = load(tmp_path, parts=[first, second, first])
    assert [cell.title for cell in sweep.cells] == [
        "spin seed 3 lam=1.0",
        "spin seed 3 lam=0.1 history=1",
        "sft seed 3",
        "spin seed 3 temperature=0.0 lam=1.0",
        "spin seed 4 temperature=0.0 lam=1.0",
    ]


def test_what_the_preset_itself_says_is_trained_where_tspin_run_trains_it(tmp_path):
    grids = {"spin": {"methods.spin.lam": [0.1, 0.2]}}
    own, other = load(tmp_path, overrides=[], methods=["spin"], grids=grids).cells
    assert (own.runs, own.shared) == (str(tmp_path / "runs"), None)
    assert Path(other.runs).parent == tmp_path / "runs" / "pocket-studies" / "tiny" and other.shared


def test_finished_cells_are_skipped_and_failed_ones_retried_on_demand(tmp_path, data_file):
    late = tmp_path / "late.jsonl"
    sweep = load(tmp_path, grid={"data.path": [str(data_file), str(late)]})
    states, shown = run(sweep, jobs=2)
    assert states == {"finished": 1, "failed": 1} and "late.jsonl: no such file" in shown and "_log.err)" in shown
    finished = next(cell for cell in sweep.cells if cell.finished)
    [record] = read_json(sweep.target.with_name("tiny_provenance.json"))["provenance"].values()
    assert record["command"] == "tspin sweep tiny.yaml"
    before = logs(tmp_path)
    assert len(before) == 2 and len(pd.read_csv(finished.results_folder / "evaluations.csv")) > 0
    # Called again: nothing runs, and the failure is told again.
    states, shown = run(sweep, jobs=2)
    assert states == {"finished": 1, "failed": 1} and "late.jsonl: no such file" in shown
    # In this process too, where it leaves no log.
    states, shown = run(sweep, retry=True)
    assert states == {"finished": 1, "failed": 1} and "late.jsonl: no such file" in shown and "_log.err" not in shown
    assert logs(tmp_path) == before
    late.write_text(data_file.read_text())
    assert run(sweep, retry=True)[0] == {"finished": 2}


def test_a_cell_is_finished_where_its_results_went(tmp_path):
    """So that results/reference is refreshed by a study whose runs have left their results in results/."""
    roots = [tmp_path / "results", tmp_path / "results" / "reference"]
    mine, committed = (load_sweep(Path("zephyr-7b"), None, tmp_path / "runs", root).cells[0] for root in roots)
    assert mine.folder == committed.folder
    for cell in (mine, committed):
        cell.results_folder.mkdir(parents=True)
        (cell.results_folder / "evaluations.csv").touch()
    write_json(mine.note, {"results": mine.results})
    assert mine.finished and not committed.finished


def test_an_error_that_is_nobodys_fault_is_shown_whole_and_the_next_cell_runs(tmp_path, monkeypatch):
    sweep = load(tmp_path, seeds=[0, 1])
    monkeypatch.setattr("tspin.experiment.grid.run_cell", lambda cell: 1 / 0)
    states, shown = run(sweep)
    assert states == {"failed": 2} and shown.count("Traceback") == 2 and "seed 1: division by zero" in shown
    assert "there is nothing to gather" in shown and not sweep.target.parent.exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_sweep_ends_its_cells_and_goes_on(jobs, tmp_path, data_file):
    path = write_study(tmp_path / "tiny.yaml", overrides=[*TINY, f"data.path={data_file}", "num_train_epochs=3"])
    command = [sys.executable, "-c", "from tspin.cli import main; main()", "sweep", str(path), "--jobs", str(jobs)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list((tmp_path / "runs").rglob("config.json")):  # the cell is at work
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that it has started too
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in errors
    logs = "".join(path.read_text() for path in (tmp_path / "runs").rglob("*_log.err"))
    assert "SIGINT" not in logs and "KeyboardInterrupt" not in logs  # its jobs are told once, by the sweep
    assert not list(tmp_path.rglob("f*ed.json"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "pocket" / "studies" / "tiny.csv").exists()


def test_what_is_missing_is_prepared_first_and_once(tmp_path):
    made, half = tmp_path / "made", tmp_path / "half"
    makes = f"python -c 'import pathlib; pathlib.Path(\"{made}\").mkdir()'"
    prepare({str(made): makes}, print)
    prepare({str(made): "python -c 'raise SystemExit(3)'"}, print)
    fails = f"python -c 'import pathlib; pathlib.Path(\"{half}\").mkdir(); raise SystemExit(3)'"
    with pytest.raises(UserError, match="prepare: .*half: its command ended with code 3: python -c"):
        prepare({str(half): fails}, print)
    assert made.exists() and not half.exists()
    # One that another sweep is making is waited for, and not removed.
    slow, lines = tmp_path / "slow", []
    code = "import sys, time; from pathlib import Path; from tspin.runs.locks import owned\n"
    code += "with owned(Path(sys.argv[1])): print(flush=True); time.sleep(0.5); Path(sys.argv[2]).mkdir()"
    makes = [sys.executable, "-c", code, str(tmp_path / ".prepare-slow"), str(slow)]
    with subprocess.Popen(makes, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        prepare({str(slow): "python -c 'raise SystemExit(3)'"}, lines.append)
    assert slow.exists() and not lines
    with pytest.raises(UserError, match="its command did not make it"):
        run(load(tmp_path, prepare={str(half): "python -c pass"}))


def test_a_cells_records_have_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cret-value-of-a-token")
    place = f"https://me:{'hunter2-' * 2}@example.org/rows.jsonl"
    given = (f"data.path={place}", "batch_size=4")
    folders = (str(tmp_path / name) for name in ("cell", "runs", "results"))
    cell = Cell("study.yaml", "pocket", "sft", 0, given, (), *folders)
    monkeypatch.setattr("tspin.experiment.grid.run_cell", lambda cell: None)
    cell.run()

    def fails(cell):
        raise UserError(f"{place}: no such file for s3cret-value-of-a-token")

    monkeypatch.setattr("tspin.experiment.grid.run_cell", fails)
    with pytest.raises(UserError):
        cell.run()
    written = "".join(path.read_text() for path in (tmp_path / "cell").iterdir())
    assert "hunter2" not in written and "s3cret" not in written and written.count("[redacted]") >= 3


SWEPT = {  # (method, temperature, rate): averages after iterations 0 and 1
    ("spin", 1.0, 0.1): (30, 33),
    ("spin", 1.0, 0.3): (50, 39),  # best for SPIN, and the best of all after iteration 0
    ("spin", 0.0, 0.1): (30, 36),
    ("spin", 0.0, 0.3): (30, 31),
    ("tspin", 1.0, 0.1): (30, 38),
    ("tspin", 1.0, 0.3): (30, 38),
    ("tspin", 0.0, 0.1): (30, 40),  # best for T-SPIN, but the means of the best are 38.5 and 38
    ("tspin", 0.0, 0.3): (30, 20),
    ("dpo", 1.0, 0.1): (30, 20),  # does not decide, and takes the common temperature
    ("dpo", 0.0, 0.1): (30, 60),
    ("sft", None, 0.1): (None, 45),
    ("sft", None, 0.3): (None, 44),
}


def swept() -> pd.DataFrame:
    rows = [
        {"temperature": t, "rate": r, "method": m, "seed": seed, "iteration": i, "avg": avg + seed, "avg_se": 1.0}
        for (m, t, r), averages in SWEPT.items()
        for i, avg in enumerate(averages)
        for seed in (0, 1)
        if avg is not None
    ]
    table = pd.DataFrame(rows).astype({"iteration": "Int64"})
    table.loc[table["method"] == "sft", "iteration"] = pd.NA
    return table


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (
            {"common": ["temperature"], "over": ["spin", "tspin"]},
            [("spin", 1.0, 0.3), ("tspin", 1.0, 0.1), ("tspin", 1.0, 0.3), ("dpo", 1.0, 0.1), ("sft", None, 0.1)],
        ),
        ({}, [("spin", 1.0, 0.3), ("tspin", 0.0, 0.1), ("dpo", 0.0, 0.1), ("sft", None, 0.1)]),
        (
            {"common": ["temperature", "rate"], "over": ["spin"]},
            [("spin", 1.0, 0.3), ("tspin", 1.0, 0.3), ("sft", None, 0.3)],
        ),
    ],
)
def test_the_rule_of_choice(choice, expected):
    scores = gathering.scores_of(swept(), ["temperature", "rate"])
    marked = scores[gathering.chosen(scores, Choice(**choice))]
    found = [tuple(row) for row in marked[["method", "temperature", "rate"]].astype(object).to_numpy()]
    assert [(m, None if pd.isna(t) else t, r) for m, t, r in found] == expected
    assert scores["path"].iloc[0] == "30.5 → 33.5"


@pytest.mark.parametrize(
    ("devices", "jobs", "expected"),
    [
        ("4567", 2, ["45", "67"]),
        ("4567", 3, ["4", "5", "6"]),
        ("45", 3, ["4", "5", "4"]),
        ("", 2, ["", ""]),
        ("01234567", 1, ["01234567"]),
    ],
)
def test_concurrent_jobs_share_the_devices_evenly(devices, jobs, expected):
    assert ["".join(part) for part in slices(list(devices), jobs)] == expected


@dataclass(frozen=True)
class Looking(Cell):
    """A cell that notes what it sees, and when."""

    def __call__(self) -> None:
        import time
        from pathlib import Path

        start = time.time()
        others = Path(self.folder).parent
        while not self.seed and len(list(others.glob("*/seen.json"))) < 3 and time.time() < start + 120:
            time.sleep(0.1)  # the first one's slice is taken while the others come and go
        variables = {name: value for name, value in os.environ.items() if "VISIBLE" in name or "AFFINITY" in name}
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        Path(self.folder, "seen.json").write_text(json.dumps([start, time.time(), variables]))


def test_jobs_at_once_on_this_machine_have_devices_of_their_own(tmp_path, monkeypatch):
    variable, names = "CUDA_VISIBLE_DEVICES", "4,5"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv(variable, names)
    sweep = load(tmp_path, seeds=[0, 1, 2])
    cells = [Looking(**vars(cell)) for cell in sweep.cells]
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        Fleet(replace(sweep, cells=cells), "local", 2).run(cells, True, lambda shown: None)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    seen = [read_json(Path(cell.folder, "seen.json")) for cell in cells]
    assert {variables[variable] for _, _, variables in seen} == set(names.split(","))
    for (start, end, mine), (other_start, other_end, others) in itertools.combinations(seen, 2):
        at_once = start < other_end and other_start < end
        assert not (at_once and mine[variable] == others[variable])
    assert any(a[0] < b[1] and b[0] < a[1] for a, b in itertools.combinations(seen, 2))  # some were at once


@pytest.mark.parametrize(
    ("kind", "hip", "variables"),
    [
        ("npu", None, ["ASCEND_RT_VISIBLE_DEVICES"]),
        ("xpu", None, ["ZE_AFFINITY_MASK"]),
        ("cuda", "7.0", ["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_more_jobs_than_devices_share_them_and_it_is_said(kind, hip, variables, tmp_path, monkeypatch, capsys):
    accelerator = SimpleNamespace(type=kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: accelerator)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setenv(variables[0], "6")
    fleet = Fleet(load(tmp_path), "local", 2)
    assert fleet.slices == [["6"], ["6"]]
    assert "tspin: --jobs 2 on 1 of this machine's accelerators: jobs share them" in capsys.readouterr().err
    python = fleet._local(["6"])._executor.python
    assert shlex.split(python) == ["env", *(f"{name}=6" for name in variables), sys.executable]


def test_nothing_is_chosen_while_cells_are_missing(tmp_path):
    study = load(tmp_path, methods=["spin"], choose={}, rule="The best.").study
    path = tmp_path / "swept.csv"
    swept().query("method == 'spin'").to_csv(path, index=False)
    assert "| **" in gathering.report(study, path, complete=True)
    assert "**" not in gathering.report(study, path, complete=False)


def test_a_cell_has_the_rows_of_its_own_seed(tmp_path):
    cells = load(tmp_path, methods=["spin"], seeds=[0, 1]).cells
    table = pd.DataFrame({"method": ["spin", "spin", "sft"], "seed": [0, 1, 1]})
    assert [gathering._of_run(table, cell).index.tolist() for cell in cells] == [[0], [1]]

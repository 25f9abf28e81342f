"""The studies of a real model, with a tiny one in place of SmolLM2's weights."""

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from tspin.cli import app
from tspin.config import REPOSITORY, load_config
from tspin.data.sources import load_rows
from tspin.doctor.tiny import tiny_model
from tspin.errors import UserError
from tspin.evaluation.harness import task_manager_for
from tspin.evaluation.suites import load_suite
from tspin.experiment.grid import load_sweep
from tspin.experiment.jobs import run_sweep
from tspin.gsm_symbolic import tasks
from tspin.hub import offline
from tspin.models import resolve
from tspin.planning.needs import needed
from tspin.pocket import tasks as pocket_tasks
from tspin.schema import HELD_OUT

NAMES = ["smollm2-short", "smollm2-long"]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The stand-in tokenizer has no words beyond the pocket tasks': it spells them, in many more tokens.
TINY = ["data.labels=4", "methods.sft.data.labels=4", "evaluation.limit=1", "iterations=2", "batch_size=2",
        "max_prompt_length=900", "max_completion_length=900", "max_new_tokens=4"]  # fmt: skip


@pytest.fixture
def few_solutions(monkeypatch):
    """Pools of a few problems: all held-out labels are scored, whatever the evaluation's limit."""
    monkeypatch.setattr(tasks, "SIZES", {"test": 2, "validation": 3, "labels": 6})
    monkeypatch.setattr(pocket_tasks, "VALIDATION_PER_TASK", 2)
    tasks.pool.cache_clear()
    with monkeypatch.context() as apart:  # the pocket tasks' pools of this size are this test's alone
        apart.setattr(pocket_tasks, "pool", cache(pocket_tasks.pool.__wrapped__))
        yield
    tasks.pool.cache_clear()


@pytest.fixture
def start(tmp_path, tokenizer) -> Path:
    """A random model with the context that spelled words need."""
    folder = tmp_path / "start"
    tiny_model(tokenizer, positions=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_solutions_end_in_their_answer_and_no_pool_has_anothers_question():
    pools = {name: tasks.pool(name) for name in tasks.SIZES}
    assert {name: len(pool) for name, pool in pools.items()} == tasks.SIZES
    problems = [problem for pool in pools.values() for problem in pool]
    assert len({problem.question for problem in problems}) == len(problems)
    for problem in problems:
        assert problem.solution.splitlines()[-1] == f"#### {problem.answer}" != problem.solution
        assert len(problem.solution) <= tasks.LONGEST
    for name, pool in (("gsm-symbolic", "labels"), ("gsm-symbolic-validation", "validation")):
        rows = load_rows(name).read()
        assert len(rows) == tasks.SIZES[pool]
        assert json.loads(rows[0]["prompt"])[0]["content"] == pools[pool][0].question


def test_an_answer_counts_as_the_labels_write_it():
    suite = load_suite("gsm-symbolic")
    (task,) = task_manager_for(suite).load([column.benchmark for column in suite.columns])["tasks"].values()
    problem, document = tasks.pool("test")[0], task.eval_docs[0]
    assert (document["question"], task.doc_to_target(document)) == (problem.question, problem.answer)
    pattern = re.compile(task.config.filter_list[0]["filter"][0]["regex_pattern"])
    for problem in tasks.pool("test"):
        assert pattern.findall(problem.solution) == [problem.answer]
    assert pattern.findall(f"{problem.solution}\nSo it is.") == pattern.findall(problem.answer) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_study_starts_from_what_it_prepares(name):
    """The preset's start is what the command makes, with the revision that smollm2 pins; its seeds are the claims'."""
    sweep = load_sweep(Path(name), None, Path("runs"), Path("results"))
    ((folder, command),) = sweep.study.prepare.items()
    words = shlex.split(command)
    config = load_config(name)
    assert config.model.path == folder and config.model.fine_tuned
    assert words[words.index("--out") + 1] == folder and words[words.index("--preset") + 1] == name
    assert words[words.index("--start") + 1] == SMOLLM2
    assert f"model.revision={load_config('smollm2').model.revision}" in words
    assert min(sweep.study.seeds) >= 10 and {cell.method for cell in sweep.cells} >= {"base", *config.methods}
    # What the preset says is trained where `tspin run` trains it; the other scales of the rewards are the study's own.
    own = {(cell.method, *cell.setting): cell.runs == "runs" for cell in sweep.cells}
    scales = [("spin", ("lam", "1.0")), ("tspin", ("alpha", "0.1"))]
    assert [key for key, there in own.items() if not there] == [key for key in scales if key in own]


@pytest.mark.parametrize("name", NAMES)
def test_before_the_start_is_made(name, tmp_path, monkeypatch):
    """Commands say what is missing; with what it is made from they plan and fetch."""
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    for asks in (lambda: resolve(config.model.path), lambda: needed(config)):
        with pytest.raises(UserError, match=f"{config.model.path}: no such folder, and no hub name.*--set model.path="):
            asks()
    refused = CliRunner().invoke(app, ["plan", name])
    assert refused.exit_code == 2 and "no such folder, and no hub name" in " ".join(refused.output.split())
    planned = CliRunner().invoke(app, ["plan", name, "--gpus", "1", "--set", f"model.path={SMOLLM2}"])
    assert planned.exit_code == 0 and "134,515,008 parameters" in planned.output and "Everything fits" in planned.output
    (item,) = needed(load_config(name, [f"model.path={SMOLLM2}"]))
    assert (item.kind, item.name) == ("model", SMOLLM2)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_from_its_start_to_its_numbers(name, tmp_path, start, few_solutions, monkeypatch):
    """The preset, its suite and its held-out labels, in a training of two steps."""
    overrides = [*TINY, f"model.path={start}"]
    given = yaml.safe_load((REPOSITORY / "experiments" / "studies" / f"{name}.yaml").read_text())
    given |= {"methods": ["base", "sft", "tspin"], "seeds": [10], "overrides": overrides, "prepare": {}}
    given["grids"].pop("spin", None)
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(given))
    sweep = load_sweep(tmp_path / f"{name}.yaml", None, tmp_path / "runs", tmp_path / "results")
    states = run_sweep(sweep, "local", 1, False, True, lambda shown: None)
    assert [state for state, cells in states.items() if cells] == ["finished"]
    table = pd.read_csv(sweep.target.with_suffix(".csv"))
    assert set(table["method"]) == {*given["methods"]} and set(table["alpha"].dropna()) == {0.1, 1.0}
    assert table[["avg", "held_out_nats_per_token"]].notna().all(axis=None)
    self_play = table[table["iteration"].notna()]
    measures = ["mean_tokens", "end_token_share", "misaligned", "weight_ess", "gradient_signal"]
    assert self_play[measures].notna().all(axis=None) and len(self_play) == 2 * 2
    scores = pd.read_csv(sweep.cells[0].results_folder / "evaluations.csv")
    assert HELD_OUT in set(scores["benchmark"])


def test_what_is_prepared_reads_the_profiles_offline_folder(tmp_path, monkeypatch):
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "manifest.json").write_text("{}")
    (tmp_path / "profile.yaml").write_text(f"offline: {tmp_path / 'offline'}")
    monkeypatch.setenv(offline.VARIABLE, "")
    for name in ("HF_HUB_OFFLINE", "NLTK_DATA"):
        monkeypatch.setenv(name, "1")
    writes = f"import os, pathlib; pathlib.Path('{tmp_path / 'made'}').write_text(os.environ['{offline.VARIABLE}'])"
    study = {"preset": "pocket", "methods": ["sft"], "seeds": [0], "prepare": {}}
    study["prepare"] = {str(tmp_path / "made"): shlex.join(["python", "-c", writes])}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.setattr("tspin.experiment.jobs.run_here", lambda cells, show, keep: None)
    sweep = load_sweep(tmp_path / "study.yaml", tmp_path / "profile.yaml", tmp_path / "runs", tmp_path / "results")
    run_sweep(sweep, "local", 1, False, True, lambda shown: None)
    assert (tmp_path / "made").read_text() == str(tmp_path / "offline")

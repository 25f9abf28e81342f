"""Presets, suites and launch files are found by name from any folder, and a suite's tasks with them."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tspin.config import REPOSITORY, load_config
from tspin.errors import UserError
from tspin.evaluation.harness import task_manager_for
from tspin.evaluation.suites import PACKAGE, load_suite
from tspin.experiment.preset import training_arguments
from tspin.yaml_files import find_yaml, recipes


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_recipes_by_name():
    folders = {path.name for path in recipes().iterdir() if path.is_dir()}
    assert {"presets", "suites", "studies", "accelerate", "slurm"} <= folders
    assert load_config("pocket").evaluation.suite == "pocket"
    assert find_yaml("paper", "experiments/suites", "suite") == recipes() / "suites" / "paper.yaml"
    with pytest.raises(UserError, match="did you mean 'pocket'"):
        load_config("pockett")


def test_the_recipe_for_ones_own_experiment(tmp_path):
    """As experiments/README.md shows it: nothing of the preset that it extends is left by mistake."""
    (text,) = re.findall(
        r"```yaml\n(# llama-8b\.yaml.*?)```", (REPOSITORY / "experiments" / "README.md").read_text(), re.DOTALL
    )
    path = tmp_path / "llama-8b.yaml"
    path.write_text(text)
    config = load_config(str(path))
    assert (config.model.path, config.model.revision) == ("meta-llama/Llama-3.1-8B-Instruct", None)
    assert (config.data.path, config.data.revision, config.data.labels) == ("my-data.jsonl", None, None)
    training = config.training
    assert (training.template, training.keep_checkpoints, training.report_to) == ("chat", "last", "wandb")
    assert config.evaluation.limit == 200 and config.evaluation.backend == "vllm"


def test_those_of_this_folder_come_first(tmp_path):
    folder = tmp_path / "experiments" / "presets"
    folder.mkdir(parents=True)
    (folder / "pocket.yaml").write_text("iterations: 2\n")
    assert load_config("pocket").training.iterations == 2


def test_a_suites_tasks_are_in_this_folder_or_in_the_package(tmp_path):
    suite = load_suite("pocket")
    assert suite.task_folder == PACKAGE / "pocket" / "lm_eval"
    assert "pocket_gcd" in task_manager_for(suite).all_tasks
    known = suite.definition()
    assert known.keys() == {"lm_eval", "reasoning_gym", "files"}
    (tmp_path / "pocket" / "lm_eval").mkdir(parents=True)
    assert suite.task_folder == Path("pocket/lm_eval")
    seen = [known["files"]]
    for text in ("task: a", "task: b"):  # scores of other files are other scores
        (tmp_path / "pocket/lm_eval/task.yaml").write_text(text)
        seen.append(suite.definition()["files"])
    assert len(set(seen)) == 3
    with pytest.raises(UserError, match="include_path nowhere: no such folder"):
        suite.model_copy(update={"include_path": Path("nowhere")}).definition()


def test_a_launch_file_by_name(tmp_path):
    settings = load_config("pocket").for_method("sft")
    args = training_arguments(settings, tmp_path, 0, launcher=Path("cpu2"))
    assert args.launcher == str(recipes() / "accelerate" / "cpu2.yaml")
    with pytest.raises(UserError, match="unknown launch file 'cpu3': did you mean 'cpu2'"):
        training_arguments(settings, tmp_path, 0, launcher=Path("cpu3"))


@pytest.mark.parametrize(("code", "queued"), [(0, False), (2, False), (127, False), (140, True), (143, None)])
def test_the_job_over_two_machines_ends_as_its_run_does(code, queued, tmp_path, monkeypatch):
    """Even at once; after SIGUSR2 it is queued again, and after SIGTERM it waits for Slurm to end it."""
    for name, line in {"tspin": f"exit {code}", "scontrol": f'echo "$*" >> {tmp_path}/calls'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    script = ["bash", REPOSITORY / "experiments/slurm/two-machines.sh", "--preset", "pocket"]
    process = subprocess.Popen(script, start_new_session=True)
    if queued is None:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    else:
        assert process.wait(timeout=60) == code
        assert (tmp_path / "calls").exists() == queued

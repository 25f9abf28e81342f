"""The commands on files, and what they say to bad input: one line, exit code 2, nothing written."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tspin import cli
from tspin.cli.guard import one_line_errors
from tspin.config import load_config
from tspin.errors import UserError
from tspin.models import load_model, load_tokenizer
from tspin.runs.claims import claim_folder
from tspin.trainer import TripletTrainer
from tspin.yaml_files import REPOSITORY

SMALL = [
    "--set",
    "max_new_tokens=6",
    "--set",
    "batch_size=8",
    "--set",
    "micro_batch_tokens=256",
]


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def assert_refused(result, *parts):
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("tspin: ")]
    assert len(lines) == 1 and "Traceback" not in result.output
    for part in parts:
        assert part in lines[0]


def test_help_has_an_example_each():
    for name in ("run", "sample", "train", "evaluate", "table"):
        result = call(name, "--help")
        assert result.exit_code == 0 and f"Example: tspin {name}" in " ".join(result.output.split())


def test_sample_and_train_on_files(tmp_path, model_folder, data_file):
    for name, seed in (("proto", 1), ("synthetic", 2)):
        arguments = ["--model", model_folder, "--data", data_file, "--out", tmp_path / f"{name}.parquet"]
        assert call("sample", *arguments, "--seed", seed, *SMALL).exit_code == 0
    files = ["--synthetic", tmp_path / "synthetic.parquet", "--proto", tmp_path / "proto.parquet"]
    common = ["--model", model_folder, "--data", data_file, "--out", tmp_path / "step", *SMALL]
    assert_refused(call("train", *common, "--iteration", 1), "--synthetic", "tspin sample")
    result = call("train", *common, *files, "--iteration", 1)
    assert result.exit_code == 0, result.output
    assert len(pd.read_parquet(tmp_path / "step" / "steps.parquet")) == 2
    assert (tmp_path / "step" / "model.safetensors").exists() and (tmp_path / "step" / "tokenizer.json").exists()
    assert_refused(call("train", *common, *files), "exists")
    for command, given in (("train", [*common[: -len(SMALL)], *files]), ("diagnose", [*common, *files])):
        again = [tmp_path / "more" if value == tmp_path / "step" else value for value in given]
        assert_refused(call(command, *again, "--method", "dpo", "--iteration", 2), "--reference: dpo at iteration 2")


def test_tokens_past_the_tokenizers_that_a_model_has_are_its_own(tmp_path, model_folder, data_file):
    """Embeddings are often padded, and such rows are drawn now and then, early in training at least."""
    padded, drawn = tmp_path / "padded", tmp_path / "synthetic.parquet"
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    model.resize_token_embeddings(len(tokenizer) + 64)
    for part in (model, tokenizer):
        part.save_pretrained(padded)
    common = ["--model", padded, "--data", data_file]
    assert call("sample", *common, "--out", drawn, *SMALL).exit_code == 0
    table = pd.read_parquet(drawn)
    table["ids"] = [[len(tokenizer) + 3, *ids[1:]] for ids in table["ids"]]
    table.to_parquet(drawn)
    result = call("train", *common, "--method", "spin", "--synthetic", drawn, "--out", tmp_path / "step", *SMALL)
    assert result.exit_code == 0, result.output
    table["ids"] = [[len(tokenizer) + 64, *ids[1:]] for ids in table["ids"]]
    table.to_parquet(drawn)
    result = call("train", *common, "--method", "spin", "--synthetic", drawn, "--out", tmp_path / "again", *SMALL)
    assert_refused(result, "vocabulary")


def test_a_stopped_training_on_files_goes_on(tmp_path, model_folder, data_file, monkeypatch):
    common = ["train", "--model", model_folder, "--data", data_file, "--method", "sft", *SMALL]
    assert call(*common, "--out", tmp_path / "whole").exit_code == 0
    calls = []

    def stopped(self, model, micro_batches, real=TripletTrainer._accumulate):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, model, micro_batches)

    monkeypatch.setattr(TripletTrainer, "_accumulate", stopped)
    result = call(*common, "--out", tmp_path / "step")
    assert result.exit_code == 143 and "kept at step 1 of 2" in result.output, result.output
    assert not (tmp_path / "step").exists()
    assert call(*common, "--out", tmp_path / "step").exit_code == 0 and len(calls) == 2
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "step"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(pd.read_parquet(tmp_path / "step" / "steps.parquet")) == 2
    assert not list(tmp_path.glob(".step*"))


def test_bad_input_is_refused(tmp_path, model_folder, data_file):
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    places = ["--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    assert_refused(call("run"), "--preset")
    assert_refused(call("run", "--preset", "poket", *places), "did you mean 'pocket'")
    assert_refused(call("run", "--preset", "pocket", "--methods", "tspn", *places), "did you mean 'tspin'")
    assert_refused(call("run", "--preset", "pocket", "--seeds", "a", *places), "--seeds")
    assert_refused(call("run", "--preset", "pocket", "--set", "data.lables=5", *places), "did you mean 'labels'")
    assert_refused(call("evaluate", "--model", model_folder, "--suite", "poket"), "did you mean 'pocket'")
    mine = ["--out", out, *SMALL]
    assert_refused(call("run", "--model", model_folder, "--data", tmp_path / "no.jsonl", *mine), "no such file")
    assert_refused(call("run", "--model", tmp_path, "--data", data_file, *mine), "is no model")
    assert_refused(
        call("run", "--model", "nobody/none", "--data", data_file, *mine),
        "nobody/none: no folder of this name is here, and the hub cannot be reached",
    )
    long = ["--set", "max_prompt_length=4"]
    assert_refused(call("run", "--model", model_folder, "--data", data_file, *mine, *long), "data row 1: prompt of")
    none = ["--set", "micro_batch_tokens=0"]
    assert_refused(
        call("run", "--model", model_folder, "--data", data_file, *mine, *none),
        "micro_batch_tokens: input should be greater",
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, model_folder, data_file):
    path = model_folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "eos_token": None}))
    assert_refused(call("run", "--model", model_folder, "--data", data_file, "--out", tmp_path / "out"), "no end token")
    assert not (tmp_path / "out").exists()


def test_results_of_another_config_are_refused(tmp_path):
    folder = tmp_path / "results" / "pocket"
    claim_folder(folder, {"config": {"iterations": 3}})
    places = ["--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    assert_refused(call("run", "--preset", "pocket", *places), " is not set there, ", "choose another")
    assert [path.name for path in folder.iterdir()] == ["config.json"] and not (tmp_path / "runs").exists()
    fresh = ["--runs", tmp_path / "runs", "--results", tmp_path / "fresh"]
    assert_refused(call("run", "--preset", "pocket", "--set", "layout=share", *fresh), "did you mean 'shared'?")
    assert not (tmp_path / "fresh").exists() and not (tmp_path / "runs").exists()


def test_a_read_only_disk_is_refused(tmp_path, model_folder, data_file):
    """/proc takes no new folders, for root either."""
    assert_refused(call("run", "--model", model_folder, "--data", data_file, "--out", "/proc/tspin", *SMALL), "/proc")


@pytest.mark.parametrize(
    "error", [OSError(28, "no", "out"), SafetensorError("I/O error: File too large (os error 28)")]
)
def test_a_full_disk_is_refused(tmp_path, model_folder, data_file, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("tspin.iteration.write_responses", full)
    out = tmp_path / "out.parquet"
    out.write_text("kept")
    result = call("sample", "--model", model_folder, "--data", data_file, "--out", out, *SMALL)
    assert_refused(result, "no space left on device")
    assert out.read_text() == "kept" and not list(tmp_path.glob(".out*"))


def test_damaged_weights_are_refused(tmp_path, model_folder, data_file):
    weights = model_folder / "model.safetensors"
    whole = weights.read_bytes()
    arguments = ["sample", "--model", model_folder, "--data", data_file, "--out", tmp_path / "out.parquet", *SMALL]
    weights.write_bytes(whole[:-100])
    assert_refused(call(*arguments), "could not be loaded")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert_refused(call(*arguments), "q_proj.weight are missing")


def test_bad_values_deep_in_the_config_are_refused(tmp_path, model_folder, data_file):
    mine = ["run", "--model", model_folder, "--data", data_file, "--out", tmp_path / "out"]
    for setting, part in {
        "optim=rmsprp": "optim: unknown value 'rmsprp': did you mean 'rmsprop'?",
        "lr_scheduler_type=linar": "lr_scheduler_type: unknown value 'linar': did you mean 'linear'?",
        "logging_strategy=foo": "foo is not a valid IntervalStrategy",
        "seed=3": "seed: no part of a config: the command gives it, by --seed",
        "no_such=3": "no_such: unknown key",
        "learning_rate=[]": "learning_rate: ",
        "template=papre": "template 'papre'",
        "top_p=[": "not a YAML value",
    }.items():
        assert_refused(call(*mine, "--set", setting), part)
    assert not (tmp_path / "out").exists()


def test_an_infinite_loss_is_refused(tmp_path, model_folder, data_file):
    """e^−u of a sum over a response overflows float32 well before the logistic loss would."""
    arguments = ["run", "--model", model_folder, "--data", data_file, "--out", tmp_path / "out", *SMALL]
    extreme = ["--set", "methods.tspin.loss_type=exponential", "--set", "methods.tspin.alpha=100"]
    assert_refused(call(*arguments, *extreme), "exponential loss is inf", "logistic")
    assert not (tmp_path / "out" / "tspin" / "iteration-0" / "model").exists()


def test_the_installed_command_exits_with_2(tmp_path):
    tspin = Path(sys.executable).parent / "tspin"
    done = subprocess.run([tspin, "run", "--preset", "nothing-like-it"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("tspin: unknown preset") and done.stderr.count("\n") == 1


def test_errors_of_ours_are_not_swallowed():
    with pytest.raises(ValueError), one_line_errors():
        raise ValueError("a bug")


def test_libraries_are_quiet():
    """By the environment, which conftest.py sets as every command does: before they are imported."""
    import datasets
    import huggingface_hub
    import transformers

    assert transformers.utils.logging.get_verbosity() == huggingface_hub.logging.get_verbosity() == logging.ERROR
    assert not transformers.utils.logging.is_progress_bar_enabled() and datasets.are_progress_bars_disabled()


REFUSED = [
    ("run --preset poket", "did you mean 'pocket'"),
    ("run --preset nosuch.yaml", "nosuch.yaml: no such file"),
    ("run --preset pocket --methods tspn", "did you mean 'tspin'"),
    ("run --preset pocket --set iteration=3", "pocket.yaml: iteration: unknown key 'iteration': did you mean 'iterat"),
    ("run --preset pocket --set optm=sgd", "did you mean 'optim'"),  # a field of TrainingArguments
    ("run --preset pocket --set data.lables=5", "data.lables: unknown key 'lables': did you mean 'labels'"),
    ("run --preset pocket --set methods.spin.data.lables=5", "methods.spin.data.lables: unknown key"),
    ("run --preset pocket --set methods.tspin.bta=1", "methods.tspin.bta: unknown key"),
    ("run --preset pocket --method spin --set alpha=1", "write it as methods.tspin.alpha"),
    ("run --preset pocket --set evaluation.suite=poket", "unknown suite 'poket'"),
    ("run --preset pocket --launcher accelerate --launcher-config fdsp2", "unknown launch file 'fdsp2'"),
    ("run --model pocket --data nosuch.jsonl", "nosuch.jsonl: no such file"),
    ("run --model pocket --data pocket --method tspn", "did you mean 'tspin'"),
    ("sample --model pocket --data pocket --out y.parquet --set temprature=0", "did you mean 'temperature'"),
    ("train --model pocket --data pocket --out x --synthetic nosuch.parquet", "nosuch.parquet: no such file"),
    ("evaluate --model pocket --suite poket", "unknown suite 'poket'"),
    ("run --model ./nosuch --data pocket", "./nosuch: no such folder"),
    ("run --preset pocket --set temperature=warm", "pocket.yaml: temperature: input should be a valid number"),
    ("run --preset pocket --set methods.tspin.beta=-1", "methods.tspin.beta: a non-negative number is expected"),
    ("run --preset pocket --set methods.spin.top_p=2", "methods.spin.top_p: input should be less than or equal to 1"),
    ("run --preset pocket --set data.labels=none", "data.labels: input should be a valid integer"),
    ("run --preset pocket --set engine.memory=2", "engine.memory: input should be less than 1"),
    ("run --preset pocket --set temperature", "--set temperature: no value: write --set temperature=VALUE"),
    ("run --preset pocket --temperature", "--temperature: no value: write --temperature VALUE"),
    ("run --preset pocket --temperatur 0", "unknown option '--temperatur': did you mean '--temperature'"),
    ("run --preset pocket --iterations many", "Invalid value for '--iterations': Input should be a valid integer"),
    ("sample --model pocket", "Missing option '--data'"),
    ("rnu", "No such command 'rnu'. Did you mean 'run'?"),
    ("settings temperatur_", "unknown setting 'temperatur_': did you mean 'temperature'"),
    (f"run --model pocket --data {REPOSITORY}/results/faults/summary.csv", "the columns fault, injected, survived, "),
    ("run --model pocket --data pocket --method base", "base, the initial policy, can only be evaluated"),
    ("sweep nosuch", "unknown study 'nosuch'"),
    ("plan poket", "did you mean 'pocket'"),
    ("fetch poket", "did you mean 'pocket'"),
]


def test_help_and_wrong_names_do_not_wait_for_torch():
    script = """
import sys
from typer.testing import CliRunner
from tspin.cli import app
heavy = {"torch", "transformers", "datasets", "pandas", "matplotlib"}
for arguments in (["--help"], ["run", "--help"], ["table", "--help"], ["run"], ["evaluate", "--seeds", "x"]):
    CliRunner().invoke(app, arguments)
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
for arguments in sys.argv[1:]:
    result = CliRunner().invoke(app, arguments.split())
    print(result.exit_code, result.stderr.replace("\\n", " "))
    assert not {"torch", "transformers"} & sys.modules.keys(), arguments
"""
    commands = [command for command, _ in REFUSED]
    done = subprocess.run([sys.executable, "-c", script, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, (command, said) in zip(done.stdout.splitlines(), REFUSED, strict=True):
        assert line.startswith("2 tspin: ") and said in line, command


def test_what_names_refuse_the_config_refuses_alike():
    for command, said in REFUSED:
        if command.startswith("run --preset pocket --set") and "suite" not in command:
            with pytest.raises(UserError, match=re.escape(said.removeprefix("pocket.yaml: "))):
                load_config("pocket", [command.split()[-1]])

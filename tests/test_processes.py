"""Training in several processes on gloo beside one process: the same losses, gradients, checkpoint; stopped, too."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree

import numpy as np
import pandas as pd
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.numpy import load_file

from tspin import SelfPlayConfig, SelfPlayTrainer
from tspin.config import REPOSITORY
from tspin.data.encoding import encode_dataset
from tspin.data.responses import read_responses, write_responses
from tspin.doctor.tiny import tiny_model
from tspin.engines import here, launch
from tspin.engines.here import Scoring, score
from tspin.engines.launch import check_launcher, launch_scoring, scores_in_shards
from tspin.errors import UserError
from tspin.models import Policy, load_model
from tspin.runs.files import folder_fingerprint
from tspin.runs.signals import Stopped
from tspin.runs.unfinished import State
from tspin.triplets import make_triplets

PATIENCE = 300  # seconds until processes are given up that a loaded machine starts slowly
FILES = REPOSITORY / "experiments" / "accelerate"
# float32 in both; only the order of additions differs, and RMSProp divides small gradients by their own size.
LOG_TOLERANCE = 1e-4  # relative, of losses, gradient norms and mean log-likelihoods
WEIGHT_TOLERANCE = 1e-5  # of weights of order 0.3, after updates of order 1e-3
SETTINGS = {
    "iterations": 1,
    "learning_rate": 1e-4,
    "max_new_tokens": 6,
    # Twelve rows in steps of five: the last step has two, one for each process; micro-batches of one or two triplets.
    "batch_size": 5,
    "micro_batch_tokens": 64,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}


def play(folder: Path, model_folder: Path, rows, **settings) -> dict:
    args = SelfPlayConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    (result,) = SelfPlayTrainer(str(model_folder), args=args, train_dataset=rows).train()
    return result.training


def launch_file(folder: Path, processes: int = 2, kind: str = "FSDP", machines: int = 1, **fsdp) -> Path:
    settings = yaml.safe_load((FILES / "cpu2.yaml").read_text())
    settings |= {"distributed_type": kind, "num_processes": processes, "num_machines": machines}
    settings["fsdp_config"] |= fsdp
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{kind}-{processes}-{machines}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def in_two(folder: Path, model_folder: Path, rows, kind: str = "FSDP", **settings) -> dict:
    return play(folder, model_folder, rows, launcher=str(launch_file(folder.parent, kind=kind)), **settings)


LORA = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
# Twelve steps; the log's rows are means over two, so that one is stopped in the middle.
TSPIN = {"method": "tspin", "num_train_epochs": 4.0, "learning_rate": 2e-5, "logging_steps": 2}
SHARDED = {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}

# Python reads it in every process that starts, and it does something at a step of the launched ones alone.
MEDDLE = """
import os, signal, torch
if "LOCAL_RANK" in os.environ:
    from tspin.trainer import TripletTrainer
    rank, untouched = int(os.environ["RANK"]), TripletTrainer.{method}
    def meddled(self, *arguments):
        step, tokens = self.state.global_step + 1, self.collator.max_tokens
        {what}
        return untouched(self, *arguments)
    TripletTrainer.{method} = meddled
"""


@pytest.fixture
def meddle(tmp_path, monkeypatch):
    """Have a statement run in each launched process at each step: it knows rank, step, tokens of a micro-batch."""

    def begin(what: str, method: str = "agree") -> None:
        folder = tmp_path / "meddle"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(MEDDLE.format(what=what, method=method))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))

    yield begin


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer, rows) -> tuple[Path, Path]:
    """A model and a T-SPIN run of it in two processes: (folder of the model, folder of the run)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for saved in (tiny_model(tokenizer), tokenizer):
        saved.save_pretrained(folder / "model")
    in_two(folder / "run", folder / "model", rows, **TSPIN)
    return folder / "model", folder / "run"


def assert_bit_for_bit(one: Path, two: Path) -> None:
    """Two runs have the same weights and step log."""
    left, right = (folder_fingerprint(run / "iteration-0/model") for run in (one, two))
    assert left == right
    logs = [pd.read_parquet(run / "iteration-0/steps.parquet").drop(columns="tokens_per_second") for run in (one, two)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    assert not (one / "iteration-0/unfinished").exists()


def assert_same_training(one: Path, two: Path, model: Path) -> None:
    """Logs and weights of two runs agree to rounding, and have moved from the model by much more."""
    left, right = (pd.read_parquet(run / "iteration-0" / "steps.parquet") for run in (one, two))
    assert list(left.columns) == list(right.columns)
    for column in left.columns.drop("tokens_per_second"):
        np.testing.assert_allclose(right[column], left[column], rtol=LOG_TOLERANCE, atol=1e-5, err_msg=column)
    folders = (model, one / "iteration-0" / "model", two / "iteration-0" / "model")
    before, left, right = (load_file(folder / "model.safetensors") for folder in folders)
    assert left.keys() == right.keys()
    for name, weights in left.items():
        assert right[name].dtype == weights.dtype
        np.testing.assert_allclose(right[name], weights, rtol=0, atol=WEIGHT_TOLERANCE, err_msg=name)
    moved = max(np.abs(left[name] - before[name]).max() for name in left)
    assert moved > 20 * WEIGHT_TOLERANCE  # the tolerance tells training from none


def test_two_processes_train_what_one_trains(undisturbed, tmp_path, rows):
    model, run = undisturbed
    one = play(tmp_path / "one", model, rows, **TSPIN)
    two = in_two(run, model, rows, **TSPIN)  # finished: nothing is trained again
    assert two["processes"] == 2 and two["steps"] == one["steps"] == 12 and two["tokens"] == one["tokens"]
    assert_same_training(tmp_path / "one", run, model)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("FSDP", {"method": "sft", "gradient_checkpointing": True, "gradient_signal": True}),
        ("MULTI_GPU", {"method": "spin", "lora": LORA, "learning_rate": 1e-3}),
    ],
    ids=["sft-fsdp2", "spin-lora-ddp"],
)
def test_and_so_with_checkpointing_and_adapters(kind, settings, tmp_path, model_folder, rows):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))  # off while training
    # With 11 rows the last step has one triplet: one of the processes has no part in it.
    data = rows[:11] if settings["method"] == "sft" else rows
    one = play(tmp_path / "one", model_folder, data, **settings)
    two = in_two(tmp_path / "two", model_folder, data, kind, **settings)
    assert two["processes"] == 2
    assert two["steps"] == one["steps"] == 3
    assert two["tokens"] == one["tokens"]
    signals = [run.get("gradient_signal", 0.0) for run in (one, two)]  # FSDP has parts of the gradients
    assert signals[0] == pytest.approx(signals[1], rel=1e-3) and (signals[0] > 0) == (kind == "FSDP")
    assert_same_training(tmp_path / "one", tmp_path / "two", model_folder)
    trained = json.loads((tmp_path / "two" / "iteration-0" / "model" / "config.json").read_text())
    assert trained["attention_dropout"] == 0.3
    # Whoever finished it, the iteration is finished: nothing is trained again in one process.
    again = play(tmp_path / "two", model_folder, data, **settings)
    assert again == two


def test_a_killed_process_ends_the_run_in_one_line_and_the_run_goes_on(undisturbed, tmp_path, rows, meddle):
    model, whole = undisturbed
    meddle("if rank == 1 and step == 6: os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(UserError, match=r"^training: a process was ended by SIGKILL") as error:
        in_two(tmp_path / "run", model, rows, checkpoint_steps=3, **TSPIN)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run/iteration-0/model").exists()
    assert [path.name for path in (tmp_path / "run/iteration-0/unfinished").glob("step-?")] == ["step-3"]
    meddle("assert step > 3")  # it goes on from there
    assert in_two(tmp_path / "run", model, rows, **TSPIN)["steps"] == 12
    assert_bit_for_bit(tmp_path / "run", whole)


@pytest.mark.parametrize(("kind", "fsdp"), [("FSDP", {}), ("FSDP", SHARDED), ("MULTI_GPU", {})], ids=str)
def test_a_signal_to_one_process_stops_all_and_the_training_goes_on(kind, fsdp, undisturbed, tmp_path, rows, meddle):
    """As a queue sends it, SIGUSR2, before a job's time is up; full, sharded and whole states."""
    model, whole = undisturbed
    settings = {**TSPIN, "launcher": str(launch_file(tmp_path, kind=kind, **fsdp))}
    if kind == "MULTI_GPU":
        whole = tmp_path / "whole"
        play(whole, model, rows, **settings)
    meddle("if rank == 1 and step == 5: os.kill(os.getpid(), signal.SIGUSR2)")
    with pytest.raises(Stopped) as stopped:
        play(tmp_path / "run", model, rows, **settings)
    assert (stopped.value.number, stopped.value.saved) == (signal.SIGUSR2, "training is kept at step 5 of 12")
    assert not (tmp_path / "run/iteration-0/model").exists()
    if kind == "FSDP":
        with pytest.raises(UserError, match=r"go on with the launch file that it had, or delete the folder"):
            play(tmp_path / "run", model, rows, **TSPIN)
    else:  # one process goes on too: where sums have another order
        copytree(tmp_path / "run", tmp_path / "alone")
        play(tmp_path / "alone", model, rows, **TSPIN)
        assert_same_training(tmp_path / "alone", whole, model)
    meddle("assert step > 5")
    play(tmp_path / "run", model, rows, **settings)
    assert_bit_for_bit(tmp_path / "run", whole)


def test_where_one_process_has_no_memory_all_start_again_with_less(undisturbed, tmp_path, rows, meddle, capfd):
    model, whole = undisturbed
    meddle(
        "if rank == 1 and step == 4 and tokens > 100: raise torch.OutOfMemoryError('CUDA out of memory')", "_accumulate"
    )
    in_two(tmp_path / "run", model, rows, checkpoint_steps=2, micro_batch_tokens=256, **TSPIN)
    told = [line for line in capfd.readouterr().err.splitlines() if "out of memory" in line]
    assert len(told) == 1 and told[0].startswith("tspin: step 4: out of memory; its processes are started again with")
    assert_same_training(tmp_path / "run", whole, model)
    meddle("raise torch.OutOfMemoryError('CUDA out of memory')", "_accumulate")
    with pytest.raises(UserError, match=r"step 1: out of memory with a single prompt and its responses"):
        in_two(tmp_path / "never", model, rows, micro_batch_tokens=8, **TSPIN)


def test_four_processes_load_and_train_what_one_does(tmp_path, tokenizer, rows, meddle):
    """The first reads the weights and hands them out; input and output embeddings are one; with shares of nothing."""
    model = tiny_model(tokenizer, tie_word_embeddings=True)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    settings = {**TSPIN, "num_train_epochs": 1.0, "batch_size": 5, "logging_steps": 1}
    one = play(tmp_path / "one", tmp_path / "model", rows[:11], **settings)
    meddle("import tspin.logprobs; tspin.logprobs.LOGITS_PER_CHUNK = 2**9")  # of the sharded head, a few tokens each
    launcher = launch_file(tmp_path, 4, fsdp_cpu_ram_efficient_loading=True)
    four = play(tmp_path / "four", tmp_path / "model", rows[:11], launcher=str(launcher), **settings)
    assert four["processes"] == 4 and four["tokens"] == one["tokens"]
    assert_same_training(tmp_path / "one", tmp_path / "four", tmp_path / "model")


# Stand-ins that start on this machine what the real ones start on others.
SSH = 'shift 2\necho "$1" >> "{calls}"\nshift\nexec sh -c "$*"\n'
SRUN = """
echo "$*" >> "{calls}"
while [ "${{1#--}}" != "$1" ]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank "$@" & pids="$pids $!"; done
trap 'kill -HUP $pids' HUP
for pid in $pids; do wait $pid || exit 1; done
"""


@pytest.mark.parametrize("by", ["ssh", "srun"])
def test_two_machines_train_what_one_process_does(by, undisturbed, tmp_path, rows, monkeypatch, meddle):
    model, whole = undisturbed
    tool = tmp_path / "bin" / by
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n" + {"ssh": SSH, "srun": SRUN}[by].format(calls=tmp_path / "calls"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    settings = {**TSPIN, "launcher": str(launch_file(tmp_path, machines=2))}
    if by == "ssh":
        settings["hosts"] = ["localhost", "another machine"]
    else:
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    if by == "ssh":
        meddle("if rank == 1 and step == 5: os.kill(os.getpid(), signal.SIGTERM)")
        with pytest.raises(Stopped):
            play(tmp_path / "a run", model, rows, **settings)
        meddle("assert step > 5")
    play(tmp_path / "a run", model, rows, **settings)
    assert_bit_for_bit(tmp_path / "a run", whole)
    calls = (tmp_path / "calls").read_text().splitlines()
    if by == "ssh":
        assert calls == ["another machine"] * 2
    else:
        assert len(calls) == 1 and "--nodes=2 --ntasks=2" in calls[0] and "--cpus-per-task=3" in calls[0]
    assert not list((tmp_path / "a run/iteration-0").glob(".tspin-job-*"))


def test_a_launched_training_ends_with_the_command_that_started_it(tmp_path, model_folder, data_file):
    command = [
        *(sys.executable, "-c", "from tspin.cli import main; main()", "run", "--model", str(model_folder)),
        *("--data", str(data_file), "--method", "sft", "--out", str(tmp_path / "run"), "--set", "batch_size=4"),
        *("--launcher", "accelerate", "--launcher-config", str(FILES / "cpu2.yaml"), "--set", "num_train_epochs=2000"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not ranks(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks(process.pid)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert "stopped by SIGTERM: training is kept at step" in errors and "Traceback" not in errors
    assert not ranks(process.pid)
    assert not (tmp_path / "run/iteration-0/model").exists()


def ranks(owner: int) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(v.startswith(f"TSPIN_OWNER={owner}@".encode()) for v in variables) and any(
            v.startswith(b"LOCAL_RANK=") for v in variables
        ):
            found.append(folder.name)
    return found


def test_the_files_are_what_accelerate_reads():
    for path in FILES.glob("*.yaml"):
        settings = load_config_from_file(str(path))
        machines = 2 if path.stem == "fsdp2_two_machines" else 1
        assert settings.num_machines == machines
        assert settings.num_processes == (2 if path.stem == "cpu2" else 8 * machines)
    assert {p.stem for p in FILES.glob("*.yaml")} == {"cpu2", "ddp", "deepspeed_zero3", "fsdp2", "fsdp2_two_machines"}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"num_machines": 2}, {}, "this is no Slurm job: name the machines in hosts"),
        ({"num_machines": 2, "num_processes": 3}, {}, "must be a multiple of num_machines"),
        ({"num_processes": None}, {}, "num_processes is None: a whole number from 1 on is needed"),
        ({"num_processes": "two"}, {}, "num_processes is 'two': a whole number from 1 on is needed"),
        ({"num_machines": 0}, {}, "num_machines is 0: a whole number from 1 on is needed"),
        ({"fsdp_config": True}, {}, "fsdp_config: a mapping is needed"),
        ({"fsdp_config": {"fsdp_version": "two"}}, {}, "fsdp_version must be 2"),
        ({"num_machines": 2}, {"hosts": ["a", "b", "c"]}, "3 machines, and .* has num_machines 2"),
        ({}, {"hosts": ["a", "b"]}, "has num_machines 1; set it to 2"),
        ({"distributed_type": "MULTI_GPU"}, {"scoring": "sharded"}, "cuts no model into shards"),
        ({"distributed_type": "MULTI_XPU"}, {"checkpoint_steps": 2}, "no states are kept under MULTI_XPU"),
        ({"distributed_type": "DEEPSPEED"}, {}, "DeepSpeed is not installed"),
        ({}, {"lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj"]}}, "use experiments/accelerate/ddp.yaml"),
        ({"fsdp_config": {"fsdp_version": 1}}, {}, "fsdp_version must be 2"),
        ({"fsdp_config": {"fsdp_version": 2}}, {}, "must be FULL_STATE_DICT or SHARDED_STATE_DICT"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_before_anything_runs(change, settings, message, tmp_path):
    path = tmp_path / "launcher.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load((FILES / "cpu2.yaml").read_text()), **change}))
    with pytest.raises(UserError, match=message):
        check_launcher(path, SelfPlayConfig(output_dir=str(tmp_path), use_cpu=True, launcher=str(path), **settings))


def test_a_state_that_says_no_kind_is_refused(tmp_path):
    """One of an earlier version: it lacks files that this one reads."""
    with pytest.raises(UserError, match=r"whose state is an earlier version's, .* delete the folder"):
        here._check_state(State(3, tmp_path), {"kind": "whole", "processes": 1}, tmp_path)


@pytest.mark.parametrize("setting", [{"hosts": ["a", "b"]}, {"scoring": "sharded"}], ids=str)
def test_what_is_of_a_launch_file_does_nothing_without(setting, tmp_path):
    with pytest.raises(UserError, match=r"does nothing without a launch file"):
        SelfPlayConfig(output_dir=str(tmp_path), use_cpu=True, **setting)


def test_something_else_is_no_launcher_file(tmp_path):
    args = SelfPlayConfig(output_dir=str(tmp_path), use_cpu=True)
    for text in ("[1, 2]", "a: [", "a: b"):
        (tmp_path / "file.yaml").write_text(text)
        with pytest.raises(UserError, match=r"no Accelerate file"):
            check_launcher(tmp_path / "file.yaml", args)
    with pytest.raises(UserError, match=r"no Accelerate file"):
        check_launcher(tmp_path / "missing.yaml", args)


def test_a_bfloat16_policy_starts_where_its_reference_is(tmp_path, model_folder, rows):
    """FSDP cuts weights to bfloat16, whatever the file says; the reference is scored so too, not by autocast."""
    settings = {"method": "tspin_reference", "bf16": True, "batch_size": 12, "learning_rate": 1e-6}
    in_two(tmp_path / "two", model_folder, rows, **settings)
    (first,) = pd.read_parquet(tmp_path / "two/iteration-0/steps.parquet").to_dict("records")
    # α = 1: the reward is log π_θ − log π_θt, before the first update. A reference scored by autocast makes it 0.05.
    assert abs(first["reward/labelled"]) < 0.01 and abs(first["reward/synthetic"]) < 0.01


def test_a_model_that_no_gpu_holds_is_scored_where_it_is_trained(tmp_path, model_folder, rows, tokenizer):
    """In shards: each process has its part of the prompts, and calls the model for nothing while others need it."""
    settings = {**SETTINGS, "method": "spin", "scoring": "sharded", "launcher": str(launch_file(tmp_path))}
    args = SelfPlayConfig(output_dir=str(tmp_path / "run"), **settings)
    assert scores_in_shards(args, str(model_folder), {})
    examples = encode_dataset(rows[:11], tokenizer, args)
    write_responses(tmp_path / "drawn.parquet", examples.prompt_ids, examples.labelled)
    triplets = make_triplets(examples, {"synthetic": read_responses(tmp_path / "drawn.parquet")})
    scoring = Scoring(tokenizer, args, autocast=False)
    for some, by_token in ((triplets, False), (triplets.select([4]), True)):  # one of two processes has nothing to do
        whole = score(load_model(str(model_folder)), some, scoring, by_token)
        parts = launch_scoring(Policy(str(model_folder), ""), {}, some, scoring, tmp_path, by_token)
        assert parts.keys() == whole.keys()
        for role, values in whole.items():
            for one, other in zip(parts[role], values, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, err_msg=role)


@pytest.mark.parametrize(("memory", "sharded"), [(None, False), (10**9, False), (10**4, True)])
def test_which_models_are_scored_in_shards(memory, sharded, tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(launch, "accelerator_bytes", lambda: memory)
    for kind, expected in (("FSDP", sharded), ("MULTI_GPU", False)):
        settings = {**SETTINGS, "launcher": str(launch_file(tmp_path, kind=kind))}
        args = SelfPlayConfig(output_dir=str(tmp_path / "run"), **settings)
        assert scores_in_shards(args, str(model_folder), {}) == expected

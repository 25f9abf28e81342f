"""Training in two processes, FSDP2 on gloo, beside one process: the same losses, gradients, checkpoint."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.numpy import load_file

from tspin import SelfPlayConfig, SelfPlayTrainer
from tspin.config import REPOSITORY
from tspin.doctor.tiny import tiny_model
from tspin.engines.launch import check_launcher
from tspin.errors import UserError
from tspin.runs.files import folder_fingerprint

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


def in_two(folder: Path, model_folder: Path, rows, kind: str = "FSDP", **settings) -> dict:
    folder.parent.mkdir(exist_ok=True)
    path = folder.parent / f"{kind}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load((FILES / "cpu2.yaml").read_text()), "distributed_type": kind}))
    return play(folder, model_folder, rows, launcher=str(path), **settings)


LORA = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}
TSPIN = {"method": "tspin", "num_train_epochs": 8.0, "learning_rate": 2e-5}  # 24 steps: time enough to kill a process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer, rows) -> tuple[Path, Path]:
    """A model and a T-SPIN run of it in two processes: (folder of the model, folder of the run)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for saved in (tiny_model(tokenizer), tokenizer):
        saved.save_pretrained(folder / "model")
    in_two(folder / "run", folder / "model", rows, **TSPIN)
    return folder / "model", folder / "run"


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
    assert two["processes"] == 2 and two["steps"] == one["steps"] == 24 and two["tokens"] == one["tokens"]
    assert_same_training(tmp_path / "one", run, model)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("FSDP", {"method": "sft", "gradient_checkpointing": True}),
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
    assert_same_training(tmp_path / "one", tmp_path / "two", model_folder)
    trained = json.loads((tmp_path / "two" / "iteration-0" / "model" / "config.json").read_text())
    assert trained["attention_dropout"] == 0.3
    # Whoever finished it, the iteration is finished: nothing is trained again in one process.
    again = play(tmp_path / "two", model_folder, data, **settings)
    assert again == two


def test_a_killed_process_ends_the_run_in_one_line_and_the_run_goes_on(undisturbed, tmp_path, rows):
    killed = []

    def kill_a_rank() -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    variables = (folder / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                mine = f"TSPIN_OWNER={os.getpid()}".encode() in variables
                started = [Path(os.fsdecode(word), "progress.json") for word in words if b"tspin-training-" in word]
                if mine and b"LOCAL_RANK=1" in variables and started and started[0].exists():
                    os.kill(int(folder.name), signal.SIGKILL)
                    killed.append(folder)
                    return
            time.sleep(0.02)

    model, whole = undisturbed
    thread = threading.Thread(target=kill_a_rank)
    thread.start()
    with pytest.raises(UserError, match=r"^training: a process was ended by SIGKILL") as error:
        in_two(tmp_path / "run", model, rows, **TSPIN)
    thread.join()
    assert killed and "\n" not in str(error.value)
    assert not (tmp_path / "run/iteration-0/model").exists()
    facts = in_two(tmp_path / "run", model, rows, **TSPIN)
    assert facts["steps"] == 24
    left, right = (folder_fingerprint(run / "iteration-0/model") for run in (tmp_path / "run", whole))
    assert left == right


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
    assert "stopped by SIGTERM" in errors and "Traceback" not in errors
    assert not ranks(process.pid)
    assert not (tmp_path / "run/iteration-0/model").exists()


def ranks(owner: int) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"TSPIN_OWNER={owner}".encode() in variables and any(v.startswith(b"LOCAL_RANK=") for v in variables):
            found.append(folder.name)
    return found


def test_the_files_are_what_accelerate_reads():
    for path in FILES.glob("*.yaml"):
        settings = load_config_from_file(str(path))
        assert settings.num_machines == 1
        assert settings.num_processes == (2 if path.stem == "cpu2" else 8)
    assert {path.stem for path in FILES.glob("*.yaml")} == {"cpu2", "ddp", "deepspeed_zero3", "fsdp2"}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"num_machines": 2}, {}, "num_machines must be 1"),
        ({"distributed_type": "DEEPSPEED"}, {}, "DeepSpeed is not installed"),
        ({}, {"lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj"]}}, "use experiments/accelerate/ddp.yaml"),
        ({"fsdp_config": {"fsdp_version": 1}}, {}, "fsdp_version must be 2"),
        ({"fsdp_config": {"fsdp_version": 2}}, {}, "must be FULL_STATE_DICT"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_before_anything_runs(change, settings, message, tmp_path):
    path = tmp_path / "launcher.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load((FILES / "cpu2.yaml").read_text()), **change}))
    with pytest.raises(UserError, match=message):
        check_launcher(path, SelfPlayConfig(output_dir=str(tmp_path), use_cpu=True, **settings))


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

"""`tspin doctor`: what it finds on this machine, and that each check can fail."""

import getpass
import json
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoConfig
from typer.testing import CliRunner

from tspin import cli
from tspin.config import load_config
from tspin.data.responses import Response
from tspin.doctor import arithmetic, examination, machine, peaks, trainings
from tspin.doctor.bench import Bench
from tspin.doctor.machine import Wanted
from tspin.engines.engine import Engine
from tspin.engines.here import train
from tspin.models import load_model
from tspin.planning import checks
from tspin.planning.architectures import find_config
from tspin.planning.checks import Finding
from tspin.runs.redaction import anonymous
from tspin.trainer import TripletTrainer

SKIPPED = {"shared memory", "layouts, bfloat16", "sampler, vllm", "training, DDP"}
SKIPPED |= {"memory given back", "memory and speed"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("bench"))
    assert made.policy and made.triplets
    return made


def doctor(*arguments: str):
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


def test_on_a_cpu_everything_that_can_be_tried_is_sound(tmp_path):
    out = tmp_path / "out"
    result = doctor("--out", str(out))
    told = json.loads((out / "doctor.json").read_text())
    states = {one["name"]: one["state"] for one in told["findings"]}
    assert result.exit_code == 0, result.output
    assert {name for name, state in states.items() if state == "skipped"} == SKIPPED
    assert all(state == "ok" for name, state in states.items() if name not in SKIPPED), told["findings"]
    lines = [line for line in result.output.splitlines() if line.startswith(("ok ", "skipped "))]
    assert len(lines) == len(states) == len(examination.checks_of(None, Path("runs")))
    page = (out / "doctor.md").read_text()
    assert page.startswith("## tspin doctor") and all(f"| {name} | {states[name]} |" in page for name in states)
    for private in (str(Path.home()), str(tmp_path), f"{socket.gethostname()} "):
        assert private not in page


def test_what_others_are_shown_names_nobody(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    monkeypatch.setenv("HF_TOKEN", "s3cret-value-of-a-token")
    text = f"{Path.cwd()}/runs on node7: /home/ada/models, /scratch/ada/x, /home/adam, s3cret-value-of-a-token"
    assert anonymous(text) == "./runs on [host]: ~/models, /scratch/[user]/x, /home/adam, [redacted]"


def test_a_failed_check_is_named_and_the_exit_code_says_so(bench, monkeypatch):
    wrong = arithmetic.score
    monkeypatch.setattr(
        arithmetic, "score", lambda *given: {role: [x + 1 for x in of] for role, of in wrong(*given).items()}
    )
    found = {"layouts": arithmetic.check_layouts, "broken": lambda bench: 1 / 0}
    monkeypatch.setattr(examination, "checks_of", lambda wanted, folder: found)
    result = doctor()
    assert result.exit_code == 2
    assert "failed   layouts: largest distance from the plain definition" in result.output
    assert "failed   broken: ZeroDivisionError: division by zero" in result.output
    assert "tspin: doctor: 2 of 2 checks failed: layouts, broken" in result.output
    assert "    ZeroDivisionError" in result.output  # the report has the end of its traceback


def test_a_number_that_is_none_fails_and_is_reported(bench, monkeypatch):
    one_of_them = [0.0] * (len(bench.triplets) - 1) + [float("nan")]
    nan = {role: one_of_them for role in bench.triplets.roles}
    monkeypatch.setattr(arithmetic, "score", lambda *given: nan)
    (found,) = examination.examine({"layouts": arithmetic.check_layouts})
    assert found["state"] == "failed" and found["numbers"] == {"shared": "nan", "padded": "nan"}


def test_a_sampler_with_another_arithmetic(bench, monkeypatch):
    drawn = Engine.sample

    def off(self, *given, **named) -> list[Response]:
        return [replace(one, logp=one.logp + 0.01 * len(one.ids)) for one in drawn(self, *given, **named)]

    monkeypatch.setattr(Engine, "sample", off)
    found = arithmetic.check_sampler(bench)
    assert found.state == "failed" and found.numbers["transformers"] == pytest.approx(0.01, abs=1e-4)


def test_processes_that_train_something_else(bench, monkeypatch):
    def launched(policy, loading, training):
        args = training.args
        args.launcher, args.learning_rate = None, 1.01 * args.learning_rate
        return train(load_model(policy.folder, loading), training)

    monkeypatch.setattr(trainings, "launch_training", launched)
    found = trainings.check_fsdp(bench)
    assert found.state == "failed" and "several processes do not train what one trains" in found.text
    assert found.numbers["weights"] == pytest.approx(0.01, rel=0.1)


def test_a_training_that_does_not_go_on_where_it_was(bench, monkeypatch):
    restored = TripletTrainer._load_optimizer_and_scheduler
    monkeypatch.setattr(TripletTrainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)
    found = trainings.check_resumed(bench)
    assert found.state == "failed" and "states kept after steps [1]" in found.text
    monkeypatch.setattr(TripletTrainer, "_load_optimizer_and_scheduler", restored)
    monkeypatch.setattr(trainings.Interrupt, "on_step_begin", lambda *given, **named: None)
    found = trainings.check_resumed(bench)
    assert found == Finding("stopped and resumed", "failed", "SIGTERM did not stop the training")


def test_a_machine_that_does_not_compute_the_same_twice(bench, monkeypatch):
    draw, trained = np.random.default_rng(0), trainings.train_two_steps

    def noisy(*given, **named):
        found = trained(*given, **named)
        return replace(found, weights={name: w + draw.normal(0, 1e-6, w.shape) for name, w in found.weights.items()})

    monkeypatch.setattr(trainings, "train_two_steps", noisy)
    found = trainings.check_resumed(bench)
    assert found.state == "warning" and "do not compute the same twice" in found.text


def test_memory_that_stays_taken(bench, monkeypatch):
    monkeypatch.setattr(Bench, "on_gpu", True)
    mib = 2**20
    occupied = iter([0, 500 * mib, 400 * mib, 0, 500 * mib, mib])
    monkeypatch.setattr(trainings, "occupied_bytes", lambda: next(occupied))
    found = trainings.check_given_back(bench)
    assert found.state == "failed" and found.text == "400 of 500 MiB stay taken after a policy is released"
    assert trainings.check_given_back(bench).state == "ok"


def test_peaks_beside_the_plan(monkeypatch):
    assert peaks.peak_finding(11 * 2**30, 10 * 2**30, 1000.0, 900.0).state == "ok"
    off = peaks.peak_finding(20 * 2**30, 10 * 2**30, None, 900.0)
    assert off.state == "warning" and off.text.startswith("10.00 GiB (20.00 predicted), 900 tokens/s (no prediction")
    assert "slow" in peaks.peak_finding(10 * 2**30, 10 * 2**30, 1000.0, 100.0).text
    monkeypatch.setattr(peaks, "accelerator_names", lambda: ["NVIDIA H100 80GB HBM3"])
    assert peaks.speed(10**9) == pytest.approx(0.4 * 989e12 / 6e9)
    monkeypatch.setattr(peaks, "accelerator_names", lambda: ["NVIDIA GeForce RTX 4090"])
    assert peaks.speed(10**9) == pytest.approx(0.4 * 165e12 / 6e9)
    monkeypatch.setattr(peaks, "accelerator_names", lambda: ["Something New"])
    assert peaks.speed(10**9) is None


def test_locks_that_keep_nobody_out(tmp_path, monkeypatch):
    assert machine.check_locks(tmp_path / "not" / "there").state == "ok"
    mounts = tmp_path / "mounts"
    mounts.write_text(f"overlay / overlay rw 0 0\nmds:/s {tmp_path} lustre rw,localflock 0 0\n")
    monkeypatch.setattr(machine, "MOUNTS", mounts)
    found = machine.check_locks(tmp_path)
    assert found.state == "warning" and "lustre, mounted with localflock: locks are of one machine" in found.text
    entered = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *given, **named: entered)
    assert machine.check_locks(tmp_path).state == "failed"


def test_what_a_run_needs_is_checked_too(tmp_path, monkeypatch):
    """A launcher for more processes than there are is refused, and what would follow from it is skipped."""
    config = load_config("pocket")
    wanted = Wanted(config, ["sft", "tspin"], {0: tmp_path / "0", 1: tmp_path / "1"}, None)
    found = {one["name"]: one for one in examination.examine(_of_the_run(wanted))}
    assert found["the run's settings"]["text"].startswith("4 runs (sft, tspin) of a model of 0.0")
    assert found["disk"]["numbers"]["checkpoint_bytes"] == 2 * 6 * wanted.needs().policy  # five of T-SPIN, one of SFT
    monkeypatch.setattr(checks, "host_memory", lambda: (10, 10))
    (one,) = (one for one in examination.examine(_of_the_run(wanted)) if one["name"] == "host memory")
    assert one["state"] == "failed" and "of weights are loaded at a time" in one["text"]
    launcher = tmp_path / "many.yaml"
    launcher.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU", "num_processes": 4096}))
    found = list(examination.examine(_of_the_run(replace(wanted, launcher=launcher))))
    assert [one["state"] for one in found] == ["failed", "skipped", "skipped", "skipped"]
    assert "num_processes is 4096" in found[0]["text"]


def _of_the_run(wanted: Wanted):
    names = ("the run's settings", "disk", "host memory", "shared memory")
    return {name: examination.checks_of(wanted, Path("runs"))[name] for name in names}


def test_a_runs_options_need_a_run():
    assert "--set and --launcher are a run's: name it by --preset" in doctor("--set", "batch_size=4").output
    assert doctor("--preset", "pockt").exit_code == 2


def test_the_checks_of_a_gpu_run(tmp_path, monkeypatch):
    """Here on a CPU, with the wide model's widths cut: layouts in bfloat16, memory given back, peak and speed."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    narrow = find_config("mistralai/Mistral-7B-v0.1").to_dict() | small | {"head_dim": 8}
    monkeypatch.setattr("tspin.doctor.bench.find_config", lambda name: AutoConfig.for_model(**narrow))
    monkeypatch.setattr(Bench, "on_gpu", True)
    monkeypatch.setitem(peaks.MODELS, peaks.WIDE, peaks.MODELS["pocket"])
    monkeypatch.setattr(peaks, "TOKENS", 512)
    monkeypatch.setattr(peaks, "accelerator_names", lambda: ["Something New"])
    names = ("layouts", "layouts, bfloat16", "sampler", "stopped and resumed", "training, DDP", "memory and speed")
    made = examination.checks_of(None, tmp_path)
    found = {one["name"]: one for one in examination.examine({name: made[name] for name in names})}
    assert {found[name]["state"] for name in names[:4]} == {"ok"}, found
    assert found["training, DDP"]["text"] == "one GPU; it takes two"
    assert "tokens/s (no prediction for this GPU)" in found["memory and speed"]["text"]

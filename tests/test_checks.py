"""What a machine must have for a run, before its first sample."""

import shutil
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tspin import SelfPlayConfig, cli, devices
from tspin.config import EngineSettings
from tspin.errors import UserError
from tspin.planning import checks
from tspin.planning.checks import Needs, check_machine, needs_of

GB = 10**9
Usage = namedtuple("Usage", "total used free")
SMALL = Needs(Path("runs"), checkpoints=1, policy=1000, state=2000, copies=1, sharing=[])


def given(monkeypatch, disk=1000 * GB, memory=(100 * GB, 100 * GB), shared=100 * GB) -> None:
    """Let this machine seem to have so much of each."""
    free = {str(checks.SHARED_MEMORY): shared}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, free.get(str(place), disk)))
    monkeypatch.setattr(checks, "host_memory", lambda: memory)


def test_what_runs_need(tmp_path, monkeypatch):
    parameters = 1000
    spin = SelfPlayConfig(output_dir=tmp_path / "spin", method="spin", iterations=3, use_cpu=True)
    (tmp_path / "spin" / "iteration-0" / "model").mkdir(parents=True)
    sft = SelfPlayConfig(output_dir=tmp_path / "sft", method="sft", iterations=3, use_cpu=True, optim="adamw_torch")
    needs = needs_of([spin, sft], parameters, "float32")
    # Two of SPIN's are lacking, and SFT's only one; Adam keeps two tensors beside the weights.
    assert needs == Needs(tmp_path / "spin", 3, 4 * parameters, 12 * parameters, 1, [])
    for optim, state in (("sgd", 4), ("rmsprop", 8), ("adamw_torch", 12)):
        args = SelfPlayConfig(output_dir=tmp_path / optim, method="spin", use_cpu=True, optim=optim)
        assert needs_of([args], parameters, "float32").state == state * parameters
    for keep, there in (("last", 1), ("best", 1), ("bfloat16", 2)):
        spin.keep_checkpoints = keep
        assert needs_of([spin], parameters, "float32").checkpoints == there
    spin.keep_checkpoints = "all"
    launcher = tmp_path / "launcher.yaml"
    fsdp = {"distributed_type": "FSDP", "num_processes": 4}
    launcher.write_text(yaml.safe_dump(fsdp))
    spin.launcher, spin.dataloader_num_workers = str(launcher), 2
    assert needs_of([spin], parameters, "float32").copies == 4
    assert needs_of([spin], parameters, "float32").sharing == ["dataloader_num_workers=2"]
    launcher.write_text(yaml.safe_dump({**fsdp, "fsdp_config": {"fsdp_cpu_ram_efficient_loading": True}}))
    monkeypatch.setattr(checks, "accelerators", lambda: 4)
    spin.sampling_backend, spin.engine = "vllm", EngineSettings(tensor_parallel=2)
    needs = needs_of([spin], parameters, "float32")
    assert needs.copies == 1 and needs.sharing[:2] == ["the launcher's processes", "engine.tensor_parallel=2"]


def test_a_disk_that_is_too_small(monkeypatch, capsys):
    needs = Needs(Path("runs/mine"), checkpoints=5, policy=4 * GB, state=8 * GB, copies=1, sharing=[])
    given(monkeypatch, disk=19 * GB)
    line = r"^runs/mine: 19.0 GB are free there, and 5 checkpoints of 4.0 GB are to be written: make room"
    with pytest.raises(UserError, match=line):
        check_machine(needs)
    given(monkeypatch, disk=30 * GB)
    check_machine(needs)
    assert "tspin: runs/mine: 30.0 GB are free there, enough for 5 checkpoints" in capsys.readouterr().err
    given(monkeypatch, disk=36 * GB)
    check_machine(needs)
    assert not capsys.readouterr().err


def test_a_host_without_room_for_the_weights(monkeypatch, capsys):
    needs = Needs(Path("runs"), checkpoints=1, policy=28 * GB, state=0, copies=1, sharing=[])
    given(monkeypatch, memory=(20 * GB, 10 * GB))
    with pytest.raises(UserError, match=r"^28.0 GB of weights are .* this machine has 20.0 GB of memory: .*bfloat16"):
        check_machine(needs)
    given(monkeypatch, memory=(40 * GB, 10 * GB))
    check_machine(needs)
    assert "this machine has 10.0 GB of its memory free" in capsys.readouterr().err
    eight = Needs(Path("runs"), checkpoints=1, policy=28 * GB, state=0, copies=8, sharing=[])
    given(monkeypatch, memory=(200 * GB, 200 * GB))
    with pytest.raises(UserError, match=r"^8 × 28.0 GB of weights .*: fsdp_cpu_ram_efficient_loading: true"):
        check_machine(eight)


def test_a_container_with_little_shared_memory(monkeypatch, capsys):
    given(monkeypatch, shared=64 * 2**20)
    check_machine(SMALL)
    assert not capsys.readouterr().err  # nothing uses it
    check_machine(Needs(Path("runs"), 1, 1000, 2000, 1, ["engine.tensor_parallel=2"]))
    found = capsys.readouterr().err
    assert "64 MiB are free, and engine.tensor_parallel=2 may take more" in found and "--shm-size" in found
    assert found.count("\n") == 1


def test_versions_that_are_not_the_tested_ones(monkeypatch, capsys):
    given(monkeypatch)
    wanted = ["torch==2.13.0", "vllm==0.32.0; extra == 'gpu'", "typer==1.0"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    there = {"torch": "2.13.0+cu128", "typer": "0.1"}

    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(metadata, "version", version)
    check_machine(SMALL)
    assert not capsys.readouterr().err
    there |= {"torch": "2.9.1", "vllm": "0.11.0"}
    check_machine(SMALL)
    found = capsys.readouterr().err
    assert "torch 2.9.1 (tested: ==2.13.0), vllm 0.11.0 (tested: ==0.32.0)" in found and found.count("\n") == 1


MEMINFO = """MemTotal:       100000 kB
MemFree:         10000 kB
MemAvailable:    60000 kB
SwapTotal:       20000 kB
SwapFree:        15000 kB
"""


@pytest.mark.parametrize("version", [1, 2])
def test_the_hosts_memory_within_its_groups(version, tmp_path, monkeypatch):
    for name in ("MEMORY", "GROUPS", "PROCESS"):
        monkeypatch.setattr(devices, name, tmp_path / name)
    assert devices.host_memory() is None
    (tmp_path / "MEMORY").write_text(MEMINFO)
    assert devices.host_memory() == (120000 * 1024, 75000 * 1024)
    (tmp_path / "PROCESS").mkdir()
    controller, limit, used = {
        1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("", "memory.max", "memory.current"),
    }[version]
    (tmp_path / "PROCESS" / "cgroup").write_text(f"9:cpu:/x\n4:{controller}:/slurm/job_7\n")
    job = tmp_path / "GROUPS" / controller / "slurm" / "job_7"
    job.mkdir(parents=True)
    (job / limit).write_text("max\n" if version == 2 else f"{2**63}\n")
    (job / used).write_text("1000\n")
    (job / "memory.stat").write_text("inactive_file 0\n")
    assert devices.host_memory() == (120000 * 1024, 75000 * 1024)
    (job.parent / limit).write_text("50000000\n")  # the job's own group has no limit, the one above it has
    (job.parent / used).write_text("30000000\n")
    (job.parent / "memory.stat").write_text("anon 1\ninactive_file 10000000\n")
    assert devices.host_memory() == (50000000, 30000000)


@pytest.mark.parametrize("preset", [False, True])
def test_a_run_is_refused_before_its_first_sample(preset, tmp_path, model_folder, data_file, monkeypatch):
    given(monkeypatch, disk=1000)
    what = ["--model", str(model_folder), "--data", str(data_file), "--method", "tspin"]
    if preset:
        places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        what = ["--preset", "pocket", *what, *places, "--set", "data.labels=8"]
    else:
        what += ["--out", str(tmp_path / "runs")]
    result = CliRunner().invoke(cli.app, ["run", *what])
    assert result.exit_code == 2 and "are to be written: make room" in result.output.splitlines()[-1]
    assert not list(tmp_path.rglob("*.parquet"))

"""What a run needs of its machine beside GPUs, looked at before hours are spent: disk, memory, /dev/shm, versions.

A check is a function that returns a Finding. `tspin run` refuses what surely fails and tells what may; `tspin doctor`
prints them all. Whether there are enough GPUs is said where they are asked for (tspin.engines.launch, scoring).
"""

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml
from packaging.requirements import Requirement
from transformers.training_args import OptimizerNames

from tspin.config import SelfPlayConfig
from tspin.devices import accelerators, host_memory
from tspin.engines.scoring import scoring_processes
from tspin.errors import UserError
from tspin.planning.peaks import OPTIMIZER_STATE
from tspin.planning.work import WEIGHT
from tspin.runs.stages import given_up

SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED = 2**30  # bytes, as NCCL's users are told to give a container; Docker's default is 64 MiB
MATTER = ("torch", "transformers", "accelerate", "lm-eval", "vllm")  # whose versions numbers depend on most
State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a check found. text: one line, with what to do where it is not ok. numbers: what it measured."""

    name: str
    state: State
    text: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What runs ask of their machine.

    folder: where they write. checkpoints: how many are still to be written. policy: bytes of one, which is what its
    weights take in memory too. state: bytes that a training which is stopped keeps. copies: processes that load a
    policy at the same time. sharing: what uses /dev/shm.
    """

    folder: Path
    checkpoints: int
    policy: int
    state: int
    copies: int
    sharing: Sequence[str]


def needs_of(runs: Sequence[SelfPlayConfig], parameters: int, dtype: str) -> Needs:
    """What the runs of a command need, one after another. parameters: of their policy. dtype: its weights' name."""
    policy = WEIGHT[dtype] * parameters
    launched = [_launched(run) for run in runs]
    return Needs(
        folder=Path(str(runs[0].output_dir)),
        checkpoints=sum(map(_lacking, runs)),
        policy=policy,
        state=max(policy + _optimizer_bytes(run, parameters, WEIGHT[dtype]) for run in runs),
        copies=max([1, *(loaded for _, loaded in launched), *map(scoring_processes, runs)]),
        sharing=list(dict.fromkeys(what for run in runs for what in _sharing(run))),
    )


def _lacking(run: SelfPlayConfig) -> int:
    """Checkpoints whose room a run surely takes still: of those to be written, what will be there at once."""
    folders = [Path(str(run.output_dir), f"iteration-{number}", "model") for number in range(run.iterations)]
    lacking = sum(not folder.exists() and given_up(folder) is None for folder in folders)
    if run.keep_checkpoints in ("last", "best"):  # one goes once the next iteration is finished
        return min(lacking, 1 if any(folder.exists() for folder in folders) else 2)
    if run.keep_checkpoints == "bfloat16":  # half the size, at most
        return min(lacking, 1 + lacking // 2)
    return lacking


def _launched(run: SelfPlayConfig) -> tuple[int, int]:
    """(processes that train on a machine, those of them that load whole weights)."""
    if run.launcher is None:
        return 1, 1
    settings = yaml.safe_load(Path(run.launcher).read_text())
    fsdp = settings.get("fsdp_config") or {}
    processes = int(settings.get("num_processes", 1)) // int(settings.get("num_machines", 1))
    spared = settings["distributed_type"] == "FSDP" and fsdp.get("fsdp_cpu_ram_efficient_loading", False)
    return processes, 1 if spared else processes


def _optimizer_bytes(run: SelfPlayConfig, parameters: int, weight: int) -> int:
    if run.lora:
        return 0
    name = OptimizerNames(run.optim).value
    tensors, further = OPTIMIZER_STATE.get(name, (2, 0))  # of one that plan does not know: Adam's
    return (tensors * weight + further) * parameters


def _sharing(run: SelfPlayConfig) -> Iterable[str]:
    if _launched(run)[0] > 1 and accelerators() > 1:
        yield "the launcher's processes"
    if run.sampling_backend == "vllm" and run.engine.tensor_parallel > 1:
        yield f"engine.tensor_parallel={run.engine.tensor_parallel}"
    if run.dataloader_num_workers:
        yield f"dataloader_num_workers={run.dataloader_num_workers}"


def check_disk(needs: Needs) -> Finding:
    """The room for checkpoints that are still to be written, and for a training's state: two while one replaces one."""
    place = next(folder for folder in (needs.folder.absolute(), *needs.folder.absolute().parents) if folder.exists())
    free, surely = shutil.disk_usage(place).free, needs.checkpoints * needs.policy
    numbers = {"free_bytes": free, "checkpoint_bytes": surely, "state_bytes": needs.state}
    what = f"{needs.checkpoints} checkpoints of {_gb(needs.policy)}"
    if not needs.policy:
        return Finding("disk", "ok", f"{_gb(free)} are free", numbers)
    if free < surely:
        remedy = "make room, choose another folder, or lower iterations"
        text = f"{needs.folder}: {_gb(free)} are free there, and {what} are to be written: {remedy}"
        return Finding("disk", "failed", text, numbers)
    if free < surely + 2 * needs.state:
        text = (
            f"{needs.folder}: {_gb(free)} are free there, enough for {what} and not for the states that trainings keep "
            f"when they are stopped (twice {_gb(needs.state)}): make room"
        )
        return Finding("disk", "warning", text, numbers)
    return Finding("disk", "ok", f"{_gb(free)} are free for {what} and states of {_gb(needs.state)}", numbers)


def check_host_memory(needs: Needs) -> Finding:
    """The host's memory against the weights that are loaded into it at a time."""
    found = host_memory()
    if found is None:
        return Finding("host memory", "skipped", "this system does not say how much memory it has")
    (whole, free), needed = found, needs.copies * needs.policy
    numbers = {"all_bytes": whole, "free_bytes": free, "loaded_bytes": needed}
    if not needed:
        return Finding("host memory", "ok", f"{_gb(free)} of {_gb(whole)} are free", numbers)
    what = f"{needs.copies} × {_gb(needs.policy)} of weights" if needs.copies > 1 else f"{_gb(needed)} of weights"
    remedy = (
        "fsdp_cpu_ram_efficient_loading: true in the launcher's file loads them once, fewer processes (num_processes, "
        "engine.data_parallel) less often"
        if needs.copies > 1
        else "ask the queue or the container for more, or load them as bfloat16 (model.dtype)"
    )
    if needed > free:
        have = f"{_gb(whole)} of memory" if needed > whole else f"{_gb(free)} of its memory free"
        text = f"{what} are loaded at a time, and this machine has {have}: {remedy}"
        return Finding("host memory", "failed" if needed > whole else "warning", text, numbers)
    return Finding("host memory", "ok", f"{_gb(free)} of {_gb(whole)} are free for {what}", numbers)


def check_shared_memory(needs: Needs) -> Finding:
    """The room in /dev/shm, where several processes exchange data."""
    if not needs.sharing:
        return Finding("shared memory", "skipped", "nothing here uses /dev/shm")
    if not SHARED_MEMORY.is_dir():
        return Finding("shared memory", "skipped", f"there is no {SHARED_MEMORY}")
    free = shutil.disk_usage(SHARED_MEMORY).free
    numbers, users = {"free_bytes": free}, ", ".join(needs.sharing)
    if free < ENOUGH_SHARED:
        text = (
            f"{SHARED_MEMORY}: {free / 2**20:.0f} MiB are free, and {users} may take more, which ends in a bus error: "
            "start the container with --shm-size=8g or --ipc=host"
        )
        return Finding("shared memory", "warning", text, numbers)
    return Finding("shared memory", "ok", f"{_gb(free)} are free for {users}", numbers)


def check_versions() -> Finding:
    """What is installed against what this version of tspin is tested with."""
    try:
        wanted = list(map(Requirement, metadata.requires("tspin") or []))
    except metadata.PackageNotFoundError:
        return Finding(
            "versions", "skipped", "tspin is not installed, so nothing says which versions it is tested with"
        )
    others, found = [], {}
    for requirement in wanted:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:  # an extra's
            continue
        if requirement.name in MATTER:
            found[requirement.name] = version
            if not requirement.specifier.contains(version, prereleases=True):
                others.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
    if others:
        text = f"other versions than tspin is tested with: {', '.join(others)}: numbers may differ, and names be gone"
        return Finding("versions", "warning", text, found)
    return Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in found.items()), found)


def check_machine(needs: Needs) -> None:
    """Raise UserError for what surely fails on this machine, and say on stderr what may."""
    findings = [check_disk(needs), check_host_memory(needs), check_shared_memory(needs), check_versions()]
    for finding in findings:
        if finding.state == "failed":
            raise UserError(finding.text)
        if finding.state == "warning":
            sys.stderr.write(f"tspin: {finding.text}\n")


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"

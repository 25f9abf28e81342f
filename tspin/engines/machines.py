"""The machines of a launched training: this one, several of a Slurm allocation (srun), or several by ssh.

Accelerate is started once on each. They share a file system, on which the run's folder is; the first of them is the one
that this process is on.
"""

import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils.launch import get_free_port

from tspin.engines.workers import OWNER, Worker, owner
from tspin.errors import UserError
from tspin.runs.redaction import NAMES as SECRETS

NO_SECRET = "TOKENIZERS_PARALLELISM"  # which is named like one
# What a process on another machine needs of this one's environment, besides what ssh's own shell gives it.
CARRIED = (
    "HF_",
    "NCCL_",
    "GLOO_",
    "TORCH",
    "OMP_",
    "MKL_",
    "TSPIN_",
    NO_SECRET,
    "PYTHON",
    "LD_LIBRARY_PATH",
    "UCX_",
)
SLURM_NODES = ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")


@dataclass(frozen=True)
class ByShell(Worker):
    """A worker on another machine: its command is run there by ssh, in this process's folder.

    Its environment is on the command line, where others can read it: tokens and passwords stay here.
    """

    host: str = ""

    @property
    def arguments(self) -> list[str]:
        carried = {
            name: value
            for name, value in self.environment.items()
            if name.startswith(CARRIED) and (name == NO_SECRET or not SECRETS.search(name))
        }
        words = [f"{name}={value}" for name, value in {**carried, OWNER: owner()}.items()]
        there = shlex.join(["env", *words, *self.command, str(self.folder)])
        return ["ssh", "-o", "BatchMode=yes", self.host, f"cd {shlex.quote(os.getcwd())} && exec {there}"]


def check_machines(path: Path, machines: int, processes: int, hosts: Sequence[str] | None) -> None:
    """Raise UserError where a launch file's machines are not there. hosts: see SelfPlayConfig."""
    if machines == 1:
        if hosts:
            raise UserError(f"hosts: {path} has num_machines 1; set it to {len(hosts)} in a copy of the file")
        return
    if processes % machines:
        raise UserError(f"{path}: num_processes, {processes}, must be a multiple of num_machines, {machines}")
    if hosts:
        if len(hosts) != machines:
            raise UserError(f"hosts: {len(hosts)} machines, and {path} has num_machines {machines}: make them agree")
        if shutil.which("ssh") is None:
            raise UserError("hosts: there is no ssh on this machine")
        return
    there = next((int(os.environ[name]) for name in SLURM_NODES if name in os.environ), None)
    if there is None or shutil.which("srun") is None:
        raise UserError(
            f"{path}: num_machines is {machines}, and this is no Slurm job: name the machines in hosts, this one "
            "first, or send the command by sbatch (experiments/slurm/README.md)"
        )
    if there < machines:
        raise UserError(f"{path}: num_machines is {machines}, and this Slurm job has {there}: ask for sbatch --nodes")


def workers_of(
    settings: Mapping[str, Any], arguments: Sequence[str], hosts: Sequence[str] | None, folder: Path, module: str
) -> tuple[list[Worker], list[dict[str, Any]]]:
    """What starts `accelerate launch` on each machine of a launch file's settings, and the job of each.

    arguments: of it. hosts: see SelfPlayConfig. folder: of the processes' job, which all see. module: their main.
    """
    machines = int(settings.get("num_machines", 1))
    command = [sys.executable, "-m", "tspin.engines.node"]
    environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ}
    ending = signal.SIGHUP  # which Accelerate hands on, and none of the processes heeds: see tspin.engines.node
    if machines > 1:
        # A process that listens, on the first machine, is what the others find each other by.
        address = settings.get("main_process_ip") or (hosts[0] if hosts else socket.gethostname())
        port = settings.get("main_process_port") or get_free_port()
        arguments = [*arguments, "--main_process_ip", address, "--main_process_port", str(port), "--same_network"]
    job = {"arguments": list(arguments), "folder": str(folder), "module": module}
    if machines > 1 and not hosts:
        each = [
            f"--nodes={machines}",
            f"--ntasks={machines}",
            "--ntasks-per-node=1",
            "--overlap",
            "--kill-on-bad-exit=1",
        ]
        if cores := os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE"):
            each.append(f"--cpus-per-task={cores}")  # which srun does not take over from the job
        return [Worker(folder / "machines", ["srun", *each, *command], environment, ending)], [{**job, "rank": None}]
    workers: list[Worker] = [Worker(folder / "machine-0", command, environment, ending)]
    for number, host in enumerate((hosts or [])[1:], start=1):
        workers.append(ByShell(folder / f"machine-{number}", command, environment, ending, host))
    return workers, [{**job, "rank": number} for number in range(len(workers))]

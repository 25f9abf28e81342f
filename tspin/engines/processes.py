"""A job in the processes of a launch file: started on each machine, watched, started again with less where memory ends.

A signal that comes to this process is left in a file, which the first of them reads between two steps; one that comes
to them they note themselves. Either way all agree upon it in a step, keep their state at its end, and stop.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import yaml
from tqdm.auto import tqdm

from tspin.config import SelfPlayConfig
from tspin.engines.machines import workers_of
from tspin.engines.workers import FAILURE, JOB, Worker, run_workers
from tspin.errors import UserError
from tspin.runs.files import write_text
from tspin.runs.signals import Stopped, stopping_when_asked

PROGRESS = "progress.json"
STOP = "stop"  # the number of a signal that came to the process that waits
STOPPED = "stopped.json"  # [number, what was kept in words]: they have stopped at a signal
MEMORY = "memory.json"  # [step, max_tokens]: one ran out of memory, and would take micro-batches of so many tokens
PREFIX = "tspin-job-"


@dataclass(frozen=True)
class Work:
    """name: for messages. module: whose main each process runs. description, unit: of the bar."""

    name: str
    module: str
    description: str
    unit: str


def launch_settings(args: SelfPlayConfig) -> dict[str, Any]:
    """The content of the launch file."""
    assert args.launcher is not None
    settings: dict[str, Any] = yaml.safe_load(Path(args.launcher).read_text())
    return settings


@contextmanager
def job_folder(args: SelfPlayConfig, beside: Path) -> Iterator[Path]:
    """A temporary folder for what processes are told and tell: within `beside`, where several machines see it."""
    shared = int(launch_settings(args).get("num_machines", 1)) > 1
    for orphan in beside.glob(f".{PREFIX}*") if shared else ():  # of a command that was killed: the run is ours now
        rmtree(orphan)
    with tempfile.TemporaryDirectory(prefix=f".{PREFIX}" if shared else PREFIX, dir=beside if shared else None) as name:
        yield Path(name).resolve()


def run_job(work: Work, args: SelfPlayConfig, job: dict[str, Any], folder: Path, keeps: bool) -> None:
    """Run a job to its end, again with smaller micro-batches where a process has no memory for them.

    job: what each process reads; "arguments" in it are plain_arguments(args). keeps: whether they heed STOP.
    Raises UserError, with the processes' own line, when one of them fails by anything but memory, and Stopped.
    """
    assert args.launcher is not None
    # The settings decide, not the file: scores of this process and the record have the same arithmetic.
    arguments = ["--config_file", str(Path(args.launcher).resolve())]
    arguments += ["--mixed_precision", "bf16" if args.bf16 else "no"]
    given: dict[str, Any] = job["arguments"]
    while True:
        (folder / JOB).write_text(json.dumps({**job, "arguments": given}, default=str))
        started = workers_of(launch_settings(args), arguments, args.hosts, folder, work.module)
        progress = Progress(folder / PROGRESS, work, disable=bool(args.disable_tqdm))
        try:
            _run(work.name, started, folder, progress, keeps)
        finally:
            progress.close()
        if not (folder / MEMORY).exists():
            return
        step, tokens = json.loads((folder / MEMORY).read_text())
        (folder / MEMORY).unlink()
        where = f"step {step}" if step else work.name
        sys.stderr.write(
            f"tspin: {where}: out of memory; its processes are started again with micro-batches of {tokens} tokens "
            f"({given['micro_batch_tokens']} before), the same prompts a step\n"
        )
        given = {**given, "micro_batch_tokens": tokens}


def _run(
    name: str,
    started: tuple[Sequence[Worker], Sequence[Mapping[str, Any]]],
    folder: Path,
    progress: "Progress",
    keeps: bool,
) -> None:
    with stopping_when_asked() as asked:

        def watch() -> None:
            progress.show()
            if asked.number is not None and not keeps:
                raise Stopped(asked.number)
            if asked.number is not None and not (folder / STOP).exists():
                write_text(folder / STOP, str(asked.number))

        try:
            run_workers(name, *started, watch)
        except UserError:
            if (folder / FAILURE).exists():
                raise UserError(f"{name}: {(folder / FAILURE).read_text()}") from None
            if asked.number is not None:
                raise Stopped(asked.number) from None  # it came to them before they were ready for it
            if not (folder / MEMORY).exists():
                raise
        if (folder / STOPPED).exists():
            raise Stopped(*json.loads((folder / STOPPED).read_text()))


class Progress:
    """The job's progress bar, drawn here from what its first process writes to `path`: [done, of how many, loss]."""

    def __init__(self, path: Path, work: Work, disable: bool):
        self.path = path
        self.bar = tqdm(desc=work.description, unit=work.unit, disable=disable)

    def show(self) -> None:
        try:
            done, total, loss = json.loads(self.path.read_text())
        except (OSError, ValueError):  # not there yet
            return
        self.bar.total = total
        if loss is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.show()
        self.bar.close()

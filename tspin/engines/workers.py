"""Child processes with a job to do: a folder with job.json in it, and what comes out beside it."""

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tspin.devices import give_back, showing, visible_devices
from tspin.errors import UserError

JOB, LOG, FAILURE = "job.json", "log.txt", "failure.txt"
OWNER = "TSPIN_OWNER"  # the process that a worker ends with, and its host
SECONDS_TO_END = 30  # between the request and the kill


@dataclass(frozen=True)
class Worker:
    """A command that is given `folder` as its last argument, and its environment.

    ending: the signal that ends it and what it started.
    """

    folder: Path
    command: Sequence[str]
    environment: Mapping[str, str]
    ending: signal.Signals = signal.SIGTERM

    @property
    def arguments(self) -> list[str]:
        """The whole command."""
        return [*self.command, str(self.folder)]

    def start(self, job: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        """The process, at work on `job`; what it says goes to `folder`/log.txt."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / JOB).write_text(json.dumps(job))
        with (self.folder / LOG).open("wb") as log:
            return subprocess.Popen(
                self.arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment, OWNER: owner()},
                start_new_session=True,  # Ctrl-C in a terminal comes to this process, which ends them
            )


def run_workers(
    name: str, workers: Sequence[Worker], jobs: Sequence[Mapping[str, Any]], watch: Callable[[], None] = lambda: None
) -> None:
    """Run all at once and wait. When one fails or this process is to stop, all are ended, with what they started.

    GPU memory that this process no longer uses is theirs. watch: called every half second. Raises UserError, "`name`: "
    and the line that says why, when a worker fails; its whole log is kept where the message says.
    """
    give_back()
    started: dict[subprocess.Popen[bytes], Worker] = {}
    try:
        for worker, job in zip(workers, jobs, strict=True):
            started[worker.start(job)] = worker
        running = list(started)
        while running:
            with suppress(subprocess.TimeoutExpired):
                running[0].wait(timeout=0.5)
            for process, worker in started.items():
                if process.poll():
                    raise UserError(f"{name}: {_reason(worker.folder)}")
            running = [process for process in started if process.returncode is None]
            watch()
    finally:
        _end(started)


def owner() -> str:
    """This process, for the workers that are to end with it."""
    return f"{os.getpid()}@{socket.gethostname()}"


def _end(started: Mapping[subprocess.Popen[bytes], Worker]) -> None:
    """End workers and what they started, such as vLLM's engine: each leads a session of its own, and so a group."""
    for last in (False, True):
        for process, worker in started.items():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL if last else worker.ending)
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SECONDS_TO_END)


def _reason(folder: Path) -> str:
    """Why a worker failed: the line that it left, or else the first error of its log."""
    if (folder / FAILURE).exists():
        return (folder / FAILURE).read_text()
    text = (folder / LOG).read_text(errors="replace")
    with tempfile.NamedTemporaryFile("w", prefix="tspin-", suffix=".log", delete=False) as kept:
        kept.write(text)
    if killed := re.search(r"exitcode\s*:\s*-(\d+)", text):  # as torchrun reports it
        name = signal.Signals(int(killed[1])).name
        return f"a process was ended by {name}; SIGKILL may mean that the host's memory ran out (log: {kept.name})"
    said = re.compile(r"Error\b.*:|^\s*Value error, ")  # as Pydantic gives the cause, below the line with its own name
    lines = [line.strip() for line in text.splitlines() if said.search(line) and "Traceback" not in line]
    # An engine's failure is reported once by itself, with the cause, and then by all that waited for it.
    waited = re.compile(r"Engine core initialization failed|validation errors? for ")
    first = next((line for line in lines if not waited.search(line)), "it ended without a word")
    return f"{first[:300]} (log: {kept.name})"


def gpu_environment(number: int, gpus: int) -> dict[str, str]:
    """The environment of worker `number` of several, with `gpus` GPUs to itself of those that this process may use.

    Without GPUs, or with 0: this process's environment. Raises UserError where there are too few.
    """
    environment = dict(os.environ)
    there, needed = visible_devices(environment), (number + 1) * gpus
    if not gpus or not there:
        return environment
    if needed > len(there):
        raise UserError(
            f"engine: {number + 1} copies of the model on {gpus} GPUs each need {needed} GPUs, {len(there)} are there; "
            "lower engine.data_parallel or engine.tensor_parallel"
        )
    mine = there[needed - gpus : needed]
    return environment if mine == there else showing(environment, mine)


def read_job(folder: Path) -> dict[str, Any]:
    """The worker's side: its job, once it is sure to end when its owner is gone; a killed run leaves no GPU taken."""
    threading.Thread(target=_end_without_owner, args=(folder,), daemon=True).start()
    job: dict[str, Any] = json.loads((folder / JOB).read_text())
    return job


def _end_without_owner(folder: Path) -> None:
    """End with the owner; on another host, with the folder that it keeps; and with what started this process."""
    process, _, host = os.environ[OWNER].partition("@")
    parent = os.getppid()
    while True:
        here = host == socket.gethostname()
        if not (_is_alive(int(process)) if here else folder.exists()) or os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        time.sleep(1.0)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True

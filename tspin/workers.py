"""Child processes with a job to do: a folder with job.json in it, and what comes out beside it."""

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tspin.errors import UserError

JOB, LOG, FAILURE = "job.json", "log.txt", "failure.txt"
OWNER = "TSPIN_OWNER"  # the process that a worker ends with


@dataclass(frozen=True)
class Worker:
    """A command that is given `folder` as its last argument, and its environment."""

    folder: Path
    command: Sequence[str]
    environment: Mapping[str, str]


def run_workers(
    name: str, workers: Sequence[Worker], jobs: Sequence[dict[str, Any]], watch: Callable[[], None] | None = None
) -> None:
    """Run all at once and wait; all are ended when one fails, or when this process is asked to stop.

    watch: called every half second. Raises UserError, "`name`: " and the line that says why, when a worker fails; its
    whole log is kept where the message says.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        for worker, job in zip(workers, jobs, strict=True):
            worker.folder.mkdir(exist_ok=True)
            (worker.folder / JOB).write_text(json.dumps(job))
            with (worker.folder / LOG).open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [*worker.command, str(worker.folder)],
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        env={**worker.environment, OWNER: str(os.getpid())},
                        start_new_session=True,  # Ctrl-C in a terminal comes to this process, which ends them
                    )
                )
        waiting = dict(zip(started, workers, strict=True))
        while waiting:
            for process, worker in list(waiting.items()):
                try:
                    code = process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
                if code != 0:
                    raise UserError(f"{name}: {_reason(worker.folder)}")
                del waiting[process]
            if watch is not None:
                watch()
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def read_job(folder: Path) -> dict[str, Any]:
    """The worker's side: its job, once it is sure to end when its owner is gone; a killed run leaves no GPU taken."""
    threading.Thread(target=_end_with, args=(int(os.environ[OWNER]),), daemon=True).start()
    job: dict[str, Any] = json.loads((folder / JOB).read_text())
    return job


def _end_with(owner: int) -> None:
    while True:
        try:
            os.kill(owner, 0)
        except OSError:
            os._exit(1)
        time.sleep(1.0)


def _reason(folder: Path) -> str:
    if (folder / FAILURE).exists():
        return (folder / FAILURE).read_text()
    text = (folder / LOG).read_text(errors="replace")
    with tempfile.NamedTemporaryFile("w", prefix="tspin-", suffix=".log", delete=False) as kept:
        kept.write(text)
    if killed := re.search(r"exitcode\s*:\s*-(\d+)", text):  # as torchrun reports it
        name = signal.Signals(int(killed[1])).name
        return f"a process was ended by {name}; SIGKILL may mean that the host's memory ran out (log: {kept.name})"
    lines = [line.strip() for line in text.splitlines() if "Error" in line and "Traceback" not in line]
    # An engine's failure is reported once by itself, with the cause, and then by all that waited for it.
    first = next((line for line in lines if "Engine core initialization failed" not in line), "it ended without a word")
    return f"{first[:300]} (log: {kept.name})"

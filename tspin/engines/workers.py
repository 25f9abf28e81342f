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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tspin.devices import give_back
from tspin.errors import UserError

JOB, LOG, FAILURE = "job.json", "log.txt", "failure.txt"
OWNER = "TSPIN_OWNER"  # the process that a worker ends with


@dataclass(frozen=True)
class Worker:
    """A command that is given `folder` as its last argument, and its environment."""

    folder: Path
    command: Sequence[str]
    environment: Mapping[str, str]


def gpu_environment(number: int, gpus: int) -> dict[str, str]:
    """The environment of worker `number` of several, with `gpus` GPUs to itself of those that this process may use.

    Without GPUs, or with 0: this process's environment. Raises UserError where there are too few.
    """
    environment = dict(os.environ)
    if gpus and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        own = visible.split(",")[number * gpus : (number + 1) * gpus]
        if len(own) < gpus:
            raise UserError(
                f"engine: {number + 1} copies of the model on {gpus} GPUs each need {(number + 1) * gpus} GPUs, "
                f"{len(visible.split(','))} are there; lower engine.data_parallel or engine.tensor_parallel"
            )
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment


def run_workers(
    name: str, workers: Sequence[Worker], jobs: Sequence[dict[str, Any]], watch: Callable[[], None] | None = None
) -> None:
    """Run all at once and wait; all, with what they started, are ended when one fails or this process is to stop.

    GPU memory that this process no longer uses is theirs. watch: called every half second. Raises UserError, "`name`: "
    and the line that says why, when a worker fails; its whole log is kept where the message says.
    """
    started: list[subprocess.Popen[bytes]] = []
    give_back()
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
                _signal(process, signal.SIGTERM)
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            _signal(process, signal.SIGKILL)  # vLLM's engine is a process of its own, and outlives what started it
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To a worker and all that it started: it leads a session, and so a group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


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
            os.killpg(0, signal.SIGKILL)
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

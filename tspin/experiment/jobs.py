"""`tspin sweep`: the missing cells of a study, in this process, in jobs beside it, or on Slurm, both by submitit."""

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import submitit
from rich.table import Table
from rich.text import Text

from tspin.errors import UserError
from tspin.experiment.gathering import gather, gathered
from tspin.experiment.grid import Cell, Sweep
from tspin.hub.offline import use_offline
from tspin.runs.files import read_json, write_json
from tspin.runs.locks import owned
from tspin.runs.redaction import redacted
from tspin.runs.signals import blocked

State = Literal["finished", "running", "queued", "failed", "missing"]
STATES: tuple[State, ...] = ("finished", "running", "queued", "failed", "missing")
WAITING = {"PENDING", "REQUEUED", "UNKNOWN"}  # as Slurm and submitit say
POLL_SECONDS = 2.0
LAST_LINES = 5
SIGNAL_SECONDS = (
    300  # from SIGUSR2 to the end of a job's time: submitit's 90 are few for a large model's step and state
)
FEW_SECONDS = 60
SUBMITIT_MINUTES = 5  # of a job whose profile does not say its time
NO_LIMIT_MINUTES = 60 * 24 * 365  # of a job on this machine; on Slurm the queue's own limit holds
Show = Callable[[Any], None]


def run_sweep(sweep: Sweep, executor: str, jobs: int, retry: bool, wait: bool, show: Show) -> dict[State, list[Cell]]:
    """Run what is missing of a study, gather what is finished; returns the cells by state.

    executor: "local" or "slurm". jobs: how many run at once on this machine; a single one runs in this process.
    retry: run what failed again. wait: until everything has ended; without, Slurm's jobs are left in the queue.
    show: prints tables and lines as things happen.
    Ctrl-C ends the jobs on this machine, and leaves Slurm's: the same command takes them over.
    """
    if executor == "slurm" and shutil.which("srun") is None:
        raise UserError("--executor slurm: there is no srun on this machine; call it where you would call sbatch")
    if offline := sweep.cells[0].offline:
        use_offline(Path(offline))  # what is prepared reads from there too
    prepare(sweep.study.prepare, show)
    fleet = Fleet(sweep, executor, jobs)
    again = ("missing", "failed") if retry else ("missing",)
    waiting = [cell for cell in sweep.cells if fleet.state(cell) in again]
    for cell in waiting:
        for left in ("failed.json", "job.json"):
            Path(cell.folder, left).unlink(missing_ok=True)
    if executor == "local" and jobs == 1:
        run_here(waiting, show, fleet.keep)
    else:
        fleet.run(waiting, wait, show)
    states = {cell: fleet.state(cell) for cell in sweep.cells}
    show(table_of(sweep, states))
    by_state = {name: [cell for cell, state in states.items() if state == name] for name in STATES}
    for cell in by_state["failed"]:
        show(Text(f"{cell.title}: {reason(cell)}"))
    show(Text(gather(sweep, by_state["finished"])))
    return by_state


def prepare(commands: Mapping[str, str], show: Show) -> None:
    """Run the commands that make folders which are missing, with this Python.

    Raises UserError where one fails; what it left of its folder by then is removed.
    """
    for folder, command in commands.items():
        if not Path(folder).exists():
            with owned(Path(folder).parent / f".prepare-{Path(folder).name}", wait=True):  # another sweep may make it
                if not Path(folder).exists():
                    _make(folder, command, show)


def _make(folder: str, command: str, show: Show) -> None:
    show(Text(f"making {folder}: {command}"))
    try:
        code = subprocess.run([sys.executable, *shlex.split(command)[1:]]).returncode
        if code or not Path(folder).exists():
            how = f"ended with code {code}" if code else "did not make it"
            raise UserError(f"prepare: {folder}: its command {how}: {command}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def run_here(cells: Sequence[Cell], show: Show, keep: Callable[[], Any]) -> None:
    """Run cells one after another in this process; when one fails, the next one runs all the same.

    keep: called when one has finished, so that its numbers are there whatever becomes of the others.
    """
    for number, cell in enumerate(cells, start=1):
        show(Text(f"cell {number} of {len(cells)}: {cell.title}", style="bold"))
        try:
            cell.run()
            keep()
        except UserError:
            continue  # failed.json has its line
        except Exception:
            show(Text(redacted(traceback.format_exc())))


def slurm_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """A profile's parameters of AutoExecutor, with what a training needs where the profile does not say it.

    Time to end a step and to keep its state; the cores for srun too, which since Slurm 22.05 takes none over from
    sbatch. Raises UserError where a job would be told to stop as it starts, and warns where little or no time is left.
    """
    parameters = {"slurm_signal_delay_s": SIGNAL_SECONDS, **given}
    cores = given.get("slurm_cpus_per_task", given.get("cpus_per_task"))
    asked = [str(argument) for argument in given.get("slurm_srun_args") or []]
    if cores is not None and not any(argument.startswith(("--cpus-per-task", "-c")) for argument in asked):
        parameters["slurm_srun_args"] = [f"--cpus-per-task={cores}", *asked]
    delay = parameters["slurm_signal_delay_s"]
    minutes = given.get("slurm_time", given.get("timeout_min", SUBMITIT_MINUTES))
    if isinstance(minutes, int | float) and delay >= 60 * minutes:
        raise UserError(
            f"profile: a job of {minutes} minutes (timeout_min) is told to stop {delay} seconds before its end "
            "(slurm_signal_delay_s), as soon as it starts: raise timeout_min"
        )
    if delay < FEW_SECONDS:  # enough for a small model: who sets it knows how long a step takes
        warn(f"slurm_signal_delay_s is {delay}: what a training's step and its state do not end in by then is lost")
    if not given.get("slurm_use_srun", True):
        warn("slurm_use_srun is false: Slurm tells only what srun starts that its time is up, so nothing is kept then")
    return parameters


def warn(line: str) -> None:
    sys.stderr.write(f"tspin: profile: {line}\n")


def slices(devices: Sequence[str], jobs: int) -> list[list[str]]:
    """The devices of each of several jobs at once: equal parts; where they are fewer than the jobs, one that is shared.

    What is left over by equal parts stays idle. Without devices: empty ones.
    """
    each = max(len(devices) // jobs, 1)
    if not devices:
        return [[] for _ in range(jobs)]
    return [[devices[(number * each + k) % len(devices)] for k in range(each)] for number in range(jobs)]


class Fleet:
    """The jobs of a study's cells. executor: "local" or "slurm". limit: of jobs at once on this machine."""

    def __init__(self, sweep: Sweep, executor: str, limit: int):
        # submitit names every job on the way; the table says the same in one place.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self.sweep, self.executor, self.limit = sweep, executor, limit
        self.folder = sweep.folder / "jobs"
        self.jobs: dict[Cell, Any] = {}
        self.slices = self._slices() if executor == "local" else []
        self.places: dict[Cell, int] = {}  # of jobs on this machine: which of the slices each has
        self.known = set(gathered(sweep).made)  # names of cells that some machine has finished
        for cell in sweep.cells if executor == "slurm" else ():
            left = _read(cell, "job.json")  # by an earlier command, in the queue still: nothing is sent twice
            if left.get("executor") == "slurm" and not cell.finished:
                job: Any = submitit.SlurmJob(folder=self.folder, job_id=left["id"])
                if not job.done(force_check=True):
                    self.jobs[cell] = job

    def run(self, waiting: Sequence[Cell], wait: bool, show: Show) -> None:
        """Submit cells and follow all jobs until they have ended or, without `wait`, are in Slurm's queue."""
        shown: dict[Cell, State] = {}
        try:
            while True:
                self.submit(waiting)
                waiting = [cell for cell in waiting if cell not in self.jobs]
                states = {cell: self.state(cell) for cell in self.sweep.cells} | dict.fromkeys(waiting, "queued")
                if not self.active() or not (wait or self.executor == "local"):
                    return
                if states != shown:
                    show(table_of(self.sweep, states))
                    shown = states
                    self.keep()
                time.sleep(POLL_SECONDS)
        except BaseException:
            if self.executor == "local":
                self.stop()
            raise

    def submit(self, cells: Sequence[Cell]) -> None:
        """Hand cells to the executor: to Slurm all of them in an array, here while fewer than `limit` are at work."""
        if self.executor == "local":
            taken = {self.places[cell] for cell in self.active()}
            free = [place for place in range(self.limit) if place not in taken]
            for cell, place in zip(cells, free, strict=False):
                self.places[cell] = place
                self._send(self._local(self.slices[place]), [cell])
        elif cells:
            self._send(self._slurm(), cells)

    def _send(self, executor: Any, cells: Sequence[Cell]) -> None:
        # A terminal's Ctrl-C is for this process, which then tells its jobs: twice at once would stop them in mid-step.
        with blocked(signal.SIGINT), executor.batch():
            jobs = [executor.submit(cell) for cell in cells]
        for cell, job in zip(cells, jobs, strict=True):
            note = {"id": job.job_id, "executor": self.executor, "log": str(job.paths.stderr)}
            write_json(Path(cell.folder, "job.json"), note)
            self.jobs[cell] = job

    def _slurm(self) -> Any:
        """Slurm, as the profile says."""
        parameters = slurm_parameters(self.sweep.submitit)
        # How often a job's time may be up before it counts as failed, which submitit takes with the executor itself.
        limit = {name: parameters.pop(name) for name in ("slurm_max_num_timeout",) if name in parameters}
        executor = submitit.AutoExecutor(folder=self.folder, cluster="slurm", **limit)
        try:
            executor.update_parameters(**{"name": f"tspin-{self.sweep.path.stem}", **parameters})
        except (NameError, ValueError, AssertionError, TypeError) as error:
            raise UserError(f"submitit: {str(error).splitlines()[0]}") from error
        return executor

    def _local(self, devices: Sequence[str]) -> Any:
        """This machine, for a job that sees these accelerators alone. The profile is of other machines."""
        from tspin.devices import showing  # which brings PyTorch

        # submitit's own way numbers them from 0, whichever are ours, and knows one kind alone.
        shown = [f"{name}={value}" for name, value in showing({}, devices).items()] if devices else []
        python = shlex.join(["env", *shown, sys.executable])
        executor = submitit.AutoExecutor(folder=self.folder, cluster="local", local_python=python)
        executor.update_parameters(timeout_min=NO_LIMIT_MINUTES)
        return executor

    def _slices(self) -> list[list[str]]:
        """Which accelerators each of `limit` jobs at once has; none where the kind has no variable to say it by."""
        from tspin.devices import can_be_shown, visible_devices

        devices = visible_devices(os.environ) if can_be_shown() else []
        if devices and len(devices) < self.limit:
            there = f"{len(devices)} of this machine's accelerators"
            sys.stderr.write(f"tspin: --jobs {self.limit} on {there}: jobs share them\n")
        return slices(devices, self.limit)

    def keep(self) -> None:
        """Gather what has finished by now, before all has."""
        if finished := [cell for cell in self.sweep.cells if cell.finished and cell.name not in self.known]:
            gather(self.sweep, finished)
            self.known |= {cell.name for cell in finished}

    def state(self, cell: Cell) -> State:
        job = self.jobs.get(cell)
        # Before the files, which it may write between two looks.
        active = "" if job is None or job.done() else job.state.upper()
        if cell.finished or cell.name in self.known:
            return "finished"
        if active:
            return "queued" if active in WAITING else "running"
        return "failed" if job is not None or Path(cell.folder, "failed.json").exists() else "missing"

    def active(self) -> list[Cell]:
        return [cell for cell, job in self.jobs.items() if not job.done()]

    def stop(self) -> None:
        """End the jobs on this machine."""
        for cell in self.active():
            os.kill(int(self.jobs[cell].job_id), signal.SIGTERM)  # submitit's own way leaves a traceback here
        for job in self.jobs.values():
            with suppress(Exception):  # how it ended is in its folder
                job.wait()


def reason(cell: Cell) -> str:
    """Why a cell failed, and the last lines of its job's log."""
    killed = "the job ended without a word: killed, out of time or out of memory"
    line = str(_read(cell, "failed.json").get("reason", killed))
    log = Path(_read(cell, "job.json").get("log", "no log"))
    if not log.is_file():
        return line
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    last = [f"    {redacted(line)}" for line in lines if line.strip()][-LAST_LINES:]
    return "\n".join([line, *last, f"    ({log})"])


def _read(cell: Cell, name: str) -> dict[str, Any]:
    """A file of the cell's folder, empty where there is none."""
    path = Path(cell.folder, name)
    return read_json(path) if path.exists() else {}


def table_of(sweep: Sweep, states: Mapping[Cell, State]) -> Table:
    """How many cells of each method are in which state."""
    table = Table("method", *STATES, title=f"{sweep.path.stem}: {len(sweep.cells)} cells")
    for method in dict.fromkeys(cell.method for cell in sweep.cells):
        of_method = [state for cell, state in states.items() if cell.method == method]
        table.add_row(method, *(str(of_method.count(state)) for state in STATES))
    return table

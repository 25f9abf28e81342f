"""Sweeps: methods × seeds × settings, each cell an ordinary run in a job of its own, by submitit, here or on Slurm."""

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import which
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from tspin.config import load_config, read_yaml, unknown
from tspin.errors import UserError
from tspin.objectives import METHODS
from tspin.runs.redaction import redacted
from tspin.runs.signals import stopping_at_once
from tspin.runs.stages import fingerprint, read_json, write_json

State = Literal["finished", "running", "queued", "failed", "missing"]
STATES: tuple[State, ...] = ("finished", "running", "queued", "failed", "missing")
LISTS = {"methods": "[spin, tspin]", "seeds": "[0, 1]", "overrides": "[iterations=2]"}
KEYS = {"preset", "methods", "seeds", "overrides", "grid", "runs", "prepare"}
PROFILE_KEYS = {"launcher", "offline", "submitit"}
WAITING = {"PENDING", "REQUEUED", "UNKNOWN"}  # as Slurm and submitit say
POLL_SECONDS = 2.0
LAST_LINES = 5
NO_LIMIT_MINUTES = 60 * 24 * 365  # of a job on this machine; on Slurm the queue's own limit holds


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, and a job for submitit: text only, so that what is pickled on the way names nothing else.

    preset, method, seed, overrides (key.path=value): as `tspin run` takes them. folder: where its state and logs are.
    runs, results: as `tspin run` takes them. launcher, offline: paths, or None.
    """

    preset: str
    method: str
    seed: int
    overrides: tuple[str, ...]
    setting: tuple[tuple[str, str], ...]
    folder: str
    runs: str
    results: str
    launcher: str | None = None
    offline: str | None = None

    def __call__(self) -> None:
        """Run it, here. An error is written to failed.json, its good end to finished.json; a signal leaves neither."""
        marker = Path(self.folder)
        try:
            with stopping_at_once():  # scancel and the end of the sweep send SIGTERM
                run_cell(self)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            write_json(marker / "failed.json", {"reason": redacted(reason)})
            raise
        (marker / "failed.json").unlink(missing_ok=True)
        told = {name: value for name, value in asdict(self).items() if name != "overrides"}
        write_json(marker / "finished.json", {**told, "overrides": [redacted(text) for text in self.overrides]})

    def checkpoint(self) -> Any:
        """What Slurm queues again when the job's time is up or it is preempted: the same run goes on where it was."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    @property
    def title(self) -> str:
        return " ".join([self.method, f"seed {self.seed}", *(f"{key}={value}" for key, value in self.setting)])


@dataclass
class Sweep:
    """A sweep file's cells, and how they are to be run."""

    name: str
    cells: list[Cell]
    submitit: dict[str, Any] = field(default_factory=dict)


def load_sweep(path: Path, profile: Path | None, runs: Path, results: Path) -> Sweep:
    """Read a sweep file (preset, methods, seeds; optional overrides, grid, runs) and a profile of machines.

    grid: from a key of the config, or several separated by commas that change together, to values; cells are all
    combinations. Each setting of the grid has folders of its own below `runs`/<preset>-studies/<name>/, as
    `make study` has them; without a grid, cells are runs of the preset itself in `runs` and `results`.
    profile: YAML with launcher (a file for `accelerate launch`), offline (a folder of `tspin fetch`) and submitit
    (parameters of its AutoExecutor). Raises UserError for unknown keys, methods, and settings.
    """
    sweep = _mapping(path, KEYS, required={"preset", "methods", "seeds"})
    machines = _mapping(profile, PROFILE_KEYS, required=set()) if profile else {}
    grid: dict[str, list[Any]] = sweep.get("grid") or {}
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise UserError(f"{path}: grid: a mapping is expected, in which each key has a list of values")
    for key in ("methods", "seeds", "overrides"):
        given = sweep.get(key, [""])
        if not isinstance(given, list) or not all(isinstance(value, str) for value in given if key != "seeds"):
            raise UserError(f"{path}: {key}: a list is expected, such as {LISTS[key]}")
        if not given and key != "overrides":
            raise UserError(f"{path}: {key} is empty")
    if not all(isinstance(seed, int) and 0 <= seed < 2**15 for seed in sweep["seeds"]):
        raise UserError(f"{path}: seeds: whole numbers from 0 to {2**15 - 1} are expected")
    place = runs / f"{Path(sweep['preset']).stem}-studies" / path.stem
    cells = []
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        given = [*sweep.get("overrides", []), *(f"{k}={v}" for keys, v in setting.items() for k in keys.split(","))]
        config = load_config(sweep["preset"], given)
        if config.evaluation is None:
            raise UserError(f"{path}: {sweep['preset']} names no evaluation suite, so its runs have no results")
        own = place / fingerprint(setting) if setting else None
        for method in sweep["methods"]:
            if method != "base" and method not in METHODS:
                raise UserError(f"{path}: {unknown('method', method, ['base', *METHODS])}")
            for seed in sweep["seeds"][:1] if method == "base" else sweep["seeds"]:
                own_settings = config if method == "base" else config.for_method(method)
                identity = fingerprint([repr(own_settings), method, seed])
                cells.append(
                    Cell(
                        preset=str(sweep["preset"]),
                        method=method,
                        seed=int(seed),
                        overrides=tuple(given),
                        setting=tuple((keys.rsplit(".", 1)[-1], str(value)) for keys, value in setting.items()),
                        folder=str(place / "cells" / f"{method}-{seed}-{identity[:12]}"),
                        runs=str(sweep["runs"] if "runs" in sweep else own or runs),
                        results=str(own / "results" if own else results),
                        launcher=machines.get("launcher"),
                        offline=machines.get("offline"),
                    )
                )
    return Sweep(path.stem, cells, dict(machines.get("submitit") or {}))


def _mapping(path: Path, keys: set[str], required: set[str]) -> dict[str, Any]:
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: a mapping is expected here, this is a {type(found).__name__}")
    for key in found:
        if key not in keys:
            raise UserError(f"{path}: {unknown('key', key, sorted(keys))}")
    for key in sorted(required - found.keys()):
        raise UserError(f"{path}: {key} is missing")
    return found


def run_cell(cell: Cell) -> None:
    """`tspin run` of one method and seed, in this process."""
    if cell.offline:
        from tspin.hub.offline import use_offline

        use_offline(Path(cell.offline))
    from tspin.experiment.preset import run_experiment

    run_experiment(
        Path(cell.preset).stem,
        load_config(cell.preset, cell.overrides),
        [cell.method],
        [cell.seed],
        Path(cell.runs),
        Path(cell.results),
        launcher=Path(cell.launcher) if cell.launcher else None,
    )


class Fleet:
    """The jobs of a sweep's cells. executor: "local" or "slurm". jobs: at once on this machine."""

    def __init__(self, sweep: Sweep, executor: str, jobs: int):
        import submitit

        # submitit names every job on the way; the table says the same in one place.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self.sweep, self.executor, self.limit = sweep, executor, jobs
        self.folder = Path(sweep.cells[0].folder).parent.parent / "jobs"
        self.jobs: dict[Cell, Any] = {}
        self._submitit = submitit

    def submit(self, cells: Sequence[Cell]) -> None:
        """Hand cells to the executor: to Slurm all of them in an array, here while fewer than `limit` are at work."""
        if self.executor == "local":
            cells = cells[: max(self.limit - len(self.active()), 0)]
        if not cells:
            return
        for cell in cells:
            Path(cell.folder).mkdir(parents=True, exist_ok=True)
            (Path(cell.folder) / "failed.json").unlink(missing_ok=True)
        executor = self._executor()
        if self.executor == "slurm":
            with executor.batch():
                jobs = [executor.submit(cell) for cell in cells]
        else:
            jobs = [executor.submit(cell) for cell in cells]
        for cell, job in zip(cells, jobs, strict=True):
            left = {"id": job.job_id, "executor": self.executor, "log": str(job.paths.stderr)}
            write_json(Path(cell.folder) / "job.json", left)
            self.jobs[cell] = job

    def adopt(self, cells: Sequence[Cell]) -> None:
        """Take over the jobs that an earlier command left in Slurm's queue, so that nothing is sent twice."""
        for cell in cells:
            left = _read(cell, "job.json")
            if self.executor == "slurm" == left.get("executor"):
                job: Any = self._submitit.SlurmJob(folder=self.folder, job_id=left["id"])
                if not job.done(force_check=True):
                    self.jobs[cell] = job

    def state(self, cell: Cell) -> State:
        folder = Path(cell.folder)
        if (folder / "finished.json").exists():
            return "finished"
        job = self.jobs.get(cell)
        if job is not None and not job.done():
            return "queued" if job.state.upper() in WAITING else "running"
        if (folder / "finished.json").exists():  # it ended between the two looks
            return "finished"
        return "failed" if job is not None or (folder / "failed.json").exists() else "missing"

    def active(self) -> list[Cell]:
        return [cell for cell in self.jobs if self.state(cell) in ("queued", "running")]

    def stop(self) -> None:
        """End the jobs on this machine."""
        for job in self.jobs.values():
            if not job.done():
                os.kill(int(job.job_id), signal.SIGTERM)  # submitit's own way leaves a traceback on the terminal
        for job in self.jobs.values():
            with suppress(Exception):  # how it ended is in its folder
                job.wait()

    def reason(self, cell: Cell) -> str:
        """Why a cell failed, and the last lines of its log."""
        killed = "the job ended without a word: killed, out of time or out of memory"
        reason = _read(cell, "failed.json").get("reason", killed)
        log = Path(_read(cell, "job.json").get("log", "no log"))
        if not log.is_file():
            return str(reason)
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        tail = [f"    {redacted(line)}" for line in lines if line.strip()][-LAST_LINES:]
        return "\n".join([str(reason), *tail, f"    ({log})"])

    def _executor(self) -> Any:
        executor = self._submitit.AutoExecutor(folder=self.folder, cluster=self.executor)
        if self.executor == "slurm":
            given = {"name": f"tspin-{self.sweep.name}", **self.sweep.submitit}
        else:  # the profile is of other machines; here every job sees every GPU
            import torch

            given = {"timeout_min": NO_LIMIT_MINUTES, "gpus_per_node": torch.cuda.device_count()}
        try:
            executor.update_parameters(**given)
        except (NameError, ValueError, AssertionError, TypeError) as error:
            raise UserError(f"submitit: {str(error).splitlines()[0]}") from error
        return executor


def run_sweep(
    sweep: Sweep, executor: str, jobs: int, retry: bool, wait: bool, show: Callable[[Any], None]
) -> dict[str, list[Cell]]:
    """Run what is missing of a sweep; returns its cells by state.

    jobs: how many run at once on this machine. retry: run what failed again. wait: until everything has ended; without,
    Slurm's jobs are left in the queue. show: is given a table whenever a state changes. Ctrl-C ends the jobs on this
    machine, and leaves Slurm's: the same command finds them again.
    """
    if executor == "slurm" and which("srun") is None:
        raise UserError("--executor slurm: there is no srun on this machine; call it where you would call sbatch")
    fleet = Fleet(sweep, executor, jobs)
    fleet.adopt([cell for cell in sweep.cells if fleet.state(cell) != "finished"])
    again: set[State] = {"missing", "failed"} if retry else {"missing"}
    waiting = [cell for cell in sweep.cells if cell not in fleet.jobs and fleet.state(cell) in again]
    last: dict[State, int] = {}
    try:
        while True:
            fleet.submit(waiting)
            waiting = [cell for cell in waiting if cell not in fleet.jobs]
            states = {cell: fleet.state(cell) for cell in sweep.cells}
            states |= {cell: "queued" for cell in waiting}
            counts = {name: list(states.values()).count(name) for name in STATES}
            if counts != last:
                show(table_of(sweep, states))
                last = counts
            if not (waiting or fleet.active()) or not (wait or executor == "local"):
                break
            time.sleep(POLL_SECONDS)
    except BaseException:
        if executor == "local":
            fleet.stop()
        raise
    for cell, state in states.items():
        if state == "failed":
            show(Text(f"{cell.title}: {fleet.reason(cell)}"))
    return {name: [cell for cell, state in states.items() if state == name] for name in STATES}


def _read(cell: Cell, name: str) -> dict[str, Any]:
    """A file of the cell's folder, empty where there is none."""
    try:
        found: dict[str, Any] = read_json(Path(cell.folder) / name)
    except (OSError, ValueError):
        return {}
    return found


def table_of(sweep: Sweep, states: Mapping[Cell, State]) -> Table:
    """How many cells of each method are in which state."""
    table = Table(title=f"sweep {sweep.name}: {len(sweep.cells)} cells")
    table.add_column("method")
    for state in STATES:
        table.add_column(state, justify="right")
    for method in dict.fromkeys(cell.method for cell in sweep.cells):
        own = [state for cell, state in states.items() if cell.method == method]
        table.add_row(method, *(str(own.count(state)) for state in STATES))
    return table

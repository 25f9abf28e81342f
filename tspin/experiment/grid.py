"""A study: a file that names methods × seeds × settings of a preset, and its cells, each a run of its own.

runs/<preset>-studies/<name>/shared/        responses of the initial policy, which settings with equal decoding share
runs/<preset>-studies/<name>/<setting>/     checkpoints, responses and logs at one setting, as `tspin run` leaves them
runs/<preset>-studies/<name>/cells/<cell>/  finished.json or failed.json, job.json, results/
runs/<preset>-studies/<name>/jobs/          what jobs printed
results/<preset>/studies/<name>.csv, …      see tspin.experiment.gathering: a cell that is in it is not run again
"""

import itertools
import json
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator
from submitit.helpers import Checkpointable

from tspin.config import Config, load_config, warmup_of
from tspin.errors import UserError, unknown
from tspin.evaluation.suites import load_suite
from tspin.objectives import METHODS
from tspin.runs.files import fingerprint, read_json, write_json
from tspin.runs.redaction import redacted
from tspin.runs.signals import Stopped, stopping_at_once
from tspin.schema import BASE, CELL, RUN, STUDY_MEASURES
from tspin.sections import Section, read
from tspin.yaml_files import find_yaml, read_yaml

Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
Settings = Annotated[list[dict[str, Any]], Field(min_length=1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**15)]  # results keep seeds in 16 bits
Content = TypeVar("Content", bound=Section)


class Choice(Section):
    """How a study chooses a setting for each method, by averages over seeds.

    First the settings in `common`: the values at which the methods in `over` have the highest mean, each at its best.
    Then the best setting of each method among those with these values.
    """

    metric: Literal["avg"] = "avg"  # over the suite's columns
    iteration: Literal["last"] = "last"
    common: list[str] = []  # by the last part of their keys
    over: list[str] = []


class Study(Section):
    """A file of experiments/studies/, or one like it."""

    preset: str
    methods: Annotated[list[str], Field(min_length=1)]  # base is run at the first seed alone
    seeds: Annotated[list[Seed], Field(min_length=1)]
    overrides: list[str] = []  # key.path=value, as `tspin run --set` takes them
    # A key of the config, or several separated by commas that change together → its values. All combinations are run.
    grid: Grid = {}
    # A method → its grid in place of `grid`, or its settings one by one, each a mapping from keys to values.
    grids: dict[str, Grid | Settings] = {}
    across: Grid = {}  # combined with each setting, whichever way it is given; the first value's cells come first
    suite: str | None = None  # in place of the preset's
    # Of a study without a grid, whose folders runs and results are in: the study's, or those of `tspin run`, so that
    # what the main experiment has trained is not trained again, and tables and figures draw from the results.
    runs: Literal["study", "runs"] = "study"
    results: Literal["study", "results"] = "study"
    prepare: dict[str, str] = {}  # a folder → the command, python …, that makes it where it is missing
    choose: Choice | None = None
    rule: str = ""  # `choose` in words, for the report

    @field_validator("prepare")
    @classmethod
    def _python(cls, prepare: dict[str, str]) -> dict[str, str]:
        for command in prepare.values():
            if shlex.split(command)[:1] not in (["python"], ["python3"]):
                raise ValueError("a command begins with python")
        return prepare

    def settings(self, method: str) -> list[dict[str, Any]]:
        """The settings of a method's grid, each from its keys to values; an empty one without a grid."""
        given = self.grids.get(method, self.grid)
        each = given if isinstance(given, list) else _combinations(given)
        return [{**outer, **inner} for outer in _combinations(self.across) for inner in each]


class Profile(Section):
    """What cells run on: paths as `tspin run` takes them, and parameters of submitit's AutoExecutor."""

    launcher: str | None = None
    offline: str | None = None
    submitit: dict[str, Any] = {}


@dataclass(frozen=True)
class Cell(Checkpointable):
    """A run of a study, and a job for submitit: text only, so that what is pickled on the way names nothing else.

    study: its file. setting: (name, value) of what its grid sets. folder: of its state. shared: see build_trainer.
    The others are as `tspin run` takes them. Checkpointable: Slurm queues it again when its time is up or it is
    preempted, and the same run goes on where it was, a training after the last step that it ended.
    """

    study: str
    preset: str
    method: str
    seed: int
    overrides: tuple[str, ...]
    setting: tuple[tuple[str, str], ...]
    folder: str
    runs: str
    results: str
    shared: str | None = None
    launcher: str | None = None
    offline: str | None = None

    def __call__(self) -> None:
        """Run it as a job: its stages' provenance names the command that sent it, not submitit's.

        Of a job on several machines the first has the run; it starts its trainings on the others too.
        """
        if os.environ.get("SLURM_PROCID", "0") != "0":
            return
        sys.argv = ["tspin", "sweep", self.study]
        try:
            self.run()
        except Stopped as stopped:
            leave_to_queue(stopped.number)
            raise

    def run(self) -> None:
        """Run it in this process. An error leaves failed.json, its good end finished.json; a signal leaves neither."""
        try:
            with stopping_at_once():  # scancel and the end of the sweep send SIGTERM
                run_cell(self)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            write_json(Path(self.folder, "failed.json"), {"reason": redacted(reason)})
            raise
        settings = [redacted(text) for text in self.overrides]
        note = {"preset": self.preset, "method": self.method, "seed": self.seed, "overrides": settings}
        write_json(self.note, {**note, "results": self.results})

    @property
    def name(self) -> str:
        """Of the method, the seed and all settings that decide its numbers: the same on every machine."""
        return Path(self.folder).name

    @property
    def title(self) -> str:
        return " ".join([self.method, f"seed {self.seed}", *(f"{name}={value}" for name, value in self.setting)])

    @property
    def results_folder(self) -> Path:
        return Path(self.results, Path(self.preset).stem)

    @property
    def note(self) -> Path:
        """What it leaves at its good end."""
        return Path(self.folder, "finished.json")

    @property
    def finished(self) -> bool:
        """Whether it came to a good end, with its results in this folder, and they are still there."""
        there = self.note.exists() and (self.results_folder / "evaluations.csv").exists()
        return there and read_json(self.note).get("results") == self.results


@dataclass(frozen=True)
class Sweep:
    """A study as it was read, with its cells: all of a seed, then those of the next, so that what there is compares.

    folder: of runs, states and logs. results: the folder that all results are in; target: this study's, without suffix.
    """

    path: Path
    study: Study
    cells: list[Cell]
    submitit: dict[str, Any]
    folder: Path
    results: Path
    target: Path


def load_sweep(file: Path, profile: Path | None, runs: Path, results: Path) -> Sweep:
    """Read a study, by its file or its name in experiments/studies, and a profile of machines.

    A file may have `parts`, studies within it that are run one after another: each has the file's keys, and its own in
    their place.

    Raises UserError for unknown keys, methods, settings and suites, and for values of another type.
    """
    path = find_yaml(str(file), "experiments/studies", "study")
    studies, machines = _parts(path), _read(profile, Profile) if profile else Profile()
    preset = Path(studies[0].preset).stem
    place = runs / f"{preset}-studies" / path.stem
    identify = cache(_identity)

    def cell(study: Study, method: str, setting: dict[str, Any], seed: int) -> Cell:
        overrides = _overrides(study, setting)
        identity = identify(study.preset, overrides, method)
        folder = place / "cells" / f"{method}-{seed}-{identity}"
        # What the preset itself says is trained where `tspin run` trains it: once for both.
        own = study.runs == "runs" or identity == identify(study.preset, (), method)
        return Cell(
            study=str(path),
            preset=study.preset,
            method=method,
            seed=seed,
            overrides=overrides,
            setting=tuple((column(keys), redacted(_text(value))) for keys, value in setting.items()),
            folder=str(folder),
            runs=str(runs if own else place / fingerprint(setting)),
            results=str(results if study.results == "results" else folder / "results"),
            shared=None if own else str(place / "shared"),
            launcher=machines.launcher,
            offline=machines.offline,
        )

    try:
        for study in studies:
            _check(study)
        cells = [
            cell(study, method, setting, seed)
            for study in studies
            for seed in study.seeds
            for method in study.methods
            for setting in study.settings(method)
            if method != BASE or seed == study.seeds[0]
        ]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    cells = list({cell.name: cell for cell in cells}.values())  # parts may have cells in common
    target = results / preset / "studies" / path.stem
    return Sweep(path, studies[0], cells, machines.submitit, place, results, target)


def leave_to_queue(number: int) -> None:
    """Let submitit and Slurm decide what becomes of a job that a signal has stopped; its state is kept by now.

    SIGUSR2, before its time is up: submitit's handler, which is in force again, queues the job anew and exits.
    SIGTERM, which submitit bypasses: the job may be preempted or cancelled, and Slurm alone knows which. A job that
    left by itself would have failed, and not come again; this one waits for Slurm's end, or for a SIGUSR2.
    """
    if number == signal.SIGUSR2:
        signal.raise_signal(number)
    while number == signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        time.sleep(1.0)


def run_cell(cell: Cell) -> None:
    """`tspin run` of one method and seed, in this process."""
    if cell.offline:
        from tspin.hub.offline import use_offline

        use_offline(Path(cell.offline))
    from tspin.experiment.preset import Where, run_experiment

    shared, launcher = (Path(path) if path else None for path in (cell.shared, cell.launcher))
    where = Where(Path(cell.runs), Path(cell.results), shared, launcher)
    config = load_config(cell.preset, cell.overrides)
    run_experiment(Path(cell.preset).stem, config, [cell.method], [cell.seed], where)


def _combinations(grid: Grid) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def column(keys: str) -> str:
    """What a grid's keys are called in tables: the last part of the last one."""
    return keys.rsplit(".", 1)[-1]


def _parts(path: Path) -> list[Study]:
    """The studies of a file: its parts, or the one that it is."""
    whole = dict(read_yaml(path))
    parts = whole.pop("parts", [{}])
    if not (isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts)):
        raise UserError(f"{path}: parts: a list of mappings, each with keys of a study")
    if len(parts) > 1 and "choose" in whole:
        raise UserError(f"{path}: choose: a rule of choice is for a study without parts")
    return [_read(path, Study, {**whole, **part}) for part in parts]


def _read(path: Path, section: type[Content], content: Any = None) -> Content:
    try:
        return read(section, read_yaml(path) if content is None else content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check(study: Study) -> None:
    """Raise UserError for names that do not fit together."""
    choice = study.choose or Choice()
    known = {"methods": [BASE, *METHODS], "grids": study.methods, "choose.over": study.methods}
    for key, names in {"methods": study.methods, "grids": study.grids, "choose.over": choice.over}.items():
        for method in names:
            if method not in known[key]:
                raise UserError(f"{key}: {unknown('method', method, known[key])}")
    for key in ("runs", "results"):
        if getattr(study, key) == key and (study.grid or study.grids or study.across):
            raise UserError(f"{key}: the settings of a grid have {key} of their own; leave this key out")
    if choice.common and not choice.over:
        raise UserError("choose.common: name the methods that decide in choose.over")
    for method in study.methods:
        for setting in study.settings(method):
            names = [column(keys) for keys in setting]
            for name in names:
                if names.count(name) > 1 or name in (CELL, *RUN, *STUDY_MEASURES):
                    raise UserError(f"{method}'s grid: two columns of the results would be called {name}")
        for name in choice.common if method in choice.over else ():
            if name not in names:
                raise UserError(f"choose.common: {unknown(f'setting of {method}', name, names)}")


def _overrides(study: Study, setting: dict[str, Any]) -> tuple[str, ...]:
    suite = [f"evaluation.suite={study.suite}"] if study.suite else []
    keyed = [f"{key}={_text(value)}" for keys, value in setting.items() for key in keys.split(",")]
    return (*study.overrides, *suite, *keyed)


def _text(value: Any) -> str:
    """A YAML value as --set takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _identity(preset: str, overrides: tuple[str, ...], method: str) -> str:
    """Fingerprint of what decides a method's numbers besides the seed. Raises UserError for what the config refuses."""
    config = load_config(preset, overrides)
    if config.evaluation is None:
        raise UserError(f"{preset} names no evaluation suite, so its runs have no results")
    suite = load_suite(config.evaluation.suite)
    schedule: dict[str, str] = {}  # the initial policy has none
    if method == BASE:
        settings = _beyond(config.tree(), Config().tree())
    else:
        settings = _beyond(config.for_method(method).tree(), Config().for_method(method).tree())
        schedule = warmup_of(config.for_method(method).training)
    return fingerprint([settings, *schedule.values(), suite.model_dump(mode="json"), suite.definition()])[:12]


def _beyond(tree: Any, defaults: Any) -> Any:
    """What a tree of settings says beyond the defaults: a setting that is added later renames no cell."""
    if not (isinstance(tree, dict) and isinstance(defaults, dict)):
        return tree
    missing = object()
    return {key: _beyond(tree[key], defaults.get(key)) for key in tree if tree[key] != defaults.get(key, missing)}

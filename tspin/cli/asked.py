"""What `tspin run` is asked for: every option is used, combined with others, or refused, before PyTorch is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tspin.cli.options import check_sources
from tspin.errors import UserError
from tspin.names import check_config, check_methods, expanded, read_preset
from tspin.schema import BASE
from tspin.yaml_files import overridden

OF_ANY_MODEL, OF_ANY_DATA = ("dtype", "attention"), ("labels", "subset_seed", "rounds", "history")
ALONE = Path("runs/mine")


@dataclass(frozen=True)
class Given:
    """The options as they were typed; None where they were not."""

    preset: str | None = None
    config: Path | None = None
    model: str | None = None
    dataset: str | None = None
    methods: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    iterations: int | None = None
    out: Path | None = None
    runs: Path | None = None
    results: Path | None = None
    launcher: Path | None = None
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class Asked:
    """A run as it will be.

    tree, overrides, source: its config, as tspin.config.build_config takes it.
    name: of its folder in `runs` and in `results`, where its checkpoints are evaluated.
    out: the folder of a run whose checkpoints are not; None where they are.
    launcher: a file for `accelerate launch`.
    """

    tree: Mapping[str, Any]
    source: str
    overrides: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    name: str
    out: Path | None
    runs: Path
    results: Path
    launcher: Path | None

    @property
    def folders(self) -> dict[int, Path]:
        """Where each seed's methods are, where nothing is evaluated: `out`, or seed-<s> in it of several seeds."""
        assert self.out is not None
        return {seed: self.out / f"seed-{seed}" if len(self.seeds) > 1 else self.out for seed in self.seeds}


def ask(given: Given) -> Asked:
    """The run that the options ask for together. Raises UserError for options that do not go together, naming them.

    A file (--preset, --config) that names a suite is evaluated, into --runs and --results. One that names none, and
    --model with --data alone, is trained into --out.
    """
    file = _file(given)
    tree, source = read_preset(file) if file else ({}, "")
    tree = _with_options(tree, given)
    overrides = expanded(given.settings)
    named = _methods_of(overridden(tree, overrides)) if given.methods is None else given.methods
    check_methods(named)
    overrides = expanded(overrides, named)
    _check_said_once(given, overrides)
    fields = check_config(tree, overrides, source)
    evaluated = fields.get("evaluation") is not None
    _check_places(given, evaluated, file)
    if not evaluated and BASE in named:
        raise UserError(
            f"--methods {','.join(named)}: {BASE}, the initial policy, can only be evaluated, and {_what(given)} names "
            "no suite: leave it out, or evaluate it by tspin evaluate --model"
        )
    check_sources(fields)
    name = Path(file).stem if file else ALONE.name
    out = None if evaluated else given.out or (Path("runs") / name)
    runs, results = given.runs or Path("runs"), given.results or Path("results")
    return Asked(tree, source, overrides, named, given.seeds or [0], name, out, runs, results, given.launcher)


def _file(given: Given) -> str | None:
    """The preset's name or the config's path; None where --model and --data are all that there is."""
    if given.preset and given.config:
        raise UserError("--preset and --config both name the run's file: give one of them")
    if given.config and given.config.suffix not in (".yaml", ".yml"):
        raise UserError(f"--config {given.config}: a YAML file is expected, with the keys of a preset")
    if not (given.preset or given.config) and not (given.model and given.dataset):
        there, lacking = ("--model", "--data") if given.model else ("--data", "--model")
        half = f"{there} alone: {lacking} is missing too; " if given.model or given.dataset else ""
        raise UserError(f"{half}run needs --preset or --config, or --model and --data")
    return given.preset or (str(given.config) if given.config else None)


def _with_options(tree: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """A config with --model, --data and --iterations in it.

    What the file says of its own model and data alone, such as a revision or columns, does not hold for others.
    """
    tree = dict(tree)
    for section, path, kept in (("model", given.model, OF_ANY_MODEL), ("data", given.dataset, OF_ANY_DATA)):
        if path is not None:
            own = tree.get(section)
            said = {key: value for key, value in own.items() if key in kept} if isinstance(own, Mapping) else {}
            tree[section] = {**said, "path": path}
    return tree if given.iterations is None else {**tree, "iterations": given.iterations}


def _methods_of(tree: Mapping[str, Any]) -> list[str]:
    """The methods that are run when none are named: the paper's comparison where there is a suite, else T-SPIN alone.

    A config without a suite that has settings of methods names them by these.
    """
    if tree.get("evaluation") is not None:
        return [BASE, "sft", "spin", "tspin"]
    methods = tree.get("methods")
    return list(methods) if isinstance(methods, Mapping) and methods else ["tspin"]


def _check_said_once(given: Given, overrides: Sequence[str]) -> None:
    """Raise UserError where an option and a setting say different things of the same key."""
    options = {"model": given.model, "data": given.dataset, "iterations": given.iterations}
    for override in overrides:
        key, value = override.partition("=")[::2]
        section = key.removesuffix(".path")
        if options.get(section) is not None and str(options[section]) != value:
            raise UserError(f"--{section} {options[section]} and --set {key}={value} do not agree: give one of them")


def _check_places(given: Given, evaluated: bool, file: str | None) -> None:
    if evaluated and file is None:
        raise UserError(
            f"--set evaluation: {_what(given)} is trained and not evaluated; write what you set into a file and run it "
            "by --config FILE, or evaluate a checkpoint by tspin evaluate"
        )
    if evaluated and given.out:
        raise UserError(
            f"--out {given.out}: {_what(given)} is evaluated, and keeps its runs in --runs and its numbers in --results"
        )
    for option, place in {"--runs": given.runs, "--results": given.results}.items():
        if place and not evaluated:
            raise UserError(
                f"{option} {place}: {_what(given)} names no suite, so nothing is evaluated; its folder is --out"
            )


def _what(given: Given) -> str:
    """The run, as it was typed."""
    if file := given.preset or given.config:
        return f"{'--preset' if given.preset else '--config'} {file}"
    return "a run of --model and --data"

"""`tspin rerun`: run again what results/<preset>/ holds, from its provenance, and say which numbers are the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from rich.table import Table

from tspin.config import Config, build_config
from tspin.errors import UserError
from tspin.experiment.results import read_table
from tspin.runs.claims import first_difference
from tspin.runs.files import read_json
from tspin.runs.provenance import provenance
from tspin.schema import BASE, RUN, SCORE

T = TypeVar("T")
ERRORS = 3.0  # standard errors of a difference of averages that another machine may show


@dataclass(frozen=True)
class Recorded:
    """What a provenance.json and the config.json beside it say of some results."""

    folder: Path
    config: Config
    methods: list[str]
    seeds: list[int]
    provenance: dict[str, Any]


def load_recorded(
    path: Path, methods: Sequence[str] | None, seeds: Sequence[int] | None, iterations: int | None
) -> Recorded:
    """The runs of a provenance.json, or some of them. Raises UserError where a rerun lacks something, naming it."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the provenance.json of a folder in results/")
    beside = path.parent / "config.json"
    try:
        record, settings = read_json(path), read_json(beside)["config"]
        runs = [(run["method"], run["seed"]) for run in record["runs"]]
        last = max((run["iteration"] for run in record["runs"]), default=0)
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{beside} is missing" if not beside.is_file() else f"no {error} in it" if error.args else "unreadable"
        raise UserError(f"{path}: not the provenance of a preset's results ({reason})") from error
    try:
        config = build_config(settings, [f"iterations={iterations or last + 1}"])
    except UserError as error:
        raise UserError(f"{beside}: its config is none of this version's ({error})") from error
    all_methods = [BASE, *sorted({method for method, _ in runs})]
    methods = _chosen(f"{path}: no run of", methods, all_methods)
    seeds = _chosen(f"{path}: no run of seed", seeds, sorted({seed for _, seed in runs}))
    return Recorded(path.parent, config, methods, sorted(seeds), record)


def _chosen(problem: str, wanted: Sequence[T] | None, there: list[T]) -> list[T]:
    """`wanted`, or all that are there when None. Raises UserError for one that is not."""
    for name in wanted or []:
        if name not in there:
            raise UserError(f"{problem} {name} there; it has {', '.join(map(str, there))}")
    return list(wanted or there)


def differences(record: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a number may depend on and is other here: name → (recorded, here). The commit is in it too."""
    then, now = _flat(record), _flat(provenance())
    return {name: (value, now.get(name)) for name, value in then.items() if value != now.get(name)}


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    parts = {f"{part}.{name}": value for part in ("versions", "hardware") for name, value in record[part].items()}
    return {name: record[name] for name in ("commit", "uncommitted_changes")} | parts


def rerun(recorded: Recorded, out: Path, settings: Sequence[str] = (), launcher: Path | None = None) -> Path:
    """The results folder of `recorded` run again into `out`.

    settings: key.path=value of what changes no number, and is therefore not on record: engine.*, micro-batches, kept
    states. launcher: see run_experiment. Raises UserError for other settings.
    """
    from tspin.experiment.preset import Where, run_experiment

    then = recorded.config.tree()
    config = build_config({**then, "iterations": recorded.config.training.iterations}, settings)
    if config.tree() != then:
        key, there, here = first_difference(then, config.tree())
        raise UserError(f"--set: {key} is {there!r} on record, {here!r} here: a rerun has the record's settings")
    where = Where(out / "runs", out / "results", launcher=launcher)
    return run_experiment(recorded.folder.name, config, recorded.methods, recorded.seeds, where)


def compare(old: Path, new: Path) -> pd.DataFrame:
    """A row per run and iteration that both results folders have: method, seed, iteration, and

    average_old, average_new: over the suite's columns
    error: standard error of their difference
    largest: difference of any score
    problems: share of those with equal values
    loss: largest difference of a step's, NA where there are no steps
    """
    suite = pd.DataFrame(read_json(old / "suite.json")["columns"])[["benchmark", "metric"]]
    scores = _both(old, new, "evaluations", SCORE).merge(suite, on=["benchmark", "metric"])
    scores["gap"] = (scores["value_old"] - scores["value_new"]).abs()
    scores["variance"] = scores["stderr_old"] ** 2 + scores["stderr_new"] ** 2
    problems = _both(old, new, "problems", [*RUN, "benchmark", "doc_id"])
    problems["problems"] = problems["value_old"] == problems["value_new"]
    table = scores.groupby(RUN, dropna=False).agg(
        average_old=("value_old", "mean"),
        average_new=("value_new", "mean"),
        error=("variance", lambda variance: variance.sum() ** 0.5 / len(variance)),
        largest=("gap", "max"),
    )
    table["problems"] = problems.groupby(RUN, dropna=False)["problems"].mean()
    table["loss"] = float("nan")
    if all((folder / "steps.parquet").exists() for folder in (old, new)):
        steps = _both(old, new, "steps", [*RUN, "step"])
        steps["loss"] = (steps["loss_old"] - steps["loss_new"]).abs()
        table["loss"] = steps.groupby(RUN, dropna=False)["loss"].max()
    return table.reset_index()


def _both(old: Path, new: Path, name: str, keys: list[str]) -> pd.DataFrame:
    """The rows of a table that two results folders have, told by `keys`; other columns end in _old and _new."""
    return read_table(old, name).merge(read_table(new, name), on=keys, suffixes=("_old", "_new"))


def verdict(table: pd.DataFrame, exact: bool) -> list[str]:
    """Lines on the runs whose numbers moved. exact: every number must be equal, as on the machine of the record."""
    wrong = []
    for row in table.to_dict("records"):
        name = f"{row['method']}, seed {row['seed']}, iteration {row['iteration']}"
        gap = abs(row["average_old"] - row["average_new"])
        if exact and (row["largest"] > 0 or row["problems"] < 1 or row["loss"] > 0):
            wrong.append(f"{name}: other numbers than on record")
        elif not exact and gap > ERRORS * row["error"]:
            averages = f"{row['average_new']:.2f}, {row['average_old']:.2f} on record"
            wrong.append(f"{name}: Avg {averages} (± {row['error']:.2f} of the difference)")
    return wrong


def shown(table: pd.DataFrame) -> Table:
    """What `compare` returned, for the terminal."""
    drawn = Table(title="rerun beside the record")
    for name in ("method", "seed", "iteration", "Avg on record", "Avg here", "largest difference of a score",
                 "equal problems", "largest difference of a step's loss"):  # fmt: skip
        drawn.add_column(name)
    for row in table.to_dict("records"):
        iteration = "–" if pd.isna(row["iteration"]) else str(row["iteration"])
        loss, largest = _gap(row["loss"], ".2g"), _gap(row["largest"], ".2f")
        averages = (f"{row['average_old']:.2f}", f"{row['average_new']:.2f}")
        drawn.add_row(row["method"], str(row["seed"]), iteration, *averages, largest, f"{row['problems']:.1%}", loss)
    return drawn


def _gap(value: float, form: str) -> str:
    return "–" if pd.isna(value) else "exact" if value == 0 else format(value, form)

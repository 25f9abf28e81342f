"""`tspin rerun`: run again what results/<preset>/ holds, from its provenance, and say which numbers are the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from tspin.config import Config, build_config
from tspin.errors import UserError
from tspin.runs.claims import first_difference
from tspin.runs.files import read_json
from tspin.runs.provenance import provenance
from tspin.schema import BASE, RUN

KEYS = [*RUN, "benchmark", "metric"]
ERRORS = 3.0  # standard errors of a difference of averages that another machine may show


@dataclass(frozen=True)
class Recorded:
    """What a provenance.json and the config.json beside it say of some results."""

    folder: Path
    config: Config
    methods: list[str]
    seeds: list[int]
    provenance: dict[str, Any]

    @property
    def preset(self) -> str:
        return self.folder.name


def load_recorded(
    path: Path, methods: Sequence[str] | None, seeds: Sequence[int] | None, iterations: int | None
) -> Recorded:
    """The runs of a provenance.json, or some of them. Raises UserError where a rerun lacks something, naming it."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the provenance.json of a folder in results/")
    beside = path.parent / "config.json"
    try:
        found, settings = read_json(path), read_json(beside)["config"]
        known = {(run["method"], run["seed"]) for run in found["runs"]}
        last = max((run["iteration"] for run in found["runs"]), default=0)
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{beside} is missing" if not beside.is_file() else f"no {error} in it" if error.args else "unreadable"
        raise UserError(f"{path}: not the provenance of a preset's results ({reason})") from error
    try:
        config = build_config(settings, [f"iterations={iterations or last + 1}"])
    except UserError as error:
        raise UserError(f"{beside}: its config is of no version that this one knows ({error})") from error
    all_methods = [BASE, *dict.fromkeys(method for method, _ in sorted(known))]
    for method in methods or []:
        if method not in all_methods:
            raise UserError(f"{path}: no run of {method} there; it has {', '.join(all_methods)}")
    wanted = sorted(seeds if seeds is not None else {seed for _, seed in known})
    for seed in wanted:
        if seed not in {own for _, own in known}:
            raise UserError(f"{path}: no run of seed {seed} there")
    return Recorded(path.parent, config, list(methods or all_methods), wanted, found)


def differences(recorded: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a number may depend on and is other here: name → (recorded, here). The commit is in it too."""
    here = provenance()
    found = {}
    for name in ("commit", "uncommitted_changes"):
        if recorded.get(name) != here[name]:
            found[name] = (recorded.get(name), here[name])
    for part in ("versions", "hardware"):
        for name, value in recorded.get(part, {}).items():
            if here[part].get(name) != value:
                found[f"{part}.{name}"] = (value, here[part].get(name))
    return found


def rerun(recorded: Recorded, out: Path, settings: Sequence[str] = (), launcher: Path | None = None) -> Path:
    """Run it into `out`; returns the results folder.

    settings: key.path=value of what changes no number, and is therefore not on record: engine.*, micro-batches, kept
    states. launcher: see run_experiment. Raises UserError for other settings.
    """
    from tspin.experiment.preset import run_experiment

    on_record = recorded.config.tree()
    config = build_config({**on_record, "iterations": recorded.config.training.iterations}, settings)
    if config.tree() != on_record:
        key, there, here = first_difference(on_record, config.tree())
        raise UserError(f"--set: {key} is {there!r} on record, {here!r} here: a rerun has the record's settings")
    places = (out / "runs", out / "results")
    return run_experiment(recorded.preset, config, recorded.methods, recorded.seeds, *places, launcher=launcher)


def compare(old: Path, new: Path) -> pd.DataFrame:
    """A row a run and iteration that both have: method, seed, iteration, and

    average_old, average_new (percent, over the suite's columns), error (of their difference), largest (difference of
    any score), problems (share of equal ones), loss (largest difference of a step's; empty where there are no steps).
    """
    columns = pd.DataFrame(read_json(old / "suite.json")["columns"])[["benchmark", "metric"]]
    before, after = (
        columns.merge(pd.read_csv(folder / "evaluations.csv", dtype={"iteration": "Int64"}), on=["benchmark", "metric"])
        for folder in (old, new)
    )
    both = before.merge(after, on=KEYS, suffixes=("_old", "_new"))
    equal = _equal_problems(old, new)
    steps = _step_losses(old, new)
    rows = []
    for key, own in both.groupby(RUN, dropna=False):
        variance = (own["stderr_old"] ** 2 + own["stderr_new"] ** 2).sum()
        rows.append(
            {
                **dict(zip(RUN, key, strict=True)),
                "average_old": own["value_old"].mean(),
                "average_new": own["value_new"].mean(),
                "error": variance**0.5 / len(own),
                "largest": (own["value_old"] - own["value_new"]).abs().max(),
                "problems": equal.get(_plain(key)),
                "loss": steps.get(_plain(key)),
            }
        )
    return pd.DataFrame(rows)


def verdict(table: pd.DataFrame, exact: bool) -> list[str]:
    """What is not as it should be, a line each. exact: every number must be equal, as on the record's own machine."""
    wrong = []
    for row in table.to_dict("records"):
        name = f"{row['method']}, seed {row['seed']}, iteration {row['iteration']}"
        gap = abs(row["average_old"] - row["average_new"])
        if exact and (row["largest"] > 0 or row["problems"] < 1 or (row["loss"] or 0) > 0):
            wrong.append(f"{name}: other numbers than on record")
        elif not exact and gap > ERRORS * row["error"]:
            averages = f"{row['average_new']:.2f}, {row['average_old']:.2f} on record"
            wrong.append(f"{name}: Avg {averages} (± {row['error']:.2f} of the difference)")
    return wrong


def shown(table: pd.DataFrame) -> Table:
    """The comparison for the terminal."""
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


def _gap(value: float | None, form: str) -> str:
    return "–" if value is None or pd.isna(value) else "exact" if value == 0 else format(value, form)


def report(found: dict[str, tuple[Any, Any]], show: Callable[[str], Any]) -> None:
    """A line a difference between the record and this machine."""
    for name, (then, now) in found.items():
        show(f"{name}: {then} on record, {now} here")


def _equal_problems(old: Path, new: Path) -> dict[tuple, float]:
    keys = [*RUN, "benchmark", "doc_id"]
    tables = (pd.read_parquet(folder / "problems.parquet").astype({"iteration": "Int64"}) for folder in (old, new))
    first, second = tables
    both = first.merge(second, on=keys, suffixes=("_old", "_new"))
    same = both["value_old"] == both["value_new"]
    return {_plain(key): float(own.mean()) for key, own in same.groupby([both[name] for name in RUN], dropna=False)}


def _step_losses(old: Path, new: Path) -> dict[tuple, float]:
    paths = [folder / "steps.parquet" for folder in (old, new)]
    if not all(path.exists() for path in paths):
        return {}
    first, second = (pd.read_parquet(path).astype({"iteration": "Int64"}) for path in paths)
    both = first.merge(second, on=[*RUN, "step"], suffixes=("_old", "_new"))
    gap = (both["loss_old"].astype("float32") - both["loss_new"].astype("float32")).abs()
    return {_plain(key): float(own.max()) for key, own in gap.groupby([both[name] for name in RUN], dropna=False)}


def _plain(key: tuple) -> tuple:
    return tuple(None if pd.isna(value) else value for value in key)

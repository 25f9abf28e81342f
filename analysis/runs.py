"""One run as comparisons read it: from its folder in runs/, or from the committed results of a preset."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tspin.errors import UserError
from tspin.schema import gaps, misaligned, unit

from .entropy import nats
from .reading import read_evaluations, read_scores, read_suite, read_table


@dataclass(frozen=True)
class Run:
    """A run's tables; every one has a column `iteration`, empty tables stand for what was not recorded.

    scores: label, value. steps: as logged. samples: prompt_id, and the gaps of y over y′ after training, reward and
    log_likelihood. costs: seconds, tokens, peak_bytes. responses: prompt_id, text, of the policy that the iteration
    ended with. prompts: prompt_id, prompt, labelled. warnings: name, of tspin.diagnostics; None where no iteration
    recorded whether there were any. unit: what the scores are in. drawn: nats of y′ (entropy.nats).
    """

    name: str
    method: str
    scores: pd.DataFrame
    steps: pd.DataFrame
    samples: pd.DataFrame
    costs: pd.DataFrame
    responses: pd.DataFrame
    prompts: pd.DataFrame
    warnings: pd.DataFrame | None = None
    unit: str = "percent"
    drawn: pd.DataFrame = field(default_factory=pd.DataFrame)

    def average(self) -> pd.Series:
        """Avg by iteration: the mean over benchmarks."""
        return _mean_by_iteration(self.scores, lambda scores: scores["value"])

    def misaligned(self) -> pd.Series:
        """By iteration, the share of prompts where y has the higher reward and the lower log-likelihood."""
        return _mean_by_iteration(self.samples, misaligned)

    def entropy(self) -> pd.Series:
        """By iteration, the mean of −log π_θt(y′) in nats."""
        return _mean_by_iteration(self.drawn, lambda drawn: drawn["nats"])

    def likelihood_gap(self) -> pd.Series:
        """By iteration, the mean of log π(y) − log π(y′) in nats."""
        return _mean_by_iteration(self.samples, lambda samples: samples["log_likelihood"])


def load_run(spec: str) -> Run:
    """A run by its folder, or `<results>:<method>:<seed>`, as results/reference/pocket:spin:10. Raises UserError."""
    folder = Path(spec)
    parts = spec.rsplit(":", 2)
    try:
        if (folder / "config.json").is_file() and any(folder.glob("iteration-*")):
            return _from_folder(folder)
        if len(parts) == 3 and parts[2].isdigit() and Path(parts[0]).is_dir():
            return _from_results(Path(parts[0]), parts[1], int(parts[2]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{spec}: one of its files is damaged ({reason}): the command that made it makes it anew"
        ) from error
    raise UserError(
        f"{spec}: no run; give a run's folder, such as runs/pocket/seed-0/spin, or a result, such as "
        "results/reference/pocket:spin:10"
    )


def _from_results(folder: Path, method: str, seed: int) -> Run:
    def of_run(table: pd.DataFrame) -> pd.DataFrame:
        rows = table[(table["method"] == method) & (table["seed"] == seed)]
        return rows.assign(iteration=rows["iteration"].fillna(0).astype(int))

    def optional(name: str) -> pd.DataFrame:
        return read_table(folder, name) if (folder / f"{name}.parquet").is_file() else pd.DataFrame()

    scores = of_run(read_scores(folder))
    if scores.empty:
        runs = read_evaluations(folder)[["method", "seed"]].drop_duplicates()
        known = ", ".join(f"{m}:{s}" for m, s in runs.itertuples(index=False))
        raise UserError(f"{folder} has no run {method}:{seed}; it has: {known}")
    scores["label"] = pd.Categorical(scores["label"], [column.label for column in read_suite(folder)])
    recorded = {name: optional(name) for name in ("steps", "diagnostics", "responses")}
    tables = {name: of_run(table) if len(table) else table for name, table in recorded.items()}
    costs = [
        cost for cost in _json(folder / "provenance.json")["runs"] if (cost["method"], cost["seed"]) == (method, seed)
    ]
    return Run(
        name=f"{folder}:{method}:{seed}",
        method=method,
        scores=scores.sort_values(["iteration", "label"])[["iteration", "label", "value"]],
        steps=tables["steps"],
        samples=_samples(tables["diagnostics"]),
        drawn=_drawn(tables["diagnostics"]),
        costs=_costs(costs),
        responses=tables["responses"],
        prompts=optional("prompts"),
        warnings=_warnings({cost["iteration"]: cost["warnings"] for cost in costs if "warnings" in cost}),
        unit=unit((column.benchmark, column.metric, column.label) for column in read_suite(folder)),
    )


def _from_folder(folder: Path) -> Run:
    folders = [path for path in folder.glob("iteration-*") if path.is_dir()]  # iteration-0-synthetic.parquet is none
    iterations = {t: path for t, path in sorted((int(path.name.split("-")[1]), path) for path in folders)}

    def each(read: Callable[[Path], pd.DataFrame | None]) -> pd.DataFrame:
        tables = {t: read(path) for t, path in iterations.items()}
        recorded = [table.assign(iteration=t) for t, table in tables.items() if table is not None]
        return pd.concat(recorded, ignore_index=True) if recorded else pd.DataFrame()

    def parquet(name: str) -> pd.DataFrame:
        return each(lambda path: pd.read_parquet(path / name) if (path / name).is_file() else None)

    responses, diagnostics = parquet("synthetic.parquet"), parquet("diagnostics.parquet")
    if len(responses):  # what iteration t trained on as y′ came from the policy of iteration t − 1
        responses = responses.assign(iteration=responses["iteration"] - 1)
    prompts, scores = folder / "prompts.parquet", each(_scores)
    columns = scores[["benchmark", "metric", "label"]].drop_duplicates() if len(scores) else scores
    guards = {t: path / "guards.json" for t, path in iterations.items()}
    return Run(
        name=str(folder),
        method=_json(folder / "config.json")["settings"]["method"],
        scores=scores,
        steps=parquet("steps.parquet"),
        samples=_samples(diagnostics),
        drawn=_drawn(diagnostics),
        costs=_costs([{"iteration": t, **_facts(path)} for t, path in iterations.items()]),
        responses=pd.concat([responses, parquet("examples.parquet")], ignore_index=True),
        prompts=pd.read_parquet(prompts) if prompts.is_file() else pd.DataFrame(),
        warnings=_warnings({t: _json(path)["warnings"] for t, path in guards.items() if path.is_file()}),
        unit=unit(columns.itertuples(index=False, name=None)),
    )


def _scores(iteration: Path) -> pd.DataFrame | None:
    record = iteration / "evaluation.stage.json"
    if not record.is_file():
        return None
    columns = pd.DataFrame(_json(record)["inputs"]["suite"]["columns"])[["benchmark", "metric", "label"]]
    return columns.merge(pd.read_csv(iteration / "evaluation" / "scores.csv"), on=["benchmark", "metric"])


def _facts(iteration: Path) -> dict[str, Any]:
    """What an iteration's training recorded, and the seconds of the other stages."""
    facts: dict[str, Any] = {}
    for stage in ("model", "synthetic.parquet", "reference.parquet"):
        record = iteration / f"{stage}.stage.json"
        if record.is_file():
            content = _json(record)
            facts |= content["facts"] if stage == "model" else {f"{stage}_seconds": content["seconds"]}
    return facts


def _samples(diagnostics: pd.DataFrame) -> pd.DataFrame:
    return gaps(diagnostics) if len(diagnostics) else diagnostics


def _drawn(diagnostics: pd.DataFrame) -> pd.DataFrame:
    return nats(diagnostics) if len(diagnostics) else diagnostics


def _costs(costs: list[dict[str, Any]]) -> pd.DataFrame:
    rows = [
        {
            "iteration": cost["iteration"],
            "seconds": sum(v for k, v in cost.items() if k.endswith("_seconds") and v is not None),
            "tokens": cost.get("tokens"),
            "peak_bytes": cost.get("peak_memory_bytes"),
        }
        for cost in costs
    ]
    return pd.DataFrame(rows, columns=["iteration", "seconds", "tokens", "peak_bytes"]).sort_values("iteration")


def _warnings(names_by_iteration: Mapping[int, Iterable[str]]) -> pd.DataFrame | None:
    rows = [{"iteration": t, "name": name} for t, names in names_by_iteration.items() for name in names]
    return pd.DataFrame(rows, columns=["iteration", "name"]) if names_by_iteration else None


def _mean_by_iteration(table: pd.DataFrame, value: Callable[[pd.DataFrame], pd.Series]) -> pd.Series:
    return value(table).groupby(table["iteration"]).mean() if len(table) else pd.Series(dtype=float)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

"""results/<preset>/: the small tidy files that tables, figures and claims are made from.

What is committed is apart, in results/reference/<preset>/: nothing is written there unless `--results` names it.

evaluations.csv      preset, method, seed, iteration, benchmark, metric, value, stderr, n
problems.parquet     method, seed, iteration, benchmark, doc_id, value: the tabulated metric of each problem
steps.parquet        method, seed, iteration, and what training logged at each optimizer step
diagnostics.parquet  method, seed, iteration, and a row per prompt and role (tspin.schema.DIAGNOSTICS)
prompts.parquet      seed, prompt_id, prompt, labelled, proto, task: texts, of the smallest seed
tokens.parquet       method, seed, iteration, and log π of single tokens (tspin.schema.TOKENS), of the smallest seed, of
                     SelfPlayConfig.token_prompts prompts
responses.parquet    method, seed, iteration, prompt_id, text: a response sampled from the policy that the iteration
                     ended with, of the smallest seed; "base" has the initial policy's. What iteration t trains on as
                     y′ is the response of iteration t − 1. The last iteration has EXAMPLES prompts only.
suite.json           which metric makes which column
provenance.json      commit, versions, hardware, and what each run cost

Scores that are shares are in percent, others in lm-eval's units (tspin.schema.NO_SHARES).
Of larger data sets, diagnostics.parquet, prompts.parquet and responses.parquet have TEXTS prompts, evenly spread; the
first has those of them that diagnostics scored (SelfPlayConfig.diagnostics_prompts).
`iteration` is empty for base and sft. Numbers of diagnostics.parquet are rounded to 1/4096, those of
tokens.parquet to 1/256. Rows of a method and seed
replace those that were there.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tspin.errors import UserError
from tspin.evaluation.suites import Suite
from tspin.objectives import METHODS
from tspin.runs.files import atomic_path, read_json, write_json, write_text
from tspin.runs.provenance import provenance
from tspin.schema import BASE, EVALUATION_COLUMNS, RUN, RUN_TYPES, SCORE

EXAMPLES = 10
TEXTS = 5_000
DIAGNOSTIC_STEPS = 4096  # to a nat
TOKEN_STEPS = 256
TABLES = ("evaluations", "problems", "steps", "diagnostics", "prompts", "responses", "tokens")
OF_ONE_SEED = ("prompts", "responses", "tokens")  # the smallest, to keep the files small


@dataclass
class Collected:
    """What the runs of an experiment leave: parts of each table, and the cost of each run."""

    parts: dict[str, list[pd.DataFrame]] = field(default_factory=dict)
    costs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, table: pd.DataFrame, method: str, seed: int, iteration: int | None) -> None:
        """Rows of one run at one iteration for the table `name`."""
        number = pd.array([iteration] * len(table), dtype="Int64")
        self.parts.setdefault(name, []).append(table.assign(method=method, seed=seed, iteration=number))

    def table(self, name: str) -> pd.DataFrame:
        """All rows for the table `name`, their run first."""
        whole = pd.concat(self.parts[name], ignore_index=True)
        return whole[[*RUN, *(column for column in whole if column not in RUN)]]


def problems_of(samples: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """benchmark, doc_id, value of the tabulated metrics, from an evaluation's samples.

    doc_id numbers a benchmark's problems, through all tasks of a group.
    """
    wanted = pd.DataFrame([{"benchmark": c.benchmark, "metric": c.metric} for c in suite.columns])
    kept = samples.merge(wanted, on=["benchmark", "metric"])
    number = kept.groupby("benchmark").cumcount()
    one_task = kept.groupby("benchmark")["task"].transform("nunique") == 1
    doc = kept["doc_id"].where(one_task, number)
    return pd.DataFrame({"benchmark": kept["benchmark"], "doc_id": doc.astype("int32"), "value": kept["value"]})


def read_results(target: Path) -> dict[str, Any]:
    """What a results folder has by now: name → table, and "runs": (method, seed, iteration) → its cost.

    Raises UserError naming the first file that is damaged: before a run starts, not at its end.
    """
    results: dict[str, Any] = {name: read_table(target, name) for name in TABLES if _path(target, name).exists()}
    path = target / "provenance.json"
    try:
        results["runs"] = _by_run(read_json(path)["runs"]) if path.exists() else {}
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return results


def read_table(target: Path, name: str) -> pd.DataFrame:
    """A table of TABLES in a results folder. Raises UserError when its file is damaged or missing."""
    path = _path(target, name)
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=RUN_TYPES)[EVALUATION_COLUMNS]
        return pd.read_parquet(path).astype(RUN_TYPES)
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def write_results(target: Path, preset: str, suite: Suite, collected: Collected) -> None:
    """Merge what was collected into results/<preset>/. Raises UserError as read_results, before anything is written."""
    old = read_results(target)
    for name in collected.parts:
        table = collected.table(name)
        if name == "evaluations":
            table = table.assign(preset=preset)[EVALUATION_COLUMNS]
        if name in old:
            table = _replacing(old[name], table)
        if name in OF_ONE_SEED:
            table = table[table["seed"] == table["seed"].min()]
        _write_table(_path(target, name), _in_order(table, suite))
    columns = [column.model_dump(mode="json") for column in suite.columns]
    write_json(target / "suite.json", {"preset": preset, "columns": columns})
    new = _by_run(collected.costs)
    fresh = {(method, seed) for method, seed, _ in new}
    runs = {run: cost for run, cost in old["runs"].items() if run[:2] not in fresh} | new  # as the tables' rows
    date = time.strftime("%Y-%m-%d", time.gmtime())
    write_json(target / "provenance.json", {**provenance(), "date": date, "runs": list(runs.values())})


def _path(target: Path, name: str) -> Path:
    return target / f"{name}.{'csv' if name == 'evaluations' else 'parquet'}"


def _by_run(costs: list[dict[str, Any]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    return {(cost["method"], cost["seed"], cost["iteration"]): cost for cost in costs}


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path} is damaged ({reason}): restore it or move it away; finished stages are kept in runs/")


def _replacing(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """`old` without the runs that `new` has, then `new`."""
    fresh = set(zip(new["method"], new["seed"], strict=True))
    kept = [run not in fresh for run in zip(old["method"], old["seed"], strict=True)]
    return pd.concat([old[kept], new], ignore_index=True)


def _in_order(table: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """Its rows by method, seed, iteration, benchmark and metric: methods and benchmarks as they are declared."""
    orders = {"method": [BASE, *METHODS], "benchmark": [column.benchmark for column in suite.columns]}
    ranks = {key: {name: rank for rank, name in enumerate(names)} for key, names in orders.items()}
    return table.sort_values(
        [key for key in SCORE if key in table],
        key=lambda column: column.map(ranks[str(column.name)]) if column.name in ranks else column,
        kind="stable",
        na_position="first",
    )


def write_problems(path: Path, table: pd.DataFrame) -> None:
    """Write a study's problems, as results/<preset>/problems.parquet is written."""
    _write_parquet(path, table.astype({"value": "float32", "iteration": "Int8"}))


def _write_table(path: Path, table: pd.DataFrame) -> None:
    if path.suffix == ".csv":
        write_text(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        return
    floats = [str(name) for name in table.select_dtypes(["float64", "float32"])]
    if path.stem == "diagnostics":  # these files are committed: digits that mean nothing would be most of their size
        table = table.assign(**{name: (table[name] * DIAGNOSTIC_STEPS).round() / DIAGNOSTIC_STEPS for name in floats})
    if path.stem == "tokens":
        for name in ("before", "after"):
            rounded = [(np.asarray(logps, "float32") * TOKEN_STEPS).round() / TOKEN_STEPS for logps in table[name]]
            table = table.assign(**{name: pd.Series(rounded, table.index)})
    _write_parquet(path, table.astype({**dict.fromkeys(floats, "float32"), "seed": "int16", "iteration": "Int8"}))


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    floats = [str(name) for name in table.select_dtypes(["float32"])]
    with atomic_path(path) as temporary:
        table.to_parquet(
            temporary, index=False, compression="zstd", compression_level=19, use_byte_stream_split=floats,
            use_dictionary=[str(name) for name in table if name not in floats],
        )  # fmt: skip

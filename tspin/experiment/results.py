"""results/<preset>/: the small tidy files that tables, figures and claims are made from.

evaluations.csv      preset, method, seed, iteration, benchmark, metric, value, stderr, n (percent)
problems.parquet     method, seed, iteration, benchmark, doc_id, value: the tabulated metric of each problem (percent)
steps.parquet        method, seed, iteration, and what training logged at each optimizer step
diagnostics.parquet  method, seed, iteration, and a row a prompt and role (tspin.schema.DIAGNOSTICS)
prompts.parquet      seed, prompt_id, prompt, labelled, proto: texts, of the smallest seed
responses.parquet    method, seed, iteration, prompt_id, text: a response sampled from the policy that the iteration
                     ended with, of the smallest seed; "base" has the initial policy's. What iteration t trains on as
                     y′ is the response of iteration t − 1. The last iteration has EXAMPLES prompts only.
suite.json           which metric makes which column
provenance.json      commit, versions, hardware, and what each run cost

Of larger data sets, diagnostics.parquet, prompts.parquet and responses.parquet have TEXTS prompts, evenly spread.
`iteration` is empty for base and sft. Numbers of diagnostics.parquet are rounded to 1/4096. Rows of a method and seed
replace those that were there.
"""

import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from tspin.errors import UserError
from tspin.evaluation.suites import Suite
from tspin.objectives import METHODS
from tspin.runs.files import atomic_path, read_json, write_json, write_text
from tspin.runs.provenance import provenance
from tspin.schema import BASE, EVALUATION_COLUMNS, RUN

EXAMPLES = 10
TEXTS = 5_000
DIAGNOSTIC_STEPS = 4096  # to a nat
FILES = ("evaluations", "problems", "steps", "diagnostics", "prompts", "responses")


@dataclass
class Collected:
    """What the runs of an experiment leave: parts of each file, and the cost of each run."""

    parts: dict[str, list[pd.DataFrame]] = field(default_factory=dict)
    costs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, table: pd.DataFrame, method: str, seed: int, iteration: int | None) -> None:
        """Rows of one run at one iteration for the file `name`."""
        number = pd.array([iteration] * len(table), dtype="Int64")
        self.parts.setdefault(name, []).append(table.assign(method=method, seed=seed, iteration=number))

    def table(self, name: str) -> pd.DataFrame:
        """All rows for the file `name`, their run first."""
        whole = pd.concat(self.parts[name], ignore_index=True)
        return whole[[*RUN, *(column for column in whole if column not in RUN)]]


def problems_of(samples: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """benchmark, doc_id, value (percent) of the tabulated metrics, from an evaluation's samples.

    doc_id numbers a benchmark's problems, through all tasks of a group.
    """
    wanted = pd.DataFrame([{"benchmark": c.benchmark, "metric": c.metric} for c in suite.columns])
    kept = samples.merge(wanted, on=["benchmark", "metric"])
    number = kept.groupby("benchmark").cumcount()
    one_task = kept.groupby("benchmark")["task"].transform("nunique") == 1
    doc = kept["doc_id"].where(one_task, number)
    return pd.DataFrame({"benchmark": kept["benchmark"], "doc_id": doc.astype("int32"), "value": kept["value"]})


def read_results(target: Path) -> dict[str, Any]:
    """What a results folder has by now: name → table, and "runs", the costs in provenance.json.

    Raises UserError naming the first file that is damaged: before a run starts, not at its end.
    """
    found: dict[str, Any] = {}
    for name in FILES:
        path = target / f"{name}.{'csv' if name == 'evaluations' else 'parquet'}"
        if not path.exists():
            continue
        try:
            if name == "evaluations":
                found[name] = pd.read_csv(path, dtype={"iteration": "Int64"})[EVALUATION_COLUMNS]
            else:
                found[name] = pd.read_parquet(path)
                found[name][RUN]
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise _damaged(path, error) from error
    path = target / "provenance.json"
    try:
        found["runs"] = {_run_key(cost): cost for cost in read_json(path)["runs"]} if path.exists() else {}
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return found


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path} is damaged ({reason}): restore it or move it away; finished stages are kept in runs/")


def write_results(target: Path, preset: str, suite: Suite, collected: Collected) -> None:
    """Merge what was collected into results/<preset>/. Raises UserError as read_results, before anything is written."""
    old = read_results(target)
    evaluations = collected.table("evaluations").assign(preset=preset)[EVALUATION_COLUMNS]
    if "evaluations" in old:
        evaluations = _replacing(old["evaluations"], evaluations)
    buffer = io.StringIO()
    _in_order(evaluations, suite).to_csv(buffer, index=False, float_format="%.6g", lineterminator="\n")
    write_text(target / "evaluations.csv", buffer.getvalue())
    for name in FILES[1:]:
        if name in collected.parts:
            table = collected.table(name)
            table = _replacing(old[name], table) if name in old else table
            if name in ("prompts", "responses"):  # texts: of the smallest seed, to keep the files small
                table = table[table["seed"] == table["seed"].min()]
            _write_parquet(target / f"{name}.parquet", _in_order(table, suite))
    columns = [column.model_dump(mode="json") for column in suite.columns]
    write_json(target / "suite.json", {"preset": preset, "columns": columns})
    merged = old["runs"] | {_run_key(cost): cost for cost in collected.costs}
    stamp = {**provenance(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    write_json(target / "provenance.json", {**stamp, "runs": list(merged.values())})


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    floats = [str(name) for name in table.select_dtypes(["float64", "float32"])]
    # These files are committed: digits that mean nothing would be most of their size.
    rounded = {name: (table[name] * DIAGNOSTIC_STEPS).round() / DIAGNOSTIC_STEPS for name in floats}
    table = table.assign(**rounded) if path.stem == "diagnostics" else table
    types = {**dict.fromkeys(floats, "float32"), "seed": "int16", "iteration": "Int8"}
    with atomic_path(path) as temporary:
        table.astype(types).to_parquet(
            temporary, index=False, compression="zstd", compression_level=19, use_byte_stream_split=floats,
            use_dictionary=[str(name) for name in table if name not in floats],
        )  # fmt: skip


def _replacing(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    fresh = set(zip(new["method"], new["seed"], strict=True))
    kept = [key not in fresh for key in zip(old["method"], old["seed"], strict=True)]
    return pd.concat([old[kept], new], ignore_index=True)


def _in_order(table: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    orders = {
        "method": {name: position for position, name in enumerate([BASE, *METHODS])},
        "benchmark": {column.benchmark: position for position, column in enumerate(suite.columns)},
    }
    keys = [key for key in ("method", "seed", "iteration", "benchmark", "metric") if key in table]
    return table.sort_values(
        keys,
        key=lambda column: column.map(orders[str(column.name)].get) if column.name in orders else column,
        kind="stable",
        na_position="first",
    )


def _run_key(cost: dict[str, Any]) -> tuple[str, int, int]:
    return cost["method"], cost["seed"], cost["iteration"]

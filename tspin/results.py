"""results/<preset>/: the small tidy files that tables, figures and claims are made from.

evaluations.csv      preset, method, seed, iteration, benchmark, metric, value, stderr, n (percent)
problems.parquet     method, seed, iteration, benchmark, doc_id, value: the tabulated metric of each problem (percent)
steps.parquet        method, seed, iteration, and what training logged at each optimizer step
diagnostics.parquet  method, seed, iteration, and a row a prompt and role (tspin.diagnostics.SCHEMA)
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

from tspin.evaluation import Suite
from tspin.objectives import METHODS
from tspin.run_store import atomic_path, provenance, read_json, write_json, write_text

BASE = "base"
EXAMPLES = 10
TEXTS = 5_000
DIAGNOSTIC_STEPS = 4096  # to a nat
RUN = ["method", "seed", "iteration"]
EVALUATION_COLUMNS = ["preset", *RUN, "benchmark", "metric", "value", "stderr", "n"]


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


def write_results(target: Path, preset: str, suite: Suite, collected: Collected) -> None:
    """Merge what was collected into results/<preset>/."""
    evaluations = collected.table("evaluations").assign(preset=preset)[EVALUATION_COLUMNS]
    path = target / "evaluations.csv"
    if path.exists():
        evaluations = _replacing(pd.read_csv(path, dtype={"iteration": "Int64"}), evaluations)
    buffer = io.StringIO()
    _in_order(evaluations, suite).to_csv(buffer, index=False, float_format="%.6g", lineterminator="\n")
    write_text(path, buffer.getvalue())
    for name in ("problems", "steps", "diagnostics"):
        if name in collected.parts:
            _merge_parquet(target / f"{name}.parquet", collected.table(name), suite)
    for name in ("prompts", "responses"):  # texts: of the smallest seed, to keep the files small
        if name in collected.parts:
            _merge_parquet(target / f"{name}.parquet", collected.table(name), suite, smallest_seed=True)
    columns = [column.model_dump(mode="json") for column in suite.columns]
    write_json(target / "suite.json", {"preset": preset, "columns": columns})
    merged = {}
    if (target / "provenance.json").exists():
        merged = {_run_key(cost): cost for cost in read_json(target / "provenance.json")["runs"]}
    merged |= {_run_key(cost): cost for cost in collected.costs}
    stamp = {**provenance(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    write_json(target / "provenance.json", {**stamp, "runs": list(merged.values())})


def _merge_parquet(path: Path, new: pd.DataFrame, suite: Suite, smallest_seed: bool = False) -> None:
    if path.exists():
        new = _replacing(pd.read_parquet(path), new)
    if smallest_seed:
        new = new[new["seed"] == new["seed"].min()]
    new = _in_order(new, suite)
    floats = [str(name) for name in new.select_dtypes(["float64", "float32"])]
    # These files are committed: digits that mean nothing would be most of their size.
    rounded = {name: (new[name] * DIAGNOSTIC_STEPS).round() / DIAGNOSTIC_STEPS for name in floats}
    new = new.assign(**rounded) if path.stem == "diagnostics" else new
    types = {**dict.fromkeys(floats, "float32"), "seed": "int16", "iteration": "Int8"}
    with atomic_path(path) as temporary:
        new.astype(types).to_parquet(
            temporary, index=False, compression="zstd", compression_level=19, use_byte_stream_split=floats,
            use_dictionary=[str(name) for name in new if name not in floats],
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

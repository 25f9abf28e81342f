"""The files that tables and figures start from, checked, and the atomic write that they end with."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tspin.errors import UserError
from tspin.runs.files import atomic_path

PAPER = Path(__file__).parent / "paper"
KEY = ["method", "seed", "iteration", "benchmark", "metric"]
DTYPES = {
    "preset": "str",
    "method": "str",
    "seed": "Int64",
    "iteration": "Int64",
    "benchmark": "str",
    "metric": "str",
    "value": "float64",
    "stderr": "float64",
    "n": "Int64",
}


class Column(NamedTuple):
    """One column of a table: a benchmark, its label and group, and which of its metrics is tabulated."""

    benchmark: str
    label: str
    group: str
    metric: str


def _unusable(path: Path, preset: str, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; make it with: make reproduce-table1 PRESET={preset}")


def _existing(path: Path, preset: str) -> Path:
    if not path.is_file():
        raise _unusable(path, preset, "no such file")
    return path


def suite(preset: str, results: Path = Path("results")) -> list[Column]:
    """The tabulated columns of `results/<preset>/suite.json`, in the table's order.

    Raises `UserError` if the file is missing, malformed or names a label twice.
    """
    path = _existing(results / preset / "suite.json", preset)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["columns"]
        columns = [Column(**{field: str(entry[field]) for field in Column._fields}) for entry in entries]
    except KeyError as error:
        raise _unusable(path, preset, f"lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise _unusable(path, preset, "is not a suite") from error
    if not columns or len({column.label for column in columns}) < len(columns):
        raise _unusable(path, preset, "names a label twice" if columns else "has no columns")
    return columns


def evaluations(preset: str, results: Path = Path("results")) -> pd.DataFrame:
    """All of `results/<preset>/evaluations.csv`: `value` and `stderr` in percent, `iteration` NA at base and sft.

    Raises `UserError` if the file is missing, empty or malformed, or holds another preset's rows or a score twice.
    """
    path = _existing(results / preset / "evaluations.csv", preset)
    try:
        scores = pd.read_csv(path, dtype=DTYPES)
    except (ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise _unusable(path, preset, f"cannot be read ({reason})") from error
    if absent := [name for name in DTYPES if name not in scores]:
        raise _unusable(path, preset, f"lacks the columns {', '.join(absent)}")
    if scores.empty:
        raise _unusable(path, preset, "has no rows")
    problems = {
        "a preset, method, seed, benchmark or metric is empty": scores[["preset", *KEY]]
        .drop(columns="iteration")
        .isna()
        .any(axis=1),
        f"the preset is not {preset}": scores["preset"] != preset,
        "iteration must be empty for base and sft, and only there": scores["iteration"].isna()
        != scores["method"].isin(["base", "sft"]),
        "a score is there twice": scores.duplicated(KEY),
    }
    for problem, rows in problems.items():
        if rows.any():
            raise _unusable(path, preset, f"line {int(rows.to_numpy().argmax()) + 2}: {problem}")
    return scores


def tabulated(preset: str, results: Path = Path("results")) -> pd.DataFrame:
    """The scores that the table shows: `evaluations` with each benchmark's tabulated metric only, and its `label`.

    Raises `UserError` as `evaluations` and `suite` do, and if the two files have no score in common.
    """
    columns = pd.DataFrame(suite(preset, results))[["benchmark", "metric", "label"]]
    scores = evaluations(preset, results).merge(columns, on=["benchmark", "metric"])
    if scores.empty:
        raise _unusable(results / preset / "evaluations.csv", preset, "has no score that suite.json tabulates")
    return scores


def parquet(name: str, preset: str, results: Path = Path("results")) -> pd.DataFrame:
    """`results/<preset>/<name>.parquet`; columns: tspin.experiment.results. Raises `UserError` if it is unreadable."""
    path = _existing(results / preset / f"{name}.parquet", preset)
    try:
        return pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise _unusable(path, preset, f"cannot be read ({' '.join(str(error).split())})") from error


def published(name: str) -> pd.DataFrame:
    """The paper's numbers in percent, as printed: `analysis/paper/<name>.csv`, `iteration` NA for base and sft."""
    return pd.read_csv(PAPER / f"{name}.csv", dtype={"iteration": "Int64"})


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, each as a dict from column to value."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def write_atomically(path: Path, content: bytes) -> Path:
    """Put `content` at `path`, so that a reader or a crash meets the old file or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path

"""The files of a preset's results, `results/<preset>/`, checked as they are read; and the paper's numbers.

What is committed is in `results/reference/<preset>/`, apart from what a user's runs leave.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tspin.errors import UserError
from tspin.schema import EVALUATION_COLUMNS, ONCE, RUN

PAPER = Path(__file__).parent / "paper"
COMMITTED = Path(__file__).resolve().parents[1] / "results" / "reference"  # in a checkout; a wheel has none
PUBLISHED = {
    "Zephyr-7B": ["table1_zephyr", "table2_without_historical_advantage"],
    "Mistral-7B": ["table4_mistral"],
}
TYPES = {"seed": "Int64", "iteration": "Int64", "value": "float64", "stderr": "float64", "n": "Int64"}
DTYPES = {name: TYPES.get(name, "str") for name in EVALUATION_COLUMNS}


class Column(NamedTuple):
    """One column of a table: a benchmark, its label and group, and which of its metrics is tabulated."""

    benchmark: str
    label: str
    group: str
    metric: str

    @property
    def named(self) -> tuple[str, str, str]:
        """As tspin.schema takes it."""
        return self.benchmark, self.metric, self.label


def is_committed(folder: Path) -> bool:
    """Whether a preset's results are the committed ones."""
    return folder.resolve().parent.name == "reference"


def reference_of(folder: Path) -> Path | None:
    """The committed results of the preset that `folder` holds results of: beside them, or in this checkout.

    None where there are none, and of the committed results themselves.
    """
    if is_committed(folder):
        return None
    places = (root / folder.name for root in (folder.parent / "reference", COMMITTED))
    return next((place for place in places if place.is_dir()), None)


def unusable(path: Path, problem: str) -> UserError:
    """The error that names a file of `results/<preset>/`, what is wrong with it and the command that makes it."""
    root = path.parent.parent
    elsewhere = "" if root == Path("results") else f" --results {root}"
    return UserError(f"{path}: {problem}; make it with: tspin run --preset {path.parent.name}{elsewhere}")


def read_suite(folder: Path) -> list[Column]:
    """The tabulated columns of `suite.json`, in the table's order.

    Raises `UserError` if the file is missing, malformed or names a label twice.
    """
    path = _existing(folder / "suite.json")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["columns"]
        columns = [Column(**{field: str(entry[field]) for field in Column._fields}) for entry in entries]
    except KeyError as error:
        raise unusable(path, f"lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise unusable(path, "is not a suite") from error
    if not columns or len({column.label for column in columns}) < len(columns):
        raise unusable(path, "names a label twice" if columns else "has no columns")
    return columns


def read_evaluations(folder: Path) -> pd.DataFrame:
    """All of `evaluations.csv`: `value` and `stderr` of shares in percent, `iteration` NA at base and sft.

    Raises `UserError` if the file is missing, empty or malformed, or holds another preset's rows or a score twice.
    """
    path = _existing(folder / "evaluations.csv")
    try:
        scores = pd.read_csv(path, dtype=DTYPES)
    except (ValueError, TypeError, OverflowError) as error:
        raise unusable(path, f"cannot be read ({_one_line(error)})") from error
    if absent := [name for name in DTYPES if name not in scores]:
        raise unusable(path, f"lacks the columns {', '.join(absent)}")
    if scores.empty:
        raise unusable(path, "has no rows")
    names = scores[["preset", "method", "seed", "benchmark", "metric"]]
    once = scores["method"].isin(ONCE)
    problems = {
        "a preset, method, seed, benchmark or metric is empty": names.isna().any(axis=1),
        f"the preset is not {folder.name}": scores["preset"] != folder.name,
        "iteration must be empty for base and sft, and only there": scores["iteration"].isna() != once,
        "a score is there twice": scores.duplicated([*RUN, "benchmark", "metric"]),
    }
    for problem, rows in problems.items():
        if rows.any():
            raise unusable(path, f"line {int(rows.to_numpy().argmax()) + 2}: {problem}")
    return scores


def read_scores(folder: Path) -> pd.DataFrame:
    """The scores that the table shows: of `evaluations.csv` each benchmark's tabulated metric, and its `label`.

    Raises `UserError` as `read_evaluations` and `read_suite` do, and if the two files have no score in common.
    """
    columns = pd.DataFrame(read_suite(folder))[["benchmark", "metric", "label"]]
    scores = read_evaluations(folder).merge(columns, on=["benchmark", "metric"])
    if scores.empty:
        raise unusable(folder / "evaluations.csv", "has no score that suite.json tabulates")
    return scores


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """`<name>.parquet`; columns: tspin.experiment.results. Raises `UserError` if it is missing or unreadable."""
    path = _existing(folder / f"{name}.parquet")
    try:
        return pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise unusable(path, f"cannot be read ({_one_line(error)})") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that the results were made with; empty where they were not recorded."""
    path = folder / "config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["config"]) if path.is_file() else {}


def labels_of(folder: Path, method: str = "") -> int | None:
    """How many labels self-play trained on, or a method of its own number; None: all there are, or not recorded."""
    settings = read_settings(folder)
    own = settings.get("methods", {}).get(method, {}).get("data") or {}
    labels = {**settings.get("data", {}), **own}.get("labels")
    return int(labels) if labels else None


def read_paper(model: str) -> pd.DataFrame:
    """What the paper prints of a model, in percent: method, iteration (NA for base and sft), benchmarks, Avg."""
    files = [PAPER / f"{name}.csv" for name in PUBLISHED[model]]
    return pd.concat([pd.read_csv(path, dtype={"iteration": "Int64"}) for path in files], ignore_index=True)


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    error, reference = unusable(path, "no such file"), reference_of(path.parent)
    if reference is None or not (reference / path.name).is_file():
        raise error
    raise UserError(f"{error}; or take the committed results: --results {reference.parent}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Suites of lm-evaluation-harness tasks: what a table has as columns. tspin.evaluation.harness runs them.

A suite is a YAML file, `experiments/suites/<name>.yaml`: which tasks, and which metric of each makes a column.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tspin.errors import UserError
from tspin.runs.files import fingerprint
from tspin.yaml_files import find_yaml, read_yaml

SUITES = "experiments/suites"
PACKAGE = Path(__file__).parents[1]


class Column(BaseModel):
    """One column of the table: a metric of an lm-eval task or group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benchmark: str  # lm-eval's name of the task or group
    label: str
    group: str
    metric: str  # "<metric>,<filter>" as lm-eval reports it, such as "exact_match,flexible-extract"
    num_fewshot: int | None = None  # None: the task's default
    # The first problems of each of its tasks; None: all. The evaluation's limit may be smaller.
    limit: int | None = Field(None, ge=1)


class Suite(BaseModel):
    """The columns of a table and how their prompts are built."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    columns: tuple[Column, ...]  # in table order
    include_path: Path | None = None  # folder of further task files, relative to the current one or to this package
    apply_chat_template: bool = False
    split: str | None = None  # None: the split that each task is meant to be tested on

    @property
    def task_folder(self) -> Path | None:
        """The folder of further task files. Raises UserError where there is none."""
        if self.include_path is None:
            return None
        for folder in (self.include_path, PACKAGE / self.include_path):
            if folder.is_dir():
                return folder
        raise UserError(f"include_path {self.include_path}: no such folder, neither here nor in {PACKAGE}")

    def definition(self) -> dict[str, str]:
        """What scores follow from besides the suite: versions, and the task files (and what is beside their folder)."""
        facts = {package: version(package) for package in ("lm_eval", "reasoning_gym")}
        if folder := self.task_folder:
            files = [*folder.iterdir(), *folder.parent.glob("tasks.*")]
            facts["files"] = fingerprint({path.name: path.read_text() for path in sorted(files) if path.is_file()})
        return facts


def load_suite(name_or_path: str | Path) -> Suite:
    """The suite in a YAML file, or of that name in `experiments/suites`.

    `extends: <name>` at the top of a file starts from another suite; its other keys replace that one's.
    Raises UserError for an unknown name and for a file with unknown keys or bad values.
    """
    path = find_yaml(str(name_or_path), SUITES, "suite")
    try:
        return Suite.model_validate(_settings(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}") from error


def tabulated(scores: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """The rows of `scores` that are columns of the suite's table, in table order.

    Raises UserError when a column's metric is not among those that lm-eval reported.
    """
    for column in suite.columns:
        reported = set(scores.loc[scores["benchmark"] == column.benchmark, "metric"])
        if column.metric not in reported:
            metrics = ", ".join(sorted(reported)) or "none"
            raise UserError(f"{column.benchmark} has no metric {column.metric!r}; lm-eval reported: {metrics}")
    order = pd.DataFrame([{"benchmark": column.benchmark, "metric": column.metric} for column in suite.columns])
    return order.merge(scores, on=["benchmark", "metric"], how="left")[list(scores.columns)]


def _settings(path: Path, extended: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A suite file's settings on top of those of the suites that it extends. Raises UserError."""
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a suite is a mapping with the key `columns`")
    base = settings.pop("extends", None)
    if base is None:
        return settings
    if path.resolve() in extended or not isinstance(base, str):
        raise UserError(f"{path}: `extends` is the name of another suite, in no circle (got {base!r})")
    return {**_settings(find_yaml(base, SUITES, "suite"), (*extended, path.resolve())), **settings}

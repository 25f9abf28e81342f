"""Scores of a model on a suite of lm-evaluation-harness tasks.

A suite is a YAML file, `experiments/suites/<name>.yaml`: which tasks, and which metric of each makes
a column of the table. Every number comes from lm-eval; here they are only put in order.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tspin.config import REPOSITORY, find_yaml, read_yaml, unknown
from tspin.errors import UserError
from tspin.hub.offline import limit_waiting, offline_benchmarks
from tspin.runs.files import fingerprint

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUITES = "experiments/suites"
HUB_MODULES = ("huggingface_hub", "datasets", "httpx", "requests", "aiohttp", "fsspec")
SCORES = ["benchmark", "metric", "value", "stderr", "n"]
SAMPLES = ["benchmark", "task", "doc_id", "metric", "value", "response"]


class Column(BaseModel):
    """One column of the table: a metric of an lm-eval task or group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benchmark: str  # lm-eval's name of the task or group
    label: str
    group: str
    metric: str  # "<metric>,<filter>" as lm-eval reports it, such as "exact_match,flexible-extract"
    num_fewshot: int | None = None  # None: the task's own default
    # The first problems of each of its tasks; None: all. The evaluation's own limit may be smaller.
    limit: int | None = Field(None, ge=1)


class Suite(BaseModel):
    """The columns of a table and how their prompts are built."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    columns: tuple[Column, ...]  # in table order
    include_path: Path | None = None  # folder of further task files, relative to the repository's root
    apply_chat_template: bool = False
    split: str | None = None  # None: the split that each task is meant to be tested on

    def definition(self) -> dict[str, str]:
        """What scores follow from besides the suite: versions, and the task files (and what is beside their folder)."""
        found = {package: version(package) for package in ("lm_eval", "reasoning_gym")}
        if self.include_path is not None:
            folder = _in_repository(self.include_path)
            files = [*folder.iterdir(), *folder.parent.glob("tasks.*")]
            found["files"] = fingerprint({path.name: path.read_text() for path in sorted(files) if path.is_file()})
        return found


@dataclass(frozen=True)
class Evaluation:
    """What lm-eval reports about one model on one suite; values and standard errors are in percent.

    scores: one row per benchmark and metric (all that lm-eval reports, not only the columns'), with columns
        `benchmark, metric, value, stderr, n`. An lm-eval group has its aggregate, over `n` problems in all.
        `stderr` is NaN where lm-eval gives none, as for a single problem.
    samples: one row per problem and metric, with columns `benchmark, task, doc_id, metric, value, response`. `task`
        differs from `benchmark` within a group; `doc_id` counts within a task. `response` is the generated text,
        None for tasks that compare likelihoods. Metrics with several values per problem are left out.
    """

    scores: pd.DataFrame
    samples: pd.DataFrame


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


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    suite: Suite,
    *,
    batch_size: int,
    limit: int | None = None,
    seed: int = 1234,
) -> Evaluation:
    """Run a suite on a model, wherever that model is; all tasks' prompts are batched together.

    batch_size: prompts in a batch. limit: problems per task, the first ones; None for all. seed: of the draw of
    few-shot examples (1234 is lm-eval's default), and of Python's, NumPy's and PyTorch's generators, which are
    left in the state that the evaluation puts them in.
    Raises UserError when lm-eval does not know a benchmark.
    """
    from tspin.evaluation.backend import SegmentedLM

    was_training = model.training
    with _lm_eval_log(logging.ERROR):  # it warns of ready-made models as such
        lm = SegmentedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        return evaluate_lm(lm, suite, limit=limit, seed=seed)
    finally:
        model.train(was_training)


def evaluate_lm(lm: "LM", suite: Suite, *, limit: int | None = None, seed: int = 1234) -> Evaluation:
    """Run a suite on one of lm-eval's own language models; see `evaluate`."""
    import lm_eval
    from transformers import set_seed

    limit_waiting()
    with _lm_eval_log(logging.ERROR):  # its warnings here concern custom data sets as such
        manager = task_manager_for(suite)
        with offline_benchmarks():
            tasks = [_loaded(manager, column, suite.split) for column in _benchmarks(suite)]
        loaded = manager.load(tasks)
        for leaf in loaded["tasks"].values():
            leaf.set_fewshot_seed(seed)
    set_seed(seed)
    with _lm_eval_log(logging.WARNING):
        # Not simple_evaluate: it reloads the tasks and starts a dozen programs to describe the machine, every time.
        try:
            results = lm_eval.evaluate(
                lm, loaded, samples=_chosen(suite, tasks, limit), apply_chat_template=suite.apply_chat_template
            )
        except AssertionError as error:
            if "maximum sequence length" not in str(error):
                raise
            sys.stderr.write("\n")  # lm-eval leaves its progress bar open
            raise UserError(
                f"the model's context is too short for a problem and its answer ({' '.join(str(error).split())}): "
                "evaluate with fewer shots (num_fewshot in the suite), or a model of a longer context"
            ) from error
    scores, samples = [], []
    for column, task in zip(_benchmarks(suite), tasks, strict=True):
        scores.append(_scores(column.benchmark, results["results"][column.benchmark]))
        for leaf in _leaves(task):
            samples.append(_samples(column.benchmark, leaf.task_name, results["samples"][leaf.task_name]))
    return Evaluation(pd.concat(scores, ignore_index=True), pd.concat(samples, ignore_index=True))


def tabulated(scores: pd.DataFrame, suite: Suite) -> pd.DataFrame:
    """The rows of `scores` that are columns of the suite's table, in table order.

    Raises UserError when a column's metric is not among those that lm-eval reported.
    """
    for column in suite.columns:
        reported = set(scores.loc[scores["benchmark"] == column.benchmark, "metric"])
        if column.metric not in reported:
            found = ", ".join(sorted(reported)) or "none"
            raise UserError(f"{column.benchmark} has no metric {column.metric!r}; lm-eval reported: {found}")
    order = pd.DataFrame([{"benchmark": column.benchmark, "metric": column.metric} for column in suite.columns])
    return order.merge(scores, on=["benchmark", "metric"], how="left")[list(scores.columns)]


def _in_repository(path: Path) -> Path:
    return path if path.is_dir() else REPOSITORY / path


def _settings(path: Path, extended: tuple[Path, ...] = ()) -> dict[str, Any]:
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a suite is a mapping with the key `columns`")
    base = settings.pop("extends", None)
    if base is None:
        return settings
    if path.resolve() in extended or not isinstance(base, str):
        raise UserError(f"{path}: `extends` is the name of another suite, in no circle (got {base!r})")
    return {**_settings(find_yaml(base, SUITES, "suite"), (*extended, path.resolve())), **settings}


def _benchmarks(suite: Suite) -> list[Column]:
    """One column per benchmark: two columns may show two metrics of the same one."""
    return list({column.benchmark: column for column in reversed(suite.columns)}.values())[::-1]


@cache
def _task_manager(include_path: Path | None, include_defaults: bool) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def task_manager_for(suite: Suite) -> "TaskManager":
    """The index that holds every benchmark; lm-eval's own, seconds to build, only where it is needed.

    Raises UserError when lm-eval does not know a benchmark.
    """
    names = [column.benchmark for column in suite.columns]
    path = _in_repository(suite.include_path) if suite.include_path else None
    manager = _task_manager(path, include_defaults=path is None)
    if path and not set(names) <= set(manager.task_index):
        manager = _task_manager(path, include_defaults=True)
    known = manager.all_subtasks + manager.all_groups
    for name in names:
        if name not in known:
            raise UserError(unknown("lm-eval task or group", name, known))
    return manager


def _loaded(manager: "TaskManager", column: Column, split: str | None) -> "Task | Group":
    """`_load_task`, with what the hub's clients raise as one line: gated sets, no network, a silent server."""
    try:
        return _load_task(manager, column, split)
    except UserError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.split(".")[0] in HUB_MODULES):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{column.benchmark}: its data set cannot be loaded ({reason}); where there is no network use --offline, "
            "for gated data sets accept their terms on the hub and set HF_TOKEN"
        ) from error


def _load_task(manager: "TaskManager", column: Column, split: str | None) -> "Task | Group":
    """The column's task or group, with its number of shots and its split.

    Set on the loaded tasks, as lm-eval itself does: a dict of overrides is looked up in no index by TaskManager.load.
    """
    loaded = manager.load([column.benchmark])
    for task in loaded["tasks"].values():
        if column.num_fewshot is not None:
            task.set_config("num_fewshot", column.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        if split is not None:
            task.set_config("test_split", split)
    return loaded.get("groups", {}).get(column.benchmark) or loaded["tasks"][column.benchmark]


def _chosen(suite: Suite, tasks: "list[Task | Group]", limit: int | None) -> dict[str, list[int]] | None:
    """For each task the problems to ask: the first ones, as many as its column and the evaluation allow."""
    columns = _benchmarks(suite)
    if limit is None and all(column.limit is None for column in columns):
        return None
    chosen = {}
    for column, task in zip(columns, tasks, strict=True):
        for leaf in _leaves(task):
            sizes = [len(leaf.eval_docs), *(size for size in (column.limit, limit) if size is not None)]
            chosen[leaf.task_name] = list(range(min(sizes)))
    return chosen


def _leaves(task: "Task | Group") -> "list[Task]":
    return task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]


def _scores(benchmark: str, result: dict[str, Any]) -> pd.DataFrame:
    rows = []
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = result.get(f"{metric}_stderr,{filter_name}")
            stderr = 100.0 * stderr if isinstance(stderr, Real) else float("nan")  # lm-eval has "N/A"
            rows.append((benchmark, key, 100.0 * value, stderr, result["sample_len"]))
    return pd.DataFrame(rows, columns=SCORES)


def _samples(benchmark: str, task: str, samples: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for sample in samples:
        response = sample["resps"][0][0]
        response = response if isinstance(response, str) else None
        for metric in sample["metrics"]:
            if isinstance(value := sample[metric], Real):
                key = f"{metric},{sample['filter']}"
                rows.append((benchmark, task, sample["doc_id"], key, 100.0 * float(value), response))
    return pd.DataFrame(rows, columns=SAMPLES)


@contextmanager
def _lm_eval_log(level: int) -> Iterator[None]:
    """Keep lm-eval's log to this level and above; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)

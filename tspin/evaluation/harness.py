"""Scores of a model on a suite: every number comes from lm-evaluation-harness, here they are put in order."""

import logging
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tspin.errors import UserError, reason, unknown
from tspin.evaluation.suites import Column, Suite
from tspin.hub.offline import limit_waiting, offline_benchmarks
from tspin.schema import is_share

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_MODULES = ("huggingface_hub", "datasets", "httpx", "httpx2", "requests", "aiohttp", "fsspec")
PYTHON_SEED = 0  # lm-eval's default
SCORES = ["benchmark", "metric", "value", "stderr", "n"]
SAMPLES = ["benchmark", "task", "doc_id", "metric", "value", "response"]


@dataclass(frozen=True)
class Evaluation:
    """What lm-eval reports about one model on one suite.

    Values and standard errors of shares are in percent, all others in lm-eval's units (tspin.schema.NO_SHARES).

    scores: one row per benchmark and metric (all that lm-eval reports, not only the columns'), with columns
        `benchmark, metric, value, stderr, n`. An lm-eval group has its aggregate, over `n` problems in all.
        `stderr` is NaN where lm-eval gives none, as for a single problem.
    samples: one row per problem and metric, with columns `benchmark, task, doc_id, metric, value, response`. `task`
        differs from `benchmark` within a group; `doc_id` counts within a task. `response` is the generated text,
        None for tasks that compare likelihoods. Metrics with several values per problem are left out.
    """

    scores: pd.DataFrame
    samples: pd.DataFrame


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    suite: Suite,
    *,
    batch_size: int,
    limit: int | None = None,
    seed: int = 1234,
) -> Evaluation:
    """A model's scores on a suite, computed wherever that model is; all tasks' prompts are batched together.

    batch_size: prompts in a batch.
    limit: problems per task, the first ones; None for all.
    seed: of the draw of few-shot examples (1234 is lm-eval's default), and of NumPy's and PyTorch's generators, which
        are left in the state that the evaluation puts them in, as is Python's, seeded as lm-eval's command does.
    Raises UserError when lm-eval does not know a benchmark.
    """
    from tspin.evaluation.backend import SegmentedLM

    was_training = model.training
    with lm_eval_log(logging.ERROR):  # it warns of ready-made models as such
        lm = SegmentedLM(model, suite, tokenizer=tokenizer, batch_size=batch_size)
    try:
        return evaluate_lm(lm, suite, limit=limit, seed=seed)
    finally:
        model.train(was_training)


def evaluate_lm(lm: "LM", suite: Suite, *, limit: int | None = None, seed: int = 1234) -> Evaluation:
    """The scores of a model as lm-eval loads it; see `evaluate`."""
    import lm_eval
    from transformers import set_seed

    limit_waiting()
    set_seed(seed)
    random.seed(PYTHON_SEED)  # some tasks shuffle their choices as they are loaded
    with lm_eval_log(logging.ERROR):  # its warnings here concern custom data sets as such
        manager = task_manager_for(suite)
        with offline_benchmarks():
            tasks = {column: _loaded(manager, column, suite) for column in suite.columns}
        loaded = manager.load([*tasks.values()])
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed)
    _check_thinking(loaded["tasks"], suite)
    with lm_eval_log(logging.WARNING):
        # Not simple_evaluate: it reloads the tasks and starts a dozen programs to describe the machine, every time.
        try:
            results = lm_eval.evaluate(
                lm,
                loaded,
                samples=_chosen(tasks, limit),
                system_instruction=suite.system_instruction,
                apply_chat_template=suite.apply_chat_template,
                fewshot_as_multiturn=suite.multiturn,
            )
        except AssertionError as error:
            if "maximum sequence length" not in str(error):
                raise
            sys.stderr.write("\n")  # lm-eval leaves its progress bar open
            raise UserError(
                f"the model's context is too short for a problem and its answer ({' '.join(str(error).split())}): "
                "evaluate with fewer shots (num_fewshot in the suite), or a model of a longer context"
            ) from error
    scores = [_scores(column.benchmark, results["results"][column.benchmark]) for column in tasks]
    samples = [
        _samples(column.benchmark, leaf.task_name, results["samples"][leaf.task_name])
        for column, task in tasks.items()
        for leaf in _leaves(task)
    ]
    return Evaluation(pd.concat(scores, ignore_index=True), pd.concat(samples, ignore_index=True))


@cache
def _task_manager(include_path: Path | None, include_defaults: bool) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def task_manager_for(suite: Suite) -> "TaskManager":
    """The index that holds every benchmark; lm-eval's, seconds to build, only where it is needed.

    Raises UserError when lm-eval does not know a benchmark.
    """
    names, folder = [column.benchmark for column in suite.columns], suite.task_folder
    manager = _task_manager(folder, include_defaults=folder is None)
    if not set(names) <= set(manager.task_index):
        manager = _task_manager(folder, include_defaults=True)
    known = manager.all_subtasks + manager.all_groups
    for name in names:
        if name not in known:
            raise UserError(unknown("lm-eval task or group", name, known))
    return manager


def _loaded(manager: "TaskManager", column: Column, suite: Suite) -> "Task | Group":
    """The column's task or group, with its number of shots, its split and its generation settings.

    Set on the loaded tasks, as lm-eval itself does: a dict of overrides is looked up in no index by TaskManager.load.
    Raises UserError for what the hub's clients raise: gated sets, no network, a silent server.
    """
    try:
        loaded = manager.load([column.benchmark])
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.split(".")[0] in HUB_MODULES):
            raise
        raise UserError(
            f"{column.benchmark}: its data set cannot be loaded ({reason(error)}); where there is no network use "
            "--offline, for gated data sets accept their terms on the hub and set HF_TOKEN"
        ) from error
    for task in loaded["tasks"].values():
        if column.num_fewshot is not None:
            task.set_config("num_fewshot", column.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        if suite.split is not None:
            task.set_config("test_split", suite.split)
        if suite.gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", {**(task.get_config("generation_kwargs") or {}), **suite.gen_kwargs})
    return loaded.get("groups", {}).get(column.benchmark) or loaded["tasks"][column.benchmark]


def _check_thinking(tasks: "Mapping[str, Task]", suite: Suite) -> None:
    """Raise UserError for tasks that compare likelihoods, of which reasoning leaves nothing to compare."""
    kinds = ("loglikelihood", "multiple_choice")
    compared = [name for name, task in tasks.items() if task.get_config("output_type") in kinds]
    if suite.thinking and compared:
        raise UserError(
            f"enable_thinking: {', '.join(sorted(compared))} compare likelihoods and let no model think; "
            "set enable_thinking: false in the suite, or leave them out"
        )


def _chosen(tasks: "Mapping[Column, Task | Group]", limit: int | None) -> dict[str, list[int]] | None:
    """For each task the problems to ask: the first ones, as many as its column and the evaluation allow."""
    if limit is None and all(column.limit is None for column in tasks):
        return None
    chosen = {}
    for column, task in tasks.items():
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
            scale = _scale(benchmark, key)
            stderr = scale * stderr if isinstance(stderr, Real) else float("nan")  # lm-eval has "N/A"
            rows.append((benchmark, key, scale * value, stderr, result["sample_len"]))
    return pd.DataFrame(rows, columns=SCORES)


def _samples(benchmark: str, task: str, samples: list[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for sample in samples:
        response = sample["resps"][0][0]
        response = response if isinstance(response, str) else None
        for metric in sample["metrics"]:
            if isinstance(value := sample[metric], Real):
                key = f"{metric},{sample['filter']}"
                rows.append((benchmark, task, sample["doc_id"], key, _scale(task, key) * float(value), response))
    return pd.DataFrame(rows, columns=SAMPLES)


def _scale(benchmark: str, metric: str) -> float:
    """What lm-eval's value is multiplied by."""
    return 100.0 if is_share(benchmark, metric) else 1.0


@contextmanager
def lm_eval_log(level: int) -> Iterator[None]:
    """Keep lm-eval's log to this level and above; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)

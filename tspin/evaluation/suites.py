"""Suites of lm-evaluation-harness tasks: what a table has as columns. tspin.evaluation.harness runs them.

A suite is a YAML file, `experiments/suites/<name>.yaml`: which tasks, which metric of each makes a column, and how they
are asked. Its keys for that are lm-eval's and do what they do there; with the same keys `python -m lm_eval run` has the
same responses. Where it differs, and why: experiments/README.md.
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import Field, model_validator

from tspin.config import IsoDate, NonEmpty, Rendering
from tspin.errors import UserError
from tspin.names import SUITES
from tspin.runs.files import fingerprint
from tspin.sections import Section, read
from tspin.yaml_files import find_yaml, read_extended

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = Path(__file__).parents[1]


class Column(Section):
    """One column of the table: a metric of an lm-eval task or group."""

    benchmark: str  # lm-eval's name of the task or group
    label: str
    group: str
    metric: str  # "<metric>,<filter>" as lm-eval reports it, such as "exact_match,flexible-extract"
    num_fewshot: int | None = None  # None: the task's default
    # The first problems of each of its tasks; None: all. The evaluation's limit may be smaller.
    limit: int | None = Field(None, ge=1)


class Suite(Section):
    """The columns of a table, how their prompts are built and what becomes of the responses."""

    columns: tuple[Column, ...]  # in table order
    include_path: Path | None = None  # folder of further task files, relative to the current one or to this package
    split: str | None = None  # None: the split that each task is meant to be tested on
    apply_chat_template: bool | NonEmpty = False  # or the name of one of the tokenizer's templates
    fewshot_as_multiturn: bool | None = None  # examples as turns of their own; None: where there is a chat template
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = {}  # over the tasks' own generation settings
    chat_template_args: dict[str, Any] = {}
    enable_thinking: bool | None = None  # told to the chat template; None: nothing is
    think_end_token: str | int | None = None  # what is before it is no part of the response: its text, or its number
    # Tokens of a prompt and its response at most; None, or more than the model's context: that. Where it is None no
    # record has it: it came after results whose cells are known by their suite's keys.
    max_length: int | None = Field(default=None, ge=1, exclude_if=lambda value: value is None)
    # Ours, as training has them (tspin.config.SelfPlayConfig).
    turn_end: NonEmpty | None = None
    date: IsoDate | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Suite":
        names = [column.benchmark for column in self.columns]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"columns: {twice} is there twice; evaluations.csv has all of a benchmark's metrics")
        if not self.apply_chat_template:
            for name in ("fewshot_as_multiturn", "chat_template_args", "enable_thinking", "date"):
                if getattr(self, name) not in (None, False, {}):
                    raise ValueError(f"{name}: only a chat template has a use for it; set apply_chat_template: true")
        if self.thinking and self.think_end_token is None:
            raise ValueError("enable_thinking: give think_end_token too, what ends the reasoning (such as </think>)")
        return self

    @property
    def thinking(self) -> bool | None:
        """enable_thinking, which may stand among the template's arguments as well."""
        return self.chat_template_args.get("enable_thinking") if self.enable_thinking is None else self.enable_thinking

    @property
    def multiturn(self) -> bool:
        """Whether worked examples are turns of their own; unless it is said, where there are turns, as by lm-eval."""
        return bool(self.apply_chat_template) if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    @property
    def rendering(self) -> Rendering:
        """How conversations become text, as training says it."""
        given = {name: value for name, value in self.chat_template_args.items() if name != "enable_thinking"}
        if self.thinking is not None:
            given["enable_thinking"] = self.thinking
        return Rendering(
            system_prompt=self.system_instruction, chat_template_kwargs=given, turn_end=self.turn_end, date=self.date
        )

    def alike(self, run: Rendering) -> "Suite":
        """The suite that asks as a run writes its prompts, in all that it does not say itself. Raises UserError."""
        theirs: dict[str, Any] = {"turn_end": run.turn_end}
        if self.apply_chat_template:
            arguments = dict(run.chat_template_kwargs or {})
            theirs |= {"system_instruction": run.system_prompt, "chat_template_args": arguments, "date": run.date}
        theirs = {name: value for name, value in theirs.items() if name not in self.model_fields_set}
        return read(Suite, {**self.model_dump(), **theirs}, "evaluation.suite: ")

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


def check_chat_template(suite: Suite, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise UserError where a suite puts its problems into a chat template that the tokenizer has not."""
    if suite.apply_chat_template and not tokenizer.chat_template:
        raise UserError(
            "apply_chat_template: this suite asks for the tokenizer's chat template, and it has none: save one with "
            "the tokenizer, or set apply_chat_template: false in a suite of your own (`extends: …`)"
        )


def load_suite(name_or_path: str | Path) -> Suite:
    """The suite in a YAML file, or of that name in `experiments/suites`.

    `extends: <name>` at the top of a file starts from another suite; what it says itself comes on top.
    Raises UserError for an unknown name and for a file with unknown keys or bad values.
    """
    path = find_yaml(str(name_or_path), SUITES, "suite")
    settings = read_extended(path, SUITES, "suite")
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a suite is a mapping with the key `columns`")
    return read(Suite, settings, f"{path}: ")


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

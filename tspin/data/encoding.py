"""Rows in, examples out: prompts and labelled responses as tokens, encoded once where that takes long."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tspin.config import SelfPlayConfig
from tspin.data.formats import Message
from tspin.data.mapped import FILE, TypedRows, column, mapped, table_of
from tspin.data.responses import RESPONSE_SCHEMA, Response, response_rows
from tspin.data.sources import Source, source_of
from tspin.data.templates import encode_prompt, encode_response, special_tokens, spelt_tokens
from tspin.errors import UserError
from tspin.models import tokenizer_fingerprint
from tspin.runs.files import fingerprint, fingerprint_of
from tspin.runs.locks import owned
from tspin.runs.stages import run_stage

SETTINGS = ("template", "max_prompt_length", "max_completion_length", "long_prompts")  # that examples depend on
BAR_AFTER = 10  # seconds of encoding that need no progress bar
EXAMPLE_SCHEMA = pa.schema([*RESPONSE_SCHEMA, ("prompt", pa.string()), ("prompt_ids", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class Example:
    """A prompt and its labelled response, encoded. `prompt_id` is the row's number in the data set."""

    prompt_id: int
    prompt: str
    prompt_ids: list[int]
    labelled: Response


class Examples(TypedRows[Example]):
    """Examples of a data set of EXAMPLE_SCHEMA.

    noted: "dropped", "truncated", "cut", "special_tokens" → numbers of such rows, only what there is.
    remarks: that in words, a line per kind.
    fingerprint: of the prompts' numbers and tokens and the labels' tokens. prompts_fingerprint: without the labels.
    """

    def __init__(
        self,
        dataset: Dataset,
        noted: Mapping[str, list[int]],
        remarks: Sequence[str],
        fingerprint: str | None = None,
        prompts_fingerprint: str | None = None,
    ):
        super().__init__(
            dataset.select_columns(["prompt_id", "prompt", "prompt_ids", "ids", "text", "finished"]),
            lambda number, prompt, prompt_ids, *label: Example(number, prompt, prompt_ids, Response(*label)),
        )
        self.noted = noted
        self.remarks = remarks
        numbers = self.prompt_ids.tolist()
        labels = (label.ids for label in self.labelled)
        self.fingerprint = fingerprint or fingerprint_of(zip(numbers, self.prompts, labels, strict=True))
        self.prompts_fingerprint = prompts_fingerprint or fingerprint_of(zip(numbers, self.prompts, strict=True))

    @property
    def prompt_ids(self) -> np.ndarray:
        """The prompts' numbers."""
        return column(self.dataset, "prompt_id")

    @property
    def prompts(self) -> TypedRows[list[int]]:
        """The prompts' tokens."""
        return TypedRows(self.dataset.select_columns(["prompt_ids"]), lambda ids: ids)

    @property
    def labelled(self) -> TypedRows[Response]:
        """The labelled responses."""
        return response_rows(self.dataset)


def encode_dataset(
    dataset: Source | Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig
) -> Examples:
    """Rows of a known format (tspin.data.formats) as examples, numbered as `source_of` does. Raises UserError.

    What is made of large data sets (`Source.key`) is kept in args.shared_dir, or the run's folder, and read from there
    the next time. Rows of note are told on stderr.
    """
    source = dataset if isinstance(dataset, Source) else source_of(dataset)
    if source.key is None:
        examples = encode_examples(source.read(), tokenizer, args)
    else:
        examples = _encoded_once(source, tokenizer, args)
    for remark in examples.remarks:
        sys.stderr.write(f"tspin: {remark}\n")
    return examples


def _encoded_once(source: Source, tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig) -> Examples:
    settings = {name: getattr(args, name) for name in SETTINGS}
    inputs = {"rows": source.key, "tokenizer": tokenizer_fingerprint(tokenizer), **settings}
    folder = Path(args.shared_dir or str(args.output_dir))
    path = folder / f"examples-{fingerprint(inputs)}"

    def produce(target: Path) -> dict[str, Any]:
        target.mkdir()
        made = encode_examples(source.read(), tokenizer, args, target / FILE)
        return {name: getattr(made, name) for name in ("noted", "remarks", "fingerprint", "prompts_fingerprint")}

    with owned(folder, wait=True):
        facts = run_stage(path, inputs, produce).facts
    return Examples(Dataset.from_file(str(path / FILE)), **facts)


def encode_examples(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig, path: Path | None = None
) -> Examples:
    """Encode checked rows (tspin.data.rows.ROWS). path: keeps what is made of them there, an Arrow file.

    A prompt over args.max_prompt_length is dealt with as args.long_prompts says: "error" raises UserError, "drop"
    leaves the row out, "truncate" keeps the prompt's last tokens. Rows that were dropped, or cut in prompt or response,
    and those whose text spells special tokens, are in `noted` of what is returned, and counted and listed in its
    `remarks`.
    Raises UserError for a tokenizer without an end token, and where no rows are left or two have the same number.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token): set one, or responses could never end")
    with tqdm(total=len(rows), desc="encoding", unit="row", delay=BAR_AFTER) as bar:
        encoder = _Encoder(tokenizer, args, bar)
        dataset = mapped(rows, encoder, EXAMPLE_SCHEMA, path=path)
    if not len(dataset):
        raise UserError("no data left: every prompt is longer than max_prompt_length")
    if len(np.unique(column(dataset, "prompt_id"))) < len(dataset):
        raise UserError("train_dataset: two rows have the same prompt_id; responses are matched by it")
    return Examples(dataset, encoder.noted, encoder.remarks(len(rows)))


class _Encoder:
    """Encodes rows, a batch at a time, and notes those that are not learned as they stand."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig, bar: tqdm):
        self.tokenizer = tokenizer
        self.args = args
        self.bar = bar
        self.noted: dict[str, list[int]] = {}
        self._special = special_tokens(tokenizer)
        self._spelt: set[str] = set()

    def __call__(self, batch: dict[str, list[Any]]) -> pa.Table:
        rows = map(
            self._encoded, batch["number"], map(json.loads, batch["prompt"]), map(json.loads, batch["completion"])
        )
        table = table_of([row for row in rows if row], EXAMPLE_SCHEMA)
        self.bar.update(len(batch["number"]))
        return table

    def _encoded(self, number: int, prompt: list[Message], completion: list[Message]) -> tuple[Any, ...]:
        """A row of EXAMPLE_SCHEMA; an empty one where the prompt is dropped."""
        limit, long_prompts = self.args.max_prompt_length, self.args.long_prompts
        text, ids = encode_prompt(prompt, self.tokenizer, self.args.template, self._special)
        if not ids:
            raise UserError(f"data row {number + 1}: the tokenizer makes no token of this prompt")
        if len(ids) > limit:
            if long_prompts == "error":
                raise UserError(
                    f"data row {number + 1}: prompt of {len(ids)} tokens, max_prompt_length is "
                    f"{limit}; raise it, or set long_prompts to truncate or drop"
                )
            self._note("dropped" if long_prompts == "drop" else "truncated", number)
            if long_prompts == "drop":
                return ()
            ids = ids[-limit:]
        if spelt := spelt_tokens([*prompt, *completion], self._special):
            self._spelt.update(spelt)
            self._note("special_tokens", number)
        label = encode_response(completion[-1]["content"], self.tokenizer, self.args.max_completion_length)
        if not label.finished:
            self._note("cut", number)
        return number, label.text, label.ids, label.finished, text, ids

    def _note(self, kind: str, number: int) -> None:
        self.noted.setdefault(kind, []).append(number)

    def remarks(self, count: int) -> list[str]:
        """The noted rows in words, of `count` rows in all, a line per kind."""
        limit, longest = self.args.max_prompt_length, self.args.max_completion_length
        as_text = "as text"
        if self.args.template == "none":
            as_text = "as control tokens in prompts (template none), as text elsewhere"
        says = {
            "dropped": f"dropped: prompts of more than max_prompt_length, {limit}",
            "truncated": f"cut to the last {limit} tokens of their prompts (max_prompt_length)",
            "cut": f"cut to {longest} tokens of their response and no end token (max_completion_length)",
            "special_tokens": f"spell special tokens ({' '.join(sorted(self._spelt))}), taken {as_text}",
        }
        remarks = []
        for kind, numbers in self.noted.items():
            listed = ", ".join(str(n + 1) for n in numbers[:10]) + (", …" if len(numbers) > 10 else "")
            remarks.append(f"{len(numbers)} of {count} data rows {says[kind]}: rows {listed}")
        return remarks

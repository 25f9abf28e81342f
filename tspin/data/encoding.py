"""Rows in, examples out: prompts and labelled responses as tokens, encoded once where that takes long."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tspin.config import SelfPlayConfig
from tspin.data.mapped import FILE, TypedRows, column, mapped, table_of
from tspin.data.responses import RESPONSE_SCHEMA, Response, response_rows
from tspin.data.sources import Source, source_of
from tspin.data.templates import PAPER_TEMPLATE, Template, Written
from tspin.errors import UserError, tell
from tspin.models import tokenizer_fingerprint
from tspin.runs.files import fingerprint, fingerprint_of
from tspin.runs.locks import owned
from tspin.runs.stages import run_stage

SETTINGS = ("max_prompt_length", "max_completion_length", "long_prompts")  # that examples depend on
BAR_AFTER = 10  # seconds of encoding that need no progress bar
GENERATED = {"ids": "generated_ids", "text": "generated_text", "finished": "generated_finished"}
EXAMPLE_SCHEMA = pa.schema(
    [
        *(field for field in RESPONSE_SCHEMA if field.name != "logp"),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("task", pa.string()),
        *((name, RESPONSE_SCHEMA.field(cell).type) for cell, name in GENERATED.items()),  # null where there is none
    ]
)


@dataclass(frozen=True)
class Example:
    """A prompt and its labelled response, encoded. `prompt_id` is the row's number in the data set.

    task: what kind of prompt it is, where the data says so.
    """

    prompt_id: int
    prompt: str
    prompt_ids: list[int]
    labelled: Response
    task: str | None = None


class Examples(TypedRows[Example]):
    """Examples of a data set of EXAMPLE_SCHEMA.

    noted: a kind ("dropped", "truncated", "cut", "border", …) → numbers of such rows, only what there is.
    remarks: how prompts and responses are written, and the noted rows, in words, a line each.
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
            dataset.select_columns(["prompt_id", "prompt", "prompt_ids", "task", "ids", "text", "finished"]),
            lambda number, prompt, ids, task, *label: Example(number, prompt, ids, Response(*label), task),
        )
        self._generated = dataset.select_columns(list(GENERATED.values()))
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

    @property
    def generated(self) -> TypedRows[Response] | None:
        """The responses that came with the data, to be iteration 0's y′; None where there are none."""
        cells = self._generated.rename_columns({name: cell for cell, name in GENERATED.items()})
        return None if cells[0]["ids"] is None else response_rows(cells)


def encode_dataset(
    dataset: Source | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    args: SelfPlayConfig,
    name: str = "train_dataset",
) -> Examples:
    """Rows of any format (tspin.data.formats) as examples. name: of rows in memory, for messages. Raises UserError.

    What is made of large data sets (`Source.key`) is kept in args.shared_dir, or the run's folder, and read from there
    the next time. Rows of note are told on stderr.
    """
    source = dataset if isinstance(dataset, Source) else source_of(dataset, name=name)
    if source.key is None:
        examples = encode_examples(source.read(), tokenizer, args)
    else:
        examples = _encoded_once(source, tokenizer, args)
    for remark in examples.remarks:
        tell(remark)
    return examples


def _encoded_once(source: Source, tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig) -> Examples:
    settings = {name: getattr(args, name) for name in SETTINGS} | {"rendering": asdict(args.rendering)}
    inputs = {
        "columns": EXAMPLE_SCHEMA.names,
        "rows": source.key,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **settings,
    }
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
    leaves the row out, "truncate" keeps the prompt's last tokens. Rows that are not learned as they stand are in
    `noted` of what is returned, and counted and listed in its `remarks`.
    Raises UserError for a tokenizer without an end token, for rows that the chat template cannot write, and where no
    rows are left or two have the same number.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token): set one, or responses could never end")
    with tqdm(total=len(rows), desc="encoding", unit="row", delay=BAR_AFTER) as bar:
        encoder = _Encoder(tokenizer, args, bar)
        dataset = mapped(rows, encoder, EXAMPLE_SCHEMA, path=path)
    count = len(np.unique(column(rows, "row")))
    encoder.refuse(count)
    if not len(dataset):
        raise UserError("no data left: every prompt is longer than max_prompt_length")
    if len(np.unique(column(dataset, "prompt_id"))) < len(dataset):
        raise UserError("two rows of the data have the same prompt_id; responses are matched by it")
    return Examples(dataset, encoder.noted, [encoder.manner(), *encoder.remarks(count)])


class _Encoder:
    """Encodes rows, a batch at a time, and notes those that are not learned as they stand."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig, bar: tqdm):
        self.template = Template(tokenizer, args.rendering)
        self.args = args
        self.bar = bar
        self._noted: dict[str, set[int]] = {}  # of a row each of its examples may say the same
        self.refused: dict[int, str] = {}  # row → why it cannot be rendered

    def __call__(self, batch: dict[str, list[Any]]) -> pa.Table:
        rows = [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
        encoded = self._with_responses(rows, "completion")
        generated = {}
        if rows[0]["generated"] is not None:
            generated = {row["number"]: response for row, _, _, response in self._with_responses(rows, "generated")}
        examples = [self._example(*item, generated.get(item[0]["number"])) for item in encoded]
        self.bar.update(len(rows))
        return table_of([cells for cells in examples if cells], EXAMPLE_SCHEMA)

    def _with_responses(
        self, rows: Sequence[dict[str, Any]], column: str
    ) -> list[tuple[dict[str, Any], Written, list[int], Response]]:
        """(row, text, prompt's tokens, response in `column`) of the rows that can be rendered."""
        written = [(row, parts) for row in rows if (parts := self._written(row, column))]
        hidden = [parts.hidden for _, parts in written]
        prompts = self.template.encode([parts.prompt for _, parts in written], hidden)
        wholes = self.template.encode([self._whole(parts) for _, parts in written], hidden)
        return [
            (row, parts, prompt, self._response(row, parts, prompt, whole))
            for (row, parts), prompt, whole in zip(written, prompts, wholes, strict=True)
        ]

    def _written(self, row: dict[str, Any], column: str) -> Written | None:
        """A row as text; None where it cannot be rendered."""
        prompt, (response,) = json.loads(row["prompt"]), json.loads(row[column])
        try:
            return self.template.write(prompt, response, json.loads(row["tools"] or "null"))
        except UserError as error:
            self.refused[row["row"]] = str(error)
            return None

    def _whole(self, written: Written) -> str:
        return f"{written.prompt}{written.response}{self.template.end.text}"

    def _example(
        self, row: dict[str, Any], written: Written, prompt: list[int], label: Response, generated: Response | None
    ) -> tuple[Any, ...]:
        """A row of EXAMPLE_SCHEMA; an empty one where the prompt is dropped."""
        args = self.args
        if not prompt:
            raise UserError(f"data row {row['row'] + 1}: the tokenizer makes no token of this prompt")
        if len(prompt) > args.max_prompt_length:
            if args.long_prompts == "error":
                raise UserError(
                    f"data row {row['row'] + 1}: prompt of {len(prompt)} tokens, max_prompt_length is "
                    f"{args.max_prompt_length}; raise it, or set long_prompts to truncate or drop"
                )
            self._note("dropped" if args.long_prompts == "drop" else "truncated", row)
            if args.long_prompts == "drop":
                return ()
            prompt = prompt[-args.max_prompt_length :]
        for note in written.notes:
            self._note(note, row)
        if not label.finished:
            self._note("cut", row)
        text = written.shown(written.prompt)
        cells = (None, None, None) if generated is None else (generated.ids, generated.text, generated.finished)
        return row["number"], label.text, label.ids, label.finished, text, prompt, row["task"], *cells

    def _response(self, row: dict[str, Any], written: Written, prompt: list[int], whole: list[int]) -> Response:
        """A row's response: what follows the prompt in both together, or cut and without an end."""
        assert written.response is not None
        ids = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or not ids:
            self._note("border", row)
            ids = self.template.encode_after(written.response + self.template.end.text, written.hidden)
        longest = self.args.max_completion_length
        return Response(ids[:longest], written.shown(written.response).lstrip(" "), finished=len(ids) <= longest)

    def _note(self, kind: str, row: dict[str, Any]) -> None:
        self._noted.setdefault(kind, set()).add(row["row"])

    @property
    def noted(self) -> dict[str, list[int]]:
        """See `Examples`."""
        return {kind: sorted(rows) for kind, rows in self._noted.items()}

    def refuse(self, count: int) -> None:
        """Raise UserError where rows could not be rendered, of `count` in all."""
        if self.refused:
            number, why = next(iter(self.refused.items()))
            raise UserError(f"{len(self.refused)} of {count} data rows: {why}; the first is row {number + 1}")

    def remarks(self, count: int) -> list[str]:
        """How prompts and responses are written, and the noted rows in words, of `count` in all, a line per kind."""
        limit, longest = self.args.max_prompt_length, self.args.max_completion_length
        as_text = "as text"
        if self.args.template == "none":
            as_text = "as control tokens in prompts (template none), as text elsewhere"
        says = {
            "dropped": f"dropped: prompts of more than max_prompt_length, {limit}",
            "truncated": f"cut to the last {limit} tokens of their prompts (max_prompt_length)",
            "cut": f"cut to {longest} tokens of their response and no end token (max_completion_length)",
            "special_tokens": f"spell special tokens, taken {as_text}",
            "left_out": "have messages that the chat template writes in part alone",
            "opened_otherwise": "have responses that stand right after the generation prompt, which the chat template "
            "does not write before an assistant's message",
            "border": "have prompts whose end the tokenizer would merge with the response: encoded apart",
        }
        remarks = []
        for kind, numbers in self.noted.items():
            listed = ", ".join(str(n + 1) for n in numbers[:10]) + (", …" if len(numbers) > 10 else "")
            remarks.append(f"{len(numbers)} of {count} data rows {says[kind]}: rows {listed}")
        return remarks

    def manner(self) -> str:
        """How prompts begin and responses end, in one line."""
        template, begin = self.template, self.template.begin_text
        line = f"responses end with {template.end}"
        line += f", prompts begin with {begin!r}" if begin else ""
        if self.args.template == "auto" and template.form == "paper":
            form = PAPER_TEMPLATE.replace("{prompt}", "…").strip()
            line += (
                f"; there is no chat template, so that prompts are written as {form!r} (--set template=… sets another)"
            )
        date = self.args.date
        return line + (f", the chat template is told the date {date}" if date else "")

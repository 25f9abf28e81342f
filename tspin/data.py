"""Prompts, labelled responses, synthetic responses: loading, templating, encoding, storing.

Data sets are in TRL's prompt–completion format: rows {"prompt": …, "completion": …}, each a string
or a list of {"role", "content"} messages, from a JSONL or Parquet file or the hub.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from tspin.errors import UserError
from tspin.hub import load_dataset

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "


@dataclass(frozen=True)
class Response:
    """One response to a prompt.

    ids: its tokens; the end token is the last of them if and only if `finished`.
    finished: False for a response cut at the length limit, which is trained without an end token.
    """

    ids: list[int]
    text: str
    finished: bool


@dataclass(frozen=True)
class Example:
    """A prompt and its labelled response, encoded. `prompt_id` is the row's number in the data set."""

    prompt_id: int
    prompt: str
    prompt_ids: list[int]
    labelled: Response


Row = Mapping[str, Any]


def load_rows(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Rows {"prompt", "completion"} of a JSONL or Parquet file, the hub, or "pocket".

    columns: where the data set names them otherwise, {"prompt": "question", "completion": "answer"}.
        A set with a `messages` column and no completion gives the first round of each conversation.
    Raises UserError naming the file and row for missing or empty data, prompts or completions.
    """
    if path == "pocket":
        rows: Iterable[Row] = _pocket_rows()
    elif Path(path).suffix in {".jsonl", ".json", ".parquet"}:
        rows = read_rows(Path(path))
    else:
        rows = load_dataset(path, name, split, revision)
    return validate_rows(rows, path, columns)


def validate_rows(rows: Iterable[Row], source: str, columns: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows reduced to {"prompt", "completion"}; the first bad row raises UserError, counted from 1."""
    prompt_column = (columns or {}).get("prompt", "prompt")
    completion_column = (columns or {}).get("completion", "completion")
    checked = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(f"{source}, row {number}: not an object with a prompt and a completion")
        prompt: Any
        completion: Any
        if completion_column not in row and row.get("messages") is not None:
            prompt, completion = _first_round(row["messages"], source, number)
        else:
            prompt, completion = row.get(prompt_column), row.get(completion_column)
        if not _has_text(prompt):
            raise UserError(f"{source}, row {number}: no prompt (column {prompt_column!r} is missing or empty)")
        if not _has_text(completion):
            raise UserError(f"{source}, row {number}: empty response (column {completion_column!r})")
        checked.append({"prompt": prompt, "completion": completion})
    if not checked:
        raise UserError(f"{source} has no rows: give a data set with at least one prompt and response")
    return checked


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in value) and bool(
        value[-1]["content"].strip()
    )


def _first_round(messages: Any, source: str, number: int) -> tuple[list[Any], list[Any]]:
    try:
        first = [message["role"] for message in messages].index("assistant")
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{source}, row {number}: `messages` has no assistant turn with role and content") from None
    return list(messages[:first]), [messages[first]]


def _pocket_rows() -> Iterable[Row]:
    from tspin.pocket.tasks import labelled_rows

    return labelled_rows()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .parquet or .json file (a list, or a list under the key "examples"). Raises UserError."""
    if path.suffix == ".parquet":
        return list(_read_parquet(path))  # type: ignore[arg-type]
    text = _read_text(path)
    if path.suffix == ".json":
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            whole = None  # many a .json file has one object a line
        found = whole.get("examples") if isinstance(whole, dict) else whole
        if isinstance(found, list):
            return found
    return list(_parse_lines(text, path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error


def _parse_lines(text: str, path: Path) -> Iterable[Any]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also splits inside JSON strings
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); JSONL has one object a line") from error


def _read_parquet(path: Path) -> Iterable[Row]:
    try:
        return pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error


def nested_subset(rows: Sequence[dict[str, Any]], size: int | None, seed: int) -> list[tuple[int, dict[str, Any]]]:
    """(row number, row) of the first `size` rows in a seeded random order, sorted by row number.

    A smaller size gives a subset of a larger one (the paper's data-efficiency study needs that).
    Raises UserError when there are fewer rows than asked for.
    """
    if size is not None and size > len(rows):
        raise UserError(f"data.labels: {size} labelled responses asked for, the data set has {len(rows)}")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [(i, rows[i]) for i in sorted(order[:size])]


def encode_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, list[int]]:
    """(text, token ids) of a prompt as the policy sees it, up to where its response begins.

    template: "chat" for the tokenizer's own chat template, "auto" for that where there is one and
    the paper's template where there is none, "paper", "none" for the text as it is, or any text with
    {prompt} in it. A prompt given as one user's message is that message's text; longer conversations, which only a
    chat template can tell apart, always take it.
    """
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "paper"
    if template != "chat" and not isinstance(prompt, str) and [message["role"] for message in prompt] == ["user"]:
        prompt = prompt[0]["content"]
    if not isinstance(prompt, str) or template == "chat":
        if not tokenizer.chat_template:
            raise UserError("data.template: the tokenizer has no chat template; give one user's message and 'paper'")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        # The template has written the begin token itself, if the model wants one.
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
    form = {"paper": PAPER_TEMPLATE, "none": "{prompt}"}.get(template, template)
    if "{prompt}" not in form:
        raise UserError(f"data.template {template!r}: auto, chat, paper, none, or a text with {{prompt}} in it")
    text = form.replace("{prompt}", prompt)
    return text, _without_end(tokenizer(text)["input_ids"], tokenizer)


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Some tokenizers close every text with an end token; a prompt is not the end.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_response(completion: Any, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Response:
    """A labelled response with its end token, or cut to max_tokens and without one."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Response(ids[:max_tokens], text, finished=len(ids) <= max_tokens)


def encode_examples(
    rows: Sequence[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_prompt_tokens: int,
    max_response_tokens: int,
    long_prompts: str,
) -> list[Example]:
    """Encode numbered rows. A prompt over max_prompt_tokens is dealt with as `long_prompts` says.

    "error" raises UserError, "drop" leaves the row out, "truncate" keeps the prompt's last tokens.
    Also raises UserError for a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token): set one, or responses could never end")
    examples = []
    for number, row in rows:
        text, ids = encode_prompt(row["prompt"], tokenizer, template)
        if len(ids) > max_prompt_tokens:
            if long_prompts == "error":
                raise UserError(
                    f"data row {number + 1}: prompt of {len(ids)} tokens, data.max_prompt_tokens is "
                    f"{max_prompt_tokens}; raise it, or set data.long_prompts to truncate or drop"
                )
            if long_prompts == "drop":
                continue
            ids = ids[-max_prompt_tokens:]
        response = encode_response(row["completion"], tokenizer, max_response_tokens)
        examples.append(Example(number, text, ids, response))
    if not examples:
        raise UserError("no data left: every prompt is longer than data.max_prompt_tokens")
    return examples


RESPONSE_SCHEMA = pa.schema(
    [("prompt_id", pa.int64()), ("text", pa.string()), ("ids", pa.list_(pa.int32())), ("finished", pa.bool_())]
)


def write_responses(path: Path, prompt_ids: Sequence[int], responses: Sequence[Response]) -> None:
    """Write responses as Parquet (schema: RESPONSE_SCHEMA), one row a prompt."""
    columns = [
        list(prompt_ids),
        [response.text for response in responses],
        [response.ids for response in responses],
        [response.finished for response in responses],
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, RESPONSE_SCHEMA, strict=True)]
    pq.write_table(pa.table(arrays, schema=RESPONSE_SCHEMA), path)


def read_responses(path: Path) -> dict[int, Response]:
    """Responses by prompt id. Raises UserError when the file is no such table."""
    try:
        rows = pq.read_table(path, schema=RESPONSE_SCHEMA).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{path}: not a table of responses made by `tspin sample` ({error})") from error
    return {row["prompt_id"]: Response(row["ids"], row["text"], row["finished"]) for row in rows}


def response_statistics(responses: Sequence[Response], labelled: Sequence[Response]) -> dict[str, float]:
    """What to watch about synthetic responses, as shares in [0, 1] and mean tokens.

    end_token_share: finished ones. duplicate_share: those equal to another prompt's earlier response.
    equal_to_labelled_share: y′ = y, where SPIN's loss gives no gradient.
    """
    texts = pd.Series([response.text for response in responses])
    equal = [a.ids == b.ids for a, b in zip(responses, labelled, strict=True)]
    return {
        "mean_tokens": sum(len(response.ids) for response in responses) / len(responses),
        "end_token_share": sum(response.finished for response in responses) / len(responses),
        "duplicate_share": float(texts.duplicated().mean()),
        "equal_to_labelled_share": sum(equal) / len(equal),
    }

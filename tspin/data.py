"""Prompts, labelled responses, synthetic responses: loading, templating, encoding, storing.

Data sets are in TRL's prompt–completion format: rows {"prompt": …, "completion": …}, each a string
or a list of {"role", "content"} messages, from a JSONL or Parquet file or the hub.

Data is text, templates are control: where a prompt or a response spells one of the tokenizer's special tokens
(<|im_start|>, </s>), it is encoded as the characters that it is. A prompt cannot open a turn of its own, and a response
ends where its row ends, once, and nowhere inside. Such rows are counted and listed on stderr. One exception:
with data.template "none", prompts are taken as written for the tokenizer, special tokens included; they are listed too.
"""

import json
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
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
        for what, value in (("prompt", prompt), ("response", completion)):
            if not all(map(_is_unicode, _texts(value))):
                raise UserError(f"{source}, row {number}: the {what} has half of a surrogate pair: no Unicode text")
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


def _texts(value: Any) -> list[str]:
    """The texts of a prompt or completion."""
    return [value] if isinstance(value, str) else [message["content"] for message in value]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        except (ValueError, RecursionError):
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
            except (ValueError, RecursionError) as error:  # besides bad syntax: numbers too long, nesting too deep
                raise UserError(f"{path}, line {number}: not JSON ({error}); JSONL has one object a line") from error


def _read_parquet(path: Path) -> Iterable[Row]:
    try:
        return pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from error


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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as control tokens, the longest first. Words that were merely added are not."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added, key=lambda text: (-len(text), text))


def _spelt(value: Any, special: Sequence[str]) -> list[str]:
    """The special tokens that the texts of a prompt or completion spell."""
    return [token for token in special if any(token in text for text in _texts(value))]


def encode_prompt(prompt: Any, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, list[int]]:
    """(text, token ids) of a prompt as the policy sees it, up to where its response begins.

    template: "chat" for the tokenizer's own chat template, "auto" for that where there is one and
    the paper's template where there is none, "paper", "none" for the text as it is, or any text with
    {prompt} in it. Conversations (lists of messages) always take the chat template.
    Special tokens come from the template alone; those that the prompt spells are text (but with "none").
    Raises UserError for an unknown template, and for messages that the chat template refuses.
    """
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "paper"
    special = special_tokens(tokenizer)
    given: Any = prompt
    hidden: Hidden = []
    if template != "none" or not isinstance(prompt, str):
        given, hidden = _hide(prompt, _spelt(prompt, special))
    if not isinstance(prompt, str) or template == "chat":
        if not tokenizer.chat_template:
            raise UserError("data.template: the tokenizer has no chat template; use plain prompts and 'paper'")
        messages = [{"role": "user", "content": given}] if isinstance(prompt, str) else list(given)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"the tokenizer's chat template refuses a prompt's messages ({error})") from error
        assert isinstance(text, str)
        if hidden:
            return _show(text, hidden), _encode_with_plain(text, hidden, tokenizer, special)
        # The template has written the begin token itself, if the model wants one.
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
    form = {"paper": PAPER_TEMPLATE, "none": "{prompt}"}.get(template, template)
    if "{prompt}" not in form:
        raise UserError(f"data.template {template!r}: auto, chat, paper, none, or a text with {{prompt}} in it")
    text = form.replace("{prompt}", given)
    if hidden:
        empty = _without_end(tokenizer("")["input_ids"], tokenizer)  # the begin token, if there is one
        return _show(text, hidden), empty + _encode_with_plain(text, hidden, tokenizer, special)
    return text, _without_end(tokenizer(text)["input_ids"], tokenizer)


Hidden = list[tuple[str, str]]  # (placeholder, the special token's text that it stands for)


def _hide(prompt: Any, spelt: Sequence[str]) -> tuple[Any, Hidden]:
    """A prompt with a placeholder, a character of Unicode's private use area, for each special token that it spells."""
    if not spelt:
        return prompt, []
    used = set("".join(_texts(prompt)))
    free = [mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in used]
    if len(free) < len(spelt):
        raise UserError("a prompt spells special tokens and uses all of Unicode's private characters")
    hidden = list(zip(free, spelt, strict=False))

    def replaced(text: str) -> str:
        for mark, token in hidden:
            text = text.replace(token, mark)
        return text

    if isinstance(prompt, str):
        return replaced(prompt), hidden
    return [{**message, "content": replaced(message["content"])} for message in prompt], hidden


def _show(text: str, hidden: Hidden) -> str:
    for mark, token in hidden:
        text = text.replace(mark, token)
    return text


def _encode_with_plain(
    text: str, hidden: Hidden, tokenizer: PreTrainedTokenizerBase, special: Sequence[str]
) -> list[int]:
    """Token ids of a filled-in template: its own special tokens are control tokens, what is hidden is text."""
    ids: list[int] = []
    for number, part in enumerate(re.split("(" + "|".join(map(re.escape, special)) + ")", text)):
        if number % 2:
            ids.append(tokenizer.vocab[part])
        elif part:
            ids += _encode_plain(_show(part, hidden), tokenizer)
    return ids


def _encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Some tokenizers close every text with an end token; a prompt is not the end.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_response(completion: Any, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Response:
    """A labelled response with its end token, or cut to max_tokens and without one.

    Special tokens that the text spells are text: the one end token is the last token.
    """
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    ids = [*_encode_plain(text, tokenizer), tokenizer.eos_token_id]
    return Response(ids[:max_tokens], text, finished=len(ids) <= max_tokens)


def encode_examples(
    rows: Sequence[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_prompt_tokens: int,
    max_response_tokens: int,
    long_prompts: str,
    noted: dict[str, list[int]] | None = None,
) -> list[Example]:
    """Encode numbered rows. A prompt over max_prompt_tokens is dealt with as `long_prompts` says.

    "error" raises UserError, "drop" leaves the row out, "truncate" keeps the prompt's last tokens.
    Rows that were dropped or truncated, and those whose text spells special tokens, are counted and listed on stderr;
    noted: gets their numbers, "dropped", "truncated", "special_tokens" → row numbers, only what there is.
    Also raises UserError for a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token): set one, or responses could never end")
    noted = {} if noted is None else noted
    special = special_tokens(tokenizer)
    found: set[str] = set()
    examples = []
    for number, row in rows:
        text, ids = encode_prompt(row["prompt"], tokenizer, template)
        if not ids:
            raise UserError(f"data row {number + 1}: the tokenizer makes no token of this prompt")
        if len(ids) > max_prompt_tokens:
            if long_prompts == "error":
                raise UserError(
                    f"data row {number + 1}: prompt of {len(ids)} tokens, data.max_prompt_tokens is "
                    f"{max_prompt_tokens}; raise it, or set data.long_prompts to truncate or drop"
                )
            noted.setdefault("dropped" if long_prompts == "drop" else "truncated", []).append(number)
            if long_prompts == "drop":
                continue
            ids = ids[-max_prompt_tokens:]
        if spelt := _spelt(row["prompt"], special) + _spelt(row["completion"], special):
            found.update(spelt)
            noted.setdefault("special_tokens", []).append(number)
        response = encode_response(row["completion"], tokenizer, max_response_tokens)
        examples.append(Example(number, text, ids, response))
    if not examples:
        raise UserError("no data left: every prompt is longer than data.max_prompt_tokens")
    as_text = (
        "as text" if template != "none" else "as control tokens in prompts (data.template none), as text elsewhere"
    )
    says = {
        "dropped": f"dropped: prompts of more than data.max_prompt_tokens, {max_prompt_tokens}",
        "truncated": f"cut to the last {max_prompt_tokens} tokens of their prompts (data.max_prompt_tokens)",
        "special_tokens": f"spell special tokens ({' '.join(sorted(found))}), taken {as_text}",
    }
    for kind, numbers in noted.items():
        listed = ", ".join(str(n + 1) for n in numbers[:10]) + (", …" if len(numbers) > 10 else "")
        sys.stderr.write(f"tspin: {len(numbers)} of {len(rows)} data rows {says[kind]}: rows {listed}\n")
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
    """Responses by prompt id. Raises UserError when the file is no such table, or a row of it no such response."""
    try:
        rows = pq.read_table(path, schema=RESPONSE_SCHEMA).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a table of responses made by `tspin sample` ({error})") from error
    seen = set()
    for number, row in enumerate(rows, start=1):
        problem = None
        if any(row[name] is None for name in RESPONSE_SCHEMA.names):
            problem = "an empty cell"
        elif not row["ids"] or any(token is None or token < 0 for token in row["ids"]):
            problem = "no tokens" if not row["ids"] else "a token that is none"
        elif row["prompt_id"] in seen:
            problem = f"prompt_id {row['prompt_id']} is there twice"
        if problem:
            raise UserError(f"{path}, row {number}: {problem}; make the file again by `tspin sample`")
        seen.add(row["prompt_id"])
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

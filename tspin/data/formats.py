"""Rows of prompts and completions: from files, the hub, or memory; checked, in one form.

Data sets are in TRL's prompt–completion format: rows {"prompt": …, "completion": …}, each a string
or a list of {"role", "content"} messages, from a JSONL or Parquet file or the hub. A string is one message.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

from tspin.data.mapped import BATCH, read_in
from tspin.errors import UserError
from tspin.hub.offline import load_dataset
from tspin.runs.files import sha256

LARGE = 2**25  # bytes of a data set from which encoding takes long enough to keep what it gives
MESSAGES = List({"role": Value("string"), "content": Value("string")})
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which JSON can spell and no text has
ROWS = Features(
    {
        "number": Value("int64"),
        "row": Value("int64"),
        "prompt": Value("string"),
        "completion": Value("string"),
        "tools": Value("string"),
        "generated": Value("string"),
    }
)  # the number counts from 0

Message = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set that is named and not read yet.

    read: gives its checked rows, a data set of ROWS. Raises UserError, naming source and row, at the first one without
        text, and where there is none.
    key: of a large set, JSON values that change when its rows do; None where there is no cheap way to say, or no need.
    """

    read: Callable[[], Dataset]
    key: Any = None


def load_rows(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: int | None = None,
    seed: int = 0,
) -> Source:
    """Rows of a JSONL or Parquet file, of the hub, or "pocket". Raises UserError where there is no such data set.

    name, split, revision: of a data set on the hub.
    columns: what the set calls them, {"prompt": "question", "completion": "answer"}. A set with a `messages` column and
        no completion gives the first round of each conversation.
    labels, seed: take only the rows that `nested_subset` chooses.
    """
    file = Path(path)
    given: Callable[[], Iterable[Any]]
    if path == "pocket":
        from tspin.pocket.tasks import labelled_rows

        given, key = labelled_rows, None
    elif file.suffix in {".jsonl", ".json", ".parquet"}:
        if not file.is_file():
            raise UserError(f"{path}: no such file")
        given, key = lambda: read_rows(file), sha256(file) if file.stat().st_size >= LARGE else None
    else:
        dataset = load_dataset(path, name, split, revision)
        given, key = lambda: dataset, key_of(dataset)

    def read() -> Dataset:
        rows = read_in(lambda: checked_rows(given(), path, columns), ROWS)
        return rows if labels is None else rows.select(nested_subset(len(rows), labels, seed), new_fingerprint="rows")

    return Source(read, None if key is None else [key, dict(columns or {}), labels, seed])


def source_of(dataset: Iterable[Mapping[str, Any]]) -> Source:
    """Rows that are there already, a datasets.Dataset or any mappings; an integer "prompt_id" replaces the number."""
    return Source(lambda: read_in(lambda: checked_rows(dataset, "train_dataset", numbered=True), ROWS), key_of(dataset))


def key_of(dataset: Any) -> Any:
    """`Source.key` of a datasets.Dataset, which knows its own fingerprint; None for small ones and for all else."""
    if not isinstance(dataset, Dataset) or dataset.data.nbytes < LARGE:
        return None
    return {"datasets.Dataset": dataset._fingerprint}  # a private name, but one that the library's guide shows


def checked_rows(
    rows: Iterable[Any], source: str, columns: Mapping[str, str] | None = None, numbered: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows as ROWS has them; the first bad one raises UserError, counted from 1. numbered: see `source_of`."""
    names = {"prompt": "prompt", "completion": "completion", **(columns or {})}
    number = 0
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: not an object with a prompt and a completion")
        prompt, completion = row.get(names["prompt"]), row.get(names["completion"])
        if names["completion"] not in row and row.get("messages") is not None:
            prompt, completion = _first_round(row["messages"], where)
        prompt, completion = as_messages(prompt, "user"), as_messages(completion, "assistant")
        if not prompt or not prompt[-1]["content"].strip():
            raise UserError(f"{where}: no prompt (column {names['prompt']!r} is missing or empty)")
        if not completion or not completion[-1]["content"].strip():
            raise UserError(f"{where}: empty response (column {names['completion']!r})")
        if None in (message["role"] for message in prompt):
            raise UserError(f"{where}: a message of the prompt has no role (user, assistant or system)")
        for what, messages in (("prompt", prompt), ("response", completion)):
            if any(SURROGATE.search(text or "") for message in messages for text in message.values()):
                raise UserError(f"{where}: the {what} has half of a surrogate pair: no Unicode text")
        given = row.get("prompt_id") if numbered else None
        yield {
            "number": given if isinstance(given, int) else number - 1,
            "row": number - 1,
            "prompt": json.dumps(prompt),
            "completion": json.dumps(completion[-1:]),
            "tools": None,
            "generated": None,
        }
    if not number:
        raise UserError(f"{source} has no rows: give a data set with at least one prompt and response")


def as_messages(value: Any, role: str) -> list[Message]:
    """A prompt or completion as messages {"role", "content"}; a text is one message of this role. [] for all else."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, Sequence):
        return []
    if not all(isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in value):
        return []
    roles = (message.get("role") for message in value)
    roles = (role if isinstance(role, str) else None for role in roles)
    return [{"role": role, "content": message["content"]} for role, message in zip(roles, value, strict=True)]


def _first_round(messages: Any, where: str) -> tuple[list[Any], list[Any]]:
    try:
        first = [message["role"] for message in messages].index("assistant")
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{where}: `messages` has no assistant turn with role and content") from None
    return list(messages[:first]), [messages[first]]


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a .jsonl, .parquet or .json file (a list, or a list under the key "examples"). Raises UserError.

    JSONL and Parquet are read a part at a time, other JSON whole.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix == ".json" and (listed := _read_list(path)) is not None:
        yield from listed
    else:
        yield from _read_lines(path)


def _read_list(path: Path) -> list[Any] | None:
    """The list that a JSON file is or has; None where it is no such file: many a .json has one object per line."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    listed = whole.get("examples") if isinstance(whole, dict) else whole
    return listed if isinstance(listed, list) else None


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:  # as bytes: lines end at a line feed and at no other of Unicode's line ends
        for number, line in enumerate(file, start=1):
            try:
                if (text := line.decode()).strip():
                    yield json.loads(text)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 text ({error})") from error
            except (ValueError, RecursionError) as error:  # besides bad syntax: numbers too long, nesting too deep
                raise UserError(f"{path}, line {number}: not JSON ({error}); JSONL has one object per line") from error


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            for part in file.iter_batches(BATCH):
                yield from part.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from error


def nested_subset(count: int, size: int, seed: int) -> list[int]:
    """Of `count` row numbers the first `size` in a seeded random order, sorted.

    A smaller size gives a subset of a larger one (the paper's data-efficiency study needs that).
    Raises UserError when there are fewer rows than asked for.
    """
    if size > count:
        raise UserError(f"data.labels: {size} labelled responses asked for, the data set has {count}")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return sorted(order[:size])

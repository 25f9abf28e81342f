"""Rows of prompts and completions: from files, the hub, or memory; checked, and read a row at a time.

Data sets are in TRL's prompt–completion format: rows {"prompt": …, "completion": …}, each a string
or a list of {"role", "content"} messages, from a JSONL or Parquet file or the hub.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tspin.errors import UserError
from tspin.hub.offline import load_dataset
from tspin.runs.files import sha256

LARGE_FILE, LARGE_SET = 2**25, 20_000  # bytes and rows from which encoding takes long enough to keep what it gives
READ = 1024  # rows of a Parquet file held at a time

Row = Mapping[str, Any]


class Rows:
    """The rows {"prompt", "completion"} of a data set, read from the start, and checked, at each pass over them.

    Iterating raises UserError, naming source and row, at the first one without text, and where there is none.

    read: opens the data set. columns: what it calls them, {"prompt": "question", "completion": "answer"}. A set with
        a `messages` column and no completion gives the first round of each conversation.
    key: of a large set, JSON values that change when its rows do; None where there is no cheap way to say, or no need.
    """

    def __init__(
        self,
        source: str,
        read: Callable[[], Iterable[Row]],
        columns: Mapping[str, str] | None = None,
        key: Callable[[], Any] | None = None,
    ):
        self.source = source
        self.read = read
        self.columns = columns
        self._key = key
        self._subset: tuple[int, int] | None = None

    @property
    def key(self) -> Any:
        """What identifies the rows, where that is known."""
        return None if self._key is None else [self._key(), dict(self.columns or {}), self._subset]

    def subset(self, size: int | None, seed: int) -> "Rows":
        """Only the rows that `nested_subset` chooses; all with None."""
        chosen = Rows(self.source, self.read, self.columns, self._key)
        chosen._subset = None if size is None else (size, seed)
        return chosen

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self.numbered())

    def numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows with their numbers in the full data set, from 0."""
        rows = enumerate(validate_rows(self.read(), self.source, self.columns))
        if self._subset is None:
            yield from rows
            return
        count = sum(1 for _ in validate_rows(self.read(), self.source, self.columns))
        chosen = set(nested_subset(count, *self._subset))
        yield from ((number, row) for number, row in rows if number in chosen)


def load_rows(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Rows:
    """Rows of a JSONL or Parquet file, the hub, or "pocket". columns: see Rows. Raises UserError where none is."""
    if path == "pocket":
        return Rows(path, _pocket_rows, columns)
    file = Path(path)
    if file.suffix in {".jsonl", ".json", ".parquet"}:
        if not file.is_file():
            raise UserError(f"{path}: no such file")
        large = file.stat().st_size >= LARGE_FILE
        return Rows(path, lambda: read_rows(file), columns, (lambda: sha256(file)) if large else None)
    dataset = load_dataset(path, name, split, revision)
    key = set_key(dataset)
    return Rows(path, lambda: dataset, columns, (lambda: key) if key else None)


def set_key(dataset: Any) -> Any:
    """`Rows.key` of a datasets.Dataset, which knows its own fingerprint; None for small ones and for all else."""
    known = getattr(dataset, "_fingerprint", None)
    return {"datasets.Dataset": known} if known and len(dataset) >= LARGE_SET else None


def validate_rows(
    rows: Iterable[Row], source: str, columns: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows reduced to {"prompt", "completion"}; the first bad row raises UserError, counted from 1."""
    prompt_column = (columns or {}).get("prompt", "prompt")
    completion_column = (columns or {}).get("completion", "completion")
    number = 0
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
        if not isinstance(prompt, str) and not all(isinstance(message.get("role"), str) for message in prompt):
            raise UserError(f"{source}, row {number}: a message of the prompt has no role (user, assistant or system)")
        for what, value in (("prompt", prompt), ("response", completion)):
            if not all(map(_is_unicode, texts(value))):
                raise UserError(f"{source}, row {number}: the {what} has half of a surrogate pair: no Unicode text")
        yield {"prompt": prompt, "completion": completion}
    if not number:
        raise UserError(f"{source} has no rows: give a data set with at least one prompt and response")


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    if not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in value) and bool(
        value[-1]["content"].strip()
    )


def texts(value: Any) -> list[str]:
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


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a .jsonl, .parquet or .json file (a list, or a list under the key "examples"). Raises UserError.

    JSONL and Parquet are read a part at a time, other JSON whole.
    """
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".json" and (listed := _read_list(path)) is not None:
            yield from listed
        else:
            yield from _read_lines(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def _read_list(path: Path) -> list[Any] | None:
    """The list that a JSON file is or has; None where it is no such file: many a .json has one object a line."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    found = whole.get("examples") if isinstance(whole, dict) else whole
    return found if isinstance(found, list) else None


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:  # as bytes: lines end at a line feed and at no other of Unicode's line ends
        for number, line in enumerate(file, start=1):
            try:
                if (text := line.decode()).strip():
                    yield json.loads(text)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 text ({error})") from error
            except (ValueError, RecursionError) as error:  # besides bad syntax: numbers too long, nesting too deep
                raise UserError(f"{path}, line {number}: not JSON ({error}); JSONL has one object a line") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            for part in file.iter_batches(READ):
                yield from part.to_pylist()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from error


def nested_subset(count: int, size: int | None, seed: int) -> list[int]:
    """Of `count` row numbers the first `size` in a seeded random order, sorted.

    A smaller size gives a subset of a larger one (the paper's data-efficiency study needs that).
    Raises UserError when there are fewer rows than asked for.
    """
    if size is not None and size > count:
        raise UserError(f"data.labels: {size} labelled responses asked for, the data set has {count}")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return sorted(order[:size])

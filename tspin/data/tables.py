"""Examples and responses, any number of them: Arrow tables, in memory while small, in memory-mapped files when large.

Rows become Python objects when they are asked for, and no earlier: what a run holds does not grow with its text.
"""

import mmap
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tspin.errors import UserError
from tspin.runs.files import fingerprint_of

BATCH = 1024  # rows of a record batch
IN_MEMORY = 2**28  # bytes of a table that stays in memory
T = TypeVar("T")


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


RESPONSE_SCHEMA = pa.schema(
    [("prompt_id", pa.int64()), ("text", pa.string()), ("ids", pa.list_(pa.int32())), ("finished", pa.bool_())]
)
EXAMPLE_SCHEMA = pa.schema([*RESPONSE_SCHEMA, ("prompt", pa.string()), ("prompt_ids", pa.list_(pa.int32()))])


class View(Sequence[T]):
    """`size` items, each made by `get` when it is asked for; a slice is a list."""

    def __init__(self, size: int, get: Callable[[int], T]):
        self.size = size
        self.get = get

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(index)
        return self.get(index % self.size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Table:
    """Random access to an Arrow table's cells."""

    def __init__(self, table: pa.Table):
        self.table = table
        lengths = [len(chunk) for chunk in table.column(0).chunks]
        self._starts = np.cumsum([0, *lengths]).tolist()
        self._lists: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.table.num_rows

    def value(self, column: str, row: int) -> Any:
        """A text, number or truth value."""
        chunk = bisect_right(self._starts, row) - 1
        return self.table.column(column).chunk(chunk)[row - self._starts[chunk]].as_py()

    def ids(self, column: str, row: int) -> list[Any]:
        """A list of tokens, or of other numbers."""
        number = bisect_right(self._starts, row) - 1
        if (column, number) not in self._lists:
            chunk = self.table.column(column).chunk(number)
            self._lists[column, number] = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        offsets, values = self._lists[column, number]
        row -= self._starts[number]
        return values[offsets[row] : offsets[row + 1]].tolist()

    def array(self, column: str) -> np.ndarray:
        """All of a column of numbers."""
        return self.table.column(column).to_numpy()


class TableWriter:
    """Collects rows: in memory, and beyond IN_MEMORY bytes in a file. As a context manager it flushes at the end.

    path: write there from the start, as an Arrow IPC file; without, the file is one that never has a name, so that
    nothing is left however the process ends (TMPDIR says on which disk).
    """

    def __init__(self, schema: pa.Schema, path: Path | None = None):
        self.schema = schema
        self.path = path
        self._rows: list[tuple[Any, ...]] = []
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        self._writer: Any = pa.ipc.new_file(str(path), schema) if path else None
        self._nameless: Any = None

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def add(self, *row: Any) -> None:
        """A row, its cells in the schema's order."""
        self._rows.append(row)
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            rows, self._rows = self._rows, []
            self.add_batch(record_batch(rows, self.schema))

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Rows as columns, of the same schema."""
        if self._writer is not None:
            self._writer.write_batch(batch)
            return
        self._batches.append(batch)
        self._bytes += batch.nbytes
        if self._bytes > IN_MEMORY:
            self._nameless = tempfile.TemporaryFile()
            self._writer = pa.ipc.new_file(pa.PythonFile(self._nameless, "w"), self.schema)
            for kept in self._batches:
                self._writer.write_batch(kept)
            self._batches = []

    def table(self) -> Table:
        """The rows, after the `with` block; once."""
        if self.path:
            return open_table(self.path)
        if self._nameless is None:
            return Table(pa.Table.from_batches(self._batches, self.schema))
        with self._nameless as file:
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # outlives the file
        return Table(pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped))).read_all())


def record_batch(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows, their cells in the schema's order, as columns."""
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def open_table(path: Path) -> Table:
    """An Arrow IPC file, memory-mapped."""
    return Table(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


class Examples(View[Example]):
    """Examples of a table of EXAMPLE_SCHEMA. Raises UserError where two have the same prompt_id.

    noted: "dropped", "truncated", "special_tokens" → numbers of such rows of the data set, only what there is.
    remarks: that in words, a line a kind.
    """

    def __init__(self, table: Table, noted: Mapping[str, list[int]] | None = None, remarks: Sequence[str] = ()):
        super().__init__(len(table), self._example)
        self.table = table
        self.noted = dict(noted or {})
        self.remarks = list(remarks)
        self.prompt_ids = table.array("prompt_id")
        if len(np.unique(self.prompt_ids)) < len(table):
            raise UserError("train_dataset: two rows have the same prompt_id; responses are matched by it")

    def _example(self, row: int) -> Example:
        value, ids = self.table.value, self.table.ids
        return Example(value("prompt_id", row), value("prompt", row), ids("prompt_ids", row), self._labelled(row))

    def _labelled(self, row: int) -> Response:
        return _response(self.table, row)

    @property
    def prompts(self) -> View[list[int]]:
        """The prompts' tokens."""
        return View(len(self), lambda row: self.table.ids("prompt_ids", row))

    @property
    def labelled(self) -> View[Response]:
        """The labelled responses."""
        return View(len(self), self._labelled)

    @cached_property
    def fingerprint(self) -> str:
        """Of the prompts' numbers and tokens and the labels' tokens."""
        ids = self.table.ids
        return fingerprint_of(
            [int(number), ids("prompt_ids", row), ids("ids", row)] for row, number in enumerate(self.prompt_ids)
        )

    @cached_property
    def prompts_fingerprint(self) -> str:
        """Of the prompts' numbers and tokens."""
        return fingerprint_of(
            [int(number), self.table.ids("prompt_ids", row)] for row, number in enumerate(self.prompt_ids)
        )


class Responses(Mapping[int, Response]):
    """Responses by prompt id, of a table of RESPONSE_SCHEMA."""

    def __init__(self, table: Table):
        self.table = table
        self.prompt_ids = table.array("prompt_id")
        self._order = np.argsort(self.prompt_ids, kind="stable")
        self._sorted = self.prompt_ids[self._order]

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[int]:
        return iter(self.prompt_ids.tolist())

    def __getitem__(self, prompt_id: int) -> Response:
        place = int(np.searchsorted(self._sorted, prompt_id))
        if place == len(self._sorted) or self._sorted[place] != prompt_id:
            raise KeyError(prompt_id)
        return _response(self.table, int(self._order[place]))

    def of(self, prompt_ids: Sequence[int] | np.ndarray) -> View[Response]:
        """The responses to these prompts, in their order."""
        return View(len(prompt_ids), lambda i: self[int(prompt_ids[i])])


def _response(table: Table, row: int) -> Response:
    return Response(table.ids("ids", row), table.value("text", row), table.value("finished", row))


def write_parquet(path: Path, schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as Parquet, a part at a time."""
    left = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while part := list(islice(left, 16 * BATCH)):
            writer.write_batch(record_batch(part, schema))


def write_responses(path: Path, prompt_ids: Iterable[int], responses: Iterable[Response]) -> None:
    """Write responses as Parquet (schema: RESPONSE_SCHEMA), one row a prompt."""
    pairs = zip(prompt_ids, responses, strict=True)
    write_parquet(path, RESPONSE_SCHEMA, ((int(number), r.text, r.ids, r.finished) for number, r in pairs))


def read_responses(path: Path) -> Responses:
    """Responses by prompt id. Raises UserError when the file is no such table, or a row of it no such response."""
    try:
        with pq.ParquetFile(path) as file, TableWriter(RESPONSE_SCHEMA) as writer:
            start = 0
            for part in file.iter_batches(BATCH):
                arrays = [part.column(field.name).cast(field.type) for field in RESPONSE_SCHEMA]
                batch = pa.record_batch(arrays, schema=RESPONSE_SCHEMA)
                _check(batch, path, start)
                start += len(batch)
                writer.add_batch(batch)
        responses = Responses(writer.table())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a table of responses made by `tspin sample` ({error})") from error
    numbers, first = np.unique(responses.prompt_ids, return_index=True)
    if len(numbers) < len(responses):
        row = int(np.setdiff1d(np.arange(len(responses)), first)[0])
        raise _bad_row(path, row, f"prompt_id {responses.prompt_ids[row]} is there twice")
    return responses


def _check(batch: pa.RecordBatch, path: Path, start: int) -> None:
    """Raise UserError for the first row, counted from `start`, that is no response."""
    ids = batch.column("ids")
    tokens = ids.flatten()
    sound = not any(column.null_count for column in batch.columns) and not tokens.null_count
    if sound and (not len(tokens) or pc.min(tokens).as_py() >= 0) and (pc.list_value_length(ids).to_numpy() > 0).all():
        return
    for number, row in enumerate(batch.to_pylist(), start=start):
        if any(value is None for value in row.values()):
            raise _bad_row(path, number, "an empty cell")
        if not row["ids"] or any(token is None or token < 0 for token in row["ids"]):
            raise _bad_row(path, number, "no tokens" if not row["ids"] else "a token that is none")


def _bad_row(path: Path, row: int, problem: str) -> UserError:
    return UserError(f"{path}, row {row + 1}: {problem}; make the file again by `tspin sample`")


def response_statistics(responses: Sequence[Response], labelled: Sequence[Response]) -> dict[str, float]:
    """What to watch about synthetic responses, as shares in [0, 1] and mean tokens.

    end_token_share: finished ones. duplicate_share: those equal to another prompt's earlier response.
    equal_to_labelled_share: y′ = y, where SPIN's loss gives no gradient.
    """
    count, tokens, finished, equal = len(responses), 0, 0, 0
    different = set()
    for response, label in zip(responses, labelled, strict=True):
        tokens += len(response.ids)
        finished += response.finished
        equal += response.ids == label.ids
        different.add(hash(response.text))
    return {
        "mean_tokens": tokens / count,
        "end_token_share": finished / count,
        "duplicate_share": (count - len(different)) / count,
        "equal_to_labelled_share": equal / count,
    }

"""Responses to prompts, labelled or drawn: in memory-mapped rows, and in the Parquet files of a run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from tspin.data.mapped import BATCH, TypedRows, column, mapped, reordered, table_of
from tspin.errors import UserError

ROW_GROUP = 16 * BATCH  # rows of a Parquet file that are read at a time
RESPONSE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("text", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
        ("logp", pa.float64()),  # null where nobody watched
    ]
)


@dataclass(frozen=True)
class Response:
    """One response to a prompt.

    ids: its tokens; the end token is the last of them if and only if `finished`.
    finished: False for a response cut at the length limit, which is trained without an end token.
    logp: log π of its tokens in nats, as the sampler that drew it computed it; None where nobody watched.
    """

    ids: list[int]
    text: str
    finished: bool
    logp: float | None = field(default=None, compare=False)


def response_rows(dataset: Dataset) -> TypedRows[Response]:
    """The responses in the rows of a data set with RESPONSE_SCHEMA's columns."""
    cells = [name for name in ("ids", "text", "finished", "logp") if name in dataset.column_names]
    return TypedRows(dataset.select_columns(cells), Response)


class Responses(Mapping[int, Response]):
    """Responses by prompt id, from a data set of RESPONSE_SCHEMA."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.prompt_ids = column(dataset, "prompt_id")
        self.index = pd.Index(self.prompt_ids)
        self._rows = response_rows(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(self.prompt_ids.tolist())

    def __getitem__(self, prompt_id: int) -> Response:
        return self._rows[self.index.get_loc(prompt_id)]

    def of(self, prompt_ids: Sequence[int] | np.ndarray) -> TypedRows[Response]:
        """The responses to these prompts, in their order. Raises KeyError where there is none to one of them."""
        places = self.index.get_indexer(prompt_ids)
        if (places < 0).any():
            raise KeyError(prompt_ids[int((places < 0).argmax())])
        return response_rows(reordered(self.dataset, places))


def write_parquet(path: Path, schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows, their cells in the schema's order, as Parquet, a part at a time."""
    left = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while part := list(islice(left, ROW_GROUP)):
            writer.write_table(table_of(part, schema))


def write_responses(path: Path, prompt_ids: Iterable[int], responses: Iterable[Response]) -> None:
    """Write responses as Parquet (schema: RESPONSE_SCHEMA), one row per prompt."""
    pairs = zip(prompt_ids, responses, strict=True)
    write_parquet(path, RESPONSE_SCHEMA, ((int(number), r.text, r.ids, r.finished, r.logp) for number, r in pairs))


def read_responses(path: Path) -> Responses:
    """Responses by prompt id. Raises UserError when the file is no such table, or a row of it no such response."""
    try:
        with pq.ParquetFile(path) as file:

            def row_group(batch: dict[str, list[int]]) -> pa.Table:
                part = file.read_row_group(batch["number"][0])
                return pa.table([part[name].cast(kind) for name, kind in columns.items()], schema=RESPONSE_SCHEMA)

            columns = dict(zip(RESPONSE_SCHEMA.names, RESPONSE_SCHEMA.types, strict=True))
            numbers = Dataset.from_dict({"number": range(file.num_row_groups)})
            responses = Responses(mapped(numbers, row_group, RESPONSE_SCHEMA, batch_size=1))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a table of responses made by `tspin sample` ({error})") from error
    _check(responses, path)
    return responses


def _check(responses: Responses, path: Path) -> None:
    """Raise UserError for the first row that is no response."""
    for number, part in enumerate(responses.dataset.with_format("arrow").iter(BATCH)):
        tokens, lengths = pc.list_flatten(part["ids"]), pc.list_value_length(part["ids"])
        needed = part.drop_columns("logp")
        sound = not any(values.null_count for values in (*needed.itercolumns(), tokens))
        if sound and pc.min(lengths).as_py() > 0 and pc.min(tokens).as_py() >= 0:
            continue
        for row, cells in enumerate(needed.to_pylist(), start=number * BATCH):
            if None in cells.values():
                raise _bad_row(path, row, "an empty cell")
            if not cells["ids"] or any(token is None or token < 0 for token in cells["ids"]):
                raise _bad_row(path, row, "no tokens" if not cells["ids"] else "a token that is none")
    if not responses.index.is_unique:
        row = int(responses.index.duplicated().argmax())
        raise _bad_row(path, row, f"prompt_id {responses.prompt_ids[row]} is there twice")


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

"""Rows of files and folders as they stand there, whatever their format (tspin.data.formats) is.

JSONL, JSON, CSV and TSV (each as .gz, .bz2 or .xz too) and Parquet are read here, a part at a time and into no cache: a
mistake is named by its line, and a cell of CSV is text, "007" and "NA" too. All else that `datasets` knows it reads.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tspin.data.mapped import BATCH
from tspin.errors import UserError, reason, tell

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
LONGEST_CELL = 2**31 - 1  # characters; csv's own limit, 131,072, is less than a response may have
SAVED = (datasets.config.DATASET_STATE_JSON_FILENAME, datasets.config.DATASETDICT_JSON_FILENAME)  # by save_to_disk
Reader = Callable[[Path], Iterator[Any]]
T = TypeVar("T")


def is_local(path: str) -> bool:
    """Whether a data set's path is a file or folder, there or not, and no name on the hub."""
    return reader_of(Path(path)) is not None or os.path.exists(path)


def check_there(path: str) -> None:
    """Raise UserError where a data set's path is that of a file, and there is none."""
    if reader_of(Path(path)) and not os.path.exists(path):
        raise UserError(f"{path}: no such file")


def reader_of(path: Path) -> Reader | None:
    """What reads a file of this name here; None where only `datasets` may."""
    if path.suffix not in OPENERS:
        return READERS.get(path.suffix)
    suffix = Path(path.stem).suffix
    return None if suffix == ".parquet" else READERS.get(suffix)


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a file that `reader_of` knows. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if (reader := reader_of(path)) is None:
        raise UserError(f"{path}: what it holds must show in its name: {', '.join(READERS)}")
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from error


def open_folder(folder: Path, name: str | None, split: str) -> list[Path] | datasets.Dataset:
    """A split of a folder: its files, where they can be read here, or else its rows.

    The folder is one that `save_to_disk` wrote, or has files of data; which split a file is in is for `datasets` to
    say, by the file's name or by the folder's README.md (where `name` is one of the configurations). Files that are in
    no split are told on stderr. Raises UserError.
    """
    place = str(folder.resolve())  # as it was given, "json" would be the name of a reader
    try:
        if any((folder / file).is_file() for file in SAVED):
            found: Any = datasets.load_from_disk(place)
        else:
            found = datasets.load_dataset_builder(place, name).config.data_files or {}
    except Exception as error:  # its readers raise many kinds
        raise UserError(f"{folder}: no folder of data ({reason(error)})") from error
    if isinstance(found, datasets.Dataset):
        return found
    chosen = split_of({str(key): value for key, value in found.items()}, split, str(folder))
    if isinstance(chosen, datasets.Dataset):
        return chosen
    files = [Path(file) for file in chosen]
    if not all(map(reader_of, files)):
        return read_by_library(folder, name, split)
    placed = {Path(file) for part in found.values() for file in part}
    if left := sorted(path.name for path in Path(place).rglob("*") if reader_of(path) and path not in placed):
        names = ", ".join(left[:10]) + (f" and {len(left) - 10} more" if len(left) > 10 else "")
        tell(f"{folder}: its files in none of the splits {', '.join(map(str, found))}: {names}")
    return files


def read_by_library(path: Path, name: str | None = None, split: str = "train") -> datasets.Dataset:
    """A folder's split, or the one of a file, as `datasets` reads it. Raises UserError."""
    folder, files = (path.parent, path.name) if path.is_file() else (path, None)
    try:
        return datasets.load_dataset(str(folder.resolve()), name, data_files=files, split=split)
    except Exception as error:  # as above
        raise UserError(f"{path}: not data that `datasets` can read ({reason(error)})") from error


def split_of(splits: Mapping[Any, T], split: str, source: str) -> T:
    """One of a data set's splits. Raises UserError, naming those that there are."""
    if split not in splits:
        raise UserError(f"{source}: no split {split!r}; there are: {', '.join(map(str, splits))} (data.split)")
    return splits[split]


def _opened(path: Path) -> Any:
    """A file, as the bytes that it holds or its compression stands for."""
    return OPENERS.get(path.suffix, open)(path, "rb")


def _read_json(path: Path) -> Iterator[Any]:
    """A list, or a list under the key "examples", or one object per line, as many a .json has them."""
    try:
        with _opened(path) as file:
            whole = json.loads(file.read().decode())
    except (ValueError, RecursionError):
        whole = None
    listed = whole.get("examples") if isinstance(whole, dict) else whole
    return iter(listed) if isinstance(listed, list) else _read_lines(path)


def _read_lines(path: Path) -> Iterator[Any]:
    with _opened(path) as file:  # as bytes: lines end at a line feed and at no other of Unicode's line ends
        for number, line in enumerate(file, start=1):
            try:
                if (text := line.decode()).strip():
                    yield json.loads(text)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 text ({error})") from error
            except (ValueError, RecursionError) as error:  # besides bad syntax: numbers too long, nesting too deep
                raise UserError(f"{path}, line {number}: not JSON ({error}); JSONL has one object per line") from error


def _read_table(path: Path, delimiter: str) -> Iterator[Any]:
    csv.field_size_limit(LONGEST_CELL)
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            columns = next(lines, [])
            if len({*columns}) < len(columns):
                raise UserError(f"{path}: two columns of its header have the same name: {', '.join(columns)}")
            for cells in filter(None, lines):
                if len(cells) != len(columns):
                    counts = f"{len(cells)} cells, the header has {len(columns)}"
                    raise UserError(f"{path}, line {lines.line_num}: {counts}; put cells with commas in quotes")
                yield dict(zip(columns, cells, strict=True))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after line {lines.line_num}: not UTF-8 text ({error})") from error
        except csv.Error as error:
            raise UserError(f"{path}, line {lines.line_num}: no table of cells ({error})") from error


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            decoded = any(_holds_json(field.type) for field in file.schema_arrow)
            for part in file.iter_batches(BATCH):
                # JSON within Arrow is text to pyarrow, and values to `datasets`, which writes it.
                table = datasets.table.InMemoryTable(pa.Table.from_batches([part]))
                yield from datasets.Dataset(table) if decoded else part.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from error


def _holds_json(kind: pa.DataType) -> bool:
    inner = (kind.field(number).type for number in range(kind.num_fields))
    return isinstance(kind, pa.JsonType) or any(map(_holds_json, inner))


READERS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".parquet": _read_parquet,
}

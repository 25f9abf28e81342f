"""Data sets: a file, a folder, a name on the hub, or rows in memory; read when they are asked for."""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, Json

from tspin.data.files import check_there, is_local, open_folder, read_by_library, read_rows, reader_of, split_of
from tspin.data.mapped import read_in
from tspin.data.rows import ROWS, Rounds, checked_rows, recognised
from tspin.errors import UserError, tell
from tspin.hub.offline import load_dataset
from tspin.runs.files import sha256

EMBEDDED = {  # what data.path may name → the module that has its rows, and their pool
    "pocket": ("tspin.pocket.tasks", "labels"),
    "pocket-validation": ("tspin.pocket.tasks", "validation"),
    "gsm-symbolic": ("tspin.gsm_symbolic.tasks", "labels"),
    "gsm-symbolic-validation": ("tspin.gsm_symbolic.tasks", "validation"),
}
LARGE = 2**25  # bytes of a data set from which encoding takes long enough to keep what it gives


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
    rounds: Rounds = "first",
    generated: bool = False,
    labels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Source:
    """Rows of a file, a folder, the hub, or an embedded pool. Raises UserError where there is no such data set.

    name, split: of a folder, or on the hub. revision: on the hub.
    columns, rounds, generated: see `checked_rows`.
    labels, seed: take only the examples that `nested_subset` chooses. limit: likewise, of fewer rows all.
    """
    given, key = _find(path, name, split, revision)
    choice: dict[str, Any] = {"columns": dict(columns or {}), "rounds": rounds, "generated": generated}

    def read() -> Dataset:
        rows = read_in(lambda: checked_rows(given(), path, **choice), ROWS)
        size = labels if limit is None else min(limit, len(rows))
        return rows if size is None else rows.select(nested_subset(len(rows), size, seed), new_fingerprint="rows")

    chosen = [choice, labels, seed] if limit is None else [choice, labels, seed, limit]
    return Source(read, None if key is None else [key, *chosen])


def check_first_row(path: str, columns: Mapping[str, str] | None = None, generated: bool = False) -> None:
    """Raise UserError where a file of data is missing, or what its first row has for columns is no format.

    How it is read is told on stderr. Nothing is asked of other sources, nor of large files: a .json is read as a whole.
    """
    if path in EMBEDDED:
        return
    check_there(path)
    place = Path(path)
    if reader_of(place) and place.is_file() and place.stat().st_size < LARGE:
        row = next(iter(read_rows(place)), None)
        if isinstance(row, Mapping):
            recognised(row, path, columns, generated)


def source_of(
    dataset: Any,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    rounds: Rounds = "first",
    generated: bool = False,
    name: str = "train_dataset",
) -> Source:
    """Rows that are there already: a datasets.Dataset, or any iterable of mappings.

    An integer "prompt_id" replaces the number, unless a row can make several examples.
    split: of a DatasetDict, or any mapping of splits. columns, rounds, generated: see `checked_rows`. name: the
    argument's, for messages.
    """
    if isinstance(dataset, Mapping):
        given = split_of(dataset, split, name)
        tell(f"{name}: split {split} of {', '.join(map(str, dataset))}")
    elif isinstance(dataset, Iterable) and not isinstance(dataset, str | bytes):
        given = dataset
    else:
        raise UserError(
            f"{name}: rows are needed, a datasets.Dataset or any iterable of mappings, not a {type(dataset).__name__}"
            + ("; datasets.load_dataset reads files and hub names" if isinstance(dataset, str) else "")
        )
    choice: dict[str, Any] = {"columns": dict(columns or {}), "rounds": rounds, "generated": generated}
    key = key_of(given)

    def read() -> Dataset:
        return read_in(lambda: checked_rows(_undecoded(given), name, numbered=rounds == "first", **choice), ROWS)

    return Source(read, None if key is None else [key, choice])


def key_of(dataset: Any) -> Any:
    """`Source.key` of a datasets.Dataset, which knows its own fingerprint; None for small ones and for all else."""
    if not isinstance(dataset, Dataset) or dataset.data.nbytes < LARGE:
        return None
    return {"datasets.Dataset": dataset._fingerprint}  # a private name, but one that the library's guide shows


def _undecoded(rows: Any) -> Any:
    """Rows with their columns of images and the like as they are kept: they are refused, whatever they show."""
    for name, feature in (rows.features if isinstance(rows, Dataset) else {}).items():
        if hasattr(feature, "decode") and not isinstance(feature, Json):
            rows = rows.cast_column(name, replace(feature, decode=False))
    return rows


def _find(path: str, name: str | None, split: str, revision: str | None) -> tuple[Callable[[], Iterable[Any]], Any]:
    """What gives a data set's rows as they stand there, and their `Source.key`."""
    if path in EMBEDDED:
        module, pool = EMBEDDED[path]
        return partial(import_module(module).labelled_rows, pool), None
    check_there(path)
    place = Path(path)
    if not is_local(path):
        found: Any = load_dataset(path, name, split, revision)
    elif place.is_dir():
        found = open_folder(place, name, split)
    elif reader_of(place):
        found = [place]
    else:
        found = read_by_library(place)
    if not isinstance(found, list):
        return lambda: _undecoded(found), key_of(found)
    large = sum(file.stat().st_size for file in found) >= LARGE
    return lambda: chain.from_iterable(map(read_rows, found)), [sha256(file) for file in found] if large else None


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

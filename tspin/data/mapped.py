"""Any number of rows, memory-mapped by `datasets`: what a run holds does not grow with their text.

Rows on their way (of a file that is read, of responses that are drawn) are in files that are removed once they are
open: nothing of them stays in a run's folder or in a cache. TMPDIR says on which disk they are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

BATCH = 1000  # rows that are Python objects at a time
FILE = "rows.arrow"
T = TypeVar("T")


class TypedRows(Sequence[T]):
    """The rows of a data set as objects, each made when it is asked for; many at once, or a slice, are a list.

    make: an object from a row's cells, in the order of the columns.
    """

    def __init__(self, dataset: Dataset, make: Callable[..., T]):
        self.dataset = dataset
        self.make = make

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return self.make(*self.dataset[index].values())

    def __getitems__(self, indices: Sequence[int]) -> list[T]:
        """The rows of these numbers, read together: five times as fast as one by one. PyTorch's loader asks so."""
        return list(map(self.make, *self.dataset[indices].values()))

    def __iter__(self) -> Iterator[T]:
        for batch in self.dataset.iter(BATCH):
            yield from map(self.make, *batch.values())


def rows_at(rows: Sequence[T], indices: Sequence[int]) -> list[T]:
    """Some of the rows, by their numbers; read together where they can be."""
    return rows.__getitems__(indices) if isinstance(rows, TypedRows) else [rows[i] for i in indices]


def spread(rows: Sequence[T], count: int) -> list[T]:
    """At most `count` of the rows, evenly spread: the same ones whenever there are as many rows."""
    return rows_at(rows, [i * len(rows) // count for i in range(count)] if len(rows) > count else range(len(rows)))


def column(dataset: Dataset, name: str) -> np.ndarray:
    """All of a column of numbers."""
    return dataset.with_format("arrow")[name].to_numpy()


def table_of(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    """Rows, their cells in the schema's order, as a table."""
    cells = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table([pa.array(values, field.type) for values, field in zip(cells, schema, strict=True)], schema=schema)


def read_in(rows: Callable[[], Iterable[dict[str, Any]]], features: Features) -> Dataset:
    """The rows that a function gives, one after the other. Raises what it raises."""
    with unnamed() as folder:
        try:
            return Dataset.from_generator(rows, features=features, cache_dir=folder, fingerprint="rows")
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None


def mapped(
    dataset: Dataset,
    function: Callable[[dict[str, list[Any]]], pa.Table],
    schema: pa.Schema,
    *,
    batch_size: int = BATCH,
    path: Path | None = None,
) -> Dataset:
    """The rows that `function` makes of each `batch_size` rows of a data set. path: keeps them there, an Arrow file."""
    features = Features.from_arrow_schema(schema)
    if not len(dataset):
        return Dataset.from_dict({name: [] for name in schema.names}, features=features)
    with unnamed() as folder:
        return dataset.map(
            function,
            batched=True,
            batch_size=batch_size,
            remove_columns=dataset.column_names,
            features=features,
            cache_file_name=str(path or Path(folder) / FILE),
            new_fingerprint="rows",  # of a function with a model in it, none can be computed
        )


def reordered(dataset: Dataset, places: np.ndarray) -> Dataset:
    """The rows at these places, in their order: a copy, unless they are there in it already."""
    if np.array_equal(places, np.arange(len(dataset))):
        return dataset
    with unnamed() as folder:
        chosen = dataset.select(places, new_fingerprint="rows")
        return chosen.flatten_indices(cache_file_name=str(Path(folder) / FILE), new_fingerprint="rows")


@contextmanager
def unnamed() -> Iterator[str]:
    """A folder that is removed at the end. What is memory-mapped from it by then can be read as long as it is held."""
    with TemporaryDirectory(prefix="tspin-rows-", ignore_cleanup_errors=True) as folder, without_bars():
        yield folder


@contextmanager
def without_bars() -> Iterator[None]:
    """While this holds, `datasets` draws no progress bars: the steps draw their own."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()

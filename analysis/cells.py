"""Numbers by reference: each knows the file of a results folder that it is a cell of, and where in it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from .writing import number

SEPARATOR = " · "  # between the parts of a source


class Absent(Exception):
    """A number that the results do not hold; its text is the source that there is not."""


@dataclass(frozen=True)
class Cell:
    """A value as text, and its source: file, then the row's keys and the column, or the keys down to the value."""

    text: str
    source: str

    def __str__(self) -> str:
        return self.text

    def __html__(self) -> Markup:
        return Markup('<span class="cell" title="{}">{}</span>').format(self.source, self.text)


class Cells:
    """What a report may state. files: name → table or JSON value, as the file of that name in a results folder has it.

    A number that is not there raises Absent, which `sentence` turns into no sentence.
    """

    def __init__(self, files: Mapping[str, Any]):
        self.files = files

    def cell(self, file: str, column: str, form: str = "", **row: Any) -> Cell:
        """The cell of a table in `column` of the one row that has these values. form: of a number; else it is text."""
        parts = [file, *(f"{key}={'' if value is None else value}" for key, value in row.items()), column]
        source = SEPARATOR.join(parts)
        table = self.files.get(file)
        if table is None or column not in table:
            raise Absent(source)
        for key, value in row.items():
            table = table[table[key].isna() if value is None else table[key].eq(value).fillna(False).astype(bool)]
        if len(table) != 1 or pd.isna(value := table[column].iloc[0]) or value == "":
            raise Absent(source)
        return Cell(number(value, form) if form else str(value), source)

    def value(self, file: str, *path: str | int, form: str = "", cut: Callable[[str], str | None] = str) -> Cell:
        """The value of a JSON file at the end of a path. cut: what of a text is shown; None where it has no such part.

        Absent too where the value is null or empty.
        """
        source = SEPARATOR.join(map(str, (file, *path)))
        found = self.files.get(file)
        for key in path:
            try:
                found = found[key]  # type: ignore[index]
            except (KeyError, IndexError, TypeError) as error:
                raise Absent(source) from error
        text = None if found is None else number(found, form) if form else cut(_plain(found))
        if not text:
            raise Absent(source)
        return Cell(text, source)

    def count(self, file: str, *path: str | int, equal: Any = None) -> Cell:
        """How many values a path leads to, "*" in it standing for every one; equal: of these, those that are it."""
        source = SEPARATOR.join(map(str, (file, *path, "count" if equal is None else f"count of {equal}")))
        if file not in self.files:
            raise Absent(source)
        found = list(every(self.files[file], path))
        if not found:
            raise Absent(source)
        return Cell(f"{len(found) if equal is None else found.count(equal):,}", source)


def every(value: Any, path: tuple[str | int, ...]) -> Iterator[Any]:
    """What a path leads to in a JSON value; "*" stands for every entry. Nothing where it leads nowhere."""
    if not path:
        yield value
    elif path[0] == "*":
        for entry in value.values() if isinstance(value, dict) else value:
            yield from every(entry, path[1:])
    elif isinstance(value, dict) and path[0] in value:
        yield from every(value[path[0]], path[1:])
    elif isinstance(value, list) and isinstance(path[0], int) and path[0] < len(value):
        yield from every(value[path[0]], path[1:])


def _plain(value: Any) -> str:
    """A JSON value as a reader would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def sentence(caller: Callable[[], Markup]) -> Markup:
    """What a template's `call` block says, and a space; or nothing where a number of it is absent."""
    try:
        return Markup(caller()).strip() + " "
    except Absent:
        return Markup("")

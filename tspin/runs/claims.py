"""A folder belongs to one config: what is in it was made by these settings and no others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tspin.errors import UserError
from tspin.runs.sealed import read_sealed, write_sealed


class Missing:
    """In the place of a value that is not there, which is another thing than null."""

    def __repr__(self) -> str:
        return "not set"


MISSING = Missing()


def claim_folder(
    folder: Path, config: Mapping[str, Any], what: str = "run", option: str = "--out or --runs, or output_dir in Python"
) -> None:
    """Make `folder` a run (or whatever `what` says) of `config`, which is kept in its config.json.

    option: what the user chooses the folder by.

    Raises UserError if it already is one of another config, naming the first setting that differs and both values;
    nothing is written then.
    """
    path = folder / "config.json"
    wanted = json.loads(json.dumps(config, default=str))
    there = read_sealed(path, "written anew from the settings given now")
    if there is None:
        write_sealed(path, wanted)
    elif there != wanted:
        key, old, new = first_difference(there, wanted)
        raise UserError(
            f"{folder} holds a {what} of another config ({key} is {old!r} there, {new!r} here): "
            f"choose another folder by {option}, or delete this one"
        )


def first_difference(there: Any, here: Any, path: str = "") -> tuple[str, Any, Any]:
    """(dotted key, value there, value here) of the first difference between two JSON trees; MISSING where it is not."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            old, new = there.get(key, MISSING), here.get(key, MISSING)  # a key that is not there is no null
            if old != new:
                return first_difference(old, new, f"{path}.{key}" if path else key)
    return path or "content", there, here

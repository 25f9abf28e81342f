"""JSON files that hold a checksum of themselves: damage is noticed, kept beside, and told in one line."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tspin.runs.files import fingerprint, write_json


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with the fingerprint of the rest under "checksum"."""
    plain = json.loads(json.dumps(content, default=str, allow_nan=False))
    write_json(path, {**plain, "checksum": fingerprint(plain)})


def read_sealed(path: Path, consequence: str) -> dict[str, Any] | None:
    """The object that `write_sealed` wrote; None where there is none, or one that is damaged, which is set aside.

    consequence: what follows from the damage, for the line that tells it.
    """
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("checksum") == fingerprint(content):
            return content
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError):
        pass
    set_aside(path, consequence)
    return None


def set_aside(path: Path, consequence: str) -> None:
    """Give a damaged file or folder a name that says so, and say it in one line."""
    names = (path.with_name(path.name + f".damaged{number}") for number in ["", *(f"-{n}" for n in range(2, 1000))])
    aside = next(name for name in names if not name.exists())
    os.replace(path, aside)
    sys.stderr.write(f"tspin: {path} is damaged (its checksum is another): kept as {aside.name}, {consequence}\n")

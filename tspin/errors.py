"""Mistakes that a user can put right, and the lines that name them."""

import difflib
import sys
from collections.abc import Iterable
from functools import cache


class UserError(Exception):
    """A mistake the user can put right: printed as one line, exit code 2."""


def reason(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The line for a name that is not among the known ones, with the nearest that is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    return f"unknown {what} {name!r}: {hint}(known: {listed or 'none'})"


@cache
def tell(line: str) -> None:
    """A note on stderr, once, however many runs of a command have it to say. What ends a command is a UserError."""
    sys.stderr.write(f"note: {line}\n")

"""Reading mappings of plain values into frozen sections, and the one line for what is wrong in them."""

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from tspin.errors import UserError, unknown

Kind = TypeVar("Kind", bound="Section")


class Section(BaseModel):
    """Base of what is read: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_enum_values=True, arbitrary_types_allowed=True
    )


def _unknown_key(name: str, value: Any, known: Iterable[str]) -> str:
    return unknown("key", name, known)


def read(
    kind: type[Kind],
    given: Any,
    path: str = "",
    known: Iterable[str] = (),
    refusal: Callable[[str, Any, Iterable[str]], str] = _unknown_key,
) -> Kind:
    """A section from a mapping of plain values.

    path: the section's, with a dot at its end.
    known: the keys that it may have there; those of `kind` when left out.
    refusal: (key, value, known) → what to say to a key that it may not have.
    Raises UserError for the first thing that is wrong.
    """
    values = mapping(given, path.rstrip("."))
    check_names(values, path, list(known or kind.model_fields), refusal)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}{_explained(error, kind, values)}") from error


def check_names(
    values: Mapping[str, Any], path: str, known: Iterable[str], refusal: Callable[[str, Any, Iterable[str]], str]
) -> None:
    """Raise UserError for the first key that is not known; the arguments are those of `read`."""
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{path}{name}: {refusal(name, value, known)}")


def mapping(given: Any, path: str) -> Mapping[str, Any]:
    """The keys and values given for a section, none where it is empty. Raises UserError."""
    if not isinstance(given, Mapping | None):
        raise UserError(f"{path}: keys with values are expected (got {reprlib.repr(given)})")
    return given or {}


def _explained(error: ValidationError, kind: type[Section], values: Mapping[str, Any]) -> str:
    """The path of the first value that is wrong, and what each type that it may have says to it.

    Where values do not fit together, what the section's own validator says.
    """
    # A key that is not known may be the one that is missing, misspelt.
    errors = sorted(error.errors(), key=lambda problem: problem["type"] == "missing")
    if not errors[0]["loc"]:
        return str(errors[0]["ctx"]["error"])
    problems = [(_path(problem["loc"], values), problem) for problem in errors]
    first, problem = problems[0]
    if problem["type"] == "missing":
        return ".".join(map(str, problem["loc"])) + ": required, and missing"
    return f"{first}: " + " or ".join(_message(problem, kind) for path, problem in problems if path == first)


def _path(location: tuple[int | str, ...], values: Any) -> str:
    """The part of pydantic's location that is in the values: it goes on with the types of a union."""
    parts = []
    for part in location:
        if not (part in values if isinstance(values, Mapping) else isinstance(values, list) and isinstance(part, int)):
            break
        parts.append(str(part))
        values = values[part]
    return ".".join(parts)


def _message(problem: Any, kind: type[Section]) -> str:
    given = problem["input"]
    if problem["type"] == "extra_forbidden":  # in a section within this one
        hint = kind.model_fields[problem["loc"][0]].annotation
        fields = next(member.model_fields for member in (hint, *get_args(hint)) if hasattr(member, "model_fields"))
        return unknown("key", str(problem["loc"][-1]), fields)
    if problem["type"] in ("enum", "literal_error") and isinstance(given, str):
        return unknown("value", given, re.findall("'([^']*)'", problem["ctx"]["expected"]))
    return f"{problem['msg'][0].lower()}{problem['msg'][1:]} (got {reprlib.repr(given)})"

"""Settings as their sources declare them (name, type, default, meaning), without importing what these stand on.

These are the fields of tspin.config.SelfPlayConfig, of tspin.settings' sections and of transformers.TrainingArguments.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Declared:
    """A field: its type and its default as Python writes them, and what it means, "" where the source does not say."""

    name: str
    type: str
    default: str
    meaning: str


@cache
def declared(kind: str) -> Mapping[str, Declared]:
    """The fields that a class declares itself, by their names."""
    text = _source(kind).read_text(encoding="utf-8")
    lines = text.splitlines()
    (body,) = (node.body for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == kind)
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {field.name: field for field in (_declared(node, lines[(node.end_lineno or 0) - 1]) for node in fields)}


def find_section(kind: str) -> str | None:
    """The section of tspin.settings that a field's type names: EngineSettings, of a field `engine`."""
    return next((name for name in kind.split(" | ") if name in _sections()), None)


@cache
def _sections() -> frozenset[str]:
    nodes = ast.parse((HERE / "settings.py").read_text(encoding="utf-8")).body
    return frozenset(node.name for node in nodes if isinstance(node, ast.ClassDef))


def _source(kind: str) -> Path:
    if kind == "TrainingArguments":
        spec = find_spec("transformers")  # where it is, without its import
        assert spec is not None and spec.origin is not None
        return Path(spec.origin).with_name("training_args.py")
    return HERE / ("config.py" if kind == "SelfPlayConfig" else "settings.py")


def _declared(node: Any, line: str) -> Declared:
    """line: the last of the field's, whose comment says what a section's field means."""
    name, annotation, value = node.target.id, ast.unparse(node.annotation), node.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "setting":
        return Declared(name, annotation, ast.unparse(value.args[0]), ast.literal_eval(value.args[1]))
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        default = ast.unparse(given["default"]) if "default" in given else ""
        return Declared(name, annotation, default, _help(given.get("metadata")))
    return Declared(name, annotation, ast.unparse(value) if value else "", line.partition("  # ")[2])


def _help(metadata: ast.expr | None) -> str:
    """What Transformers' metadata say of a field, where that is written out."""
    entries = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    texts = [value.value for key, value in entries if isinstance(key, ast.Constant) and key.value == "help"
             and isinstance(value, ast.Constant)]  # fmt: skip
    return str(texts[0]) if texts else ""

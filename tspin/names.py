"""Names that a command is given, checked before PyTorch is imported, which takes seconds.

The keys of a config are the fields of tspin.config's classes and of transformers.TrainingArguments. All of these stand
on PyTorch, so that their names are read from their sources here; values are judged by the classes.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tspin.errors import UserError, unknown
from tspin.objectives import METHODS, find_method
from tspin.schema import BASE
from tspin.sections import check_names, mapping
from tspin.yaml_files import find_yaml, overridden, read_yaml

PRESETS, SUITES = "experiments/presets", "experiments/suites"
COEFFICIENTS = {coefficient.name: coefficient for method in METHODS.values() for coefficient in method.coefficients}
# Fields that are no part of a preset, and the options by which the commands give them.
BY_COMMAND = {
    **dict.fromkeys(("output_dir", "shared_dir"), "--out or --runs"),
    "method": "--method or --methods",
    "seed": "--seed or --seeds",
    "launcher": "--launcher and --config",
}
SECTIONS = {"model": "ModelSettings", "data": "DataSettings", "evaluation": "EvaluationSettings", "methods": None}


def check_experiment(preset: str, overrides: Iterable[str], methods: Sequence[str]) -> None:
    """Raise UserError for the first name that is wrong: of the preset, a key, a method, the suite."""
    fields = check_preset(preset, overrides)
    check_methods(methods)
    suite = (fields.get("evaluation") or {}).get("suite")
    if isinstance(suite, str):
        find_yaml(suite, SUITES, "suite")


def check_preset(name_or_path: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A preset with `key.path=value` overrides, as plain values. Raises UserError for unknown names in it."""
    tree, source = read_preset(name_or_path)
    return check_config(tree, overrides, source)


def read_preset(name_or_path: str) -> tuple[Mapping[str, Any], str]:
    """What a preset of experiments/ or a YAML file says, and what messages on it begin with. Raises UserError."""
    path = find_yaml(name_or_path, PRESETS, "preset")
    return mapping(read_yaml(path), str(path)), f"{path.name}: "


def check_config(tree: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "") -> dict[str, Any]:
    """A tree of plain values with its overrides. Raises UserError for keys that tspin.config.build_config refuses."""
    fields = overridden(tree, overrides)
    try:
        for section, kind in SECTIONS.items():
            if kind is not None:
                check_names(mapping(fields.get(section), section), f"{section}.", config_fields(kind), refusal)
        check_names(fields, "", [*SECTIONS, *preset_fields()], refusal)
        for name, given in mapping(fields.get("methods"), "methods").items():
            find_method(name)
            path, own = f"methods.{name}", mapping(given, f"methods.{name}")
            data = mapping(own.get("data"), f"{path}.data")
            check_names(own, f"{path}.", ["data", *COEFFICIENTS, *preset_fields()], refusal)
            check_names(data, f"{path}.data.", config_fields("DataSettings"), refusal)
    except UserError as error:
        raise UserError(f"{source}{error}") from error
    return fields


def check_methods(methods: Sequence[str]) -> None:
    """Raise UserError for an unknown method, and for none."""
    for method in methods:
        if method != BASE:
            find_method(method, besides=[BASE])
    if not methods:
        raise UserError(f"--methods is empty: name some of {', '.join([BASE, *METHODS])}")


@cache
def preset_fields() -> list[str]:
    """The fields of SelfPlayConfig that a preset may set, ours first."""
    ours = config_fields("SelfPlayConfig")
    spec = find_spec("transformers")  # where it is, without its import
    assert spec is not None and spec.origin is not None
    declared = [*_fields(Path(spec.origin).with_name("training_args.py"), "TrainingArguments"), *ours]
    left_out = {*BY_COMMAND, *COEFFICIENTS, "history"}
    names = (name for name in dict.fromkeys(declared) if name not in left_out and not name.endswith("_token"))
    return sorted(names, key=lambda name: name not in ours)


def config_fields(kind: str) -> list[str]:
    """The fields that a class of tspin.config declares."""
    return _fields(Path(__file__).with_name("config.py"), kind)


@cache
def _fields(source: Path, kind: str) -> list[str]:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    return [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def refusal(name: str, value: Any, known: Iterable[str]) -> str:
    """Why a preset has no such key in this place, and which one may be meant."""
    if name == "history":
        return "stands in data, as data.history"
    if name in BY_COMMAND:
        return f"no part of a config: the command gives it, by {BY_COMMAND[name]}"
    if name.endswith("_token"):
        return "a secret is no setting, which results keep; put it into HF_TOKEN"
    if name in COEFFICIENTS:
        methods = [method.name for method in METHODS.values() if COEFFICIENTS[name] in method.coefficients]
        return f"a coefficient of {', '.join(methods)}: write it as methods.{methods[0]}.{name}"
    if name in preset_fields():
        return f"{name} stands at the top level, or in methods.<name>"
    if name in ("training", "sampling") and isinstance(value, dict) and value:
        return f"no section: {refusal(next(iter(value)), None, preset_fields())}"
    return unknown("key", name, known)

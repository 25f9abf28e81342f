"""Names and values that a command is given, checked before PyTorch is imported, which takes seconds.

The keys of a config are the fields of tspin.config.SelfPlayConfig and of transformers.TrainingArguments, and the
sections of tspin.settings. The first two stand on PyTorch: their fields are read from their sources here. What their
types alone refuse is refused here too; what does not fit together is for tspin.config to say.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import create_model

from tspin import settings
from tspin.declared import Declared, declared
from tspin.errors import UserError, unknown
from tspin.objectives import METHODS, find_method
from tspin.schema import BASE
from tspin.sections import Section, check_names, mapping, read
from tspin.yaml_files import find_yaml, overridden, read_extended

PRESETS, SUITES = "experiments/presets", "experiments/suites"
COEFFICIENTS = {coefficient.name: coefficient for method in METHODS.values() for coefficient in method.coefficients}
# Fields that are no part of a preset, and the options by which the commands give them.
BY_COMMAND = {
    **dict.fromkeys(("output_dir", "shared_dir"), "--out or --runs"),
    "method": "--method or --methods",
    "seed": "--seed or --seeds",
    "launcher": "--launcher and --launcher-config",
}
# What people type by habit, on the command line alone: files say a setting by its one name.
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "sampling.temperature": "temperature",
    "sampling.top_p": "top_p",
    "sampling.max_new_tokens": "max_new_tokens",
    "sampling.batch_size": "sampling_batch_size",
    "sampling.backend": "sampling_backend",
    "sampling.dtype": "sampling_dtype",
    "history": "data.history",
    "labels": "data.labels",
    "columns": "data.columns",
    "suite": "evaluation.suite",
}
TAKE_MORE = ("accelerator_config", "fsdp")  # than their types say
SECTIONS = {"model": "ModelSettings", "data": "DataSettings", "evaluation": "EvaluationSettings", "methods": None}


def check_preset(name_or_path: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A preset with `key.path=value` overrides, as plain values. Raises UserError for unknown names in it."""
    tree, source = read_preset(name_or_path)
    return check_config(tree, overrides, source)


def read_preset(name_or_path: str) -> tuple[Mapping[str, Any], str]:
    """What a preset of experiments/ or a YAML file says, and what messages on it begin with. Raises UserError.

    `extends: <name>` starts from another preset; what the file says itself comes on top, section by section.
    """
    path = find_yaml(name_or_path, PRESETS, "preset")
    return mapping(read_extended(path, PRESETS, "preset"), str(path)), f"{path.name}: "


def check_config(tree: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "") -> dict[str, Any]:
    """A tree of plain values with its overrides. Raises UserError for what tspin.config.build_config refuses alike."""
    fields = overridden(tree, overrides)
    try:
        for section, kind in SECTIONS.items():
            if kind is not None:
                read(getattr(settings, kind), fields.get(section), f"{section}.", refusal=refusal)
        check_names(fields, "", [*SECTIONS, *preset_fields()], refusal)
        _check_values(fields, "")
        for name, given in mapping(fields.get("methods"), "methods").items():
            _check_method(name, mapping(given, f"methods.{name}"))
    except UserError as error:
        raise UserError(f"{source}{error}") from error
    return fields


def _check_method(name: str, given: Mapping[str, Any]) -> None:
    method, path = find_method(name), f"methods.{name}."
    check_names(given, path, ["data", *COEFFICIENTS, *preset_fields()], refusal)
    read(settings.DataSettings, given.get("data"), f"{path}data.", refusal=refusal)
    _check_values(given, path)
    try:
        method.resolve({key: value for key, value in given.items() if key in COEFFICIENTS and value is not None})
    except UserError as error:
        raise UserError(f"{path}{error}") from error


def _check_values(values: Mapping[str, Any], path: str) -> None:
    """Raise UserError for the first value that a setting's type refuses. path: what is before the names."""
    kinds: dict[str, Any] = {name: kind for name in values if (kind := _kind(name)) is not None}
    fields: dict[str, Any] = {name: (kind, ...) for name, kind in kinds.items()}
    given = create_model("Given", __base__=Section, **fields)
    read(given, {name: values[name] for name in kinds}, path)


def _kind(name: str) -> Any:
    """The type of a setting at the top level; None for those of Transformers' own, which it judges itself."""
    if name not in preset_fields() or name in TAKE_MORE:
        return None
    try:
        return eval(find_declared(name).type, {**vars(settings), "Any": Any})  # of our sources and of Transformers'
    except NameError:
        return None


def find_declared(name: str) -> Declared:
    """What a top-level setting's source says of it, ours first."""
    return declared("SelfPlayConfig").get(name) or declared("TrainingArguments")[name]


def expanded(overrides: Iterable[str], methods: Sequence[str] = ()) -> list[str]:
    """`key.path=value` overrides with what stands in ALIASES, and coefficients of one of `methods`, by their full keys.

    Raises UserError for a coefficient that several of the methods have.
    """
    return [_expanded(override, methods) for override in overrides]


def _expanded(override: str, methods: Sequence[str]) -> str:
    key, sign, value = override.partition("=")
    key = ALIASES.get(key.strip(), key.strip())
    if sign and key in COEFFICIENTS:
        having = [name for name in methods if name in METHODS and COEFFICIENTS[key] in METHODS[name].coefficients]
        if len(having) > 1:
            each = " ".join(f"--set methods.{name}.{key}={value}" for name in having)
            raise UserError(f"--set {override}: {', '.join(having)} have {key}: say it of each, {each}")
        key = f"methods.{having[0]}.{key}" if having else key
    return f"{key}{sign}{value}"


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
    ours = declared("SelfPlayConfig")
    left_out = {*BY_COMMAND, *COEFFICIENTS, "history"}
    fields = dict.fromkeys([*declared("TrainingArguments"), *ours])
    names = (name for name in fields if name not in left_out and not name.endswith("_token"))
    return sorted(names, key=lambda name: name not in ours)


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
        inner = next(iter(value))
        return f"no section: {refusal(ALIASES.get(f'{name}.{inner}', inner), None, preset_fields())}"
    return unknown("key", name, known)

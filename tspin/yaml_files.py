"""YAML files: finding them by name, reading them, and `key.path=value` on top. What they may say is elsewhere."""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tspin.errors import UserError, unknown

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_NODES = 100_000  # values in a YAML file, its aliases written out


class Loader(yaml.SafeLoader):
    """Plain values alone; 5e-7, which YAML 1.1 takes for text, is the number that people mean."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), None)


def recipes() -> Path:
    """The folder of presets/, suites/, studies/, accelerate/ and slurm/: the package's, or the repository's."""
    packaged = Path(__file__).parent / "recipes"  # a wheel has experiments/ there, see pyproject.toml
    return packaged if packaged.is_dir() else REPOSITORY / "experiments"


def find_yaml(name_or_path: str, folder: str, what: str) -> Path:
    """A YAML file: of that path, or of that name in `folder` ("experiments/presets") here or among the recipes."""
    given = Path(name_or_path)
    if given.suffix in {".yaml", ".yml"}:
        if given.is_file():
            return given
        raise UserError(f"{given}: no such file")
    for candidate in (place / f"{name_or_path}.yaml" for place in _places(folder)):
        if candidate.is_file():
            return candidate
    raise UserError(unknown(what, name_or_path, yaml_names(folder)))


def yaml_names(folder: str) -> list[str]:
    """The names of the YAML files that `find_yaml` finds in a folder."""
    return sorted({path.stem for place in _places(folder) for path in place.glob("*.yaml")})


def _places(folder: str) -> list[Path]:
    return [Path.cwd() / folder, recipes() / Path(folder).name]


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises UserError for what is no file, no UTF-8 text, no YAML, or endless."""
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45 is no date
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error


def lineage(path: Path, folder: str, what: str) -> list[Path]:
    """A YAML file and, before it, those that it `extends`, each by a name of `folder` or a path. Raises UserError."""
    files = [path]
    while isinstance(tree := read_yaml(files[0]), dict) and "extends" in tree:
        base = tree["extends"]
        below = find_yaml(base, folder, what) if isinstance(base, str) else None
        if below is None or any(below.samefile(file) for file in files):
            raise UserError(f"{files[0]}: `extends` is the name of another {what}, in no circle (got {base!r})")
        files.insert(0, below)
    return files


def read_extended(path: Path, folder: str, what: str) -> Any:
    """What a YAML file holds, on top of what it extends: mappings are merged key by key, all else is replaced.

    Raises UserError.
    """
    files = lineage(path, folder, what)
    whole, *above = [read_yaml(file) for file in files]
    for file, tree in zip(files[1:], above, strict=True):
        if not isinstance(whole, dict):
            raise UserError(f"{file}: extends {tree['extends']}, which holds no settings")
        whole = _merged(whole, {key: value for key, value in tree.items() if key != "extends"})
    return whole


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(below[key], value) for key, value in above.items()
            if isinstance(value, dict) and isinstance(below.get(key), dict)}  # fmt: skip
    return {**below, **above, **both}


def overridden(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `tree` with `key.path=value` overrides, in their order. Raises UserError."""
    changed = copy.deepcopy(dict(tree))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key.strip():
            how = f"no value: write --set {key}=VALUE" if key.strip() else "write it as key.path=value"
            raise UserError(f"--set {override}: {how}")
        *parents, last = key.strip().split(".")
        node = changed
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise UserError(f"--set {override}: {parent} is a value, not a section")
        try:
            node[last] = _parsed(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"--set {override}: {value!r} is not a YAML value") from error
    return changed


def _parsed(text: str) -> Any:
    tree = yaml.load(text, Loader)
    open_nodes, count = [tree], 0
    while open_nodes:  # a few lines of aliases can stand for a tree without end
        node, count = open_nodes.pop(), count + 1
        if count > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values")
        if isinstance(node, dict):
            if wrong := [key for key in node if not isinstance(key, str)]:
                raise ValueError(f"the key {wrong[0]!r} is no text: put it in quotes")
            open_nodes += node.values()
        elif isinstance(node, list):
            open_nodes += node
    return tree

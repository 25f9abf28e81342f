"""Models and data sets by their hub names: from the hub, or from an offline folder that `tspin fetch` made.

An offline folder holds

    manifest.json                                     what is there: names, revisions, a SHA-256 for every file
    models/<owner>/<name>/                            a model's files
    datasets/<owner>/<name>/<config>/<split>.parquet  a data set's rows
    nltk_data/                                        what IFEval's checks need

With one in use (`use_offline`, which sets TSPIN_OFFLINE for child processes), nothing else is read and nothing is asked
of a network.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tspin.errors import UserError, reason
from tspin.pocket import EMBEDDED
from tspin.runs.files import read_json, sha256
from tspin.runs.stages import given_up, gone

if TYPE_CHECKING:
    from datasets import DatasetDict

VARIABLE = "TSPIN_OFFLINE"
DEFAULT = "default"  # a data set's configuration when none is named
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]  # weights in safetensors alone
FILE_FORMATS = ("json", "parquet", "csv")  # what load_dataset reads from files, no names of data sets
WAITS = ("connect", "read", "write", "pool")  # what an HTTP request may wait for


@dataclass(frozen=True)
class Item:
    """A model, a data set or NLTK data, by its hub name."""

    kind: str  # "model", "dataset" or "nltk"
    name: str
    config: str | None = None  # of a data set, as `split`
    split: str | None = None  # None: all
    revision: str | None = None  # the commit, branch or tag that is asked for; None: any
    trained: tuple[str, ...] = ()  # of all splits, those that training takes

    @property
    def place(self) -> str:
        """Its folder within an offline folder."""
        if self.kind == "dataset":
            return f"datasets/{self.name}/{self.config or DEFAULT}"
        return f"models/{self.name}" if self.kind == "model" else f"nltk_data/tokenizers/{self.name}"

    @property
    def required(self) -> set[str]:
        """The splits without which the item is of no use."""
        return {self.split} if self.split else {*self.trained}

    def __str__(self) -> str:
        parts = [part for part in (self.config, self.split) if part]
        kind = "data set" if self.kind == "dataset" else self.kind
        return f"{kind} {self.name}" + (f" ({', '.join(parts)})" if parts else "")


def use_offline(folder: Path) -> None:
    """Take everything from `folder` from now on, in child processes too. Raises UserError if it is no such folder.

    To be called before the hub's libraries are imported: they read HF_HUB_OFFLINE once.
    """
    read_manifest(folder)
    os.environ[VARIABLE] = str(folder.resolve())
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["NLTK_DATA"] = str(folder.resolve() / "nltk_data")


def offline_folder() -> Path | None:
    """The offline folder in use, if there is one."""
    return Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


@cache
def limit_waiting() -> None:
    """Let the hub's client give up on a silent server: some of its requests would wait for ever.

    HF_HUB_DOWNLOAD_TIMEOUT, in seconds, says after how long without a byte; 10 is the client's default.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:
        asked, limits = request.extensions.get("timeout", {}), dict.fromkeys(WAITS, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        limits |= {kind: seconds for kind, seconds in asked.items() if seconds is not None}
        request.extensions = {**request.extensions, "timeout": limits}

    def limited_client() -> Any:
        client = default_client_factory()
        client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], limit]}
        return client

    set_client_factory(limited_client)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest: {"models", "datasets", "files"}. Raises UserError where there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: no offline folder (it has no manifest.json); make it with: tspin fetch PRESET")
    return {"models": {}, "datasets": {}, "files": {}, **read_json(path)}


def recorded(manifest: dict[str, Any], item: Item) -> dict[str, Any] | None:
    """What a manifest says of an item; None where it does not have it."""
    if item.kind == "dataset":
        facts: dict[str, Any] | None = manifest["datasets"].get(item.name, {}).get(item.config or DEFAULT)
        return facts
    return manifest["models"].get(item.name) if item.kind == "model" else {}


def lacking(folder: Path, item: Item, splits: Iterable[str] = ()) -> str | None:
    """Why an offline folder cannot give an item, in one line; None where it can, with every file of its full length.

    splits: of a data set, that must be there besides those that the item requires. Checksums are left to `verify`.
    Raises UserError for a folder without a manifest.
    """
    manifest = read_manifest(folder)
    facts = recorded(manifest, item)
    files = {name: sizes for name, sizes in manifest["files"].items() if name.startswith(item.place + "/")}
    remedy = f"on a machine with a network, run: tspin fetch PRESET --out {folder}"
    if facts is None or not files:
        return f"{folder} has no {item}: {remedy}"
    if absent := {*item.required, *splits}.difference(facts.get("splits", ())):
        return f"{folder} has no split {min(absent)} of data set {item.name}: {remedy}"
    # What was taken from files has no revision; a branch or tag is known by the name that it was asked for.
    if item.revision and facts["revision"] and item.revision not in (facts["revision"], facts.get("asked")):
        there = f"{item} is there at revision {facts['revision']}"
        return f"{folder}: {there}, {item.revision} is asked for: run `tspin fetch` again"
    for name, sizes in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != sizes["bytes"]:
            problem = "is incomplete" if path.is_file() else "is missing"
            return f"{path} {problem}: run `tspin fetch` for this folder again"
    return None


def verify(folder: Path) -> list[str]:
    """What is wrong with an offline folder, a line each: files missing or other than when they were fetched."""
    wrong = []
    for name, facts in read_manifest(folder)["files"].items():
        if not (folder / name).is_file():
            wrong.append(f"{name}: missing")
        elif sha256(folder / name) != facts["sha256"]:
            wrong.append(f"{name}: its checksum is not the one that was fetched")
    return wrong


def offline_model(folder: Path, name: str, revision: str | None = None) -> Path:
    """The folder of a model. Raises UserError for one that is not there, incomplete or of another revision."""
    item = Item("model", name, revision=revision)
    if problem := lacking(folder, item):
        raise UserError(problem)
    return folder / item.place


def offline_dataset(folder: Path, name: str, config: str | None, revision: str | None = None) -> "DatasetDict":
    """All splits of a data set's configuration; asked for another split, it raises UserError, not KeyError.

    Raises UserError for a data set that is not there, incomplete or of another revision.
    """
    import datasets
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    class Splits(datasets.DatasetDict):
        def __missing__(self, split: str) -> Any:
            raise UserError(lacking(folder, item, [split]))

    item = Item("dataset", name, config, revision=revision)
    if problem := lacking(folder, item):
        raise UserError(problem)
    splits = Splits()
    for split in read_manifest(folder)["datasets"][name][config or DEFAULT]["splits"]:
        # Read as it is: load_dataset("parquet") would copy it into a cache first.
        table = parquet.read_table(folder / item.place / f"{split}.parquet")
        splits[split] = datasets.Dataset(InMemoryTable(table))
    return splits


def check_model(path: str) -> None:
    """Raise UserError for a model's path that is no embedded one, no model's folder, and can be no hub name.

    And for a checkpoint that its run has given up.
    """
    if path in EMBEDDED:
        return
    if why := given_up(Path(path)):
        raise UserError(gone(Path(path), why))
    if not os.path.exists(path):
        check_name(path)
    elif not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is no model: a model folder has a config.json, weights and a tokenizer")


def check_name(path: str) -> None:
    """Raise UserError for a model path that can be no hub name (OWNER/NAME): that of a folder, which is not there."""
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise UserError(
            f"{path}: no such folder, and no hub name; what a study prepares is made by its command in "
            "experiments/studies, and --set model.path=OWNER/NAME names what it is made from"
        )


def model_folder(name: str, revision: str | None) -> str:
    """The folder of a model by its hub name, downloaded or in the offline folder. Raises UserError if there is none."""
    check_name(name)
    if folder := offline_folder():
        return str(offline_model(folder, name, revision))
    from huggingface_hub import snapshot_download

    limit_waiting()
    try:
        return snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES)
    except Exception as error:  # the hub client raises many kinds for "not there"
        raise UserError(f"{name}: no folder of this name is here, and {_hub_says(error, 'model')}") from error


def load_dataset(name: str, config: str | None, split: str, revision: str | None) -> Any:
    """A split of a data set by its hub name, from the hub or the offline folder. Raises UserError if there is none."""
    if folder := offline_folder():
        return offline_dataset(folder, name, config, revision)[split]
    import datasets

    limit_waiting()
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # as above
        raise UserError(
            f"data set {name!r}: no file or folder of this name is here, and {_hub_says(error, 'data set')}"
        ) from error


def _hub_says(error: Exception, what: str) -> str:
    """Why the hub gives no model or data set, and what to give in its place."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return f"the hub has no such names ({reason(error)}): give OWNER/NAME, or the path of a folder"
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, DatasetNotFoundError)):
        return f"the hub has no such {what}, or not for you ({reason(error)}); HF_TOKEN opens what asks for a login"
    if isinstance(error, (ConnectionError, LocalEntryNotFoundError)) or type(error).__module__.startswith("http"):
        return f"the hub cannot be reached ({type(error).__name__}): give the path of a {what}, or --offline FOLDER"
    return f"the hub's cannot be read ({reason(error)})"


@contextmanager
def offline_benchmarks() -> Iterator[None]:
    """While this holds, lm-eval's tasks take their data from the offline folder, if one is in use.

    Their YAML files name hub data sets, and lm-eval loads them by `datasets.load_dataset`: that function is replaced.
    """
    import datasets

    folder, original = offline_folder(), datasets.load_dataset

    def replaced(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if folder is None or Path(path).exists() or path in FILE_FORMATS:  # a task of the user's, on files
            return original(path, name, *args, **kwargs)
        return offline_dataset(folder, path, name)

    datasets.load_dataset = replaced  # type: ignore[assignment]
    try:
        yield
    finally:
        datasets.load_dataset = original

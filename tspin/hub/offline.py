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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tspin.errors import UserError
from tspin.runs.files import read_json, sha256

if TYPE_CHECKING:
    from datasets import DatasetDict

VARIABLE = "TSPIN_OFFLINE"
DEFAULT = "default"  # a data set's configuration when none is named
WAITS = ("connect", "read", "write", "pool")  # what an HTTP request may wait for
EMPTY: dict[str, Any] = {"models": {}, "datasets": {}, "files": {}}


def use_offline(folder: Path) -> None:
    """Take everything from `folder` from now on, in child processes too. Raises UserError if it is no such folder.

    To be called before the hub's libraries are imported: they read their own switch once.
    """
    read_manifest(folder)
    os.environ[VARIABLE] = str(folder.resolve())
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["NLTK_DATA"] = str(folder.resolve() / "nltk_data")


@cache
def limit_waiting() -> None:
    """Let the hub's client give up on a silent server: some of its requests would wait for ever.

    HF_HUB_DOWNLOAD_TIMEOUT, in seconds, says after how long without a byte; 10 is the client's default.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout", {})
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        limited = {kind: seconds if given.get(kind) is None else given[kind] for kind in WAITS}
        request.extensions = {**request.extensions, "timeout": limited}

    def limited_client() -> Any:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": [*hooks["request"], limit]}
        return client

    set_client_factory(limited_client)


def offline_folder() -> Path | None:
    """The offline folder in use, if there is one."""
    return Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest: {"models", "datasets", "files"}. Raises UserError where there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: no offline folder (it has no manifest.json); make it with: tspin fetch PRESET")
    return {**EMPTY, **read_json(path)}


def offline_model(folder: Path, name: str, revision: str | None) -> Path:
    """The folder of a model. Raises UserError for one that is not there, incomplete or of another revision."""
    found = read_manifest(folder)["models"].get(name)
    if found is None:
        raise _lacking(folder, f"model {name}")
    _check_revision(folder, f"model {name}", found, revision)
    place = folder / "models" / name
    _check_sizes(folder, f"models/{name}/")
    return place


def offline_dataset(folder: Path, name: str, config: str | None, revision: str | None = None) -> "DatasetDict":
    """All splits of a data set's configuration. Raises UserError for one that is not there or of another revision."""
    import datasets
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    found = read_manifest(folder)["datasets"].get(name, {}).get(config or DEFAULT)
    if found is None:
        raise _lacking(folder, f"data set {name}" + (f" ({config})" if config else ""))
    _check_revision(folder, f"data set {name}", found, revision)
    files = {split: f"datasets/{name}/{config or DEFAULT}/{split}.parquet" for split in found["splits"]}
    for file in files.values():
        _check_sizes(folder, file)
    # Read as it is: load_dataset("parquet") would copy it into a cache first.
    tables = {split: InMemoryTable(parquet.read_table(folder / file)) for split, file in files.items()}
    return datasets.DatasetDict({split: datasets.Dataset(table) for split, table in tables.items()})


def verify(folder: Path) -> list[str]:
    """What is wrong with an offline folder, a line each: files missing or other than when they were fetched."""
    wrong = []
    for name, facts in read_manifest(folder)["files"].items():
        if not (folder / name).is_file():
            wrong.append(f"{name}: missing")
        elif sha256(folder / name) != facts["sha256"]:
            wrong.append(f"{name}: its checksum is not the one that was fetched")
    return wrong


def load_dataset(name: str, config: str | None, split: str, revision: str | None) -> Any:
    """A split of a data set by its hub name, from the hub or the offline folder. Raises UserError if there is none."""
    if folder := offline_folder():
        found = offline_dataset(folder, name, config, revision)
        if split not in found:
            raise _lacking(folder, f"split {split} of data set {name}")
        return found[split]
    import datasets

    limit_waiting()
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the hub client raises many kinds for "not there"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data set {name!r} is neither a .jsonl or .parquet file here nor on the hub ({reason})"
        ) from error


@contextmanager
def offline_benchmarks() -> Iterator[None]:
    """While this holds, lm-eval's tasks take their data from the offline folder, if one is in use.

    Their YAML files name hub data sets, and lm-eval loads them by `datasets.load_dataset`: that function is replaced.
    """
    import datasets

    class Splits(datasets.DatasetDict):
        """A data set's splits; one that is not there is named, where lm-eval would stop with a KeyError."""

        def __init__(self, folder: Path, name: str, splits: datasets.DatasetDict):
            super().__init__(splits)
            self.place = (folder, name)

        def __missing__(self, split: str) -> Any:
            raise _lacking(self.place[0], f"split {split} of data set {self.place[1]}")

    folder, original = offline_folder(), datasets.load_dataset

    def replaced(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if Path(path).exists() or path in ("json", "parquet", "csv"):  # a task of the user's, on files
            return original(path, name, *args, **kwargs)
        assert folder is not None
        return Splits(folder, path, offline_dataset(folder, path, name))

    if folder is not None:
        datasets.load_dataset = replaced  # type: ignore[assignment]
    try:
        yield
    finally:
        datasets.load_dataset = original


def is_revision(facts: Mapping[str, Any], asked: str | None) -> bool:
    """Whether what the manifest has is the revision asked for: a commit, or a name that was one when it was fetched."""
    return asked is None or facts["revision"] is None or asked in (facts["revision"], facts.get("asked"))


def _check_revision(folder: Path, what: str, facts: Mapping[str, Any], asked: str | None) -> None:
    """Raise UserError where another revision was fetched than is asked for; what was taken from files has none."""
    if not is_revision(facts, asked):
        there = facts["revision"]
        raise UserError(f"{folder}: {what} is there at revision {there}, {asked} is asked for: run `tspin fetch` again")


def _check_sizes(folder: Path, prefix: str) -> None:
    """Raise UserError naming the first file that is missing or cut; checksums of gigabytes are `verify`'s."""
    for name, facts in read_manifest(folder)["files"].items():
        if name.startswith(prefix):
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                problem = "is missing" if not path.is_file() else "is incomplete"
                raise UserError(f"{path} {problem}: run `tspin fetch` for this folder again")


def _lacking(folder: Path, what: str) -> UserError:
    return UserError(f"{folder} has no {what}: on a machine with a network, run: tspin fetch PRESET --out {folder}")

"""`tspin fetch`: everything that a preset needs from the hub, into one folder for machines without a network.

Each thing is written whole and then entered in the folder's manifest with its checksums, so that a fetch that was
stopped goes on where it was. What a machine has already can take the hub's place (`--take`): a model folder or GGUF
file, or a data set's split as JSONL, JSON or Parquet.
"""

import fnmatch
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile, copytree
from typing import TYPE_CHECKING, Any

from tspin.config import Config
from tspin.data.formats import read_rows
from tspin.errors import UserError
from tspin.evaluation.suites import Suite, load_suite, task_manager_for
from tspin.hub.offline import DEFAULT, EMPTY, is_revision, limit_waiting, read_manifest
from tspin.models import HUB_FILES
from tspin.runs.files import atomic_path, sha256, write_json
from tspin.runs.locks import owned

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.tasks._index import Entry

EMBEDDED = "pocket"
LOCAL_DATA = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Item:
    """One thing to fetch. kind: model, dataset or nltk; `config` and `split` are a data set's (None: all splits).

    trained: where all splits are fetched, those that training takes.
    """

    kind: str
    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    trained: tuple[str, ...] = ()

    @property
    def required(self) -> set[str]:
        """The splits without which the item is of no use."""
        return {self.split} if self.split else {*self.trained}

    def __str__(self) -> str:
        parts = [part for part in (self.config, self.split) if part]
        return f"{self.kind} {self.name}" + (f" ({', '.join(parts)})" if parts else "")


def needed(config: Config) -> list[Item]:
    """What a preset takes from the hub: its model, its training data, its benchmarks. Raises UserError."""
    items: dict[Item, None] = {}
    if config.model.path != EMBEDDED and not Path(config.model.path).exists():
        items[Item("model", config.model.path, revision=config.model.revision)] = None
    for section in [config.data, *(config.for_method(name).data for name in config.methods)]:
        if section.path != EMBEDDED and Path(section.path).suffix not in LOCAL_DATA:
            items[Item("dataset", section.path, section.name, section.split, section.revision)] = None
    if config.evaluation is not None:
        suite = load_suite(config.evaluation.suite)
        items |= {Item("dataset", name, configuration): None for name, configuration in benchmark_data(suite)}
        if needs_nltk(suite):
            items[Item("nltk", "punkt_tab")] = None
    # A benchmark's data set is fetched with all its splits; training on one of them pins the revision of all.
    whole = {(item.name, item.config): item for item in items if item.kind == "dataset" and item.split is None}
    parts = [item for item in items if item.split is not None]
    found = [item for item in items if item.split is None or (item.name, item.config) not in whole]
    for number, item in enumerate(found):
        same = [part for part in parts if (part.name, part.config) == (item.name, item.config)]
        if item.kind == "dataset" and same:
            trained = tuple(sorted({part.split for part in same if part.split}))
            found[number] = replace(item, revision=same[-1].revision, trained=trained)
    return found


def fetch(config: Config, out: Path, take: Sequence[str] = (), report: Callable[[str], None] = print) -> list[str]:
    """Bring what is missing of `needed(config)` into `out`; returns a line for each thing that could not be had.

    take: `MODEL=FOLDER or GGUF FILE`, `punkt_tab=FOLDER`, `DATASET:CONFIG:SPLIT=FILE`; a * in CONFIG and in FILE
    stands for many.
    Raises UserError for a `take` that is malformed, names what the preset does not need, or leads to no file, and
    while another process fetches into the same folder.
    """
    items = needed(config)
    taken = local_sources(take, items)
    limit_waiting()
    with owned(out):
        return _fetch_missing(items, taken, out, report)


def _fetch_missing(
    items: list[Item], taken: dict[Item, dict[str, Path]], out: Path, report: Callable[[str], None]
) -> list[str]:
    failed = []
    for item in items:
        if is_there(out, item, taken.get(item, ())):
            report(f"{item}: there")
            continue
        try:
            facts = PRODUCERS[item.kind](out, item, taken.get(item, {}))
        except UserError as error:
            failed.append(f"{item}: {error}")
            continue
        except Exception as error:  # the hub's clients raise many kinds; whatever it was, the next thing may be had
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            failed.append(f"{item}: {reason}")
            continue
        _enter(out, item, facts)
        report(f"{item}: fetched")
    return failed


def local_sources(take: Sequence[str], items: Sequence[Item]) -> dict[Item, dict[str, Path]]:
    """For each item that `take` gives: a model's or NLTK's {"": path}, a data set's {split: path}. Raises UserError."""
    found: dict[Item, dict[str, Path]] = {}
    for given in take:
        target, separator, place = given.partition("=")
        name, *parts = target.split(":")
        if not separator or len(parts) not in (0, 2):
            raise UserError(f"--take {given}: write MODEL=PATH or DATASET:CONFIG:SPLIT=PATH")
        pattern, split = (parts[0] or DEFAULT, parts[1]) if parts else ("", "")
        same = [item for item in items if item.name == name and (item.kind == "dataset") == bool(parts)]
        matching = [item for item in same if not parts or fnmatch.fnmatch(item.config or DEFAULT, pattern)]
        if not matching:
            raise UserError(f"--take {given}: the preset needs no such {'data set' if parts else 'model or NLTK data'}")
        for item in matching:
            path = Path(place.replace("*", item.config or DEFAULT))
            if not path.exists():
                raise UserError(f"--take {given}: {path}: no such file or folder")
            found.setdefault(item, {})[split] = path
    return found


def is_there(out: Path, item: Item, splits: Iterable[str] = ()) -> bool:
    """Whether the folder has an item, with every file of its full length; of a data set, also these splits."""
    if not (out / "manifest.json").is_file():
        return False
    manifest = read_manifest(out)
    if item.kind == "nltk":
        return (out / "nltk_data" / "tokenizers" / item.name).is_dir()
    if item.kind == "model":
        known = manifest["models"].get(item.name)
        prefix = f"models/{item.name}/"
    else:
        known = manifest["datasets"].get(item.name, {}).get(item.config or DEFAULT)
        prefix = f"datasets/{item.name}/{item.config or DEFAULT}/"
        if known and not item.required | {*splits} <= known["splits"].keys():
            return False
    if known and not is_revision(known, item.revision):
        return False
    files = {name: facts for name, facts in manifest["files"].items() if name.startswith(prefix)}
    whole = all(
        (out / name).is_file() and (out / name).stat().st_size == facts["bytes"] for name, facts in files.items()
    )
    return bool(known and files and whole)


def _enter(out: Path, item: Item, facts: dict[str, Any]) -> None:
    """Put an item into the manifest, with a checksum of every file of it."""
    manifest = read_manifest(out) if (out / "manifest.json").exists() else json.loads(json.dumps(EMPTY))
    if item.kind == "model":
        manifest["models"][item.name] = facts
        folder = out / "models" / item.name
    elif item.kind == "dataset":
        configurations = manifest["datasets"].setdefault(item.name, {})
        before = configurations.get(item.config or DEFAULT, {"splits": {}})
        configurations[item.config or DEFAULT] = {**facts, "splits": {**before["splits"], **facts["splits"]}}
        folder = out / "datasets" / item.name / (item.config or DEFAULT)
    else:
        folder = out / "nltk_data"
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(out).as_posix()
            manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(out / "manifest.json", manifest)


def _fetch_model(out: Path, item: Item, taken: dict[str, Path]) -> dict[str, Any]:
    target = out / "models" / item.name
    if path := taken.get(""):
        with atomic_path(target) as temporary:
            if path.suffix == ".gguf":
                from tspin.models import convert_gguf

                convert_gguf(path, temporary)
            else:
                temporary.mkdir(parents=True)
                for file in sorted(path.iterdir()):
                    if any(fnmatch.fnmatch(file.name, pattern) for pattern in HUB_FILES):
                        copyfile(file, temporary / file.name)
        return {"revision": None, "taken": path.name}
    from huggingface_hub import HfApi, snapshot_download

    revision = HfApi().model_info(item.name, revision=item.revision).sha
    snapshot_download(item.name, revision=revision, allow_patterns=HUB_FILES, local_dir=target)
    return {"revision": revision, "asked": item.revision}


def _fetch_dataset(out: Path, item: Item, taken: dict[str, Path]) -> dict[str, Any]:
    import datasets

    parts: dict[str, Dataset]
    if taken:
        there = read_manifest(out)["datasets"].get(item.name, {}) if (out / "manifest.json").is_file() else {}
        given = {*taken, *there.get(item.config or DEFAULT, {"splits": {}})["splits"]}
        if missing := sorted(item.required - given):
            flag = f"--take {item.name}:{item.config or DEFAULT}:{missing[0]}=FILE"
            raise UserError(f"split {missing[0]}, which training takes, was not given: {flag}")
        parts = {split: datasets.Dataset.from_list(list(read_rows(path))) for split, path in taken.items()}
        facts: dict[str, Any] = {"revision": None, "taken": sorted(path.name for path in taken.values())}
    else:
        from huggingface_hub import HfApi

        revision = HfApi().dataset_info(item.name, revision=item.revision).sha
        loaded: Any = datasets.load_dataset(item.name, item.config, split=item.split, revision=revision)
        parts = {item.split: loaded} if item.split else dict(loaded)
        facts = {"revision": revision, "asked": item.revision}
    rows = {}
    for split, part in parts.items():
        with atomic_path(out / "datasets" / item.name / (item.config or DEFAULT) / f"{split}.parquet") as temporary:
            part.to_parquet(str(temporary))
        rows[split] = len(part)
    return {**facts, "splits": rows}


def _fetch_nltk(out: Path, item: Item, taken: dict[str, Path]) -> dict[str, Any]:
    if path := taken.get(""):
        with atomic_path(out / "nltk_data" / "tokenizers" / item.name) as temporary:
            copytree(path, temporary)
        return {}
    import nltk

    if not nltk.download(item.name, download_dir=str(out / "nltk_data"), quiet=True):
        raise UserError("NLTK could not download it")
    return {}


PRODUCERS: dict[str, Callable[[Path, Item, dict[str, Path]], dict[str, Any]]] = {
    "model": _fetch_model,
    "dataset": _fetch_dataset,
    "nltk": _fetch_nltk,
}


def benchmark_data(suite: Suite) -> list[tuple[str, str | None]]:
    """(hub name, configuration) of every data set that the suite's tasks load, in the tasks' order.

    Raises UserError when lm-eval does not know a benchmark.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    index: dict[str, Any] = task_manager_for(suite).task_index
    found: dict[tuple[str, str | None], None] = {}
    for task in _task_files(index, [column.benchmark for column in suite.columns]):
        settings = load_yaml(task, resolve_func=False)
        if "dataset_path" in settings and settings["dataset_path"] not in ("json", "parquet", "csv"):
            found[settings["dataset_path"], settings.get("dataset_name")] = None
    return list(found)


def needs_nltk(suite: Suite) -> bool:
    """Whether a task's own code uses NLTK, whose data is a download of its own (IFEval counts sentences by it)."""
    index = task_manager_for(suite).task_index
    folders = {path.parent for path in _task_files(index, [column.benchmark for column in suite.columns])}
    return any("import nltk" in path.read_text() for folder in sorted(folders) for path in folder.glob("*.py"))


def _task_files(index: "dict[str, Entry]", names: list[str]) -> Iterator[Path]:
    """The YAML files of the tasks that `names` come down to: groups and tags stand for their members."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for name in names:
        entry = index[name]
        members = list(entry.tags)
        if entry.yaml_path is not None and entry.kind.name == "GROUP":
            listed = load_yaml(entry.yaml_path, resolve_func=False).get("task", [])
            members = [one if isinstance(one, str) else one.get("task", one.get("group")) for one in listed]
        if members and entry.kind.name in ("GROUP", "TAG"):
            yield from _task_files(index, sorted(members))
        elif entry.yaml_path is not None:
            yield entry.yaml_path

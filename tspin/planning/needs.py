"""What a preset takes from the hub: its model, its training data, its benchmarks' data, NLTK's rules."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tspin.config import Config
from tspin.data.files import is_local, read_rows
from tspin.data.sources import EMBEDDED as EMBEDDED_ROWS
from tspin.evaluation.harness import task_manager_for
from tspin.evaluation.suites import Suite, load_suite
from tspin.hub.fetch import fetch, local_sources
from tspin.hub.offline import FILE_FORMATS, Item, check_name
from tspin.models import EMBEDDED

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry


def fetch_needed(
    config: Config, out: Path, take: Sequence[str] = (), report: Callable[[str], None] = print
) -> list[str]:
    """Bring what a preset needs and `out` lacks into it; returns a line for each thing that could not be had.

    take: see tspin.hub.fetch.local_sources. Raises UserError for what is wrong with it.
    """
    items = needed(config)
    return fetch(items, out, local_sources(take, items), read_rows, report)


def needed(config: Config) -> list[Item]:
    """The items that a preset takes from the hub, each once. Raises UserError.

    A benchmark's data set is wanted with all its splits; training on one of them pins the revision of all.
    """
    trained: dict[Item, None] = {}
    for data in [config.data, *(config.for_method(name).data for name in config.methods)]:
        if data.path not in EMBEDDED_ROWS and not is_local(data.path):
            trained[Item("dataset", data.path, data.name, data.split, data.revision)] = None
    held_out = config.evaluation.held_out if config.evaluation else None
    if held_out and held_out not in EMBEDDED_ROWS and not is_local(held_out):
        trained[Item("dataset", held_out, None, "train", None)] = None
    suite = load_suite(config.evaluation.suite) if config.evaluation else None
    benchmarks = benchmark_data(suite) if suite else []
    items = []
    models = {config.model.path: config.model.revision}
    for training in [config.training, *(config.for_method(name).training for name in config.methods)]:
        models |= dict.fromkeys([training.proto_model] if training.proto_model else [], None)
    for path, revision in models.items():
        if path not in EMBEDDED and not Path(path).exists():
            check_name(path)
            items.append(Item("model", path, revision=revision))
    items += [item for item in trained if (item.name, item.config) not in benchmarks]
    for name, configuration in benchmarks:
        same = [item for item in trained if (item.name, item.config) == (name, configuration)]
        splits = sorted({item.split for item in same if item.split})
        revision = same[-1].revision if same else None
        items.append(Item("dataset", name, configuration, revision=revision, trained=tuple(splits)))
    if suite and needs_nltk(suite):
        items.append(Item("nltk", "punkt_tab"))
    return items


def benchmark_data(suite: Suite) -> list[tuple[str, str | None]]:
    """(hub name, configuration) of every data set that the suite's tasks load, in the tasks' order.

    Raises UserError when lm-eval does not know a benchmark.
    """
    settings = [entry.cfg or {} for entry in _tasks_of(suite)]
    pairs = [(of["dataset_path"], of.get("dataset_name")) for of in settings if "dataset_path" in of]
    return list(dict.fromkeys(pair for pair in pairs if pair[0] not in FILE_FORMATS))


def needs_nltk(suite: Suite) -> bool:
    """Whether a task's code uses NLTK, whose data is a download of its own (IFEval counts sentences by it)."""
    folders = {entry.yaml_path.parent for entry in _tasks_of(suite) if entry.yaml_path}
    return any("import nltk" in path.read_text() for folder in folders for path in folder.glob("*.py"))


def _tasks_of(suite: Suite) -> "Iterator[Entry]":
    """lm-eval's entries of the suite's tasks, its groups and tags resolved into their members."""
    index = task_manager_for(suite).task_index
    names = [column.benchmark for column in reversed(suite.columns)]
    while names:
        entry = index[names.pop()]
        if entry.kind.name.endswith("TASK"):
            yield entry
            continue
        listed = (entry.cfg or {}).get("task", entry.tags)  # a group's members, a tag's
        members = {of if isinstance(of, str) else of.get("task", of.get("group")) for of in listed}
        names += sorted(members, reverse=True)

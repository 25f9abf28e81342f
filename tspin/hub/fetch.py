"""`tspin fetch`: models, data sets and NLTK data into an offline folder, for machines without a network.

Each item is written whole and then entered in the folder's manifest with its checksums, so that a fetch that was
stopped goes on where it was. What a machine has already can take the hub's place (`--take`): a model folder or GGUF
file, or a data set's split as JSONL, JSON or Parquet.
"""

import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tspin.errors import UserError, reason
from tspin.hub.offline import DEFAULT, MODEL_FILES, Item, lacking, limit_waiting, read_manifest, recorded
from tspin.runs.files import atomic_path, sha256, write_json
from tspin.runs.locks import owned

if TYPE_CHECKING:
    from datasets import Dataset

Sources = Mapping[Item, Mapping[str, Path]]  # of a data set, each split's file; of a model or NLTK data, {"": path}
ReadRows = Callable[[Path], Iterable[Any]]


def fetch(
    items: Iterable[Item], out: Path, sources: Sources, read_rows: ReadRows, report: Callable[[str], None] = print
) -> list[str]:
    """Bring the items that `out` lacks into it; returns a line for each that could not be had.

    sources: local files, from `local_sources`; all else comes from the hub.
    read_rows: gives the rows of a local data file.
    Raises UserError while another process fetches into the same folder.
    """
    limit_waiting()
    failed = []
    with owned(out):
        if not (out / "manifest.json").is_file():
            write_json(out / "manifest.json", {})
        for item in items:
            paths = sources.get(item, {})
            if lacking(out, item, filter(None, paths)) is None:
                report(f"{item}: there")
                continue
            try:
                facts = _take(out, item, paths, read_rows) if paths else _download(out, item)
            except Exception as error:  # the hub's clients raise many kinds; whatever it was, the next may be had
                failed.append(f"{item}: {reason(error)}")
                continue
            _enter(out, item, facts)
            report(f"{item}: fetched")
    return failed


def local_sources(take: Sequence[str], items: Sequence[Item]) -> Sources:
    """The local files that stand for items.

    take: `MODEL=FOLDER or GGUF FILE`, `punkt_tab=FOLDER`, `DATASET:CONFIG:SPLIT=FILE`; a * in CONFIG and in FILE
    stands for many.
    Raises UserError for an argument that is malformed, names none of the items, or leads to no file.
    """
    sources: dict[Item, dict[str, Path]] = {}
    for argument in take:
        target, separator, place = argument.partition("=")
        name, *parts = target.split(":")
        if not separator or len(parts) not in (0, 2):
            raise UserError(f"--take {argument}: write MODEL=PATH or DATASET:CONFIG:SPLIT=PATH")
        pattern, split = (parts[0] or DEFAULT, parts[1]) if parts else ("*", "")
        named = [item for item in items if item.name == name and (item.kind == "dataset") == bool(parts)]
        matching = [item for item in named if fnmatch(item.config or DEFAULT, pattern)]
        if not matching:
            kind = "data set" if parts else "model or NLTK data"
            raise UserError(f"--take {argument}: the preset needs no such {kind}")
        for item in matching:
            path = Path(place.replace("*", item.config or DEFAULT))
            if not path.exists():
                raise UserError(f"--take {argument}: {path}: no such file or folder")
            sources.setdefault(item, {})[split] = path
    return sources


def _take(out: Path, item: Item, paths: Mapping[str, Path], read_rows: ReadRows) -> dict[str, Any]:
    """Write an item from local files; returns its entry in the manifest."""
    taken = sorted(path.name for path in paths.values())
    if item.kind == "dataset":
        import datasets

        there = recorded(read_manifest(out), item) or {"splits": {}}
        if absent := item.required.difference(paths, there["splits"]):
            flag = f"--take {item.name}:{item.config or DEFAULT}:{min(absent)}=FILE"
            raise UserError(f"split {min(absent)}, which training takes, is missing: {flag}")
        parts = {split: datasets.Dataset.from_list(list(read_rows(path))) for split, path in paths.items()}
        return {"revision": None, "taken": taken, "splits": _write_splits(out / item.place, parts)}

    def unwanted(folder: str, names: list[str]) -> list[str]:
        """The names in a model's folder that are no MODEL_FILES."""
        return [name for name in names if not any(fnmatch(name, pattern) for pattern in MODEL_FILES)]

    (path,) = paths.values()
    with atomic_path(out / item.place) as temporary:
        if path.suffix == ".gguf":
            convert_gguf(path, temporary)
        else:
            shutil.copytree(path, temporary, ignore=unwanted if item.kind == "model" else None)
    return {"revision": None, "taken": path.name}


def _download(out: Path, item: Item) -> dict[str, Any]:
    """Write an item from the hub; returns its entry in the manifest."""
    if item.kind == "nltk":
        import nltk

        if not nltk.download(item.name, download_dir=str(out / "nltk_data"), quiet=True):
            raise UserError("NLTK could not download it")
        return {}
    from huggingface_hub import HfApi, snapshot_download

    if item.kind == "model":
        info = HfApi().model_info(item.name, revision=item.revision)
        folder = out / item.place  # not another one in its place: a download that was cut off goes on
        snapshot_download(item.name, revision=info.sha, allow_patterns=MODEL_FILES, local_dir=folder)
        _remove_others(folder, {file.rfilename for file in info.siblings or ()})
        return {"revision": info.sha, "asked": item.revision}
    import datasets

    revision = HfApi().dataset_info(item.name, revision=item.revision).sha
    loaded: Any = datasets.load_dataset(item.name, item.config, split=item.split, revision=revision)
    splits = _write_splits(out / item.place, {item.split: loaded} if item.split else dict(loaded))
    return {"revision": revision, "asked": item.revision, "splits": splits}


def _remove_others(folder: Path, names: Container[str]) -> None:
    """Remove what an earlier revision left: one file of weights beside several that have taken its place."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        name = path.relative_to(folder).as_posix()
        if name not in names and not name.startswith(".cache/"):
            path.unlink()


def _write_splits(folder: Path, parts: "Mapping[str, Dataset]") -> dict[str, int]:
    """Write a Parquet file for each split; returns their numbers of rows."""
    for split, part in parts.items():
        with atomic_path(folder / f"{split}.parquet") as temporary:
            part.to_parquet(str(temporary))
    return {split: len(part) for split, part in parts.items()}


def _enter(out: Path, item: Item, facts: dict[str, Any]) -> None:
    """Put an item into the manifest, with a checksum of every file of it."""
    manifest = read_manifest(out)
    if item.kind == "model":
        manifest["models"][item.name] = facts
        for name in [name for name in manifest["files"] if name.startswith(item.place + "/")]:
            del manifest["files"][name]  # another revision may have other files
    elif item.kind == "dataset":
        splits = (recorded(manifest, item) or {"splits": {}})["splits"] | facts["splits"]
        manifest["datasets"].setdefault(item.name, {})[item.config or DEFAULT] = {**facts, "splits": splits}
    for path in sorted((out / item.place).rglob("*")):
        if path.is_file():
            contents = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            manifest["files"][path.relative_to(out).as_posix()] = contents
    write_json(out / "manifest.json", manifest)


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file as a model folder, de-quantised to bfloat16. Needs the `gguf` package; raises UserError."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"{path}: reading GGUF files needs one more package: pip install gguf") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    loaded.config.__dict__.pop("quantization_config", None)
    # A model that came from a GGUF file refuses to be saved: its weights move into one that did not.
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)

"""A run's folder: stages that are written whole or not at all, fingerprints, provenance.

A stage is one output (a file or a folder) and the fingerprint of everything that it was made from.
Its record, `<output>.stage.json`, is written last: an output without a matching record does not
exist as far as a run is concerned, so a command that was killed anywhere continues where it was.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tspin.errors import UserError

RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "lm_eval", "reasoning_gym", "vllm")


def fingerprint(content: Any) -> str:
    """16 hex digits of the SHA-256 of `content`'s canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def folder_fingerprint(folder: Path) -> str:
    """Fingerprint of the contents of every file directly inside `folder`, names included."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return fingerprint(digests)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` to write a file or a folder to; renamed over it on success.

    Flushed to disk before the rename. On any error the temporary is removed and `target` is as
    it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for orphan in target.parent.glob(f".{target.name}.*.tmp"):  # of processes that were killed
        if not _alive(orphan.name.split(".")[-2]):
            _remove(orphan)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    _remove(temporary)
    try:
        yield temporary
        for path in [temporary, *(temporary.rglob("*") if temporary.is_dir() else ())]:
            _fsync(path)
        if temporary.is_dir():
            _remove(target)  # a folder cannot be renamed over one that is not empty
        os.replace(temporary, target)
        _fsync(target.parent)
    finally:
        _remove(temporary)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, indented, non-finite numbers refused."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run the command again") from error


def _record_path(output: Path) -> Path:
    return output.with_name(output.name + ".stage.json")


def stage_record(output: Path, inputs: Any) -> dict[str, Any] | None:
    """The record of a finished stage made from exactly these inputs, else None."""
    record = _record_path(output)
    if not (output.exists() and record.exists()):
        return None
    content = read_json(record)
    return content if content.get("fingerprint") == fingerprint(inputs) else None


def run_stage(output: Path, inputs: Any, produce: Callable[[Path], Mapping[str, Any] | None]) -> dict[str, Any]:
    """Make `output` by `produce(temporary path)` unless it is there, made from the same inputs.

    `produce` may return facts worth keeping with it (mean lengths, tokens). Returns the stage's
    record: {"fingerprint", "inputs", "seconds", "facts", "provenance"}.
    """
    found = stage_record(output, inputs)
    if found is not None:
        return found
    _record_path(output).unlink(missing_ok=True)
    start = time.time()
    with atomic_path(output) as temporary:
        facts = produce(temporary)
    record = {
        "fingerprint": fingerprint(inputs),
        "inputs": inputs,
        "seconds": round(time.time() - start, 2),
        "facts": dict(facts or {}),
        "provenance": provenance(),
    }
    write_json(_record_path(output), record)
    return record


def claim_folder(
    folder: Path, config: Mapping[str, Any], what: str = "run", upgrade: Callable[[Any], Any] = lambda found: found
) -> None:
    """Make `folder` a run of `config`, or raise UserError if it already is one of another.

    upgrade: gives what was written by an earlier version the settings that it did not know, by their defaults.
    The message names the first setting that differs and both values; nothing is written then.
    """
    path = folder / "config.json"
    wanted = json.loads(json.dumps(config, default=str))
    if path.exists():
        found = upgrade(read_json(path))
        if found != wanted:
            key, there, here = first_difference(found, wanted)
            raise UserError(
                f"{folder} holds a {what} of another config ({key} is {there!r} there, {here!r} here): "
                "choose another folder or delete this one"
            )
        return
    write_json(path, wanted)


def first_difference(there: Any, here: Any, path: str = "") -> tuple[str, Any, Any]:
    """(dotted key, value there, value here) of the first difference between two JSON trees."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                return first_difference(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    return path or "content", there, here


@cache
def provenance() -> dict[str, Any]:
    """Commit, versions, hardware: what a number depends on besides its config."""
    import torch

    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", "tspin", "experiments")
        ),
        "versions": versions,
        "hardware": {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "accelerators": devices},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str | None:
    repository = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

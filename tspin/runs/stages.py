"""A run's folder: stages that are written whole or not at all, fingerprints, provenance.

A stage is one output (a file or a folder) and the fingerprint of everything that it was made from.
Its record, `<output>.stage.json`, is written last: an output without a matching record does not
exist as far as a run is concerned, so a command that was killed anywhere continues where it was.

The record holds a SHA-256 of each file of the output, and of itself. What is read again is checked against them:
files each time a run comes by, checkpoints, which are large, when they are about to be loaded. What fails is kept
beside, under a name with "damaged" in it, and made again.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tspin.errors import UserError
from tspin.runs.redaction import redacted

HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]  # processes are known to their own machine alone
RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "lm_eval", "reasoning_gym", "vllm")


class DamagedStage(Exception):
    """A finished stage's output is no longer what was written; it was set aside, so running again makes it anew."""

    def __init__(self, output: Path):
        super().__init__(f"{output} was damaged")
        self.output = output


def fingerprint(content: Any) -> str:
    """16 hex digits of the SHA-256 of `content`'s canonical JSON."""
    return hashlib.sha256(_canonical(content)).hexdigest()[:16]


def fingerprint_of(items: Iterable[Any]) -> str:
    """`fingerprint` of the list of these items, which are taken one at a time."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        digest.update(b"," * bool(number) + _canonical(item))
    digest.update(b"]")
    return digest.hexdigest()[:16]


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str).encode()


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
        _, host, process, _ = orphan.name.rsplit(".", 3)
        if host == HOST and not _alive(process):
            _remove(orphan)
    temporary = target.parent / f".{target.name}.{HOST}.{os.getpid()}.tmp"
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


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksums(output: Path, beside: Sequence[str] = ()) -> dict[str, str]:
    """Path from the output's parent → SHA-256, for every file of an output and those `beside` it."""
    files = sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]
    files += [output.parent / name for name in beside]
    return {path.relative_to(output.parent).as_posix(): sha256(path) for path in files}


def _record_path(output: Path) -> Path:
    return output.with_name(output.name + ".stage.json")


def _write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of itself."""
    plain = json.loads(json.dumps(content, default=str, allow_nan=False))
    write_json(path, {**plain, "checksum": fingerprint(plain)})


def _read_sealed(path: Path, consequence: str) -> dict[str, Any] | None:
    """A JSON object as it was written, None if there is none; one that was damaged is set aside."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        claimed = content.pop("checksum", None)  # earlier versions wrote none
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        content = claimed = None
    if content is None or (claimed is not None and claimed != fingerprint(content)):
        _set_aside(path, consequence)
        return None
    return content


def _read_record(output: Path) -> dict[str, Any] | None:
    return _read_sealed(_record_path(output), "the stage is run again")


def _set_aside(path: Path, consequence: str) -> None:
    """Give a damaged file or folder a name that says so, and say it in one line."""
    names = (path.with_name(path.name + f".damaged{number}") for number in ["", *(f"-{n}" for n in range(2, 1000))])
    aside = next(name for name in names if not name.exists())
    os.replace(path, aside)
    sys.stderr.write(f"tspin: {path} is damaged (its checksum is another): kept as {aside.name}, {consequence}\n")


@dataclass(frozen=True)
class Stage:
    """A finished stage. facts: what its producer told. fingerprint: of what it was made from. seconds: it took."""

    output: Path
    fingerprint: str
    seconds: float
    facts: dict[str, Any]
    provenance: dict[str, Any]

    @classmethod
    def of(cls, output: Path, record: Mapping[str, Any]) -> "Stage":
        """From the stage's record."""
        return cls(output, *(record[name] for name in ("fingerprint", "seconds", "facts", "provenance")))


def stage_record(output: Path, inputs: Any) -> dict[str, Any] | None:
    """The record of a finished stage made from exactly these inputs, else None."""
    content = _read_record(output) if output.exists() else None
    return content if content is not None and content.get("fingerprint") == fingerprint(inputs) else None


def check_stage(output: Path, whole: bool = True) -> None:
    """Raise DamagedStage if a stage's output, about to be read, is not what was written; it is set aside then.

    whole: without, only the files beside the output are compared, and that it is there.
    What has no record, as a model of the user's, or one of an earlier version without checksums, is taken as it is.
    """
    known = (_read_record(output) or {}).get("files")
    if known is None:
        return
    beside = {name for name in known if Path(name).parts[0] != output.name}
    own = known.keys() - beside
    there = _checksums(output) if whole else {name: known[name] for name in own}
    bad = [output] if there != {name: known[name] for name in own} else []
    for path in (output.parent / name for name in sorted(beside)):
        if not path.is_file() or sha256(path) != known[path.name]:
            bad.append(path)
    if not bad:
        return
    _record_path(output).unlink()
    for path in bad:
        if path.exists():
            _set_aside(path, "the stage is run again")
    raise DamagedStage(output)


def run_stage(
    output: Path,
    inputs: Any,
    produce: Callable[[Path], Mapping[str, Any] | None],
    *,
    beside: Sequence[str] = (),
    check: bool = True,
) -> Stage:
    """Make `output` by `produce(temporary path)` unless it is there, whole, made from the same inputs.

    `produce` may return facts worth keeping with it (mean lengths, tokens). beside: names of further files that it
    writes into the output's folder. check: compare the checksums of an output that is there; without, those beside
    it only, and whoever reads it calls `check_stage` (for checkpoints of gigabytes, of which most are not read
    again).
    """
    found = stage_record(output, inputs)
    if found is not None:
        try:
            check_stage(output, whole=check)
            return Stage.of(output, found)
        except DamagedStage:
            pass
    _record_path(output).unlink(missing_ok=True)
    start = time.monotonic()
    with atomic_path(output) as temporary:
        facts = produce(temporary)
    record = {
        "fingerprint": fingerprint(inputs),
        "inputs": inputs,
        "seconds": round(time.monotonic() - start, 2),
        "facts": dict(facts or {}),
        "files": _checksums(output, beside),
        "provenance": provenance(),
    }
    _write_sealed(_record_path(output), record)
    return Stage.of(output, record)


def remove_stage(output: Path) -> None:
    """Remove an output with its record, the record first."""
    _record_path(output).unlink(missing_ok=True)
    _remove(output)


def note_damage(found: DamagedStage, before: set[Path]) -> None:
    """Remember a damaged output, which is to be made again. Raises UserError when it was already made again once."""
    if found.output in before:
        raise UserError(
            f"{found.output} was damaged again after it was made anew: this disk does not keep what it gets"
        )
    before.add(found.output)


def claim_folder(
    folder: Path, config: Mapping[str, Any], what: str = "run", upgrade: Callable[[Any], Any] = lambda found: found
) -> None:
    """Make `folder` a run of `config`, or raise UserError if it already is one of another.

    upgrade: gives what was written by an earlier version the settings that it did not know, by their defaults.
    The message names the first setting that differs and both values; nothing is written then.
    """
    path = folder / "config.json"
    wanted = json.loads(json.dumps(config, default=str))
    found = _read_sealed(path, "written anew from the settings given now")
    if found is not None:
        found = upgrade(found)
        if found != wanted:
            key, there, here = first_difference(found, wanted)
            raise UserError(
                f"{folder} holds a {what} of another config ({key} is {there!r} there, {here!r} here): "
                "choose another folder or delete this one"
            )
        return
    _write_sealed(path, wanted)


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
        "command": redacted(" ".join([Path(sys.argv[0]).name, *map(_without_place, sys.argv[1:])])),
    }


def _without_place(argument: str) -> str:
    """A command's argument as anyone may read it: of an absolute path, its name."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def _git(*arguments: str) -> str | None:
    repository = Path(__file__).resolve().parents[2]
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

"""Files that are written whole or not at all, and what tells their contents apart: checksums and fingerprints."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tspin.errors import UserError

HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]  # processes are known to their own machine alone


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` to write a file or a folder to; flushed and renamed over it on success.

    On any error the temporary is removed and `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for orphan in target.parent.glob(f".{target.name}.*.tmp"):  # of processes that were killed
        _, host, process, _ = orphan.name.rsplit(".", 3)
        if host == HOST and not _alive(process):
            remove(orphan)
    temporary = target.parent / f".{target.name}.{HOST}.{os.getpid()}.tmp"
    remove(temporary)
    try:
        yield temporary
        for path in [temporary, *(temporary.rglob("*") if temporary.is_dir() else ())]:
            _flush(path)
        if temporary.is_dir():
            remove(target)  # a folder cannot be renamed over one that is not empty
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        remove(temporary)


def _flush(path: Path) -> None:
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
    except PermissionError:  # somebody else's
        pass
    return True


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing happens where there is none."""
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
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=2, ensure_ascii=False, default=str, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run the command again") from error


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of `content`'s canonical JSON."""
    return hashlib.sha256(_canonical(content)).hexdigest()[:16]


def fingerprint_of(items: Iterable[Any]) -> str:
    """`fingerprint` of the list of these items, which are taken one at a time."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        digest.update(b"," * bool(number) + _canonical(item))
    digest.update(b"]")
    return digest.hexdigest()[:16]


def folder_fingerprint(folder: Path) -> str:
    """Fingerprint of the name and the contents of every file directly inside `folder`."""
    return fingerprint({path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()})


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str).encode()

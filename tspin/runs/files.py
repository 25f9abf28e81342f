"""Files that are written whole or not at all, and what tells their contents apart: checksums and fingerprints."""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tspin.errors import UserError

HASHED_TOGETHER = 8  # files; more than disks and memory take
SETTLED = 2.0  # seconds after a file's last write; the coarsest clock of a file system ticks once in two
_HASHED: dict[str, tuple[tuple[int, ...], str]] = {}  # path → what it was like, and its SHA-256

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


def checksums(paths: Iterable[Path], again: bool = True) -> list[str]:
    """The SHA-256 of each of several files, computed at the same time: hashing lets other threads run.

    again: without, a file that this process has hashed is not read again as long as its size, its times of change and
    its inode are those that it had. That misses what changes below the file system (a disk that loses bits) within one
    process, and writes within SETTLED seconds before a hash do not count as hashed; another process reads everything.
    """
    with ThreadPoolExecutor(min(os.cpu_count() or 1, HASHED_TOGETHER)) as pool:
        return list(pool.map(partial(_checksum, again=again), paths))


def _checksum(path: Path, again: bool) -> str:
    start, identity = time.time(), _identity(path)
    name = str(path.resolve())
    known = None if again else _HASHED.get(name)
    if known is not None and known[0] == identity:
        return known[1]
    digest = sha256(path)
    # A write in the clock's same tick would not show in the file's times.
    if start - path.stat().st_mtime > SETTLED and _identity(path) == identity:
        _HASHED[name] = (identity, digest)
    return digest


def _identity(path: Path) -> tuple[int, ...]:
    of = path.stat()
    return of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino, of.st_dev


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
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return fingerprint(dict(zip([path.name for path in files], checksums(files), strict=True)))


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str).encode()

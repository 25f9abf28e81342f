"""One command at a time in a folder: an advisory lock that the operating system drops when its owner dies."""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tspin.errors import UserError

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # some network file systems, as they are mounted
_held: set[tuple[int, Path]] = set()  # (process, folder): a process may enter its own folders again


@contextmanager
def owned(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder`, made if it is missing, for this process alone.

    While another process holds it, raise UserError naming that process, or with `wait` say so in one line and wait.
    The lock is flock's on `folder`/.lock: nothing has to be cleared after a crash, however the owner died. A folder
    that cannot be written to is not locked, since nothing in it can change; on a file system without locks, a line
    warns.
    """
    key = (os.getpid(), folder.resolve())
    descriptor = None if key in _held else _open(folder)
    if descriptor is None:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            if not wait:
                raise UserError(
                    f"{folder} is in use by {owner}: wait until it has ended, or choose another folder"
                ) from None
            sys.stderr.write(f"tspin: {folder} is in use by {owner}; waiting for it\n")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            sys.stderr.write(f"tspin: {folder}: this file system has no locks; run one command at a time there\n")
        _name_owner(descriptor)
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
    finally:
        os.close(descriptor)  # and with it the lock; the file stays, since removing it would let two in


def _open(folder: Path) -> int | None:
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return None


def _name_owner(descriptor: int) -> None:
    """Write who holds the lock, for the message of those who do not; a full disk does not matter here."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:
        pass

"""One command at a time in a folder: a lock that the operating system drops when its owner dies."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from tspin.errors import UserError

LOCK = ".lock"
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # some network file systems, as they are mounted
POLL_SECONDS = 0.5


@contextmanager
def owned(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder`, made if it is missing, for this process alone; it may enter its own folders again.

    While another process holds it, raise UserError naming that process, or with `wait` say so in one line and wait.
    A folder that cannot be written to is not locked, since nothing in it can change; on a file system without locks, a
    line warns.
    """
    try:
        held = _acquire(folder, wait)
    except OSError as error:
        if error.errno in NO_LOCKS:
            _say_no_locks(folder)
        elif error.errno not in READ_ONLY:
            raise
        held = nullcontext()
    with held:
        yield


def _acquire(folder: Path, wait: bool) -> AbstractContextManager[object]:
    """The lock of `folder`, held until its context ends: flock on `folder`/.lock, which stays there."""
    path = folder.resolve() / LOCK
    lock = FileLock(path, is_singleton=True, thread_local=False, on_acquired=_name_owner)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        owner = path.read_text(errors="replace").strip() or "another process"
    if not wait:
        raise UserError(f"{folder} is in use by {owner}: wait until it has ended, or choose another folder")
    sys.stderr.write(f"tspin: {folder} is in use by {owner}; waiting for it\n")
    return lock.acquire(poll_interval=POLL_SECONDS)


def _name_owner(descriptor: int) -> None:
    """Write who holds the lock, for the message of those who do not; a full disk does not matter here."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


@cache
def _say_no_locks(folder: Path) -> None:
    sys.stderr.write(f"tspin: {folder}: this file system has no locks; run one command at a time there\n")

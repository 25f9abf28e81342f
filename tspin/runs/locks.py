"""One command at a time in a folder, on this machine and on all that share its file system.

Two files in the folder say so. `.lock` carries flock, which the operating system drops when its owner dies, and names
the owner. Between machines that is not enough: a file system may be mounted so that each has locks of its own
(Lustre's localflock), or none. So there is a lease besides, `.owner`, which its owner touches as long as it lives; it
is gone after a good end, and whoever finds one that nobody touches takes it over. On one machine the flock decides.
"""

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from tspin.errors import UserError

LOCK, LEASE = ".lock", ".owner"
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # some network file systems, as they are mounted
FULL = (errno.ENOSPC, errno.EDQUOT)
POLL_SECONDS = 0.5
RETRY_SECONDS = 0.2
BEAT_SECONDS = 30.0  # between two signs of life
LEASE_SECONDS = 180.0  # without one until an owner on another machine is taken for dead; the same for all of them
UNWRITTEN_SECONDS = 5.0  # for an owner to write its name into the lease that it made, and for a network to bring it
JOB = re.compile(r"Slurm job (\S+), start (\d+)")


@contextmanager
def owned(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder`, made if it is missing, for this process alone; it may enter its own folders again.

    While another process holds it, raise UserError naming that process, or with `wait` say so in one line and wait.
    One on another machine that has given no sign of life for LEASE_SECONDS is watched as long again, and then its
    folder is taken over.
    A folder that cannot be written to is not locked, since nothing in it can change; on a file system without locks, a
    line warns, and the lease alone decides.
    """
    with ExitStack() as held:
        try:
            _enter(held, folder, wait)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
        yield


def _enter(held: ExitStack, folder: Path, wait: bool) -> None:
    """Have `held` hold the flock and the lease of a folder."""
    path = folder.resolve() / LOCK
    lease = _lease(path)
    try:
        held.enter_context(_acquire_lock(path, folder, wait))
        if not lease.is_locked:
            _remove_of_the_dead(path)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _say_no_locks(folder)
    if not lease.is_locked:
        _remove_unwritten(path)
    try:
        held.enter_context(_acquire_lease(lease, path, folder, wait))
    except OSError as error:
        if error.errno not in FULL:  # the next thing that is written says it, with what to do
            raise
    _name_owner(path)


def _lease(lock: Path) -> SoftFileLease:
    """The lease beside the lock in `lock`."""
    return SoftFileLease(
        lock.with_name(LEASE),
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=BEAT_SECONDS,
        on_compromise=_say_lost,
        is_singleton=True,
        thread_local=False,
    )


def _acquire_lock(path: Path, folder: Path, wait: bool) -> AbstractContextManager[object]:
    """The flock, held until its context ends; its file stays."""
    lock = FileLock(path, is_singleton=True, thread_local=False)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        owner = _owner(folder)
    if not wait:
        raise UserError(f"{folder} is in use by {owner}: wait until it has ended, or choose another folder")
    sys.stderr.write(f"tspin: {folder} is in use by {owner}; waiting for it\n")
    return lock.acquire(poll_interval=POLL_SECONDS)


def _remove_of_the_dead(lock: Path) -> None:
    """Remove a lease of this machine's, whose owner does not hold the flock any more: it is dead."""
    lease = lock.with_name(LEASE)
    with suppress(FileNotFoundError):
        if re.search(rf"^host={re.escape(socket.gethostname())}\b", lease.read_text(errors="replace"), re.MULTILINE):
            lease.unlink()


def _remove_unwritten(lock: Path) -> None:
    """Remove a lease that stays empty: its owner died before it wrote its name, and nobody would ever take it over."""
    lease = lock.with_name(LEASE)
    with suppress(FileNotFoundError):
        found, deadline = lease.stat(), time.monotonic() + UNWRITTEN_SECONDS
        while (now := lease.stat()).st_ino == found.st_ino and now.st_size == 0:
            if time.monotonic() >= deadline:
                lease.unlink()
                return
            time.sleep(RETRY_SECONDS / 10)


def _acquire_lease(lease: SoftFileLease, path: Path, folder: Path, wait: bool) -> AbstractContextManager[object]:
    """The lease, held until its context ends, when its file is removed."""
    try:  # more than one attempt: the first removes what a dead process of this machine left
        return lease.acquire(timeout=RETRY_SECONDS, poll_interval=RETRY_SECONDS / 10)
    except Timeout:  # of a process on another machine; or, without locks, on this one
        owner, silent = _owner(folder), _seconds_silent(path)
    except LeaseSettingsMismatch as error:
        raise UserError(
            f"{folder} is in use by {_owner(folder)}, a command of another version of tspin: wait until it has ended, "
            f"or delete {folder / LEASE} if it has"
        ) from error
    if _started_again(owner):
        sys.stderr.write(f"tspin: {folder} was in use by {owner}, which Slurm has started again: this is it\n")
        path.with_name(LEASE).unlink(missing_ok=True)
        return lease.acquire(poll_interval=POLL_SECONDS)
    if silent >= LEASE_SECONDS:
        sys.stderr.write(
            f"tspin: {folder} is in use by {owner}, which has given no sign of life for {silent / 60:.0f} minutes; "
            f"taking it over unless there is one in {LEASE_SECONDS:.0f} seconds\n"
        )
        with suppress(Timeout):
            return lease.acquire(timeout=LEASE_SECONDS + 2 * POLL_SECONDS, poll_interval=POLL_SECONDS)
    if not wait:
        raise UserError(
            f"{folder} is in use by {owner}: wait until it has ended, or choose another folder; where it was killed, "
            f"the same command takes over {LEASE_SECONDS / 60:.0f} minutes after its end"
        )
    sys.stderr.write(f"tspin: {folder} is in use by {owner}; waiting for it\n")
    return lease.acquire(poll_interval=POLL_SECONDS)


def _seconds_silent(lock: Path) -> float:
    """Since the owner last touched its lease, by the file system's clock: machines' own may differ."""
    try:
        lock.touch()
        return lock.stat().st_mtime - lock.with_name(LEASE).stat().st_mtime
    except FileNotFoundError:  # it has just ended
        return 0.0


def _owner(folder: Path) -> str:
    """The process that holds a folder, in words."""
    try:
        return (folder / LOCK).read_text(errors="replace").strip() or "another process"
    except OSError:
        return "another process"


def _name_owner(lock: Path) -> None:
    """Write who holds the folder, for the message of those who do not; a full disk does not matter here."""
    job = os.environ.get("SLURM_JOB_ID")
    started = f" (Slurm job {job}, start {os.environ.get('SLURM_RESTART_COUNT', 0)})" if job else ""
    with suppress(OSError):
        lock.write_text(f"process {os.getpid()} on {socket.gethostname()}{started}\n")


def _started_again(owner: str) -> bool:
    """Whether the owner is an earlier start of the Slurm job that this process is in."""
    job, named = os.environ.get("SLURM_JOB_ID"), JOB.search(owner)
    return bool(job and named and named[1] == job and int(named[2]) < int(os.environ.get("SLURM_RESTART_COUNT", 0)))


def _say_lost(lost: LeaseCompromise) -> None:
    sys.stderr.write(
        f"tspin: {Path(lost.lock_file).parent}: this command is not its only owner any more ({lost.reason}): another "
        "may write there; end one of the two\n"
    )


@cache
def _say_no_locks(folder: Path) -> None:
    sys.stderr.write(f"tspin: {folder}: this file system has no locks; run one command at a time there\n")

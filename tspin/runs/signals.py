"""SIGTERM, SIGUSR2 and Ctrl-C: a training finishes its step and keeps its state; everything else stops at once.

SIGUSR2 is what queues send before a job's time is up. In Python all raise `Stopped`, a KeyboardInterrupt; the command
line exits with 128 and the signal's number, as shells expect: 130, 140 or 143. Processes
that are forked, such as a pool's, end by SIGTERM, which their parent sends them, and without a word. Those that a
training forks, to load its data, stay as long as the step in hand needs them.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
SECONDS_TO_FORK = 0.1
_fork = threading.local()  # now: whether this thread is in the middle of a fork; mask: the signals it held back before


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end. number: the signal's; saved: what was kept of the work in hand, in words."""

    def __init__(self, number: int, saved: str = ""):
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved


class Asked:
    """Whether a signal has come: its number, or None."""

    number: int | None = None


_asked: Asked | None = None  # of the `stopping_when_asked` that holds


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """While this holds, SIGTERM and SIGUSR2 raise Stopped as Ctrl-C does."""
    with _handling(_stop):
        yield


@contextmanager
def stopping_when_asked(impatient: bool = True) -> Iterator[Asked]:
    """While this holds, the first signal is noted in the `Asked` that it yields; the second raises Stopped.

    impatient: without, the second is nothing new: for one of several processes that can only stop together.
    Whoever is at work looks there, and raises Stopped where the work can be left. At the end, with all of it done, this
    raises it: the signal is not lost. Within another one, the other one's.
    """
    global _asked
    if _asked is not None:
        yield _asked
        return
    asked = _asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        if impatient and asked.number is not None:
            raise Stopped(number)
        asked.number = number

    try:
        with _handling(note):
            yield asked
    finally:
        _asked = None
    if asked.number is not None:
        raise Stopped(asked.number)


def ask(number: int) -> None:
    """Note a signal that came to another process, as if it had come to this one."""
    if _asked is not None:
        _asked.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    if getattr(_fork, "now", False):  # what is raised in the middle of a fork is lost: let the signal come again
        again = threading.Timer(SECONDS_TO_FORK, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    raise Stopped(number)


def _leave_to_parent(number: int, frame: FrameType | None) -> None:
    pass


# Ctrl-C in a terminal, and a queue's SIGUSR2, come to all processes. A worker that they ended might hold a lock that
# its parent waits for.
IN_FORKED: dict[signal.Signals, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: _leave_to_parent,
    signal.SIGUSR2: _leave_to_parent,
}


def _before_fork() -> None:
    """Hold signals back: one that came to a process before it has handlers of its own would be lost there."""
    _fork.now = True
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)
    _fork.now = False


def _in_forked() -> None:
    for number, handler in IN_FORKED.items():
        if signal.getsignal(number) is _stop:
            signal.signal(number, handler)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_forked)


@contextmanager
def blocked(number: signal.Signals) -> Iterator[None]:
    """Hold a signal back while this holds, and from processes that are started within for as long as they live."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handling(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread only
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

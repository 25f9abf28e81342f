"""SIGTERM and Ctrl-C: a training finishes its step and keeps its state; everything else stops at once.

In Python both raise `Stopped`, a KeyboardInterrupt; the command line exits with 130 or 143, as shells expect. A forked
process, such as one of a pool's, ends by them as any process does, without a word: its parent has the say. One that a
training forks, to load its data, stays as long as the step in hand needs it.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end. number: the signal's; saved: what was kept of the work in hand, in words."""

    def __init__(self, number: int, saved: str = ""):
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved


class Asked:
    """Whether a signal has come: its number, or None."""

    number: int | None = None


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """While this holds, SIGTERM raises Stopped as Ctrl-C does."""
    with _handling(_stop):
        yield


@contextmanager
def stopping_when_asked() -> Iterator[Asked]:
    """While this holds, the first signal is noted in the `Asked` that it yields; the second raises Stopped."""
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.number is not None:
            raise Stopped(number)
        asked.number = number

    with _handling(note):
        yield asked


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _end_forked_at_once() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_end_forked_at_once)


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

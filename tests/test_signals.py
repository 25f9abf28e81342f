"""Processes that are forked while a command is at work: signals end them without a word, and hang nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tspin.runs import signals

# Pools as lm-eval makes them, which end their workers by SIGTERM. With one task a worker, a thread forks the next.
POOLS = """
import multiprocessing, os, signal, time
from tspin.runs.signals import Stopped, stopping_at_once

fork = multiprocessing.get_context("fork")
with stopping_at_once():
    for _ in range(10):
        with fork.Pool(2) as pool:
            assert pool.map(abs, range(-4, 0)) == [4, 3, 2, 1]
        with fork.Pool(2, maxtasksperchild=1) as pool:
            assert pool.map(abs, range(-4, 0), chunksize=1) == [4, 3, 2, 1]
    for tasks in (0, 2):  # idle workers, one of which holds the lock of the queue, and busy ones
        try:
            with fork.Pool(2) as pool:
                pool.map_async(time.sleep, [60] * tasks)
                time.sleep(0.3)
                os.killpg(0, signal.SIGINT)  # as Ctrl-C does in a terminal
                time.sleep(60)
        except Stopped:
            assert not multiprocessing.active_children()
print("done")
"""


def test_workers_of_a_pool_end_at_once_and_in_silence():
    done = subprocess.run(
        [sys.executable, "-c", POOLS], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_signal_in_the_middle_of_a_fork_comes_again():
    """What a handler raises there is lost."""
    with signals.stopping_at_once():
        signals._before_fork()
        os.kill(os.getpid(), signal.SIGTERM)
        signals._after_fork()
        with pytest.raises(signals.Stopped):
            time.sleep(10)


@pytest.mark.parametrize("at_work", ["stopping_at_once", "stopping_when_asked"])
def test_what_a_forked_process_does(at_work):
    """Of a command it ends by SIGTERM, and its parent's Ctrl-C is not its own; of a training, it stays for the step."""
    with getattr(signals, at_work)():
        child = os.fork()
        if child == 0:
            time.sleep(0.5)
            os._exit(7)
        time.sleep(0.1)
        if at_work == "stopping_at_once":
            os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == (-signal.SIGTERM if at_work == "stopping_at_once" else 7)


def test_a_signal_that_nobody_acted_upon_is_not_lost():
    """A training looks for it between steps; what comes while its checkpoint is written is raised after that."""
    done = []
    with pytest.raises(signals.Stopped) as stopped, signals.stopping_when_asked() as asked:
        os.kill(os.getpid(), signal.SIGUSR2)
        with signals.stopping_when_asked() as inner:
            assert inner is asked and asked.number == signal.SIGUSR2
        done.append("written")
    assert (stopped.value.number, done) == (signal.SIGUSR2, ["written"])
    with signals.stopping_when_asked() as asked:  # the next one knows nothing of it
        assert asked.number is None


def test_a_second_signal_stops_at_once_but_for_one_process_of_several():
    with pytest.raises(signals.Stopped), signals.stopping_when_asked():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        pytest.fail("the second one is heeded")
    with pytest.raises(signals.Stopped), signals.stopping_when_asked(impatient=False) as asked:
        signals.ask(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.number == signal.SIGTERM

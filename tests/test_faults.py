"""The fault campaign's short form: a few cases of most faults. `make fault-test` runs it whole."""

import subprocess
import sys

from tspin.config import REPOSITORY


def test_no_number_is_lost():
    """In a process of its own: it forks, which a process that has computed with threads must not."""
    command = [sys.executable, "-m", "experiments.checks.faults.run", "--short"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr

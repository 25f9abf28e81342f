"""This machine's arithmetic."""

import subprocess
import sys

CODE = """
import sys, torch
from tspin.devices import without_denormals
torch.set_num_threads(2)
for _ in range(2):  # the second time, PyTorch's threads are there
    with without_denormals():
        inside = torch.full((4_000_000,), 1e-30) * 1e-10
    print(int((inside != 0).sum()), sys.float_info.min / 2 > 0)
"""


def test_denormal_numbers_are_zero_while_policies_compute():
    """In every thread of PyTorch's, and not in what else a process does."""
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["0 True", "0 True"]

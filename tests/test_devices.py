"""This machine's arithmetic."""

import subprocess
import sys

CODE = """
import sys, torch
from tspin.models import load_model
torch.set_num_threads(2)
load_model(sys.argv[1])
print(int(((torch.full((4_000_000,), 1e-30) * 1e-10) != 0).sum()))
"""


def test_once_a_policy_is_loaded_denormal_numbers_are_zero(model_folder):
    """In every thread of PyTorch's."""
    ran = subprocess.run([sys.executable, "-c", CODE, str(model_folder)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "0"

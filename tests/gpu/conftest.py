"""What needs a GPU: skipped, with the reason, where there is none. `make test-gpu` runs it.

TSPIN_TEST_DEVICE=cpu runs what a CPU can take of it, slowly, to try the tests themselves.
"""

import os

import pytest
import torch

ON_CPU = os.environ.get("TSPIN_TEST_DEVICE") == "cpu"


@pytest.fixture
def device() -> torch.device:
    """Where the test computes."""
    if ON_CPU:
        return torch.device("cpu")
    if not torch.accelerator.is_available():
        pytest.skip("no GPU on this machine")
    return torch.device(torch.accelerator.current_accelerator())


@pytest.fixture
def gpus(device) -> int:
    """How many there are, two at least."""
    count = 2 if ON_CPU else torch.accelerator.device_count()
    if count < 2:
        pytest.skip("one GPU on this machine: processes that share a training need two")
    return count


@pytest.fixture
def memory(device) -> int:
    """Bytes of one GPU."""
    if device.type == "cpu":
        pytest.skip("of a GPU's memory")
    return torch.get_device_module(device).get_device_properties(0).total_memory

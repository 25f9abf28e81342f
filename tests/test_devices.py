"""This machine's accelerators and arithmetic."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tspin import devices
from tspin.engines.workers import gpu_environment
from tspin.errors import UserError
from tspin.runs.provenance import provenance

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


class Driver(SimpleNamespace):
    """Stands for torch.cuda, torch.xpu …, and notes what is asked of it."""

    def __init__(self, **functions):
        self.asked = []
        super().__init__(**{name: self._noted(name, value) for name, value in functions.items()})

    def _noted(self, name, value):
        def function(*arguments, **options):
            self.asked.append(name)
            return value(*arguments, **options) if callable(value) else value

        return function


COUNTING = {"empty_cache": None, "reset_peak_memory_stats": None, "max_memory_allocated": 7 * 2**30}


@pytest.fixture
def accelerators(monkeypatch):
    """Let this machine seem to have some."""

    def pretend(kind: str, count: int = 1, hip: str | None = None, **functions) -> Driver:
        driver = Driver(**functions)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch, "get_device_module", lambda device: driver)
        monkeypatch.setattr(torch.version, "hip", hip)
        for name in {variable for kind in devices.VISIBLE.values() for variable in kind}:
            monkeypatch.delenv(name, raising=False)
        return driver

    return pretend


def test_without_an_accelerator_the_cpu_computes():
    assert devices.device() == torch.device("cpu") and devices.accelerator() is None
    assert devices.accelerator_names() == devices.visible_devices({"CUDA_VISIBLE_DEVICES": "0,1"}) == []
    assert not devices.pins_memory() and devices.widest_float() == torch.float64
    assert provenance()["hardware"]["accelerators"] == []


@pytest.mark.parametrize("kind", ["cuda", "xpu", "privateuseone"])
def test_memory_is_asked_of_the_kind_that_is_there(kind, accelerators):
    driver = accelerators(kind, 2, get_device_name="a product", **COUNTING)
    assert devices.device().type == kind and devices.pins_memory() and devices.widest_float() == torch.float64
    devices.reset_peak()
    assert devices.peak_bytes() == 7 * 2**30
    devices.give_back()
    assert devices.accelerator_names() == ["a product", "a product"]
    assert driver.asked[:3] == ["reset_peak_memory_stats", "max_memory_allocated", "empty_cache"]


def test_mps_has_no_peaks_no_float64_and_no_bfloat16_training(accelerators, monkeypatch):
    driver = accelerators("mps", empty_cache=None)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M3")
    devices.reset_peak()
    devices.give_back()
    assert driver.asked == ["empty_cache"] and devices.peak_bytes() is None
    assert devices.accelerator_names() == ["Apple M3"]
    assert devices.widest_float() == torch.float32 and not devices.pins_memory()
    assert not devices.multiplies_bfloat16()
    assert "CUDA_VISIBLE_DEVICES" not in gpu_environment(0, 1)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_emulated_bfloat16_does_not_count(kind, accelerators):
    accelerators(kind, is_bf16_supported=lambda including_emulation=True: including_emulation)
    assert not devices.multiplies_bfloat16()


@pytest.mark.parametrize(
    ("kind", "hip", "variables"),
    [
        ("cuda", None, ["CUDA_VISIBLE_DEVICES"]),
        ("cuda", "7.0", ["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"]),
        ("xpu", None, ["ZE_AFFINITY_MASK"]),
        ("npu", None, ["ASCEND_RT_VISIBLE_DEVICES"]),
    ],
)
def test_each_worker_sees_its_own_devices(kind, hip, variables, accelerators, monkeypatch):
    if kind == "npu":  # a name that PyTorch takes once the plugin is installed
        kind = "privateuseone"
        monkeypatch.setitem(devices.VISIBLE, kind, devices.VISIBLE["npu"])
    accelerators(kind, 4, hip)
    found = [gpu_environment(number, 2) for number in range(2)]
    assert [[environment[name] for name in variables] for environment in found] == [
        ["0,1"] * len(variables),
        ["2,3"] * len(variables),
    ]
    with pytest.raises(UserError, match="3 copies of the model on 2 GPUs each need 6 GPUs, 4 are there"):
        gpu_environment(2, 2)
    monkeypatch.setenv(variables[0], "5,7,9")  # the first counts
    assert gpu_environment(1, 1)[variables[-1]] == "7"


def test_workers_of_an_unknown_kind_cannot_be_kept_apart(accelerators):
    accelerators("privateuseone", 2)
    assert gpu_environment(0, 2).keys() == os.environ.keys()  # all there are: nothing to tell
    with pytest.raises(UserError, match="engine: no variable is known .* set engine.data_parallel=1"):
        gpu_environment(0, 1)


def test_one_module_knows_kinds_of_accelerators():
    root = Path(devices.__file__).parent
    asks = {path.name for path in root.rglob("*.py") if "cuda" in path.read_text(encoding="utf-8").lower()}
    assert asks <= {"devices.py", "segments.py", "settings.py"}, asks  # a kernel, a help text

"""This machine's accelerators (CUDA, ROCm, XPU, NPU, MPS), or its CPU: which there are, their memory, fast arithmetic.

No other module asks what kind they are, but for the attention kernel that CUDA and ROCm alone have (tspin.segments).
"""

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import is_torch_bf16_gpu_available

from tspin.errors import UserError

PROCESS = Path("/proc/self")
PROCESSORS = Path("/proc/cpuinfo")
MEMORY = Path("/proc/meminfo")
GROUPS = Path("/sys/fs/cgroup")
# The variables that say which devices a process may use, the one that counts first. A machine has one "mps" at most.
VISIBLE = {
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "rocm": ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "xpu": ("ZE_AFFINITY_MASK",),
    "npu": ("ASCEND_RT_VISIBLE_DEVICES",),
}


def accelerator() -> torch.device | None:
    """The kind of accelerator that computes here, without a number; None where the CPU does."""
    return torch.accelerator.current_accelerator(check_available=True)


def device() -> torch.device:
    """Where a model is put to compute: the accelerator, else the CPU."""
    return accelerator() or torch.device("cpu")


def accelerators() -> int:
    """How many this process may use."""
    return torch.accelerator.device_count()


def accelerator_names() -> list[str]:
    """Their products' names, as their drivers give them."""
    kind = accelerator()
    if kind is None:
        return []
    if kind.type == "mps":
        return [torch.backends.mps.get_name()]
    return [_module().get_device_name(number) for number in range(accelerators())]


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """The accelerators of a process with this environment, as its variable names them."""
    listed = next((environment[name] for name in _variables() if environment.get(name)), None)
    return listed.split(",") if listed else [str(number) for number in range(accelerators())]


def can_be_shown() -> bool:
    """Whether `showing` can give a process some of this machine's accelerators, and there are any."""
    return bool(_variables())


def showing(environment: Mapping[str, str], devices: Sequence[str]) -> dict[str, str]:
    """The environment in which a process sees these of `visible_devices` alone.

    Raises UserError for a kind of accelerator whose processes cannot be kept apart.
    """
    if not _variables():
        raise UserError(
            f"engine: no variable is known that gives a process some of several {device().type} devices; "
            "set engine.data_parallel=1"
        )
    return {**environment, **dict.fromkeys(_variables(), ",".join(devices))}


def _variables() -> tuple[str, ...]:
    kind = device().type
    return VISIBLE.get("rocm" if kind == "cuda" and torch.version.hip else kind, ())


def _module() -> Any:
    """torch.cuda, torch.xpu, torch.mps …; torch.cpu without an accelerator."""
    return torch.get_device_module(device())


def pins_memory() -> bool:
    """Whether host memory can be pinned, for faster copies to the accelerator: MPS shares the host's."""
    return device().type not in ("cpu", "mps")


def widest_float() -> torch.dtype:
    """float64, for sums that need it; float32 on MPS, which has nothing wider."""
    return torch.float32 if device().type == "mps" else torch.float64


def accelerator_bytes() -> int | None:
    """Memory of one accelerator; None without, or where its driver does not say."""
    if accelerator() is None or not hasattr(_module(), "get_device_properties"):
        return None
    return int(_module().get_device_properties(0).total_memory)


def reset_peak() -> None:
    """Let the peak start again from here, where the system allows it."""
    if accelerator() is None:
        try:
            (PROCESS / "clear_refs").write_text("5")
        except OSError:
            pass
    elif hasattr(_module(), "reset_peak_memory_stats"):  # MPS counts no peaks
        _module().reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """The most memory since `reset_peak`, allocated on the accelerator or resident in this process; None if unknown."""
    if accelerator() is None:
        return resident("VmHWM")
    return _module().max_memory_allocated() if hasattr(_module(), "max_memory_allocated") else None


def occupied_bytes() -> int:
    """What `peak_bytes` counts, as it is now; 0 where nothing says it."""
    if accelerator() is None:
        return resident("VmRSS") or 0
    return _module().memory_allocated() if hasattr(_module(), "memory_allocated") else 0


def resident(field: str) -> int | None:
    """A field of /proc/self/status in bytes: VmRSS is resident memory now, VmHWM its peak. None where not Linux."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)


def host_memory() -> tuple[int, int] | None:
    """(all, free to take) bytes of the host's memory with its swap, as far as this process's groups may go.

    A container's or a queue's limit counts, and pages of files that can be read again do not. None where not Linux.
    """
    try:
        rows = dict(line.split(":") for line in MEMORY.read_text().splitlines() if ":" in line)
    except OSError:
        return None
    of = {name: 1024 * int(value.split()[0]) for name, value in rows.items()}
    whole, free = of["MemTotal"] + of["SwapTotal"], of["MemAvailable"] + of["SwapFree"]
    for limit, used in _group_limits():
        whole, free = min(whole, limit), min(free, max(limit - used, 0))
    return whole, free


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of each control group that this process is in, of either version, up to the root."""
    try:
        lines = (PROCESS / "cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        root = GROUPS / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inside = Path(path.lstrip("/"))
        for folder in (root / inside, *(root / parent for parent in inside.parents)):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # the root has no limit; a container may see itself as the root
                continue
            if limit != "max":
                yield int(limit), int(used) - int(stat.get("inactive_file", 0))


def give_back() -> None:
    """Return the device memory of what this process no longer uses, which PyTorch keeps, for others to take."""
    gc.collect()  # a Trainer and its model refer to each other
    if accelerator() is not None:
        _module().empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the host has no memory left, which less work at once may cure."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def multiplies_bfloat16() -> bool:
    """Whether this machine's accelerator, or without one its CPU, has bfloat16 matrix instructions.

    Never on MPS: only newer systems have the type there, and Transformers does not train in it.
    """
    kind = accelerator()
    if kind is not None:
        if kind.type in ("cuda", "xpu"):
            return bool(_module().is_bf16_supported(including_emulation=False))
        return is_torch_bf16_gpu_available()
    try:
        flags = PROCESSORS.read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextmanager
def without_denormals() -> Iterator[None]:
    """While this holds, CPU arithmetic takes numbers below 1.2e-38 for 0: of this thread, and of those it starts.

    Gradients are full of them where a pair's weight or a token's probability vanishes, and a product with one takes a
    CPU a hundred times as long. PyTorch's threads start with their first work and keep what they started with: who
    lets it compute before keeps them slow.
    """
    already = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)

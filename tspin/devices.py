"""The memory that a GPU or this process takes, running out of it, and what arithmetic is fast here."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size

PROCESS = Path("/proc/self")
PROCESSORS = Path("/proc/cpuinfo")


def reset_peak() -> None:
    """Let the peak start again from here, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes() -> int | None:
    """The most memory since `reset_peak`, allocated on the GPU or resident in this process; None if unknown."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


def resident(field: str) -> int | None:
    """A field of /proc/self/status in bytes: VmRSS is resident memory now, VmHWM its peak. None where not Linux."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)


def give_back() -> None:
    """Return the GPU memory of what this process no longer uses, which PyTorch keeps, for other processes to take."""
    gc.collect()  # a Trainer and its model refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the host has no memory left, which less work at once may cure."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def multiplies_bfloat16() -> bool:
    """Whether this machine's GPU, or without one its CPU, has bfloat16 matrix instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
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

"""Peak memory: a GPU's, or without one this process's resident memory where Linux tells it."""

from pathlib import Path

import torch

PROCESS = Path("/proc/self")


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

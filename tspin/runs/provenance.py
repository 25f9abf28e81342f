"""What a number depends on besides its config: commit, versions, hardware, command."""

import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tspin.runs.redaction import redacted

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "lm_eval", "reasoning_gym", "vllm")


@cache
def provenance() -> dict[str, Any]:
    """{"commit", "uncommitted_changes", "versions", "hardware", "command"} of this process."""
    import torch

    from tspin.devices import accelerator_names

    changes = _of_checkout("status", "--porcelain", "--untracked-files=no", "--", "tspin", "experiments")
    return {
        "commit": _of_checkout("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changes),
        "versions": _versions(),
        "hardware": {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "accelerators": accelerator_names()},
        "command": redacted(" ".join([Path(sys.argv[0]).name, *map(_without_place, sys.argv[1:])])),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _without_place(argument: str) -> str:
    """A command's argument as anyone may read it: of an absolute path, its name."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def _of_checkout(*arguments: str) -> str | None:
    """What git says of this checkout; nothing of a repository that an installed package merely lies in."""
    top = _git("rev-parse", "--show-toplevel")
    return _git(*arguments) if top and Path(top).resolve() == REPOSITORY else None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

"""All checks one after another, and the report of what they found."""

import io
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from tspin.doctor import arithmetic, machine, peaks, trainings
from tspin.doctor.bench import Bench
from tspin.doctor.machine import Wanted
from tspin.errors import UserError, reason
from tspin.planning.checks import Finding
from tspin.runs.files import write_json, write_text
from tspin.runs.provenance import provenance
from tspin.runs.redaction import anonymous

Check = Callable[[Bench], Finding]
NOTES = ("tspin: ", "note: ")  # what the suite itself says on stderr
LAST = 12  # lines of a traceback


def checks_of(wanted: Wanted | None, folder: Path) -> dict[str, Check]:
    """Name → check, in the order in which they are made. folder: where runs go."""
    needs = dict(zip(("disk", "host memory", "shared memory"), machine.needs_checks(wanted), strict=True))
    run: dict[str, Check] = {}
    if wanted is not None:
        run["the run's settings"] = lambda bench: machine.check_settings(wanted)
    return {
        "accelerators": machine.check_accelerators,
        "versions": machine.check_versions,
        **run,
        **needs,
        "locks": lambda bench: machine.check_locks(folder),
        "layouts": arithmetic.check_layouts,
        "layouts, bfloat16": arithmetic.check_kernel,
        "sampler": arithmetic.check_sampler,
        "sampler, vllm": arithmetic.check_vllm,
        "stopped and resumed": trainings.check_resumed,
        "training, FSDP2": trainings.check_fsdp,
        "training, DDP": trainings.check_ddp,
        "memory given back": trainings.check_given_back,
        "memory and speed": peaks.check_peak,
    }


def examine(checks: dict[str, Check]) -> Iterator[dict[str, Any]]:
    """What each check found, as it ends: name, state, text, numbers, seconds, said (notes on stderr while it ran)."""
    with tempfile.TemporaryDirectory(prefix="tspin-doctor-") as folder:
        bench = Bench(Path(folder))
        for name, check in checks.items():
            start, said = time.monotonic(), io.StringIO()
            with redirect_stderr(said):  # progress bars, and libraries' warnings
                finding, trace = _checked(name, partial(check, bench))
            notes = [line for line in said.getvalue().replace("\r", "\n").splitlines() if line.startswith(NOTES)]
            yield {
                "name": name,
                "state": finding.state,
                "text": anonymous(" ".join(finding.text.split())),
                "numbers": {of: _plain(value) for of, value in finding.numbers.items()},
                "seconds": round(time.monotonic() - start, 1),
                "said": [anonymous(line) for line in [*notes, *trace]],
            }


def _plain(value: Any) -> Any:
    """As a JSON value, which knows no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _checked(name: str, check: Callable[[], Finding]) -> tuple[Finding, list[str]]:
    """What a check found, and the end of the traceback where it fell over: that is a finding too."""
    try:
        return check(), []
    except UserError as error:
        return Finding(name, "failed", str(error)), []
    except Exception as error:  # whatever a driver, a kernel or a library raises
        text = f"{type(error).__name__}: {reason(error)}"
        return Finding(name, "failed", text), traceback.format_exc().splitlines()[-LAST:]


def report(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The findings with what the machine and its software are: for an issue, so without names of people and places."""
    known = {name: value for name, value in provenance().items() if name != "command"}
    return {**known, "findings": list(found)}


def markdown(told: dict[str, Any]) -> str:
    """A report as it is pasted into an issue."""
    hardware = told["hardware"]
    devices = ", ".join(hardware["accelerators"]) or "no accelerator"
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    changed = " with uncommitted changes" if told["uncommitted_changes"] else ""
    lines = [
        "## tspin doctor",
        "",
        f"{hardware['cpu']}, {devices}; commit {told['commit'] or 'unknown'}{changed}",
        "",
        versions,
        "",
        "| check | | found | s |",
        "| --- | --- | --- | --- |",
    ]
    for one in told["findings"]:
        cells = (one["name"], one["state"], one["text"].replace("|", "\\|"), f"{one['seconds']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    for one in told["findings"]:
        if one["said"]:
            lines += ["", f"{one['name']}:", "", *(f"    {line}" for line in one["said"])]
    return "\n".join(lines) + "\n"


def write(told: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write a report as Markdown and as JSON; returns their places."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "doctor.md", markdown(told))
    write_json(folder / "doctor.json", told)
    return folder / "doctor.md", folder / "doctor.json"

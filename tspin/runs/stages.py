"""Stages: an output (a file or a folder) and the fingerprint of everything that it was made from.

A stage's record, `<output>.stage.json`, is written last: an output without a matching record does not exist as far as
a run is concerned, so a command that was killed anywhere continues where it was.

The record holds a SHA-256 of each file of the output, and of itself. What is read again is checked against them: files
each time a run comes by, checkpoints, which are large, when they are about to be loaded. What fails is kept beside,
under a name with "damaged" in it, and made again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tspin.errors import UserError
from tspin.runs.files import atomic_path, fingerprint, remove, sha256
from tspin.runs.provenance import provenance
from tspin.runs.sealed import read_sealed, set_aside, write_sealed

AGAIN = "the stage is run again"


class DamagedStage(Exception):
    """A finished stage's output is no longer what was written; it was set aside, so running again makes it anew."""

    def __init__(self, output: Path):
        super().__init__(f"{output} was damaged")
        self.output = output


@dataclass(frozen=True)
class Stage:
    """A finished stage. facts: what its producer told. fingerprint: of what it was made from. seconds: it took."""

    output: Path
    fingerprint: str
    seconds: float
    facts: dict[str, Any]
    provenance: dict[str, Any]

    @classmethod
    def of(cls, output: Path, record: Mapping[str, Any]) -> "Stage":
        """From the stage's record."""
        return cls(output, *(record[name] for name in ("fingerprint", "seconds", "facts", "provenance")))


def run_stage(
    output: Path,
    inputs: Any,
    produce: Callable[[Path], Mapping[str, Any] | None],
    *,
    beside: Sequence[str] = (),
    check: bool = True,
) -> "Stage":
    """Make `output` unless it is there, whole, made from the same inputs; returns it as a stage.

    produce: writes the output to the path that it is given, and may return facts worth keeping (mean lengths, tokens).
    beside: names of further files that it writes into the output's folder.
    check: compare the checksums of an output that is there; without, those beside it only, and whoever reads it calls
    `check_stage` (for checkpoints of gigabytes, of which most are not read again).
    """
    record = stage_record(output, inputs)
    if record is not None:
        with suppress(DamagedStage):
            check_stage(output, whole=check)
            return Stage.of(output, record)
    _record_path(output).unlink(missing_ok=True)
    start = time.monotonic()
    with atomic_path(output) as temporary:
        facts = produce(temporary)
    record = {
        "fingerprint": fingerprint(inputs),
        "inputs": inputs,
        "seconds": round(time.monotonic() - start, 2),
        "facts": dict(facts or {}),
        "files": _checksums(output) | {name: sha256(output.parent / name) for name in beside},
        "provenance": provenance(),
    }
    write_sealed(_record_path(output), record)
    return Stage.of(output, record)


def stage_record(output: Path, inputs: Any) -> dict[str, Any] | None:
    """The record of a finished stage made from exactly these inputs, else None."""
    record = read_sealed(_record_path(output), AGAIN) if output.exists() else None
    return record if record is not None and record["fingerprint"] == fingerprint(inputs) else None


def check_stage(output: Path, whole: bool = True) -> None:
    """Raise DamagedStage if a stage's output, about to be read, is not what was written; it is set aside then.

    whole: without, only the files beside the output are compared.
    What has no record, such as a model of the user's, is taken as it is.
    """
    record = read_sealed(_record_path(output), AGAIN)
    if record is None:
        return
    beside = {name: digest for name, digest in record["files"].items() if Path(name).parts[0] != output.name}
    wanted = {name: digest for name, digest in record["files"].items() if name not in beside}
    bad = [output] if whole and _checksums(output) != wanted else []
    for name, digest in beside.items():
        path = output.parent / name
        if not path.is_file() or sha256(path) != digest:
            bad.append(path)
    if bad:
        _record_path(output).unlink()
        for path in bad:
            if path.exists():
                set_aside(path, AGAIN)
        raise DamagedStage(output)


def remove_stage(output: Path) -> None:
    """Remove an output with its record, the record first."""
    _record_path(output).unlink(missing_ok=True)
    remove(output)


def note_damage(damage: DamagedStage, before: set[Path]) -> None:
    """Remember a damaged output, which is to be made again. Raises UserError when it was already made again once."""
    if damage.output in before:
        raise UserError(
            f"{damage.output} was damaged again after it was made anew: this disk does not keep what it gets"
        )
    before.add(damage.output)


def _record_path(output: Path) -> Path:
    return output.with_name(output.name + ".stage.json")


def _checksums(output: Path) -> dict[str, str]:
    """Path from the output's parent → SHA-256, for every file of an output."""
    files = sorted(path for path in [output, *output.rglob("*")] if path.is_file())
    return {path.relative_to(output.parent).as_posix(): sha256(path) for path in files}

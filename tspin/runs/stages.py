"""Stages: an output (a file or a folder) and the fingerprint of everything that it was made from.

A stage's record, `<output>.stage.json`, is written last: an output without a matching record does not exist as far as
a run is concerned, so a command that was killed anywhere continues where it was.

The record holds a SHA-256 of each file of the output, and of itself. What is read again is checked against them: files
each time a run comes by, checkpoints, which are large, when they are about to be loaded, and by one process once as
long as they do not change (tspin.runs.files.checksums). What fails is kept beside, under a name with "damaged" in it,
and made again.

An output can be given up: its record stays and says why, so that the stage is finished and nothing is made again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tspin.errors import UserError
from tspin.runs.files import atomic_path, checksums, fingerprint, remove
from tspin.runs.provenance import provenance
from tspin.runs.sealed import read_sealed, set_aside, write_sealed

AGAIN = "the stage is run again"
GIVEN_UP = "given_up"  # in a record: why the output is not there


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
            check_stage(output, whole=check and GIVEN_UP not in record)
            return Stage.of(output, record)
    if beside:  # those are written while it is made
        _record_path(output).unlink(missing_ok=True)
    start = time.monotonic()
    with atomic_path(output) as temporary:
        facts = produce(temporary)
        _record_path(output).unlink(missing_ok=True)  # only now: where making it fails, what was there stays finished
    record = {
        "fingerprint": fingerprint(inputs),
        "inputs": inputs,
        "seconds": round(time.monotonic() - start, 2),
        "facts": dict(facts or {}),
        "files": _checksums(output.parent, [*_files(output), *beside]),
        "provenance": provenance(),
    }
    write_sealed(_record_path(output), record)
    return Stage.of(output, record)


def stage_record(output: Path, inputs: Any) -> dict[str, Any] | None:
    """The record of a finished stage made from exactly these inputs, else None."""
    record = read_sealed(_record_path(output), AGAIN)
    there = record is not None and (output.exists() or GIVEN_UP in record)
    return record if there and record is not None and record["fingerprint"] == fingerprint(inputs) else None


def made_otherwise(output: Path, inputs: Any) -> bool:
    """Whether an output is there, finished, that was made from other inputs than these."""
    record = read_sealed(_record_path(output), AGAIN)
    return record is not None and output.exists() and record["fingerprint"] != fingerprint(inputs)


def check_stage(output: Path, whole: bool = True) -> None:
    """Raise DamagedStage if a stage's output, about to be read, is not what was written; it is set aside then.

    whole: without, only the files beside the output are compared.
    What has no record, such as a model of the user's, is taken as it is. Raises UserError for what was given up.
    """
    record = read_sealed(_record_path(output), AGAIN)
    if record is None:
        return
    if whole and GIVEN_UP in record:
        raise UserError(gone(output, record[GIVEN_UP]))
    beside = {name: digest for name, digest in record["files"].items() if Path(name).parts[0] != output.name}
    wanted = {name: digest for name, digest in record["files"].items() if name not in beside}
    bad = [output] if whole and _checksums(output.parent, _files(output), again=False) != wanted else []
    there = [name for name in beside if (output.parent / name).is_file()]
    found = _checksums(output.parent, there)
    bad += [output.parent / name for name, digest in beside.items() if found.get(name) != digest]
    if bad:
        _record_path(output).unlink()
        for path in bad:
            if path.exists():
                set_aside(path, AGAIN)
        raise DamagedStage(output)


def give_up(output: Path, why: str) -> None:
    """Remove a finished stage's output, large files mostly; its record says `why`, and the stage stays finished."""
    record = read_sealed(_record_path(output), AGAIN)
    if record is None:
        return
    if GIVEN_UP not in record:
        write_sealed(_record_path(output), {**record, GIVEN_UP: why})
    if output.exists():  # last: a crash before it leaves what the next call removes
        remove(output)


def given_up(output: Path) -> str | None:
    """Why a stage's output was given up; None where it was not."""
    record = read_sealed(_record_path(output), AGAIN) if output.name else None  # "." has none
    return None if record is None else record.get(GIVEN_UP)


def gone(output: Path, why: str) -> str:
    """The line for who wants to read an output that was given up."""
    record = _record_path(output).name
    return f"{output} is gone ({why}); to have it made anew delete {record} beside it and run its command again"


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


def _files(output: Path) -> list[str]:
    """Every file of an output, as a path from the output's parent."""
    files = (path for path in [output, *output.rglob("*")] if path.is_file())
    return sorted(path.relative_to(output.parent).as_posix() for path in files)


def _checksums(parent: Path, names: Sequence[str], again: bool = True) -> dict[str, str]:
    """Name → SHA-256 of files in a folder, see tspin.runs.files.checksums."""
    return dict(zip(names, checksums([parent / name for name in names], again), strict=True))

"""What the checks share: results with their provenance, and measurements in processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tspin.runs.files import write_json, write_text
from tspin.runs.provenance import provenance


def write_evidence(folder: Path, tables: Mapping[str, pd.DataFrame], start: float, **facts: Any) -> None:
    """Write each table as <name>.csv, then provenance.json with the date, the seconds since `start` and the facts.

    start: time.monotonic() when the check began.
    """
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.5g", lineterminator="\n"))
    when = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "seconds": round(time.monotonic() - start)}
    write_json(folder / "provenance.json", {**provenance(), **facts, **when})
    print(f"wrote {', '.join(f'{name}.csv' for name in tables)} and provenance.json to {folder}, {when['seconds']} s")


def measured_apart(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Any:
    """The JSON value on the last line that `python -m module arguments` prints: a process's memory is its alone.

    Raises RuntimeError with the last line of its errors when it fails.
    """
    command, variables = [sys.executable, "-m", module, *arguments], {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{module} ended with {done.returncode}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])

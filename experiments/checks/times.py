"""How long the README's commands take on this machine: `make times`, with nothing else at work.

    python -m experiments.checks.times [--commands "make test"]

Adds a row per command to results/benchmarks/times/times.csv: command, seconds, cpu, threads, bfloat16 (whether the CPU
multiplies it in hardware), commit, date. Runs in a fresh clone of this repository, so that nothing is there before.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd

from tspin.devices import multiplies_bfloat16
from tspin.runs.files import write_text
from tspin.runs.provenance import provenance

COMMANDS = ["make reproduce-table1", "make test"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="+", default=COMMANDS)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/times"))
    parser.add_argument("--clone", type=Path, help="a clone that is set up already; left out: a fresh one")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clone = arguments.clone or Path(folder) / "clone"
        if arguments.clone is None:
            subprocess.run(["git", "clone", "--quiet", ".", str(clone)], check=True)
            subprocess.run(["make", ".venv/.ready"], cwd=clone, check=True)  # set-up is mostly the network's time
        for command in arguments.commands:
            start = time.monotonic()
            subprocess.run(command.split(), cwd=clone, check=True)
            rows.append({"command": command, "seconds": round(time.monotonic() - start), **machine()})
            print(f"{command}: {rows[-1]['seconds']} s", flush=True)
    path = arguments.out / "times.csv"
    before = [pd.read_csv(path)] if path.exists() else []
    table = pd.concat([*before, pd.DataFrame(rows)], ignore_index=True)
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
    print(f"wrote {path}")


def machine() -> dict[str, object]:
    """What a time depends on."""
    facts = provenance()
    hardware = facts["hardware"]
    return {
        "cpu": hardware["cpu"],
        "threads": hardware["threads"],
        "bfloat16": multiplies_bfloat16(),
        "commit": facts["commit"],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


if __name__ == "__main__":
    main()

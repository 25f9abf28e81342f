"""How long the commands take to answer on this machine: `make command-times`.

    python -m experiments.checks.command_times [--rounds 3] [--trees ../before .]

Adds a row per command and tree to results/benchmarks/times/commands.csv: command, seconds, cpu_seconds (user and
system; other work on the machine moves them less), cpu, threads, commit, date. The fastest of several rounds; the
trees, checkouts of this repository, take turns. `tspin run` is timed to its first progress bar; the imports that no
`tspin run` can do without stand beside it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from experiments.checks.times import machine
from tspin.runs.files import write_text

TSPIN = ["-c", "from tspin.cli import main; main()"]
IMPORTS = "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer"
BAR = b"%|"
RESULTS = Path(__file__).resolve().parents[2] / "results" / "reference" / "pocket"


class Command(NamedTuple):
    """What is timed: its name, Python's arguments, its exit code, and what it is stopped at on stderr."""

    name: str
    arguments: list[str]
    code: int = 0
    until: bytes | None = None


COMMANDS = [
    Command("tspin --help", [*TSPIN, "--help"]),
    Command("tspin table 1", [*TSPIN, "table", "1", "--results", "results"]),
    Command("tspin claims", [*TSPIN, "claims", "--results", "results"]),
    Command("tspin run --preset poket", [*TSPIN, "run", "--preset", "poket"], code=2),
    Command("tspin run --preset pocket --set optm=sgd", [*TSPIN, "run", "--preset", "pocket", "--set", "optm=sgd"], 2),
    Command("tspin run --preset pocket", [*TSPIN, "run", "--preset", "pocket", "--results", "new"], until=BAR),
    Command("tspin run --model pocket --data my.jsonl", [*TSPIN, "run", "--model", "pocket", "--data", "my.jsonl"],
            until=BAR),
    Command(f'python -c "{IMPORTS}"', ["-c", IMPORTS]),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trees", type=Path, nargs="+", default=[Path()], help="checkouts, such as of two commits")
    parser.add_argument("--commands", nargs="+", default=[command.name for command in COMMANDS])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/times"))
    arguments = parser.parse_args()
    facts = {name: value for name, value in machine().items() if name in ("cpu", "threads", "date")}
    rows = []
    for command in (command for command in COMMANDS if command.name in arguments.commands):
        rounds = [[timed(command, tree.resolve()) for tree in arguments.trees] for _ in range(arguments.rounds)]
        for tree, times in zip(arguments.trees, zip(*rounds, strict=True), strict=True):
            commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tree, text=True).strip()
            fastest = {"seconds": round(min(seconds for seconds, _ in times), 2),
                       "cpu_seconds": round(min(cpu for _, cpu in times), 2)}  # fmt: skip
            rows.append({"command": command.name, **fastest, **facts, "commit": commit})
            print(f"{command.name}, {commit[:7]}: {fastest['seconds']} s, {fastest['cpu_seconds']} s CPU", flush=True)
    path = arguments.out / "commands.csv"
    before = [pd.read_csv(path)] if path.exists() else []
    columns = ["command", "seconds", "cpu_seconds", "cpu", "threads", "commit", "date"]
    table = pd.concat([*before, pd.DataFrame(rows)], ignore_index=True)[columns]
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
    print(f"wrote {path}")


def timed(command: Command, tree: Path) -> tuple[float, float]:
    """(seconds, CPU seconds) of a command of the checkout `tree`, in a folder of its own with the committed results."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(RESULTS, folder / "results" / "pocket")
        (folder / "my.jsonl").write_text('{"prompt": "What is 3 + 4?", "completion": "The answer is 7."}\n' * 8)
        (folder / "packages").mkdir()
        (folder / "packages" / "tspin_analysis").symlink_to(tree / "analysis")  # the tree's, whichever is installed
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tree, folder / "packages")))}
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, *command.arguments], cwd=folder, env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        assert process.stderr is not None
        said = b""
        while part := os.read(process.stderr.fileno(), 4096):
            said += part
            if command.until and command.until in said:
                process.kill()
                break
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        stopped = command.until is not None and command.until in said
        if not stopped and (command.until or process.returncode != command.code):
            raise SystemExit(f"{command.name}: exit code {process.returncode}\n{said.decode()}")
        process.stderr.close()
    return seconds, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()

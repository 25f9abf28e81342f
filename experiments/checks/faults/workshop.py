"""A tiny model, data and preset, commands run on copies of them in forked processes, and what they leave, compared."""

import hashlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from safetensors.numpy import load_file

from tspin import cli
from tspin.config import REPOSITORY
from tspin.doctor.tiny import tiny_model, tiny_rows, write_rows
from tspin.evaluation.harness import task_manager_for
from tspin.evaluation.suites import load_suite
from tspin.models import POCKET_MODEL, load_tokenizer
from tspin.pocket.tasks import VALIDATION_PER_TASK, pool

PRESET = """
model: {{path: {folder}/model}}
data: {{path: {folder}/data.jsonl}}
iterations: 2
max_new_tokens: 6
batch_size: 4
micro_batch_tokens: 128
learning_rate: 1e-3
num_train_epochs: 2
bf16: false
evaluation: {{suite: {folder}/suite.yaml, limit: 2}}
"""
SUITE = """
include_path: {repository}/tspin/pocket/lm_eval
apply_chat_template: true
columns:
  - {{benchmark: pocket_gcd, label: GCD, group: math, metric: "exact_match,flexible-extract"}}
"""
STEPS = 6  # of one training: 12 rows, 4 a step, two epochs
TIMES = ["tokens_per_second"]
PATIENCE = 900  # seconds: a run that hangs is ended by SIGALRM, and has not survived
Before = Callable[[], None]


@dataclass
class Ended:
    """How a command ended: its exit code (negative: by a signal) and what it printed."""

    code: int
    output: str

    @property
    def lines(self) -> list[str]:
        """What it said itself, progress bars left out."""
        texts = self.output.replace("\r", "\n").split("\n")
        return [text[text.index("tspin: ") :] for text in texts if "tspin: " in text]


class Workshop:
    """A folder with a tiny model, data and preset, and commands run on copies of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        tokenizer = load_tokenizer(str(POCKET_MODEL))
        tiny_model(tokenizer).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        write_rows(folder / "data.jsonl", tiny_rows())
        (folder / "suite.yaml").write_text(SUITE.format(repository=REPOSITORY))
        (folder / "tiny.yaml").write_text(PRESET.format(folder=folder))
        # What every run would make for itself is made before the forks: lm-eval's index, the problems, imports.
        task_manager_for(load_suite(folder / "suite.yaml"))
        pool("validation", "gcd", VALIDATION_PER_TASK)
        self.count = 0

    def place(self) -> Path:
        """A new folder for one case."""
        self.count += 1
        return self.folder / f"case-{self.count}"

    def arguments(self, place: Path, methods: str = "base,spin,tspin", more: tuple[str, ...] = ()) -> list[str]:
        preset = ["--preset", str(self.folder / "tiny.yaml"), "--methods", methods]
        return ["run", *preset, "--runs", str(place / "runs"), "--results", str(place / "results"), *more]

    def start(
        self, place: Path, before: Before | None = None, methods: str = "base,spin,tspin", more: tuple[str, ...] = ()
    ) -> tuple[int, Path]:
        """Fork a process that runs the command; (its id, its log). before: called there first, to plant the fault."""
        self.count += 1
        log = self.folder / f"log-{self.count}"
        arguments = self.arguments(place, methods, more)
        process = os.fork()
        if process:
            return process, log
        code = 1
        try:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = ["tspin", *arguments]
            signal.alarm(PATIENCE)
            if before:
                before()
            cli.app(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, process: int, log: Path) -> Ended:
        _, status = os.waitpid(process, 0)
        return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"))

    def run(self, place: Path, before: Before | None = None, more: tuple[str, ...] = ()) -> Ended:
        return self.wait(*self.start(place, before, more=more))


def contents(place: Path) -> dict[str, str]:
    """Every number of a run by where it is: tensors, and rows of tables, as hashes."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if ".damaged" in name or "unfinished" in name or ".tmp" in name:
            continue
        if path.suffix == ".safetensors":
            for tensor, values in load_file(path).items():
                found[f"{name}:{tensor}"] = hashlib.sha256(values.tobytes()).hexdigest()
        elif path.suffix in (".parquet", ".csv"):
            table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str)
            for number, row in enumerate(table.drop(columns=TIMES, errors="ignore").to_dict("records")):
                found[f"{name}:{number}"] = hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()
    return found


def forked(function: Callable, *arguments) -> Callable:
    """Start a function in a forked process; what is returned waits for its value."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = os.fork()
    if not process:
        try:
            send.send(function(*arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    send.close()

    def value():
        try:
            return receive.recv()
        finally:
            os.waitpid(process, 0)

    return value


def in_child(function: Callable, *arguments):
    """A function's value, computed in a forked process: reading Parquet here would start threads, and forks break."""
    return forked(function, *arguments)()


def lost(expected: dict[str, str], place: Path) -> int:
    """How many numbers (tensors, rows) are missing or differ from the undisturbed run's."""
    found = in_child(contents, place)
    return sum(found.get(key) != value for key, value in expected.items()) + len(found.keys() - expected.keys())


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

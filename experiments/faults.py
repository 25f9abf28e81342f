"""The fault campaign: a tiny run is hurt in every way that days on a shared machine bring, resumed, and compared.

    make fault-test        # → results/faults/faults.csv

Every case starts a run (two iterations of SPIN and T-SPIN with evaluations), injects a fault, runs the same command
again and compares every number with those of an undisturbed run: weights bit by bit, step logs, diagnostics, responses
and evaluations row by row (times left out). Runs are forked from a process that has imported everything; one fresh
interpreter's run is compared with them first. `--short` is the form that the tests run.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from tspin import cli, experiment, selfplay, trainer
from tspin.config import REPOSITORY
from tspin.evaluation import load_suite, task_manager_for
from tspin.models import POCKET_MODEL, load_tokenizer
from tspin.run_store import provenance, write_json, write_text

PRESET = """
model: {{path: {folder}/model}}
data: {{path: {folder}/data.jsonl}}
sampling: {{max_new_tokens: 6}}
training: {{batch_size: 4, micro_batch_tokens: 128, learning_rate: 1e-3, epochs: 2, bf16: false}}
iterations: 2
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
TOLERANCE = 1e-4  # of weights after an out-of-memory error: micro-batches add up in another order
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
        torch.manual_seed(0)
        settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **settings, **tokens)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = [{"prompt": f"{a} + {b} =", "completion": f"The answer is {a + b}."} for a in range(3) for b in range(4)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "suite.yaml").write_text(SUITE.format(repository=REPOSITORY))
        (folder / "tiny.yaml").write_text(PRESET.format(folder=folder))
        task_manager_for(load_suite(folder / "suite.yaml"))
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


# --- faults, planted in the forked process -----------------------------------------------------------------------


def at_rename(number: int, counter: Path | None = None) -> Before:
    """SIGKILL before the number-th file or folder takes its name; counter: where the count is kept."""

    def plant() -> None:
        replace, seen = os.replace, [0]

        def counted(source, target, **kwargs):
            if str(source).endswith(".tmp"):
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                if counter:
                    counter.write_text(str(seen[0]))
            replace(source, target, **kwargs)

        os.replace = counted

    return plant


def at_call(owner, name: str, number: int, act: Callable[[], None]) -> Before:
    """Call `act` before the number-th call of owner.name."""

    def plant() -> None:
        original, seen = getattr(owner, name), [0]

        def counted(*args, **kwargs):
            seen[0] += 1
            if seen[0] == number:
                act()
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    return plant


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def counting_steps(counter: Path) -> Before:
    """Count the calls of training_step into a file."""

    def plant() -> None:
        original = trainer.TripletTrainer.training_step

        def counted(*args, **kwargs):
            counter.write_text(str(int(counter.read_text() or 0) + 1))
            return original(*args, **kwargs)

        trainer.TripletTrainer.training_step = counted

    counter.write_text("")
    return plant


def no_memory(error: Callable[[], BaseException], tokens: int, where: str, from_call: int = 0) -> Before:
    """Raise `error` for micro-batches of more than `tokens` tokens, in the forward or in the middle of the backward."""

    def plant() -> None:
        original, seen = trainer.logps_of, [0]

        class Breaks(torch.autograd.Function):
            @staticmethod
            def forward(ctx, hidden):
                return hidden.clone()

            @staticmethod
            def backward(ctx, gradient):
                raise error()

        def limited(model, batch, roles):
            seen[0] += 1
            large = torch.is_grad_enabled() and batch["sequences"]["input_ids"].numel() > tokens
            if not large or seen[0] < from_call:
                return original(model, batch, roles)
            if where == "forward":
                raise error()
            # The last layers' gradients are there when it breaks.
            hook = model.model.layers[0].register_forward_hook(lambda module, args, output: Breaks.apply(output))
            try:
                return original(model, batch, roles)
            finally:
                hook.remove()

        trainer.logps_of = limited

    return plant


def not_a_number(call: int) -> Before:
    """NaN log-probabilities at one call of a training."""

    def plant() -> None:
        original, seen = trainer.logps_of, [0]

        def poisoned(model, batch, roles):
            found = original(model, batch, roles)
            if torch.is_grad_enabled():
                seen[0] += 1
                if seen[0] == call:
                    return {role: values * float("nan") for role, values in found.items()}
            return found

        trainer.logps_of = poisoned

    return plant


def infinite_gradient(call: int) -> Before:
    """An infinite gradient in one parameter at one step."""

    def plant() -> None:
        original, seen = Trainer.training_step, [0]

        def exploding(self, model, *args, **kwargs):
            loss = original(self, model, *args, **kwargs)
            seen[0] += 1
            if seen[0] == call:
                next(model.parameters()).grad[0] = float("inf")
            return loss

        Trainer.training_step = exploding

    return plant


def jumping_clock() -> None:
    """A wall clock that jumps by up to a year, back and forth, at every look."""
    clock, chance = time.time, random.Random(0)
    time.time = lambda: clock() + chance.uniform(-3e7, 3e7)


def file_limit(size: int) -> Before:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# --- the campaign ------------------------------------------------------------------------------------------------


class Campaign:
    """Runs the cases; each yields a row (fault, case, survived, numbers_lost, note)."""

    def __init__(self, folder: Path, short: bool):
        self.shop = Workshop(folder)
        self.short = short
        self.rows: list[dict] = []
        self.whole = self.shop.place()
        counter = folder / "renames"
        start = time.monotonic()
        ended = self.shop.run(self.whole, at_rename(0, counter))
        assert ended.code == 0, ended.output
        self.seconds = time.monotonic() - start
        self.renames = int(counter.read_text())
        self.expected = in_child(contents, self.whole)
        self.trainings = 4  # of a run: two methods, two iterations

    def row(
        self, fault: str, case: str, place: Path, good: bool, note: str = "", lost_numbers: int | None = None
    ) -> None:
        """Judge a case after its resumption: everything is there, and what was said and returned was right."""
        missing = lost(self.expected, place) if lost_numbers is None else lost_numbers
        row = {"fault": fault, "case": case, "survived": good and not missing, "numbers_lost": missing, "note": note}
        self.rows.append(row)
        if not row["survived"]:
            print(f"FAILED {row}", flush=True)
        shutil.rmtree(place, ignore_errors=True)

    def chosen(self, cases: list, few: int) -> list:
        return cases if not self.short else random.Random(0).sample(cases, min(few, len(cases)))

    def fresh_interpreter(self) -> None:
        place = self.shop.place()
        command = [sys.executable, "-c", "from tspin.cli import main; main()", *self.shop.arguments(place)]
        done = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.row("none", "a fresh interpreter's run equals a forked one's", place, done.returncode == 0)

    def kill_at_boundaries(self) -> None:
        for number in self.chosen(list(range(1, self.renames + 1)), 2):
            place = self.shop.place()
            killed = self.shop.run(place, at_rename(number))
            resumed = self.shop.run(place)
            good = killed.code == -signal.SIGKILL and resumed.code == 0
            self.row("SIGKILL at a stage boundary", f"before rename {number} of {self.renames}", place, good)

    def kill_at_random(self) -> None:
        chance = random.Random(0)
        for number in range(1 if self.short else 50):
            place, moment = self.shop.place(), chance.uniform(0, self.seconds)
            process, log = self.shop.start(place)
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
            self.shop.wait(process, log)
            resumed = self.shop.run(place)
            self.row("SIGKILL at a random moment", f"{number + 1}: after {moment:.2f} s", place, resumed.code == 0)

    def signals(self) -> None:
        cases = [(sig, step) for sig in (signal.SIGTERM, signal.SIGINT) for step in (1, 4, STEPS, STEPS + 2, 3 * STEPS)]
        for sig, step in self.chosen(cases, 2):
            place = self.shop.place()
            counter = place.with_suffix(".steps")
            stopped = self.shop.run(place, at_call(trainer.TripletTrainer, "training_step", step, send(sig)))
            resumed = self.shop.run(place, counting_steps(counter))
            said = len(stopped.lines) == 1 and "the same command goes on" in stopped.lines[0]
            again = int(counter.read_text() or 0)  # no step is made twice
            good = stopped.code == 128 + sig and said and resumed.code == 0 and again == self.trainings * STEPS - step
            self.row(f"{sig.name} in training", f"in step {step}", place, good, stopped.lines[-1][:100])
        for sig in (signal.SIGTERM, signal.SIGINT):
            for owner, name in ((selfplay, "sample_policy"), (experiment, "evaluate")):
                if self.short and (sig, name) != (signal.SIGTERM, "evaluate"):
                    continue
                place = self.shop.place()
                stopped = self.shop.run(place, at_call(owner, name, 2, send(sig)))
                resumed = self.shop.run(place)
                said = len(stopped.lines) == 1 and "the same command goes on" in stopped.lines[0]
                good = stopped.code == 128 + sig and said and resumed.code == 0
                self.row(f"{sig.name} elsewhere", f"in {name}", place, good, stopped.lines[-1][:100])

    def killed_with_states(self) -> None:
        """SIGKILL in a training that keeps its state every two steps."""
        for step in self.chosen([3, 4, STEPS, STEPS + 3], 1):
            place = self.shop.place()
            counter, keeping = place.with_suffix(".steps"), ("--set", "training.checkpoint_steps=2")
            kill = at_call(trainer.TripletTrainer, "training_step", step, send(signal.SIGKILL))
            killed = self.shop.run(place, kill, keeping)
            resumed = self.shop.run(place, counting_steps(counter), keeping)
            within = (step - 1) % STEPS
            done = step - 1 - within + within // 2 * 2
            again = int(counter.read_text() or 0) == self.trainings * STEPS - done
            good = killed.code == -signal.SIGKILL and resumed.code == 0 and again
            self.row("SIGKILL between kept states", f"before step {step}", place, good)

    def disk(self) -> None:
        limits = [20_000, 60_000, 100_000, 150_000]  # less would cut the log that this reads
        for limit in self.chosen(limits, 1):
            place = self.shop.place()
            full = self.shop.run(place, file_limit(limit))
            resumed = self.shop.run(place)
            good = full.code == 2 and len(full.lines) == 1 and resumed.code == 0
            self.row("file size limit (RLIMIT_FSIZE)", f"{limit} bytes", place, good, full.lines[-1][:100])
        for limit in () if self.short else (150_000, 270_000, 282_000, 291_000):  # weights, optimizer, its last bytes
            place = self.shop.place()
            acts = (send(signal.SIGTERM), file_limit(limit))
            plant = at_call(trainer.TripletTrainer, "training_step", 4, lambda acts=acts: [act() for act in acts])
            full = self.shop.run(place, plant)
            resumed = self.shop.run(place)
            good = full.code == 2 and len(full.lines) == 1 and resumed.code == 0
            self.row("disk full while a state is kept", f"{limit} bytes a file", place, good, full.lines[-1][-100:])
        if self.short or not mounts():
            print("disk: RLIMIT_FSIZE alone stands for a full disk, no tmpfs (not permitted, or the short form)")
            return
        size = sum(path.stat().st_blocks * 512 for path in self.whole.rglob("*")) // 1024
        for share in (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            place = self.shop.place()
            place.mkdir()
            mount("-t", "tmpfs", "-o", f"size={max(int(share * size), 8)}k", "tmpfs", str(place))
            try:
                full = self.shop.run(place)
                mount("-o", f"remount,size={4 * size}k", str(place))
                resumed = self.shop.run(place)
                good = full.code == 2 and len(full.lines) == 1 and resumed.code == 0
                note = (full.lines or ["no line"])[-1][:100]
                missing = lost(self.expected, place)
            finally:
                subprocess.run(["umount", str(place)], check=True)
            self.row("disk full (tmpfs)", f"{share:.0%} of what the run takes", place, good, note, missing)
        for stage in ("at the start", "in the middle"):
            place = self.shop.place()
            place.mkdir()
            mount("-t", "tmpfs", "-o", f"size={4 * size}k", "tmpfs", str(place))
            try:
                if stage == "in the middle":
                    self.shop.run(place, at_rename(self.renames // 2))
                mount("-o", "remount,ro", str(place))
                refused = self.shop.run(place)
                mount("-o", "remount,rw", str(place))
                resumed = self.shop.run(place)
                good = refused.code == 2 and len(refused.lines) == 1 and resumed.code == 0
                note, missing = (refused.lines or ["no line"])[-1][:100], lost(self.expected, place)
            finally:
                subprocess.run(["umount", str(place)], check=True)
            self.row("read-only folder (tmpfs)", stage, place, good, note, missing)

    def damage(self) -> None:
        """Truncate or flip a bit of every kind of file; what is read next finds it."""
        runs = self.whole / "runs"
        files = [path.relative_to(runs) for path in sorted(runs.rglob("*")) if path.is_file()]
        skipped = ("tensorboard", ".lock", "tokenizer", "chat_template", "generation_config", "prompts.parquet")
        files = [file for file in files if not any(part in file.as_posix() for part in skipped)]
        chance = random.Random(0)
        cases = [(file, chance.choice(("cut", "bit flipped"))) for file in files]
        if self.short:
            kinds = ("spin/iteration-0/model/model.safetensors", "proto.parquet", "synthetic.parquet.stage.json")
            cases = [
                (f, "bit flipped") for kind in kinds for f in [f for f in files if f.as_posix().endswith(kind)][:1]
            ]
        for file, how in cases:
            place = self.shop.place()
            shutil.copytree(self.whole, place)
            target = place / "runs" / file
            hurt(target, how)
            stage = next((p for p in target.parents if p.parent.joinpath(p.name + ".stage.json").is_file()), None)
            if stage is not None and stage.name == "model":
                # A checkpoint is compared when it is loaded: let its evaluation be missing.
                for path in (stage.parent / "evaluation.stage.json", stage.parent / "evaluation"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            resumed = self.shop.run(place)
            aside = list(place.rglob("*.damaged"))
            good = resumed.code == 0 and len(resumed.lines) == 1 and len(aside) == 1
            self.row(f"file {how}", file.as_posix(), place, good, (resumed.lines or ["no line"])[0][-110:])

    def damaged_state(self) -> None:
        """The kept state of a stopped training is damaged: that training starts again."""
        place = self.shop.place()
        self.shop.run(place, at_call(trainer.TripletTrainer, "training_step", 4, send(signal.SIGTERM)))
        (state,) = place.rglob("optimizer.pt")
        hurt(state, "bit flipped")
        resumed = self.shop.run(place)
        self.row("file bit flipped", "the optimizer's kept state", place, resumed.code == 0 and len(resumed.lines) == 1)

    def two_at_once(self) -> None:
        place = self.shop.place()
        first, log = self.shop.start(place)
        while not list(place.rglob("tspin/.lock")):
            time.sleep(0.01)
        second = self.shop.run(place)
        refused = second.code == 2 and f"process {first} " in (second.lines or [""])[0]
        done = self.shop.wait(first, log)
        note = (second.lines or ["no line"])[0][-100:]
        self.row("two commands on one folder", "the second refuses", place, refused and done.code == 0, note)
        place = self.shop.place()
        processes = [self.shop.start(place, methods=methods) for methods in ("base,spin", "tspin")]
        codes = [self.shop.wait(*process).code for process in processes]
        self.row("two commands on one folder", "other methods: both go on", place, codes == [0, 0])
        place = self.shop.place()
        first, log = self.shop.start(place)
        while not list(place.rglob("tspin/.lock")):
            time.sleep(0.01)
        os.kill(first, signal.SIGKILL)
        self.shop.wait(first, log)
        self.row("two commands on one folder", "a dead owner does not block", place, self.shop.run(place).code == 0)

    def clock(self) -> None:
        place = self.shop.place()
        self.shop.run(place, lambda: (jumping_clock(), at_rename(self.renames // 2)()))
        for number, path in enumerate(sorted(place.rglob("*"))):
            os.utime(path, (4e9, 4e9) if number % 2 else (1, 1))
        resumed = self.shop.run(place, jumping_clock)
        seconds = [json.loads(path.read_text())["seconds"] for path in place.rglob("*.stage.json")]
        good = resumed.code == 0 and all(0 <= value < 600 for value in seconds)
        self.row("clock jumps by up to a year", "files of 1970 and 2096", place, good)

    def divergence(self) -> None:
        faults = {"NaN loss": not_a_number, "infinite gradients": infinite_gradient}
        for name, fault in faults.items():
            for call in self.chosen([1, 2 * STEPS + 3], 1):
                place = self.shop.place()
                stopped = self.shop.run(place, fault(call))
                resumed = self.shop.run(place)
                said = len(stopped.lines) == 1 and "step " in stopped.lines[0] and "(prompts " in stopped.lines[0]
                good = stopped.code == 2 and said and resumed.code == 0
                self.row(name, f"at micro-batch {call}", place, good, (stopped.lines or ["no line"])[0][:110])

    def memory(self) -> None:
        """In the last iteration's training, so that no response is sampled from other weights."""
        errors = {
            "GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "host": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        }
        cases = [(kind, where) for kind in errors for where in ("forward", "backward")]
        for kind, where in self.chosen(cases, 1) if not self.short else [("GPU", "backward")]:
            place = self.shop.place()
            if not (place / "runs").exists():
                shutil.copytree(self.whole, place)
            last = place / "runs/tiny/seed-0/tspin/iteration-1"
            weights = Path("model/model.safetensors")
            whole = in_child(load_file, last / weights)
            shutil.rmtree(last)
            ended = self.shop.run(place, no_memory(errors[kind], 64, where))
            found = in_child(load_file, last / weights) if ended.code == 0 else {}
            error = max(float(np.abs(whole[n] - found[n]).max()) for n in whole) if found else float("inf")
            said = len(ended.lines) == 1 and "out of memory" in ended.lines[0]
            small = {key: value for key, value in self.expected.items() if "tspin/iteration-1" not in key}
            here = in_child(contents, place)
            missing = sum(here.get(k) != v for k, v in small.items() if k.startswith("runs/"))
            good = ended.code == 0 and said and error < TOLERANCE
            note = f"weights within {error:.1e}; {(ended.lines or ['no line'])[0][:80]}"
            self.row(f"out of {kind} memory", f"in the {where} pass", place, good, note, missing)

    def hub(self) -> None:
        for mode in ("refuses", "hangs", "sends half"):
            place = self.shop.place()
            place.mkdir()
            server = Hub(self.shop.folder / "model", mode)
            try:
                preset = place / "hub.yaml"
                preset.write_text("model: {path: nobody/tiny}\ndata: {path: pocket}\n")
                out = place / "offline"
                hurt_fetch = server.tspin(place, "fetch", str(preset), "--out", str(out))
                taken = (out / "manifest.json").exists()
                server.mode.value = b"works"
                retried = server.tspin(place, "fetch", str(preset), "--out", str(out))
                checked = server.tspin(place, "fetch", str(preset), "--out", str(out), "--check")
            finally:
                server.stop()
            same = {p.name: sha(p) for p in (self.shop.folder / "model").iterdir()}
            got = out / "models" / "nobody" / "tiny"
            missing = sum(not (got / name).exists() or sha(got / name) != value for name, value in same.items())
            lines = [line for line in hurt_fetch.lines if line]
            good = hurt_fetch.code == 2 and len(lines) == 1 and not taken and (retried.code, checked.code) == (0, 0)
            self.row(
                f"the hub {mode}", "tspin fetch, then again", place, good, (lines or ["no line"])[0][:110], missing
            )


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hurt(path: Path, how: str) -> None:
    """Cut a file in half, or flip one bit in its middle."""
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def mounts() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", folder], check=True)
        return True


class Hub:
    """A hub of one model on this machine, in a process of its own, that behaves as its mode says."""

    def __init__(self, model: Path, mode: str):
        context = multiprocessing.get_context("fork")
        self.mode = context.Array("c", 16, lock=False)
        self.mode.value = mode.encode()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(model, self.mode))
        self.port = self.server.server_address[1]
        self.process = context.Process(target=self.server.serve_forever, daemon=True)
        self.process.start()
        self.server.socket.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def tspin(self, place: Path, *arguments: str) -> Ended:
        """A command in a fresh interpreter, since the hub's library reads its settings once."""
        environment = {
            **{
                key: value
                for key, value in os.environ.items()
                if key != "HF_HUB_OFFLINE" and "proxy" not in key.lower()
            },
            **{"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "0"},
            **{"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_XET": "1"},
        }
        command = [sys.executable, "-c", "from tspin.cli import main; main()", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return Ended(done.returncode, done.stdout + done.stderr)


def handler(model: Path, mode) -> type[BaseHTTPRequestHandler]:
    """Answers the two questions that a snapshot download asks: what is there, and a file."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            behaviour, path = mode.value.decode(), self.path.split("?")[0]
            if behaviour == "hangs":
                time.sleep(5)
                return
            if behaviour == "refuses":
                self.send(503, b"", {}, body)
                return
            commit = "0" * 40
            if path.startswith("/api/"):
                names = [{"rfilename": file.name} for file in sorted(model.iterdir())]
                entries = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": sha(file)[:40]}
                    for file in sorted(model.iterdir())
                ]
                told = entries if "/tree/" in path else {"id": "nobody/tiny", "sha": commit, "siblings": names}
                self.send(200, json.dumps(told).encode(), {"Content-Type": "application/json"}, body)
                return
            file = model / Path(path).name
            if not file.is_file():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            content = file.read_bytes()
            known = {"ETag": f'"{sha(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "none"}
            half = behaviour == "sends half" and file.suffix == ".safetensors" and body
            self.send(200, content, known, body, len(content) // 2 if half else None)

        def send(self, code: int, content: bytes, headers: dict, body: bool, only: int | None = None) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content[:only])
            if only is not None:
                self.close_connection = True

    return Handler


PARTS: list[Callable[[Campaign], None]] = [
    Campaign.fresh_interpreter,
    Campaign.signals,
    Campaign.killed_with_states,
    Campaign.disk,
    Campaign.damage,
    Campaign.damaged_state,
    Campaign.two_at_once,
    Campaign.clock,
    Campaign.hub,
    Campaign.divergence,
    Campaign.memory,
    Campaign.kill_at_boundaries,
    Campaign.kill_at_random,
]


def run(folder: Path, short: bool = False, only: list[str] | None = None, jobs: int = 2) -> pd.DataFrame:
    """Run the campaign in an empty folder, its parts side by side: fault, case, survived, numbers_lost, note."""
    torch.set_num_threads(1)
    experiment.quiet_libraries()
    provenance()
    campaign = Campaign(folder, short)
    print(f"the undisturbed run: {campaign.seconds:.1f} s, {campaign.renames} renames", flush=True)
    chosen = [part for part in PARTS if not only or part.__name__ in only]
    if short:  # what needs fresh interpreters takes most of a minute
        chosen = [part for part in chosen if part not in (Campaign.fresh_interpreter, Campaign.hub)]
    shares = [forked(work, campaign, job, chosen[job::jobs]) for job in range(jobs)]
    return pd.DataFrame(sum((share() for share in shares), []))


def work(campaign: Campaign, job: int, chosen: list[Callable[[Campaign], None]]) -> list[dict]:
    """One process's share of the campaign; each part is a process of its own, and what ends it ends nothing else."""
    rows: list[dict] = []
    for number, part in enumerate(chosen):
        campaign.shop.count = 10_000 * (job + 1) + 500 * number  # folders and logs of its own
        start = time.monotonic()
        try:
            done = in_child(one_part, campaign, part)
        except Exception as error:
            note = f"the campaign itself failed: {type(error).__name__} {error}"[:200]
            done = [{"fault": part.__name__, "case": "-", "survived": False, "numbers_lost": 0, "note": note}]
        rows += done
        good = sum(row["survived"] for row in done)
        print(f"{part.__name__}: {good} of {len(done)} survived, {time.monotonic() - start:.0f} s", flush=True)
    return rows


def one_part(campaign: Campaign, part: Callable[[Campaign], None]) -> list[dict]:
    """What a part finds."""
    part(campaign)
    return campaign.rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row a fault: how often injected and survived, and the numbers lost."""
    grouped = table.groupby("fault", sort=False)
    return grouped.agg(
        injected=("survived", "size"), survived=("survived", "sum"), numbers_lost=("numbers_lost", "sum")
    ).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few cases of each fault; writes no results")
    parser.add_argument("--only", nargs="*", help="some parts: " + ", ".join(part.__name__ for part in PARTS))
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        table = run(Path(folder).resolve(), arguments.short, arguments.only)
    print(summary(table).to_string(index=False))
    if not (arguments.short or arguments.only):
        folder = arguments.results / "faults"
        write_text(folder / "faults.csv", table.to_csv(index=False, lineterminator="\n"))
        write_text(folder / "summary.csv", summary(table).to_csv(index=False, lineterminator="\n"))
        facts = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "seconds": round(time.monotonic() - start)}
        write_json(folder / "provenance.json", {**provenance(), **facts})
    sys.exit(not table["survived"].all())


if __name__ == "__main__":
    main()

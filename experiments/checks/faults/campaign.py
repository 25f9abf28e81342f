"""The cases: each hurts a run, resumes it, and compares what it ends with."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from experiments.checks.faults.hub import Hub
from experiments.checks.faults.injections import (
    at_call,
    at_rename,
    counting_steps,
    file_limit,
    hurt,
    infinite_gradient,
    jumping_clock,
    mount,
    mounts,
    no_memory,
    not_a_number,
    send,
)
from experiments.checks.faults.workshop import STEPS, Workshop, contents, in_child, lost, sha
from tspin import selfplay, trainer
from tspin.experiment import preset as experiment

TOLERANCE = 1e-4  # of weights after an out-of-memory error: micro-batches add up in another order


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
            for owner, name in ((selfplay, "sample"), (experiment, "evaluate")):
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
            counter, keeping = place.with_suffix(".steps"), ("--set", "checkpoint_steps=2")
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
        skipped += ("tracker.json", "trainer_state.json", "card/")  # made from the others, or of no number
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

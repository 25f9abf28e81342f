"""Two training steps: in several processes as in one, stopped and gone on with as undisturbed; memory given back."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.numpy import load_file
from transformers import TrainerCallback

from tspin.devices import accelerators, occupied_bytes
from tspin.doctor.bench import Bench
from tspin.engines.engine import Engine
from tspin.engines.here import Training, train
from tspin.engines.launch import launch_training
from tspin.errors import UserError
from tspin.models import load_model
from tspin.planning.checks import Finding
from tspin.runs.signals import Stopped
from tspin.runs.unfinished import Unfinished
from tspin.yaml_files import find_yaml

LOADING = {"dtype": torch.float32, "attn_implementation": "sdpa"}
# SGD moves a weight by a multiple of its gradient: unlike those that divide by it, it enlarges no rounding error.
PLAIN: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "warmup_steps": 0}
MOVED = 1e-3  # of the largest movement of a weight: what another order of additions may change
LOGGED = 1e-3  # relative, of losses and gradient norms
GIVEN_BACK = 2**24  # bytes that may stay: libraries' workspaces
ON_CPU = "FSDP"
LAUNCHED = {"FSDP": ("fsdp2", "FSDP2"), "MULTI_GPU": ("ddp", "DDP")}  # file of experiments/accelerate/, name


@dataclass(frozen=True)
class Trained:
    """What a training left."""

    weights: dict[str, np.ndarray]
    steps: pd.DataFrame

    def same(self, other: "Trained") -> bool:
        """Whether weights and step log are equal to the bit."""
        equal = all(np.array_equal(weight, other.weights[name]) for name, weight in self.weights.items())
        return equal and self.weights.keys() == other.weights.keys() and self.steps.equals(other.steps)


def train_two_steps(
    bench: Bench,
    name: str,
    launcher: Path | None = None,
    unfinished: Unfinished | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> Trained:
    """T-SPIN's second iteration, two steps, in `bench.folder`/`name`."""
    args = bench.args(name, launcher=str(launcher) if launcher else None, **settings)
    place = bench.folder / name
    training = Training(bench.triplets, bench.tokenizer, args, 1, place / "model", place)
    if launcher:
        launch_training(bench.policy, LOADING, training)
    else:
        train(load_model(bench.policy.folder, LOADING), training, callbacks, unfinished)
    steps = pd.read_parquet(place / "steps.parquet").drop(columns="tokens_per_second")
    weights = load_file(place / "model" / "model.safetensors")
    rmtree(place / "model")  # gigabytes, on a GPU
    return Trained(weights, steps)


def check_fsdp(bench: Bench) -> Finding:
    """Shards of the weights in several processes against one process."""
    return _launched(bench, "FSDP")


def check_ddp(bench: Bench) -> Finding:
    """Whole weights in several processes against one process."""
    return _launched(bench, "MULTI_GPU")


def _launched(bench: Bench, kind: str) -> Finding:
    file, shown = LAUNCHED[kind]
    name = f"training, {shown}"
    if bench.on_gpu and accelerators() < 2:
        return Finding(name, "skipped", "one GPU; it takes two")
    if not bench.on_gpu and kind != ON_CPU:
        return Finding(name, "skipped", f"no GPU; on a CPU {LAUNCHED[ON_CPU][1]} stands for both")
    processes = accelerators() if bench.on_gpu else 2
    settings = yaml.safe_load(
        find_yaml(file if bench.on_gpu else "cpu2", "experiments/accelerate", "launch file").read_text()
    )
    launcher = bench.folder / f"{file}.yaml"
    launcher.write_text(yaml.safe_dump({**settings, "distributed_type": kind, "num_processes": processes}))
    one = train_two_steps(bench, "one", **PLAIN)
    several = train_two_steps(bench, file, launcher, **PLAIN)
    numbers = differences(bench, one, several)
    text = (
        f"{processes} processes against one: weights differ by {numbers['weights']:.1e} of their movement, "
        f"losses and gradient norms by {numbers['log']:.1e}"
    )
    sound = numbers["weights"] <= MOVED and numbers["log"] <= LOGGED
    told = text if sound else f"{text} (at most {MOVED:g}): several processes do not train what one trains"
    return Finding(name, "ok" if sound else "failed", told, numbers)


def differences(bench: Bench, one: Trained, other: Trained) -> dict[str, float]:
    """How far two trainings are apart: {"weights", "log"}.

    weights: the largest distance, as a share of the largest movement from the policy. log: relative, of the step log.
    Raises UserError where nothing moved, so that agreement would say nothing.
    """
    before = load_file(Path(bench.policy.folder, "model.safetensors"))
    moved = float(np.max([np.abs(weight - before[name]).max() for name, weight in one.weights.items()]))
    if not moved:
        raise UserError("training changed no weight")
    apart = float(np.max([np.abs(weight - other.weights[name]).max() for name, weight in one.weights.items()]))
    columns = ["loss", "grad_norm"]
    log = float(np.abs(one.steps[columns].to_numpy() / other.steps[columns].to_numpy() - 1).max())
    return {"weights": apart / moved, "log": log}


class Interrupt(TrainerCallback):
    """Sends this process SIGTERM in its first step, as the end of a queue's time does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if state.global_step == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def check_resumed(bench: Bench) -> Finding:
    """A training that SIGTERM stops and that goes on, against an undisturbed one: to the bit."""
    name = "stopped and resumed"
    whole = train_two_steps(bench, "whole")
    unfinished = Unfinished(bench.folder / "resumed" / "unfinished", {"of": "doctor"})
    unfinished.forget()
    try:
        train_two_steps(bench, "resumed", unfinished=unfinished, callbacks=[Interrupt()])
    except Stopped as stopped:
        kept = unfinished.steps()
        if stopped.number != signal.SIGTERM:  # the user's own
            raise
    else:
        return Finding(name, "failed", "SIGTERM did not stop the training")
    resumed = train_two_steps(bench, "resumed", unfinished=unfinished)
    if kept == [1] and whole.same(resumed):
        text = "SIGTERM in step 1 of 2, then the rest: weights and step log are those of an undisturbed training"
        return Finding(name, "ok", text)
    if not whole.same(train_two_steps(bench, "again")):
        text = "two undisturbed trainings differ here already: this machine's kernels do not compute the same twice"
        return Finding(name, "warning", text)
    text = f"states kept after steps {kept}; weights or step log differ from an undisturbed training's"
    return Finding(name, "failed", text)


def check_given_back(bench: Bench) -> Finding:
    """The accelerator's memory after a policy is released: the next step may be another process's."""
    name = "memory given back"
    if not bench.on_gpu:
        return Finding(name, "skipped", "no GPU")
    engine = Engine(bench.args("released"), bench.tokenizer, LOADING)
    engine.release()
    before = occupied_bytes()
    engine.score(bench.policy, bench.triplets, "the policy", keep=True)
    held = occupied_bytes() - before
    engine.release()
    left = occupied_bytes() - before
    numbers = {"held_bytes": held, "left_bytes": left}
    if left > GIVEN_BACK:
        text = f"{left / 2**20:.0f} of {held / 2**20:.0f} MiB stay taken after a policy is released"
        return Finding(name, "failed", text, numbers)
    return Finding(name, "ok", f"{held / 2**20:.0f} MiB were taken, {left / 2**20:.0f} MiB are left", numbers)

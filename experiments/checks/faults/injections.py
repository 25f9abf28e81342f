"""What hurts a run: faults planted in a forked process before its command starts, files damaged, folders mounted."""

import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Trainer

from experiments.checks.faults.workshop import Before
from tspin import trainer


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

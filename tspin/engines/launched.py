"""What processes of a launched job have in common, whatever they do."""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from tspin.engines.processes import MEMORY
from tspin.engines.workers import FAILURE
from tspin.errors import UserError
from tspin.runs.files import write_text
from tspin.runs.signals import SIGNALS
from tspin.trainer import OutOfMemory


def in_process(work: Callable[[Path], None]) -> Callable[[Path], None]:
    """`work` on a job's folder as the whole of a process, which leaves there why it failed."""

    @wraps(work)
    def main(folder: Path) -> None:
        # The launcher has them held back. Only a training heeds them: what comes before or after is not to be torn.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            work(folder)
        except UserError as error:
            write_text(folder / FAILURE, str(error))
            sys.exit(1)
        except OutOfMemory as error:
            write_text(folder / MEMORY, json.dumps([error.step, error.max_tokens]))
            sys.exit(1)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    return main


def shard_on_cpu() -> None:
    """Let Accelerate shard a model on a CPU too, where the Accelerate file asks for FSDP.

    FSDP2 works there, with gloo; Accelerate turns it on for GPUs alone, and takes this for a group of them.
    """
    state = PartialState()
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class WriteProgress(TrainerCallback):
    """Writes [step, steps, loss] for the process that waits."""

    def __init__(self, path: Path):
        self.path = path
        self.loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: D102
        self.loss = float(logs["loss"]) if "loss" in logs else self.loss

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        write_text(self.path, json.dumps([state.global_step, state.max_steps, self.loss]))

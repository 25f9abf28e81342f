"""One of the processes that train together: `accelerate launch … -m tspin.engines.training_worker FOLDER`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from tspin.config import SelfPlayConfig
from tspin.devices import without_denormals
from tspin.engines.adapters import load_policy
from tspin.engines.here import Training, train
from tspin.engines.launch import FACTS, PROGRESS, TOKENIZER, TRIPLETS
from tspin.engines.trackers import Tracked
from tspin.engines.workers import FAILURE, read_job
from tspin.errors import UserError
from tspin.models import load_tokenizer, policy_of
from tspin.runs.files import write_text
from tspin.triplets import load_triplets


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        _train(folder)
    except UserError as error:
        write_text(folder / FAILURE, str(error))
        sys.exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@without_denormals()
def _train(folder: Path) -> None:
    job = read_job(folder)
    args = SelfPlayConfig(**job["arguments"])
    first = args.process_index == 0
    if not first:
        args.report_to, args.disable_tqdm = [], True
    shard_on_cpu()
    loading = {**job["loading"], "dtype": getattr(torch, job["loading"]["dtype"])}
    training = Training(
        load_triplets(folder / TRIPLETS),
        load_tokenizer(str(folder / TOKENIZER)),
        args,
        job["iteration"],
        Path(job["checkpoint"]),
        Path(job["log_folder"]),
        job["tracked"] and Tracked(**{**job["tracked"], "folder": Path(job["tracked"]["folder"])}),
    )
    callbacks = [WriteProgress(folder / PROGRESS)] if first else []
    facts = train(load_policy(policy_of(job["policy"]), loading), training, callbacks)
    if first:
        write_text(folder / FACTS, json.dumps(facts))


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


if __name__ == "__main__":
    main()

"""One of the processes that train together: `accelerate launch … -m tspin.engines.training_worker FOLDER`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tspin.config import SelfPlayConfig
from tspin.devices import without_denormals
from tspin.engines.adapters import load_policy
from tspin.engines.here import Training, train
from tspin.engines.launch import FACTS, TOKENIZER, TRIPLETS
from tspin.engines.launched import WriteProgress, in_process, shard_on_cpu
from tspin.engines.processes import PROGRESS, STOP, STOPPED
from tspin.engines.together import Together
from tspin.engines.trackers import Tracked
from tspin.engines.workers import read_job
from tspin.models import load_tokenizer, policy_of
from tspin.runs.files import write_text
from tspin.runs.signals import Stopped, ask
from tspin.triplets import load_triplets


@in_process
@without_denormals()
def main(folder: Path) -> None:
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
    callbacks = [WriteProgress(folder / PROGRESS), HearOwner(folder / STOP)] if first else []
    policy = load_policy(policy_of(job["policy"]), loading)
    try:
        facts = train(policy, training, callbacks, _unfinished(job["unfinished"], first))
    except Stopped as stopped:
        if first:
            write_text(folder / STOPPED, json.dumps([stopped.number, stopped.saved]))
        return
    if first:
        write_text(folder / FACTS, json.dumps(facts))


def _unfinished(job: Mapping[str, Any] | None, first: bool) -> Together | None:
    return Together(Path(job["folder"]), job["inputs"], first) if job else None


class HearOwner(TrainerCallback):
    """Takes a signal that came to the process that waits, a number in a file, for one that came to this process."""

    def __init__(self, path: Path):
        self.path = path
        self.heard = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if not self.heard and self.path.exists():
            self.heard = True
            ask(int(self.path.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

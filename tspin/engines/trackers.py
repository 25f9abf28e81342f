"""Trackers: one run of W&B, Trackio or TensorBoard for a whole self-play run, over the steps of all its iterations."""

import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from huggingface_hub import get_token
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from tspin.config import SelfPlayConfig
from tspin.errors import UserError, tell
from tspin.runs.files import read_json, write_json

ONE_RUN = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class Tracked:
    """Where a training stands in its run. folder: the run's. run_id: by which a tracker goes on with it.

    steps_before: optimizer steps of the iterations before this one.
    """

    folder: Path
    run_id: str
    steps_before: int = 0


def run_id(folder: Path) -> str:
    """The identifier of the run in a folder, drawn once."""
    path = folder / "tracker.json"
    if not path.exists():
        write_json(path, {"run_id": secrets.token_hex(4)})
    kept: str = read_json(path)["run_id"]
    return kept


def check_trackers(args: SelfPlayConfig) -> None:
    """Raise UserError where a tracker would refuse its first row; tell of those that cannot go on with a run."""
    for name in args.report_to:
        if name not in ONE_RUN:
            tell(f"report_to: {name} gets a run for each iteration, {', '.join(ONE_RUN)} one for all")
    if "wandb" in args.report_to:
        import wandb

        # login() says False too within a run that the caller has begun, and where W&B is offline by its own settings.
        asks = wandb.run is None and wandb.setup().settings.mode in ("online", "run", None)
        if asks and not wandb.login(prompt=False, verify=False):
            raise UserError("report_to=wandb: no key is known here: run `wandb login`, or set WANDB_MODE=offline")
    if "trackio" in args.report_to and args.trackio_space_id and get_token() is None:
        raise UserError("trackio_space_id: no token for the hub is known here: run `hf auth login`, or leave it out")


def trackers(args: SelfPlayConfig, tracked: Tracked, step: int) -> list[TrainerCallback]:
    """The callbacks of args.report_to for one training. step: of its own steps, those that are done already."""
    if "wandb" in args.report_to:
        _begin_wandb(args, tracked)
    others = get_reporting_integration_callbacks([name for name in args.report_to if name != "tensorboard"])
    callbacks = [callback() for callback in others]
    if "tensorboard" in args.report_to:
        callbacks.append(_tensorboard(tracked, step))
    return [OfTheRun(callback, tracked.steps_before) for callback in callbacks]


def tracked_name(args: SelfPlayConfig, tracked: Tracked) -> str:
    """What a tracker calls the run: Trackio goes on with a run of this name."""
    return f"{args.run_name or args.method}-{tracked.run_id}"


def _begin_wandb(args: SelfPlayConfig, tracked: Tracked) -> None:
    """Begin W&B's run, or go on with it; one that the caller has begun is taken as it is."""
    import wandb

    if wandb.run is None:
        project = os.environ.get("WANDB_PROJECT", args.project)
        wandb.init(project=project, id=tracked.run_id, name=tracked_name(args, tracked), resume="allow")


def end_trackers(folder: Path) -> None:
    """End what a run has left open in this process, so that the next one begins its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None and wandb.run.id == run_id(folder):
        wandb.finish()


def _tensorboard(tracked: Tracked, step: int) -> TensorBoardCallback:
    from torch.utils.tensorboard import SummaryWriter  # here, so that the first bar does not wait for it

    events, done = tracked.folder / "tensorboard", tracked.steps_before + step
    if not done:
        rmtree(events, ignore_errors=True)  # what a killed try left
    return TensorBoardCallback(SummaryWriter(str(events), purge_step=done + 1 if done else None))


class OfTheRun(TrainerCallback):
    """A tracker's callback, told the steps of the whole run in place of the iteration's."""

    def __init__(self, callback: TrainerCallback, steps_before: int):
        self.callback = callback
        self.steps_before = steps_before


def _event(name: str) -> Callable[..., Any]:
    def event(self: OfTheRun, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        shifted = replace(state, global_step=state.global_step + self.steps_before)
        return getattr(self.callback, name)(args, shifted, control, **kwargs)

    return event


for name in (name for name in vars(TrainerCallback) if name.startswith("on_")):
    setattr(OfTheRun, name, _event(name))

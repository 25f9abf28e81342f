"""One iteration's stages as functions: score the reference, train."""

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from tspin.devices import peak_bytes, reset_peak
from tspin.errors import UserError
from tspin.objectives import METHODS
from tspin.runs.signals import Asked, Stopped, stopping_when_asked
from tspin.runs.stages import (
    DamagedStage,
    atomic_path,
    check_stage,
    remove_stage,
    run_stage,
    stage_record,
)
from tspin.selfplay_config import SelfPlayConfig
from tspin.trainer import AtTrainBegin, TripletTrainer
from tspin.triplets import Triplet, TripletCollator, collator_for, compute_logps


def response_logps(
    model: PreTrainedModel,
    triplets: Sequence[Triplet],
    tokenizer: PreTrainedTokenizerBase,
    args: SelfPlayConfig,
    of: str = "the policy",
    autocast: bool | None = None,
) -> dict[str, list[float]]:
    """log π of every response under `model`: role → nats, in the triplets' order.

    of: names the model on the bar. autocast: to bfloat16; args.bf16 when left out.
    """
    model.to(args.device)  # type: ignore[arg-type]
    collator = _collator(model, triplets, tokenizer, args)
    autocast = bool(args.bf16) if autocast is None else autocast
    return compute_logps(model, triplets, collator, autocast, f"log-probabilities of {of}")


def _collator(
    model: PreTrainedModel, triplets: Sequence[Triplet], tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig
) -> TripletCollator:
    try:
        return collator_for(model, triplets, tokenizer, args.micro_batch_tokens, args.layout)
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class Unfinished:
    """The states that a training keeps before its end, `folder`/step-<n>, each a stage made from `inputs`."""

    folder: Path
    inputs: Any

    def steps(self) -> list[int]:
        """The optimizer steps that states were written after, newest first, whole or not."""
        return sorted((int(path.name[5:]) for path in self.folder.glob("step-*") if path.suffix == ""), reverse=True)

    def newest(self) -> tuple[int, Path, float] | None:
        """(step, Trainer's checkpoint, seconds trained until then) of the newest whole state of these inputs."""
        for step in self.steps():
            output = self.folder / f"step-{step}"
            record = stage_record(output, self.inputs)
            try:
                check_stage(output)
            except DamagedStage:
                continue
            if record is not None:
                return step, output / f"checkpoint-{step}", record["facts"]["training_seconds"]
        return None

    def keep(self, step: int, seconds: float, write: Callable[[Path], None]) -> None:
        """Write a state, and then remove the older ones."""

        def produce(target: Path) -> dict[str, float]:
            write(target)
            return {"training_seconds": seconds}

        older = self.steps()
        remove_stage(self.folder / f"step-{step}")
        run_stage(self.folder / f"step-{step}", self.inputs, produce)
        for other in older:
            if other != step:
                remove_stage(self.folder / f"step-{other}")


def train_iteration(
    model: PreTrainedModel,
    triplets: Sequence[Triplet],
    tokenizer: PreTrainedTokenizerBase,
    args: SelfPlayConfig,
    iteration: int,
    *,
    checkpoint: Path,
    log_folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """Train `model` in place, save it to `checkpoint`, the steps to log_folder/steps.parquet.

    unfinished: where SIGTERM or Ctrl-C, and every args.checkpoint_steps steps, keep the training's state, and where
    it goes on from if there is one. A training that went on ends with the same weights and step log, bit by bit.
    Raises Stopped at a signal, after the step in hand; without `unfinished` nothing of it is kept.

    TensorBoard's events go to log_folder/tensorboard. Returns steps, training_seconds, tokens and
    peak_memory_bytes (see tspin.devices: on a CPU, that of the whole process; of several processes, the first one's),
    and of several processes their number (tspin.engines.launch starts them). Raises UserError when
    the loss is no longer finite.
    """
    first = args.process_index == 0  # of several that train together, which all run this function
    method = METHODS[args.method]
    arguments = copy.copy(args)
    arguments.output_dir = str(log_folder)
    arguments.seed = stage_seed(args.seed, "training", iteration)
    rates = args.learning_rates or [args.learning_rate]
    arguments.learning_rate = rates[min(iteration, len(rates) - 1)]
    arguments.dataloader_pin_memory = torch.cuda.is_available()
    kept = unfinished.newest() if unfinished else None
    first_step, state, seconds_before = kept or (0, None, 0.0)
    all_callbacks = [*callbacks, *([] if args.disable_tqdm else [StepBar(f"training, iteration {iteration}")])]
    if "tensorboard" in args.report_to:
        arguments.report_to = [target for target in args.report_to if target != "tensorboard"]
        events = log_folder / "tensorboard"
        if state is None:
            rmtree(events, ignore_errors=True)  # what a killed try at the same iteration left
        writer = SummaryWriter(str(events), purge_step=first_step + 1 if state else None)
        all_callbacks.append(TensorBoardCallback(writer))
    set_seed(arguments.seed)  # adapters start from random numbers, the same after a restart
    adapters = add_adapters(model, args.lora) if args.lora else None
    trainer = TripletTrainer(
        model,
        arguments,
        triplets,
        _collator(model, triplets, tokenizer, args),
        tokenizer,
        method,
        method.coefficients_at(iteration, args.coefficients),
        callbacks=all_callbacks,
    )
    # Every step's metrics go to the log; the terminal gets one bar with an estimate.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    reset_peak()
    start = time.perf_counter()

    def seconds() -> float:
        return round(seconds_before + time.perf_counter() - start, 2)

    if state is not None:
        trainer.add_callback(AtTrainBegin(lambda: trainer.restore_unlogged(state)))
    if unfinished is None:
        trainer.train()
    else:
        trainer.keep_state = lambda step, write: unfinished.keep(step, seconds(), write)
        with stopping_when_asked() as asked:
            trainer.add_callback(KeepState(asked, args.checkpoint_steps))
            trainer.train(resume_from_checkpoint=str(state) if state else None)
            step = trainer.state.global_step
            if asked.number is not None:
                if step not in unfinished.steps():  # the signal came after the last step
                    trainer._save_checkpoint(trainer.model, None)
                raise Stopped(asked.number, f"training is kept at step {step} of {trainer.state.max_steps}")
    trained_seconds = seconds()
    steps = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    if first:
        with atomic_path(log_folder / "steps.parquet") as temporary:
            steps.to_parquet(temporary, index=False)
    if adapters is not None:
        trainer.model = adapters.merge_and_unload()
    trainer.save_model(str(checkpoint))
    # A pickle of the settings, which the run's config.json holds as text: nothing here is unpickled.
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    facts = {
        "steps": trainer.state.global_step,
        "training_seconds": trained_seconds,
        "tokens": int(steps["tokens"].sum()),
        "peak_memory_bytes": peak_bytes(),
    }
    return facts | ({"processes": args.world_size} if args.world_size > 1 else {})


def add_adapters(model: PreTrainedModel, settings: dict[str, Any]) -> LoraModel:
    """Put low-rank adapters into `model`, in place, and freeze everything else (LoRA, arXiv 2106.09685).

    The model itself, not a wrapper, goes on being trained: the layouts that share prompts look into it. Raises
    UserError where it has no such modules.
    """
    config = LoraConfig(
        r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["target_modules"], lora_dropout=0.0
    )
    try:
        return LoraModel(model, {"default": config}, "default")
    except ValueError as error:
        raise UserError(f"training.lora.target_modules: {str(error).splitlines()[0]}") from error


class KeepState(TrainerCallback):
    """Has the state kept every `every` steps, and at the end of the step in which a signal came, which is the last."""

    def __init__(self, asked: Asked, every: int | None):
        self.asked = asked
        self.every = every

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if self.asked.number is not None:
            control.should_save = control.should_training_stop = True
        elif self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            control.should_save = True


class StepBar(TrainerCallback):
    """A progress bar over optimizer steps that shows the loss."""

    def __init__(self, description: str):
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.description, unit="step")

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):  # noqa: D102
        self.bar.close()


def stage_seed(seed: int, *labels: Any) -> int:
    """A seed of its own for every stage, so that no stage's randomness depends on another's."""
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31

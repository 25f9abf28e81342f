"""Training and scoring in this process, which may be one of several that train together."""

import copy
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)

from tspin.config import SelfPlayConfig
from tspin.devices import peak_bytes, pins_memory, reset_peak
from tspin.engines.adapters import ADAPTER, add_adapters, has_adapters, lora_config, merged, save_adapter
from tspin.engines.callbacks import AtTrainBegin, KeepState, LogLastStep, StepBar
from tspin.engines.together import told
from tspin.engines.trackers import Tracked, tracked_name, trackers
from tspin.errors import UserError, tell
from tspin.layouts import Layout, choose_layout, take_layout
from tspin.objectives import of_iteration
from tspin.runs.files import atomic_path, write_json
from tspin.runs.seeds import stage_seed
from tspin.runs.signals import Stopped, stopping_when_asked
from tspin.runs.unfinished import State, Unfinished
from tspin.trainer import GradientSignal, TripletTrainer
from tspin.triplets import (
    Triplet,
    TripletCollator,
    compute_logps,
    logps_of,
    longest_row,
    pad_token,
    token_logps_of,
)

FIRST_STEP = "first_step.json"  # beside the step log: what the first step saw
SAMPLED = 256  # elements of a weight


@dataclass(frozen=True)
class Training:
    """One iteration's training: on what, with which settings, and where its files go.

    checkpoint: the folder of the trained policy. log_folder: gets steps.parquet, and adapters where there are any.
    tracked: the run that trackers are told of; none without.
    """

    triplets: Sequence[Triplet]
    tokenizer: PreTrainedTokenizerBase
    args: SelfPlayConfig
    iteration: int
    checkpoint: Path
    log_folder: Path
    tracked: Tracked | None = None

    @cached_property
    def arguments(self) -> SelfPlayConfig:
        """The run's settings with this iteration's learning rate, seed and folder in them."""
        arguments = copy.copy(self.args)
        arguments.output_dir = str(self.log_folder)
        arguments.seed = stage_seed(self.args.seed, "training", self.iteration)
        arguments.learning_rate = of_iteration(self.args.learning_rates, self.iteration)
        arguments.dataloader_pin_memory = pins_memory()
        arguments.report_to = []  # ours are told the steps of the whole run
        if self.tracked is not None:
            arguments.run_name = tracked_name(self.args, self.tracked)
        return arguments


def train(
    model: PreTrainedModel,
    training: Training,
    callbacks: Sequence[TrainerCallback] = (),
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """Train `model` in place, or adapters (training.args.lora), and write its checkpoint and step log.

    model: with adapters in it, these go on; otherwise new ones are put in. They are kept in the log folder, ADAPTER.

    unfinished: where a signal (tspin.runs.signals), and every args.checkpoint_steps steps, keep the training's state,
    and where it goes on from if there is one. A training that went on ends with the same weights and step log, bit by
    bit; in another number of processes, up to rounding. Raises Stopped at a signal, after the step in hand; without
    `unfinished` nothing of it is kept.

    Returns steps, training_seconds, tokens, changed_share (of the weights that had a gradient; none where they are
    sharded), gradient_signal (where args.gradient_signal asks for it; of the steps since a training went on),
    peak_memory_bytes (see tspin.devices: on a CPU, that of the whole process; of several processes, the first one's),
    and of several processes their number. Raises UserError when the loss is no longer finite.
    """
    begun = unfinished.newest() if unfinished else State()
    set_seed(training.arguments.seed)  # adapters start from random numbers, the same after a restart
    if training.args.lora and not has_adapters(model):
        add_adapters(model, lora_config(training.args.lora))
    weights = sampled_weights(model)
    # The last: what the others decide is known by then. Not KeepState's stop, though, after which a training goes on.
    trainer = _trainer(model, training, [*callbacks, *_reports(training, begun.step), LogLastStep()])
    first_step = training.log_folder / FIRST_STEP
    if training.args.process_index == 0:
        trainer.keep_first_step = partial(write_json, first_step)
    reset_peak()
    start = time.perf_counter() - begun.seconds
    if unfinished is None:
        trainer.train()
    else:
        kind = {"kind": kind_of_state(trainer), "processes": training.args.world_size}
        _check_state(begun, kind, unfinished.folder)
        trainer.keep_state = lambda step, write: unfinished.keep(
            step, round(time.perf_counter() - start, 2), write, kind
        )
        _train_until_asked(trainer, unfinished, begun.checkpoint, training.args.checkpoint_steps)
    seconds = round(time.perf_counter() - start, 2)
    optimizer: Any = trainer.optimizer
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # a schedule-free one puts averaged weights in the place of those that it takes gradients at
    changed = changed_share(weights, sampled_weights(model), with_gradient(model, optimizer))
    measured = {"training_seconds": seconds, "changed_share": changed, "peak_memory_bytes": peak_bytes()}
    if training.args.lora and training.args.process_index == 0:
        save_adapter(model, training.log_folder / ADAPTER)
        trainer.model = merged(model, training.log_folder / ADAPTER, training.args.lora.merged_dtype)
    return {**_written(trainer, training), **measured}


def sampled_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A few elements of each of a model's trained weights, evenly spread; none of those that are sharded."""
    return {
        name: weight.detach().flatten()[:: max(weight.numel() // SAMPLED, 1)].clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad and not isinstance(weight, DTensor)
    }


def with_gradient(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> set[str]:
    """The names of a model's weights that had a gradient: none of what reads images, where there are only texts.

    An optimizer keeps a state of these, which is part of a training's; all names where it keeps none.
    """
    names = {name for name, weight in model.named_parameters() if optimizer.state.get(weight)}
    return names or {name for name, _ in model.named_parameters()}


def changed_share(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], names: Set[str]
) -> float | None:
    """The share of sampled weights of these names that differ; None where there is nothing to compare."""
    pairs = [(before[name], after[name]) for name in before.keys() & after.keys() & names]
    count = sum(old.numel() for old, _ in pairs)
    return sum(int((old != new.to(old.device)).sum()) for old, new in pairs) / count if count else None


def _trainer(model: PreTrainedModel, training: Training, callbacks: list[TrainerCallback]) -> TripletTrainer:
    method = training.args.objective
    trainer = TripletTrainer(
        model,
        training.arguments,
        training.triplets,
        collator_of(model, training.triplets, training.tokenizer, training.args),
        training.tokenizer,
        method,
        training.args.coefficients_at(training.iteration),
        callbacks=callbacks,
    )
    if training.args.gradient_signal:
        trainer.signal = GradientSignal()
    # Every step's metrics go to the log; the terminal gets one bar with an estimate.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _reports(training: Training, step: int) -> list[TrainerCallback]:
    """The progress bar and the trackers, as the settings ask; step: where the training goes on."""
    args = training.args
    callbacks: list[TrainerCallback] = []
    if not args.disable_tqdm:
        callbacks.append(StepBar(f"training, iteration {training.iteration}"))
    if training.tracked is not None:
        callbacks += trackers(args, training.tracked, step)
    return callbacks


def kind_of_state(trainer: TripletTrainer) -> str:
    """Which files the states of a training are: "whole", or FSDP's "full" or "sharded" ones."""
    if not trainer.is_fsdp_enabled:
        return "whole"
    return "sharded" if "SHARDED" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type) else "full"


def _check_state(begun: State, kind: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError for a state that this training cannot read; say so where its sums have another order."""
    if begun.checkpoint is None:
        return
    kept = begun.facts.get("kind", "an earlier version's")
    if kept != kind["kind"]:
        raise UserError(
            f"{folder}: a training was stopped there whose state is {kept}, and this one's would be "
            f"{kind['kind']}: go on with the launch file that it had, or delete the folder to train from the start"
        )
    if begun.facts["processes"] != kind["processes"]:
        then, now = begun.facts["processes"], kind["processes"]
        tell(f"training goes on at step {begun.step} in {now} processes after {then}: equal up to rounding")


def _train_until_asked(trainer: TripletTrainer, unfinished: Unfinished, state: Path | None, every: int | None) -> None:
    """Train to the end, or to the end of the step in which a signal comes; then keep the state and raise Stopped."""
    with stopping_when_asked(impatient=trainer.args.world_size == 1) as asked:
        agreed = trainer.listen(asked)
        trainer.add_callback(KeepState(agreed, every))
        if state is not None:
            trainer.add_callback(AtTrainBegin(lambda: trainer.restore_unlogged(state)))
        trainer.train(resume_from_checkpoint=str(state) if state else None)
        trainer.agree()
        step = trainer.state.global_step
        if agreed.number is not None:
            if step not in unfinished.steps():  # the signal came after the last step
                trainer._save_checkpoint(trainer.model, None)
            raise Stopped(agreed.number, f"training is kept at step {step} of {trainer.state.max_steps}")


def _written(trainer: TripletTrainer, training: Training) -> dict[str, Any]:
    """Write the step log and the checkpoint; returns their facts."""
    steps = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    if training.args.process_index == 0:
        with atomic_path(training.log_folder / "steps.parquet") as temporary:
            steps.to_parquet(temporary, index=False)
    trainer.save_model(str(training.checkpoint))
    # A pickle of the settings, which the run's config.json holds as text: nothing here is unpickled.
    (training.checkpoint / "training_args.bin").unlink(missing_ok=True)
    facts: dict[str, Any] = {"steps": trainer.state.global_step, "tokens": int(steps["tokens"].sum())}
    if trainer.signal is not None:
        facts["gradient_signal"] = trainer.signal.ratio()
    processes = training.args.world_size
    return facts | ({"processes": processes} if processes > 1 else {})


@dataclass(frozen=True)
class Scoring:
    """How responses are scored. of: names the model on the bar. autocast: to bfloat16; args.bf16 when None."""

    tokenizer: PreTrainedTokenizerBase
    args: SelfPlayConfig
    of: str = "the policy"
    autocast: bool | None = None


def score(
    model: PreTrainedModel, triplets: Sequence[Triplet], scoring: Scoring, by_token: bool = False
) -> dict[str, list[Any]]:
    """log π of every response under `model`: role → nats, in the triplets' order; by_token: a list of nats each."""
    model.to(scoring.args.device)  # type: ignore[arg-type]
    collator = collator_of(model, triplets, scoring.tokenizer, scoring.args)
    autocast = bool(scoring.args.bf16) if scoring.autocast is None else scoring.autocast
    of = token_logps_of if by_token else logps_of
    return compute_logps(model, triplets, collator, autocast, f"log-probabilities of {scoring.of}", of)


def collator_of(
    model: PreTrainedModel, triplets: Sequence[Triplet], tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig
) -> TripletCollator:
    """The collator that suits a model and the settings. Raises UserError for a layout that cannot be had.

    Of processes that train together the first one finds the layout: it may be the only one that has read the weights.
    """
    if args.world_size > 1:
        first = args.process_index == 0
        layout = told(_layout(model, triplets, args) if first else None)
        if not first:
            take_layout(model, layout)
    else:
        layout = _layout(model, triplets, args)
    return TripletCollator(tuple(triplets[0].responses), pad_token(tokenizer), layout, args.micro_batch_tokens)


def _layout(model: PreTrainedModel, triplets: Sequence[Triplet], args: SelfPlayConfig) -> Layout:
    try:
        return choose_layout(model, args.layout, max(map(longest_row, triplets)))
    except ValueError as error:
        raise UserError(str(error)) from error

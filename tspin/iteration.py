"""One iteration's stages as functions: encode the data, score the reference, train."""

import copy
import dataclasses
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from tspin import data
from tspin.data import Example
from tspin.errors import UserError
from tspin.memory import peak_bytes, reset_peak
from tspin.objectives import METHODS
from tspin.run_store import atomic_path
from tspin.selfplay_config import SelfPlayConfig
from tspin.trainer import Triplet, TripletCollator, TripletTrainer, collator_for, compute_logps


def encode_dataset(
    dataset: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig
) -> list[Example]:
    """Rows {"prompt", "completion"} as examples; an integer "prompt_id" replaces the row's number. Raises UserError."""
    rows = [dict(row) for row in dataset]
    given = [row.get("prompt_id") for row in rows]
    numbers = [value if isinstance(value, int) else i for i, value in enumerate(given)]
    if len(set(numbers)) < len(numbers):
        raise UserError("train_dataset: two rows have the same prompt_id; responses are matched by it")
    return data.encode_examples(
        list(zip(numbers, data.validate_rows(rows, "train_dataset"), strict=True)),
        tokenizer,
        template=args.template,
        max_prompt_tokens=args.max_prompt_tokens,
        max_response_tokens=args.max_response_tokens,
        long_prompts=args.long_prompts,
    )


def response_logps(
    model: PreTrainedModel,
    triplets: Sequence[Triplet],
    tokenizer: PreTrainedTokenizerBase,
    args: SelfPlayConfig,
    of: str = "the policy",
) -> dict[str, list[float]]:
    """log π of every response under `model`: role → nats, in the triplets' order. `of` names the model on the bar."""
    model.to(args.device)  # type: ignore[arg-type]
    collator = _collator(model, triplets, tokenizer, args)
    return compute_logps(model, triplets, collator, bool(args.bf16), f"log-probabilities of {of}")


def reference_table(triplets: Sequence[Triplet], logps: Mapping[str, list[float]]) -> pd.DataFrame:
    """prompt_id and a column a role, in nats: what a reference policy's log-probabilities are kept as."""
    return pd.DataFrame({"prompt_id": [t.prompt_id for t in triplets], **logps})


def _collator(
    model: PreTrainedModel, triplets: Sequence[Triplet], tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig
) -> TripletCollator:
    try:
        return collator_for(model, triplets, tokenizer, args.micro_batch_tokens, args.layout)
    except ValueError as error:
        raise UserError(str(error)) from error


def with_reference(triplets: Sequence[Triplet], table: pd.DataFrame) -> list[Triplet]:
    """Triplets with their reference log-probabilities from `reference_table`."""
    rows: dict[Any, Any] = table.set_index("prompt_id").to_dict("index")
    return [dataclasses.replace(t, reference_logps=rows[t.prompt_id]) for t in triplets]


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
) -> dict[str, Any]:
    """Train `model` in place, save it to `checkpoint`, the steps to log_folder/steps.parquet.

    TensorBoard's events go to log_folder/tensorboard. Returns steps, training_seconds, tokens and
    peak_memory_bytes (see tspin.memory: on a CPU, that of the whole process). Raises UserError when
    the loss is no longer finite.
    """
    if args.world_size > 1:
        raise UserError("training in several processes is not supported yet: start one process")
    method = METHODS[args.method]
    arguments = copy.copy(args)
    arguments.output_dir = str(log_folder)
    arguments.seed = stage_seed(args.seed, "training", iteration)
    rates = args.learning_rates or [args.learning_rate]
    arguments.learning_rate = rates[min(iteration, len(rates) - 1)]
    arguments.dataloader_pin_memory = torch.cuda.is_available()
    all_callbacks = [*callbacks, *([] if args.disable_tqdm else [StepBar(f"training, iteration {iteration}")])]
    if "tensorboard" in args.report_to:
        arguments.report_to = [target for target in args.report_to if target != "tensorboard"]
        events = log_folder / "tensorboard"
        rmtree(events, ignore_errors=True)  # what a killed try at the same iteration left
        all_callbacks.append(TensorBoardCallback(SummaryWriter(str(events))))
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
    trainer.train()
    seconds = time.perf_counter() - start
    steps = pd.DataFrame([entry for entry in trainer.state.log_history if "loss" in entry])
    with atomic_path(log_folder / "steps.parquet") as temporary:
        steps.to_parquet(temporary, index=False)
    if adapters is not None:
        trainer.model = adapters.merge_and_unload()
    trainer.save_model(str(checkpoint))
    # A pickle of the settings, which the run's config.json holds as text: nothing here is unpickled.
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    return {
        "steps": trainer.state.global_step,
        "training_seconds": round(seconds, 2),
        "tokens": int(steps["tokens"].sum()),
        "peak_memory_bytes": peak_bytes(),
    }


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


class StepBar(TrainerCallback):
    """A progress bar over optimizer steps that shows the loss."""

    def __init__(self, description: str):
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.bar = tqdm(total=state.max_steps, desc=self.description, unit="step")

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

"""TrainingArguments' own options, judged before anything is loaded: what cannot work, and what this machine lacks.

`refuse` knows by name what no self-play training can follow. `try_out` makes for real what Trainer would make only
after sampling: its optimizer and schedule for a single weight, its data loader without data.
"""

import copy
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from tspin.errors import UserError, reason

NO_EVALUATION = "no training here has an evaluation set: benchmarks are the section `evaluation`"
NO_UPLOAD = "a run's checkpoints stay in its folder: upload the one you want with `hf upload`"
NO_LENGTHS = "micro-batches are planned by tokens already, for which no triplet has to move to another step"
SHARDS = "a launch file says how processes share a training: --launcher accelerate --launcher-config fsdp2"
EVALUATION = (
    *(
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "eval_accumulation_steps",
        "eval_use_gather_object",
    ),
    *("do_eval", "do_predict", "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics"),
    *("include_for_metrics", "bf16_full_eval", "fp16_full_eval", "metric_for_best_model", "greater_is_better"),
    "load_best_model_at_end",
)
UPLOAD = ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
# Off as None, False and "no" are; anything else is refused.
UNUSABLE = {
    **dict.fromkeys(EVALUATION, NO_EVALUATION),
    **dict.fromkeys(UPLOAD, NO_UPLOAD),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), SHARDS),
    "length_column_name": NO_LENGTHS,
    "label_smoothing_factor": "the objectives are of whole responses, and have no labels that could be smoothed",
    "label_names": "the objectives are of whole responses, and have no labels",
    "neftune_noise_alpha": "with noise on the embeddings log π would not be the policy's, and no loss what it says",
    "fp16": "a gradient that overflows ends a training here, and fp16 finds its scale by overflows; use bf16",
    "auto_find_batch_size": "batch_size is part of the method; where memory runs out, micro-batches get smaller",
    "include_num_input_tokens_seen": "tokens are counted already: the column `tokens` of steps.parquet",
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C keep a training's state already",
    "save_only_model": "a training could not go on from such a state; each iteration's checkpoint is the model alone",
    "ignore_data_skip": "a training that was stopped would see its first triplets again when it goes on",
    "resume_from_checkpoint": "the same command goes on from what is kept, by itself",
}
UNUSABLE_VALUES = {
    ("lr_scheduler_type", "reduce_lr_on_plateau"): NO_EVALUATION,
    ("lr_scheduler_type", "greedy"): NO_EVALUATION,
    ("save_strategy", "best"): NO_EVALUATION,
    ("train_sampling_strategy", "group_by_length"): NO_LENGTHS,
    ("train_sampling_strategy", "batch_rebalance"): NO_LENGTHS,
}
TRIED_STEPS = 100  # of the schedule that is tried


def refuse(settings: Any) -> None:
    """Raise UserError for the first option that could only fail or do nothing. settings: TrainingArguments' fields."""
    for name, why in UNUSABLE.items():
        value = getattr(settings, name)
        if value not in (None, False, "no", TrainingArguments.__dataclass_fields__[name].default, []):
            raise UserError(f"{name}: {why} (got {value!r})")
    for (name, value), why in UNUSABLE_VALUES.items():
        if getattr(settings, name) == value:
            raise UserError(f"{name}={value}: {why}")


def try_out(args: TrainingArguments, learning_rate: float) -> None:
    """Raise UserError for packages that are missing, and for options without those that they need beside them.

    learning_rate: what the optimizer is tried with.
    """
    trackers = get_available_reporting_integrations()
    for name in args.report_to or []:
        if name not in trackers:
            found = ", ".join(trackers) or "none"
            raise UserError(f"report_to: Transformers finds no {name} here; install it, or choose of {found}")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("use_liger_kernel: its package is not installed; pip install liger-kernel")
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise UserError("accelerator_config.dispatch_batches: every process makes its own part of a step's triplets")
    trial = _Trial(args, learning_rate)
    for option, beside, make in (
        ("optim", "optim_args", trial.create_optimizer),
        ("lr_scheduler_type", "lr_scheduler_kwargs", lambda: trial.create_scheduler(TRIED_STEPS)),
        ("dataloader_num_workers", "the other dataloader_ options", trial.create_loader),
    ):
        try:
            make()
        except Exception as error:  # whatever a package that is missing, or an option that it does not know, leads to
            value = getattr(getattr(args, option), "value", getattr(args, option))
            raise UserError(f"{option}={value}, with {beside} as given: {reason(error)}") from error


class _Trial(Trainer):
    """As much of Trainer as makes an optimizer, a schedule and a data loader, for a model of one weight."""

    def __init__(self, args: TrainingArguments, learning_rate: float):
        self.args = copy.copy(args)
        self.args.learning_rate = learning_rate
        if args.optim_target_modules:
            self.args.optim_target_modules = "all-linear"  # this model has no others
        self.model = torch.nn.utils.skip_init(torch.nn.Linear, 1, 1, bias=False)  # no random number is drawn
        self.optimizer = self.lr_scheduler = self.optimizer_cls_and_kwargs = None

    def create_loader(self) -> DataLoader:
        args = self.args
        return DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

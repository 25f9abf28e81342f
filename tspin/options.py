"""TrainingArguments' own options, judged before anything is loaded: what cannot work, and what this machine lacks.

`refuse` knows by name what no self-play training can follow, and what would do nothing: every option of the installed
version is in one of the tables here or in tspin.config's (tests/test_options.py). `try_out` makes for real what Trainer
would make only after sampling: its optimizer and schedule for a single weight, its data loader without data.
"""

import copy
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from tspin.errors import UserError, reason

NO_EVALUATION = "no training here has an evaluation set: benchmarks are the section `evaluation`"
NO_UPLOAD = "nothing is uploaded while a run goes on: trainer.push_to_hub() uploads the iteration that you choose"
NO_LENGTHS = "micro-batches are planned by tokens already, for which no triplet has to move to another step"
SHARDS = "a launch file says how processes share a training: --launcher accelerate --launcher-config fsdp2"
WITHIN_BACKWARD = "it moves weights within a backward pass, of which a step here has one for each micro-batch"
NEWEST = "only the newest state of a training is kept, until it ends"
EVALUATION = (
    *(
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
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
    "ddp_backend": "processes that train together exchange by NCCL on GPUs and by gloo on CPUs",
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
    "save_total_limit": NEWEST,
    "save_on_each_node": "the machines of a run share a file system, on which the first one writes for all",
    "average_tokens_across_devices": "a step's loss is a mean over its triplets, on any number of devices",
}
UNUSABLE_VALUES = {
    ("lr_scheduler_type", "reduce_lr_on_plateau"): NO_EVALUATION,
    ("lr_scheduler_type", "greedy"): NO_EVALUATION,
    ("save_strategy", "best"): NO_EVALUATION,
    ("train_sampling_strategy", "group_by_length"): NO_LENGTHS,
    ("train_sampling_strategy", "batch_rebalance"): NO_LENGTHS,
    **{("optim", name.value): WITHIN_BACKWARD for name in OptimizerNames if name.endswith(("layerwise", "lomo"))},
}
# What one process has no use for, and a launch file's processes have (tspin.config.SelfPlayConfig).
OF_SEVERAL = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph")
# Option → the one without which it would do nothing.
BESIDE = {
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "report_to=trackio"),
    "save_steps": "save_strategy=steps",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "liger_kernel_config": "use_liger_kernel",
}
# The rest of TrainingArguments' own, and who acts on each. Ours (tspin.config.SelfPlayConfig) are declared there.
USED = {
    **dict.fromkeys(("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_kwargs"), "schedule"),
    **dict.fromkeys(("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"), "optimizer"),
    **dict.fromkeys(("data_seed", "dataloader_drop_last", "train_sampling_strategy"), "order"),
    **dict.fromkeys(("dataloader_multiprocessing_context", "dataloader_in_order", "accelerator_config"), "loader"),
    **dict.fromkeys(("tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"), "arithmetic"),
    **dict.fromkeys(("use_liger_kernel", "torch_empty_cache_steps", "use_cache", "use_cpu"), "device"),
    **dict.fromkeys(("seed", "full_determinism"), "chance"),
    **dict.fromkeys(("logging_strategy", "logging_first_step"), "log"),
    **dict.fromkeys(OF_SEVERAL, "processes"),
    "restore_callback_states_from_checkpoint": "states",
    "gradient_accumulation_steps": "refused",  # by tspin.config.complete, with batch_size in its place
    "remove_unused_columns": "off",  # always: rows are triplets, whose columns no model knows
    "do_train": "scripts",  # Trainer has it for them alone, and so has this
} | dict.fromkeys(BESIDE, "beside")
PROJECTED = ("galore", "apollo")  # optimizers that treat some modules in a way of their own
TRIED_STEPS = 100  # of the schedule that is tried


def refuse(settings: Any) -> None:
    """Raise UserError for the first option that could only fail or do nothing. settings: TrainingArguments' fields."""
    for name, why in UNUSABLE.items():
        if is_given(settings, name):
            raise UserError(f"{name}: {why} (got {getattr(settings, name)!r})")
    for (name, value), why in UNUSABLE_VALUES.items():
        if getattr(settings, name) == value:
            raise UserError(f"{name}={value}: {why}")
    for name, needed in BESIDE.items():
        option, _, wanted = needed.partition("=")
        there = getattr(settings, option)
        if is_given(settings, name) and not (wanted in str(getattr(there, "value", there)) if wanted else there):
            raise UserError(f"{name}: does nothing without {needed} (got {getattr(settings, name)!r})")


def is_given(settings: Any, name: str) -> bool:
    """Whether an option is neither at its default nor off, as None, False and "no" are where the default is off too."""
    value, default = getattr(settings, name), TrainingArguments.__dataclass_fields__[name].default
    return value != default and (default is True or value not in (None, False, "no", []))


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
    _, taken = trial.get_optimizer_cls_and_kwargs(trial.args, trial.model)  # type: ignore[arg-type]
    _check_optimizer_options(args, taken)


def _check_optimizer_options(args: TrainingArguments, taken: dict[str, Any]) -> None:
    """Raise UserError for what the chosen optimizer does not look at. taken: the arguments that it is made with."""
    optimizer = OptimizerNames(args.optim).value
    for name, argument in {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}.items():
        if is_given(args, name) and argument not in taken:
            raise UserError(f"{name}: optim={optimizer} has none; its own are set by optim_args")
    if args.optim_target_modules and not optimizer.startswith(PROJECTED):
        raise UserError(f"optim_target_modules: optim={optimizer} trains all weights alike; see lora")


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

"""SelfPlayConfig: transformers.TrainingArguments and what self-play adds to them."""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

import torch
from transformers import TrainingArguments

from tspin.config import unknown
from tspin.devices import multiplies_bfloat16
from tspin.errors import UserError
from tspin.logprobs import Layout
from tspin.objectives import LOSSES, METHODS, Coefficients
from tspin.sampling import Decoding

LAYOUTS = ("auto", *get_args(Layout))
BACKENDS = ("transformers", "vllm")
LONG_PROMPTS = ("error", "truncate", "drop")

# Fields that say where, how and how long a run is executed, not what an iteration computes.
OPERATIONAL = {
    *(
        "iterations",
        "micro_batch_tokens",
        "checkpoint_steps",
        "engine",
        "launcher",
        "diagnostics",
        "output_dir",
        "shared_dir",
        "report_to",
        "run_name",
        "disable_tqdm",
        "log_level",
    ),
    *(
        "log_level_replica",
        "log_on_each_node",
        "local_rank",
        "project",
        "dataloader_num_workers",
        "dataloader_pin_memory",
    ),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "hub_token"),
    *("resume_from_checkpoint", "ddp_timeout", "debug", "skip_memory_metrics"),
}


@dataclass
class SelfPlayConfig(TrainingArguments):
    """Settings of a self-play run: transformers.TrainingArguments and what self-play adds.

    method: a key of tspin.objectives.METHODS. iterations: T. alpha, beta, lam, loss_type,
    length_scale, margin, noise_ratio: see Coefficients. temperature (0 is greedy), top_p,
    max_new_tokens, sampling_batch_size: decoding of y′ and y0. template, max_prompt_tokens,
    max_response_tokens, long_prompts: see tspin.data.templates.
    learning_rates: one an iteration, the last going on; learning_rate for all when empty.
    micro_batch_tokens: tokens that pass through the model at once on one device; memory grows with
    it, results do not depend on it. layout: "shared" computes a prompt once for all its responses,
    "padded" once for each; "auto" is shared where the model supports it.
    checkpoint_steps: keep a training's state every so many optimizer steps, to go on
    from after a crash; None: only when SIGTERM or Ctrl-C asks to stop. Results do not depend on it.
    lora: {"rank", "alpha", "target_modules"}: train low-rank adapters by PEFT and merge them into each
    checkpoint; None trains all weights.
    monitor_proto: log y0 where it carries no gradient too (a third more work there).
    diagnostics: after each iteration, write what tspin.diagnostics finds (two forward passes over the responses).
    shared_dir: where what methods of the same base, data and seed share is kept (y0, and y′ of
    iteration 0); the run's folder when empty.
    sampling_backend: "transformers" or "vllm". sampling_dtype: of the weights while sampling, "float32" or "bfloat16";
    as the model is loaded when None. engine: the fields of tspin.engines.vllm.Engine.
    launcher: a file for `accelerate launch`; each training then runs in the processes that it names.
    bf16: None is "where the hardware multiplies bfloat16".

    Defaults are the paper's where it states one: RMSProp without weight decay, 10 % warm-up.
    Raises UserError for an unknown method or loss and for values out of range.
    """

    method: str = "tspin"
    iterations: int = 5
    alpha: float = 1.0
    beta: float = 0.1
    lam: float = 0.1
    loss_type: str = "logistic"
    length_scale: float = 2.0
    margin: float = 1.0
    noise_ratio: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    sampling_batch_size: int = 64
    template: str = "auto"
    max_prompt_tokens: int = 512
    max_response_tokens: int = 256
    long_prompts: str = "error"
    learning_rates: list[float] | None = None
    micro_batch_tokens: int = 4096
    checkpoint_steps: int | None = None
    layout: str = "auto"
    lora: dict[str, Any] | None = None
    monitor_proto: bool = False
    diagnostics: bool = True
    shared_dir: str | None = None
    sampling_backend: str = "transformers"
    sampling_dtype: str | None = None
    engine: dict[str, Any] | None = None
    launcher: str | None = None

    learning_rate: float = 5e-7
    num_train_epochs: float = 1.0
    optim: str = "rmsprop"
    warmup_steps: float = 0.1
    logging_steps: float = 1
    save_strategy: str = "no"
    report_to: Any = "tensorboard"
    logging_nan_inf_filter: bool = False  # Trainer would log an earlier mean in place of an infinite loss
    bf16: bool | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(unknown("method", self.method, METHODS))
        if self.loss_type not in LOSSES:
            raise UserError(unknown("loss_type", self.loss_type, LOSSES))
        if self.layout not in LAYOUTS:
            raise UserError(unknown("layout", self.layout, LAYOUTS))
        positive = [
            "iterations",
            "alpha",
            "lam",
            "noise_ratio",
            "length_scale",
            "max_new_tokens",
            "sampling_batch_size",
            "micro_batch_tokens",
        ]
        positive.append("learning_rate")
        if self.checkpoint_steps is not None:
            positive.append("checkpoint_steps")
        for name in positive:
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: must be positive (got {getattr(self, name)!r})")
        if self.beta < 0 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("beta and temperature must not be negative, top_p must lie in (0, 1]")
        if self.sampling_backend not in BACKENDS:
            raise UserError(unknown("sampling_backend", self.sampling_backend, BACKENDS))
        if not torch.accelerator.is_available():
            self.use_cpu = True  # TrainingArguments takes bf16 on a CPU only when told so
        if self.long_prompts not in LONG_PROMPTS:
            raise UserError(unknown("long_prompts", self.long_prompts, LONG_PROMPTS))
        if self.bf16 is None:
            self.bf16 = multiplies_bfloat16()
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """At most one: several GPUs are for several processes (`launcher`), not for Trainer's DataParallel."""
        return min(super().n_gpu, 1)

    @property
    def coefficients(self) -> Coefficients:
        own = (self.alpha, self.beta, self.lam, self.loss_type, self.length_scale, self.margin, self.noise_ratio)
        return Coefficients(*own)

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.temperature, self.top_p, self.max_new_tokens, self.sampling_batch_size)

    def computed(self) -> dict[str, Any]:
        """The fields that decide what is computed, as plain JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in OPERATIONAL}
        # Runs from before there was a choice stay what they were.
        for name, default in {"lora": None, "sampling_backend": "transformers", "sampling_dtype": None}.items():
            if fields[name] == default:
                del fields[name]
        return {
            name: value if isinstance(value, int | float | list | dict | None) else str(value)
            for name, value in fields.items()
        }

"""Every setting, declared once: presets in YAML, `--set` and Python say the same by the same names.

A preset has the sections model, data, evaluation and methods; beside them stands any field of SelfPlayConfig by its
name. `methods.<name>` takes the method's coefficients (tspin.objectives), fields of SelfPlayConfig and a `data`, which
hold for that method alone. An unknown key or a bad value raises UserError: the key's path, the value, what is allowed
there, the nearest right name.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import torch
from pydantic import BeforeValidator, Field, create_model
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from tspin.devices import multiplies_bfloat16
from tspin.errors import UserError
from tspin.names import COEFFICIENTS, SECTIONS, TAKE_MORE, preset_fields, read_preset, refusal
from tspin.objectives import METHODS, Coefficients, Method, find_method, with_sft
from tspin.options import OF_SEVERAL, is_given, refuse, try_out
from tspin.sections import Section, mapping, read
from tspin.settings import (
    Backend,
    DataSettings,
    Dtype,
    EngineSettings,
    EvaluationSettings,
    IsoDate,
    LoraSettings,
    ModelSettings,
    NonEmpty,
    NonNegative,
    Positive,
    PositiveInt,
)
from tspin.yaml_files import REPOSITORY as REPOSITORY
from tspin.yaml_files import overridden

# TrainingArguments' own that say where and how a run is executed, not what an iteration computes; ours are marked.
OPERATIONAL = {
    *("output_dir", "report_to", "run_name", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node"),
    *("local_rank", "project", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "resume_from_checkpoint", "ddp_timeout", "debug", "skip_memory_metrics"),
    "hub_token",
}


@dataclass(frozen=True)
class Decoding:
    """How responses are drawn: the fields of SelfPlayConfig. batch_size: prompts decoded together."""

    temperature: float
    top_p: float
    max_new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Rendering:
    """How conversations become text: the fields of SelfPlayConfig of these names."""

    template: str = "auto"
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    turn_end: str | None = None
    date: str | None = None


def rendering_of(training: Any) -> Rendering:
    """The Rendering of a SelfPlayConfig, or of the Settings of one."""
    return Rendering(**{entry.name: getattr(training, entry.name) for entry in dataclasses.fields(Rendering)})


def setting(default: Any, meaning: str, operational: bool = False) -> Any:
    """A field of SelfPlayConfig. operational: it says how a run is executed, not what an iteration computes."""
    return field(default=default, metadata={"help": meaning, "operational": operational})


def warmup_of(training: Any) -> dict[str, str]:
    """What tells runs with a warm-up from those of versions that began it at a rate of 0, for fingerprints."""
    return {"warmup": "from 1/w"} if training.warmup_steps else {}


def coefficients_of(training: Any) -> dict[str, float | str | list[float]]:
    """The coefficients of a SelfPlayConfig's method: those that are given, and the defaults. Raises UserError."""
    given = {name: getattr(training, name) for name in COEFFICIENTS if getattr(training, name) is not None}
    return find_method(training.method).resolve(given)


if TYPE_CHECKING:
    _WithCoefficients = TrainingArguments
else:
    _WithCoefficients = dataclasses.make_dataclass(
        "_WithCoefficients",
        [(c.name, Any, setting(None, f"{c.meaning} ({c.default}: {c.source})")) for c in COEFFICIENTS.values()],
        bases=(TrainingArguments,),
    )


@dataclass
class SelfPlayConfig(_WithCoefficients):
    """Settings of a self-play run: transformers.TrainingArguments and what self-play adds.

    The coefficients of tspin.objectives are fields too: None stands for the method's default, a list has one number per
    iteration, the last going on, and one that the method does not have is refused. Defaults are the paper's where it
    states one: RMSProp without weight decay, 10 % warm-up, 64 triplets per step. Raises UserError.
    """

    method: str = setting("tspin", "a key of tspin.objectives.METHODS")
    iterations: Annotated[int, Field(gt=0, lt=128)] = setting(5, "T; results keep it in 8 bits", operational=True)
    shared_dir: str | None = setting(None, "keeps what methods can share, y0 and the first y′; None: output_dir", True)

    template: str = setting("auto", "auto, chat, paper, none, or a text with {prompt} in it: see tspin.data.templates")
    system_prompt: str | None = setting(None, "put before conversations that have none of their own")
    chat_template_kwargs: dict[str, Any] | None = setting(
        None, "given to the chat template, such as {enable_thinking: false}"
    )
    turn_end: NonEmpty | None = setting(None, "text that ends a response; None: what the chat template writes there")
    date: IsoDate | None = setting(None, "today, to chat templates that write it; None: the day the run began")
    max_prompt_length: PositiveInt = setting(512, "tokens of a prompt")
    max_completion_length: PositiveInt = setting(256, "tokens of a labelled response, which is cut there")
    long_prompts: Literal["error", "truncate", "drop"] = setting("error", "on prompts over max_prompt_length")

    temperature: NonNegative = setting(1.0, "of y′ and y0; 0 is greedy, 1 draws from the policy as it is")
    top_p: Annotated[float, Field(gt=0, le=1)] = setting(1.0, "nucleus sampling's mass; 1 is the whole distribution")
    max_new_tokens: PositiveInt = setting(256, "a response still open then is cut there")
    sampling_batch_size: PositiveInt = setting(64, "prompts decoded together by transformers; vllm plans its own")
    sampling_backend: Backend = setting("transformers", "what draws responses")
    sampling_dtype: Dtype | None = setting(None, "of the weights while sampling; None: as the model is loaded")
    engine: EngineSettings = setting(EngineSettings(), "vLLM's GPUs", operational=True)

    proto_model: NonEmpty | None = setting(
        None,
        "a model, by model.path's names, that y0 is drawn from in place of the initial policy; β acts at once then",
    )
    history: Annotated[int, Field(ge=0, lt=128)] = setting(
        0, "earlier iterations whose y′ an iteration trains on too; SPIN's released code takes 1"
    )
    sft_weight: NonNegative = setting(
        0.0, "of −log π(y) per token, added to any loss of pairs; Iterative RPO (arXiv 2404.19733) takes 1"
    )
    learning_rate: Positive | Annotated[list[Positive], Field(min_length=1)] = setting(  # type: ignore[assignment]
        5e-7, "one, or a list with one per iteration, the last going on"
    )
    num_train_epochs: Positive = setting(1.0, "of an iteration")
    batch_size: PositiveInt = setting(64, "triplets per optimizer step, whatever the hardware")
    per_device_train_batch_size: int | None = setting(None, "follows from batch_size")  # type: ignore[assignment]
    optim: OptimizerNames = setting("rmsprop", "the optimizer")
    weight_decay: NonNegative = setting(0.0, "of all weights but biases and norms")
    warmup_steps: NonNegative = setting(0.1, "below 1, the share of the steps; from 1/w of the rate at the first")
    lr_scheduler_type: SchedulerType = setting("linear", "after the warm-up")
    max_grad_norm: Positive = setting(1.0, "gradients are clipped there")
    gradient_checkpointing: bool = setting(False, "saves memory, costs a second forward pass")
    bf16: bool | Literal["auto"] = setting("auto", "auto: where the hardware multiplies bfloat16")  # type: ignore[assignment]
    lora: LoraSettings | None = setting(None, "train low-rank adapters; None: all weights")
    layout: Literal["auto", "shared", "padded"] = setting("auto", "shared: each prompt once for all its responses")
    monitor_proto: bool = setting(False, "log y0 where it carries no gradient too; a third more work there")
    micro_batch_tokens: PositiveInt = setting(4096, "tokens per forward pass on one device; lower saves memory", True)
    keep_checkpoints: Literal["all", "last", "best", "bfloat16"] = setting(
        "all",
        "of the iterations' models; last, best (and last), bfloat16 (earlier ones cut to that): tspin.checkpoints",
        operational=True,
    )
    checkpoint_steps: PositiveInt | None = setting(None, "steps after which a training's state is kept", True)
    launcher: str | None = setting(None, "a file for `accelerate launch`: train in its processes", operational=True)
    scoring: Literal["auto", "whole", "sharded"] = setting(
        "auto", "log-probabilities by whole models, or as `launcher` cuts them; auto: where a GPU holds none", True
    )
    hosts: list[NonEmpty] | None = setting(
        None, "machines of a launch file with several, this one first, reached by ssh; None: a Slurm job's", True
    )
    diagnostics: bool = setting(True, "write tspin.diagnostics' tables after each iteration", operational=True)
    diagnostics_prompts: PositiveInt = setting(
        5000, "that these tables score, evenly spread and the same in every iteration; all where there are fewer", True
    )
    token_prompts: Annotated[int, Field(ge=0)] = setting(
        200, "of them, those whose log-probabilities are kept token by token, to look at", operational=True
    )

    best_iteration: Literal["last", "held_out_nll"] = setting(
        "last",
        "the rule, fixed before a run; held_out_nll: where −log π(y) of the trainer's eval_dataset is least",
        operational=True,
    )
    gradient_signal: bool = setting(False, "record the gradients' signal to noise; memory for one more of them", True)
    logging_steps: float = setting(1.0, "optimizer steps per row of the step log")
    logging_nan_inf_filter: bool = setting(False, "Trainer's would log an earlier mean in place of an infinite loss")
    save_strategy: SaveStrategy = setting("no", "checkpoint_steps keeps states", operational=True)
    report_to: Any = setting("tensorboard", "trackers", operational=True)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _DECLARED}
        paths = {name: str(value) for name, value in given.items() if isinstance(value, Path)}
        for name, value in complete(read(Settings, given | paths)):
            setattr(self, name, value)
        used = {"hosts": self.hosts is not None, "scoring": self.scoring != "auto"}
        for name, acts in (used | {name: is_given(self, name) for name in OF_SEVERAL}).items():
            if acts and self.launcher is None:
                raise UserError(
                    f"{name}: does nothing without a launch file: --launcher accelerate --launcher-config FILE"
                )
        if not torch.accelerator.is_available():
            self.use_cpu = True  # TrainingArguments takes bf16 on a CPU only when told so
        if self.bf16 == "auto":
            self.bf16 = multiplies_bfloat16()
        try:
            super().__post_init__()
        except (TypeError, ValueError) as error:
            raise UserError(f"SelfPlayConfig: {error}") from error
        try_out(self, self.learning_rates[0])

    @property
    def n_gpu(self) -> int:
        """At most one: several GPUs are for several processes (`launcher`), not for Trainer's DataParallel."""
        return min(super().n_gpu, 1)

    @property
    def coefficients(self) -> dict[str, float | str | list[float]]:
        """See `coefficients_of`."""
        return coefficients_of(self)

    @property
    def objective(self) -> Method:
        """The method, with −log π(y) in its loss where sft_weight is not 0."""
        return with_sft(METHODS[self.method], self.sft_weight)

    def coefficients_at(self, iteration: int) -> Coefficients:
        """Those in force at an iteration, see tspin.objectives.Method."""
        return METHODS[self.method].coefficients_at(iteration, self.coefficients, self.proto_model is None)

    @property
    def learning_rates(self) -> list[float]:
        """One per iteration, the last going on; adapters' own where those have one."""
        rate = (self.lora and self.lora.learning_rate) or self.learning_rate
        return rate if isinstance(rate, list) else [rate]

    @property
    def rendering(self) -> Rendering:
        """How conversations become text."""
        return rendering_of(self)

    @property
    def decoding(self) -> Decoding:
        """How y′ and y0 are drawn."""
        return Decoding(self.temperature, self.top_p, self.max_new_tokens, self.sampling_batch_size)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of the warm-up. It ends before the training does: a single step is one at the full rate, not at 0."""
        return min(super().get_warmup_steps(num_training_steps), num_training_steps - 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, from which an equal SelfPlayConfig can be made; tokens are masked."""
        plain: dict[str, Any] = super().to_dict()
        return {name: value.model_dump() if isinstance(value, Section) else value for name, value in plain.items()}

    def computed(self) -> dict[str, Any]:
        """What decides what an iteration computes, as JSON values: for fingerprints."""
        left_out = OPERATIONAL | COEFFICIENTS.keys()
        fields = {name: value for name, value in self.to_dict().items() if name not in left_out}
        return fields | self.coefficients | warmup_of(self)


_DECLARED = {declared.name: declared for declared in dataclasses.fields(SelfPlayConfig) if declared.init}
if taken := COEFFICIENTS.keys() & {*TrainingArguments.__dataclass_fields__, *SelfPlayConfig.__annotations__}:
    raise ValueError(f"{min(taken)}: a coefficient of a method has the name of a setting; give it another")
_HINTS = get_type_hints(SelfPlayConfig, include_extras=True) | dict.fromkeys(TAKE_MORE, Any)
_OFF = BeforeValidator(lambda value: "no" if value is False else value)  # as YAML reads a bare no
_HINTS |= {name: Annotated[_HINTS[name], _OFF] for name in ("logging_strategy", "save_strategy", "eval_strategy")}
_FIELDS: dict[str, Any] = {
    name: (_HINTS[name], [] if declared.default is dataclasses.MISSING else declared.default)
    for name, declared in _DECLARED.items()
}
# SelfPlayConfig without what an instance of it does: no folder, no device.
Settings = create_model("Settings", __base__=Section, **_FIELDS)
OURS = {name for name, declared in _DECLARED.items() if "operational" in declared.metadata} - COEFFICIENTS.keys()
OPERATIONAL |= {name for name in OURS if _DECLARED[name].metadata["operational"]}


@dataclass(frozen=True)
class RunSettings:
    """One run: one method. training: Settings, whose fields are SelfPlayConfig's."""

    method: str
    model: ModelSettings
    data: DataSettings
    evaluation: EvaluationSettings | None
    training: Any

    def tree(self) -> dict[str, Any]:
        """What decides the run's numbers besides its seed, and how many iterations there are."""
        evaluation = self.evaluation.model_dump() if self.evaluation else None
        sections = {"model": self.model.model_dump(), "data": self.data.model_dump(), "evaluation": evaluation}
        fields = {**_deciding(self.training), **coefficients_of(self.training), "iterations": self.training.iterations}
        return {"method": self.method, **sections, **fields}


@dataclass(frozen=True)
class Config:
    """An experiment: methods on one initial policy and one data set.

    training: Settings, common to all methods. methods: what is given for each.
    """

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    evaluation: EvaluationSettings | None = None
    training: Any = Settings()
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def for_method(self, name: str) -> RunSettings:
        """The settings of one method's run, what is given for it merged in. Raises UserError for an unknown one."""
        method, given = find_method(name), dict(self.methods.get(name, {}))
        known = ["data", *(c.name for c in method.coefficients), *preset_fields(), *COEFFICIENTS]
        try:
            own_data = mapping(given.pop("data", None), "data")
            data = read(DataSettings, {**self.data.model_dump(), **own_data}, "data.", refusal=refusal)
            common = self.training.model_dump(exclude_unset=True)
            training = read(Settings, {**common, **given}, known=known, refusal=refusal)
            training = complete(training.model_copy(update={"method": name}))
        except UserError as error:
            raise UserError(f"methods.{name}.{error}") from error
        return RunSettings(name, self.model, data, self.evaluation, training)

    def tree(self) -> dict[str, Any]:
        """What decides numbers, as a preset says it with its defaults written out."""
        methods: dict[str, Any] = {}
        for name, given in self.methods.items():
            run = self.for_method(name)
            fields = {key: value for key, value in _deciding(run.training).items() if key in given}
            data = {key: getattr(run.data, key) for key in given.get("data") or {}}
            methods[name] = {**coefficients_of(run.training), **fields, "data": data}
        evaluation = self.evaluation.model_dump() if self.evaluation else None
        sections = {"model": self.model.model_dump(), "data": self.data.model_dump(), "evaluation": evaluation}
        return {**sections, **_deciding(self.training), "methods": methods}


def _deciding(training: Any) -> dict[str, Any]:
    """The fields that decide what an iteration computes: ours, and Transformers' where they are not its defaults."""
    left_out = {*OPERATIONAL, *COEFFICIENTS, "method", "seed", "history", "per_device_train_batch_size"}
    theirs: dict[str, Any] = training.model_dump(exclude=OURS | left_out, exclude_defaults=True)
    return theirs | training.model_dump(include=OURS - left_out)


def complete(training: Any) -> Any:
    """Settings with what follows from others of them. Raises UserError where they do not fit together, or with us."""
    coefficients_of(training)
    refuse(training)
    size = training.batch_size
    for name, right in {"per_device_train_batch_size": (None, size), "gradient_accumulation_steps": (1,)}.items():
        if getattr(training, name) not in right:
            raise UserError(f"{name}: set batch_size instead, {size} triplets per optimizer step on any hardware")
    self_play = METHODS[training.method].self_play
    if training.sft_weight and not self_play:
        raise UserError(f"sft_weight: {training.method}'s loss is that term alone: set it in methods.<name> of others")
    # A method without self-play is one round of training.
    iterations = training.iterations if self_play else 1
    return training.model_copy(update={"per_device_train_batch_size": size, "iterations": iterations})


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """The Config of a preset of experiments/ or a YAML file, `key.path=value` overrides on top.

    Raises UserError for an unknown preset, unreadable YAML, unknown keys and bad values.
    """
    tree, source = read_preset(name_or_path)
    return build_config(tree, overrides, source)


def build_config(tree: Mapping[str, Any], overrides: Iterable[str] = (), source: str = "") -> Config:
    """The Config of a tree of plain values and `key.path=value` overrides. source: what its messages begin with."""
    fields = overridden(tree, overrides)
    model, data, evaluation, methods = (fields.pop(name, None) for name in SECTIONS)
    try:
        if evaluation is not None:
            evaluation = read(EvaluationSettings, evaluation, "evaluation.", refusal=refusal)
        config = Config(
            model=read(ModelSettings, model, "model.", refusal=refusal),
            data=read(DataSettings, data, "data.", refusal=refusal),
            evaluation=evaluation,
            training=read(Settings, fields, known=[*SECTIONS, *preset_fields()], refusal=refusal),
            methods={name: mapping(given, f"methods.{name}") for name, given in mapping(methods, "methods").items()},
        )
        complete(config.training)
        for name in config.methods:
            config.for_method(name)
    except UserError as error:
        raise UserError(f"{source}{error}") from error
    return config

"""`tspin plan`: what an experiment needs, before any GPU is booked. For memory see tspin.planning.peaks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from tspin.config import Config, RunSettings
from tspin.errors import UserError, unknown
from tspin.objectives import METHODS
from tspin.planning import peaks
from tspin.planning.architectures import Shape, adapter_parameters, find_config, shape_of

USABLE = 0.95  # of a GPU's memory: the driver, the libraries and fragments take the rest
DECODED_TOGETHER = 256  # sequences of a vLLM copy, its default
WEIGHT = {"float32": 4, "bfloat16": 2}  # bytes
Lengths = tuple[int, int, int]  # mean tokens of prompts, of y, and of y′ and y0
REMEDIES = {
    "training": "lower micro_batch_tokens, set gradient_checkpointing or lora, or take more GPUs",
    "scoring": "lower micro_batch_tokens",
    "sampling": "lower sampling_batch_size or max_new_tokens, or raise engine.tensor_parallel",
}


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. flops: dense bfloat16, per second. bandwidth: bytes per second. Vendors' public figures."""

    memory: float
    flops: float
    bandwidth: float


GPUS = {
    "h200": Gpu(141e9, 989e12, 4.80e12),
    "h100": Gpu(80e9, 989e12, 3.35e12),
    "a100": Gpu(80e9, 312e12, 2.04e12),
    "a100-40": Gpu(40e9, 312e12, 1.56e12),
    "l40s": Gpu(48e9, 362e12, 0.864e12),
    "rtx4090": Gpu(24e9, 165e12, 1.01e12),
}


@dataclass(frozen=True)
class Hardware:
    """GPUs of a kind of GPUS, and the share of their arithmetic, and of their bandwidth, that is reached."""

    gpus: int = 8
    gpu: str = "h100"
    utilisation: float = 0.4


@dataclass(frozen=True)
class Data:
    """What is known of the data beside the config: mean lengths, and rows for methods whose `labels` is empty.

    Where a mean is not known, half of the configured maximum stands for it.
    """

    prompt_tokens: int | None = None
    response_tokens: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Stage:
    """One kind of work of a method, over all its iterations. hours: on the clock."""

    method: str
    stage: str
    tokens: int
    flops: float
    hours: float


@dataclass(frozen=True)
class Plan:
    """memory: stage → parts in bytes on one GPU. disk: bytes. problem: the first thing that does not fit."""

    shape: Shape
    memory: dict[str, peaks.Parts]
    stages: list[Stage]
    disk: int
    problem: str | None


def plan(config: Config, hardware: Hardware = Hardware(), data: Data = Data()) -> Plan:
    """Memory, tokens, time and disk of a config's methods; evaluation is not in it.

    Training is sharded over all GPUs (FSDP; adapters have whole weights on each), sampling has a copy on each,
    log-probabilities one on engine.data_parallel of them.
    Raises UserError for unknown GPUs and models that cannot be planned.
    """
    if hardware.gpu not in GPUS:
        raise UserError(f"--gpu: {unknown('GPU', hardware.gpu, GPUS)}")
    model = find_config(config.model.path, config.model.revision, config.model.trust_remote_code)
    shape = shape_of(model)
    lengths = (
        data.prompt_tokens or config.training.max_prompt_length // 2,
        data.response_tokens or config.training.max_completion_length // 2,
        data.response_tokens or config.training.max_new_tokens // 2,
    )
    methods = [config.for_method(name) for name in config.methods or ["tspin"]]
    memory = _memory(methods, model, shape, lengths, hardware.gpus)
    stages = [stage for settings in methods for stage in _stages(settings, shape, lengths, hardware, data.rows)]
    disk = sum(settings.training.iterations for settings in methods) * WEIGHT[config.model.dtype] * shape.parameters
    return Plan(shape, memory, stages, disk, _problem(memory, hardware))


def _memory(
    methods: Sequence[RunSettings], model: PreTrainedConfig, shape: Shape, lengths: Lengths, gpus: int
) -> dict[str, peaks.Parts]:
    """Stage → parts in bytes on one GPU, for the method with the longest rows."""
    settings = max(methods, key=lambda settings: _row_tokens(settings, lengths))
    training, tokens, row = settings.training, settings.training.micro_batch_tokens, _row_tokens(settings, lengths)
    weight = WEIGHT[settings.model.dtype]
    precision = scored = peaks.Precision(weight, weight if training.bf16 is False else 2)
    batch = peaks.MicroBatch(
        tokens=tokens,
        row_tokens=min(row, tokens),
        response_tokens=tokens * (row - lengths[0]) // row,
        count=max(training.batch_size * row // (gpus * tokens), 1),
        padded=training.layout == "padded",
        checkpointing=training.gradient_checkpointing,
    )
    if training.lora:  # adapters are trained beside whole weights on every GPU
        adapters = adapter_parameters(model, training.lora.rank, training.lora.target_modules)
        optimizer = peaks.Optimizer(training.optim, trained=adapters)
    else:
        optimizer = peaks.Optimizer(training.optim, shards=gpus)
        if gpus > 1:  # as trainings in shards compute, see tspin.engines.launch.trains_in_bfloat16
            scored = peaks.Precision(precision.compute, precision.compute)
    drawn = 2 if settings.training.sampling_backend == "vllm" else weight
    return {
        "training": peaks.training_parts(shape, precision, batch, optimizer),
        "scoring": peaks.scoring_parts(shape, scored, batch),
        "sampling": peaks.sampling_parts(shape, drawn, _together(settings), lengths[0], lengths[2]),
    }


def _stages(settings: RunSettings, shape: Shape, lengths: Lengths, hardware: Hardware, rows: int | None) -> list[Stage]:
    """A method's work: 2 P FLOPs per token forward, 6 P forward and backward, 8 P with checkpointing.

    Decoding reads all weights and the cache for each token of a batch: the larger of that and its arithmetic counts.
    """
    labels = settings.data.labels or rows
    if labels is None:
        raise UserError(f"{settings.method} uses all rows of {settings.data.path}: say how many they are with --rows")
    method, device, gpus = METHODS[settings.method], GPUS[hardware.gpu], hardware.gpus
    speed = gpus * device.flops * hardware.utilisation
    prompt, _, response = lengths
    seen = _rounds(settings) * labels * _row_tokens(settings, lengths)

    def stage(name: str, tokens: float, per_token: int, seconds: float = 0.0, used: int = gpus) -> Stage:
        flops = tokens * per_token * shape.parameters
        hours = max(flops / (speed * used / gpus), seconds) / 3600
        return Stage(settings.method, name, round(tokens), flops, hours)

    backward = 8 if settings.training.gradient_checkpointing else 6
    stages = [stage("training", settings.training.num_train_epochs * seen, backward)]
    scored = _scored_tokens(settings, lengths, labels)
    stages.append(stage("scoring", scored, 2, used=min(settings.training.engine.data_parallel, gpus)))
    if method.self_play:
        drawn = (settings.training.iterations + (not settings.data.generated)) * labels  # y′ and, once, y0
        together = _together(settings)
        steps = drawn * response / (gpus * together)
        read = 2 * shape.parameters + together * (prompt + response) * peaks.cache_bytes(shape, 2)
        seconds = steps * read / (device.bandwidth * hardware.utilisation)
        seconds += drawn * prompt * 2 * shape.parameters / speed
        stages.append(stage("sampling", drawn * (prompt + response), 2, seconds))
    return stages


def _scored_tokens(settings: RunSettings, lengths: Lengths, labels: int) -> int:
    """Tokens of all forward passes beside training: nothing that the sampler or an earlier iteration found."""
    training, method = settings.training, METHODS[settings.method]
    prompt, labelled, response = lengths
    shown = min(labels, training.diagnostics_prompts) if training.diagnostics else 0
    tokens = shown * training.iterations * _row_tokens(settings, lengths)  # after each training
    if method.uses_reference:  # y′ in each iteration; y in the first, and where not all of the earlier ones are known
        anew = method.reference == "previous" and shown < labels  # y too then, and the y′ of a history
        rounds = _rounds(settings) if anew else training.iterations
        tokens += labels * (rounds * (prompt + response) + (training.iterations if anew else 1) * labelled)
    if method.reference != "previous" and shown:  # under the policy: y in the first iteration, y′ in another arithmetic
        own_type = training.bf16 is False and training.sampling_dtype in (None, settings.model.dtype)
        apart = training.sampling_backend == "vllm" or not own_type
        drawn = training.iterations * (prompt + response) if method.self_play and apart else 0
        tokens += shown * (prompt + labelled + drawn)
    return tokens


def _rounds(settings: RunSettings) -> int:
    """How often all iterations see the labels: each its own pairs, and with a history those of iterations before it."""
    return sum(1 + min(t, settings.data.history) for t in range(settings.training.iterations))


def _row_tokens(settings: RunSettings, lengths: Lengths) -> int:
    """Tokens of one prompt's row: the prompt once, y, and in self-play y′ and y0."""
    prompt, labelled, response = lengths
    return prompt + labelled + (2 * response if METHODS[settings.method].self_play else 0)


def _together(settings: RunSettings) -> int:
    """Sequences that one copy of the model decodes together."""
    training = settings.training
    return DECODED_TOGETHER if training.sampling_backend == "vllm" else training.sampling_batch_size


def _problem(memory: Mapping[str, peaks.Parts], hardware: Hardware) -> str | None:
    """The first stage that needs more than a GPU has, and what to change; None where all fit."""
    usable = USABLE * GPUS[hardware.gpu].memory
    for stage, parts in memory.items():
        total, largest = sum(parts.values()), max(parts, key=lambda part: parts[part])
        if total > usable:
            return (
                f"{stage} needs {total / 2**30:.1f} GiB on each of {hardware.gpus} {hardware.gpu}, which has "
                f"{usable / 2**30:.1f} to give; most of it is {largest} ({parts[largest] / 2**30:.1f} GiB): "
                f"{REMEDIES[stage]}"
            )
    return None


def measured_error(folder: Path = Path("results/benchmarks/plan")) -> str | None:
    """One line on how far predictions of memory were from measured peaks (`make plan-check`); None without them."""
    import pandas as pd

    path = folder / "memory.csv"
    if not path.is_file():
        return None
    errors = pd.read_csv(path)["error_percent"]
    return f"{len(errors)} measured peaks: predictions were {errors.min():+.0f} % to {errors.max():+.0f} % off ({path})"


def as_dict(planned: Plan) -> dict[str, Any]:
    """A plan as plain JSON values: bytes, tokens, FLOPs, hours."""
    return {
        "parameters": planned.shape.parameters,
        "memory_bytes_per_gpu": planned.memory,
        "stages": [vars(stage) for stage in planned.stages],
        "disk_bytes": planned.disk,
        "does_not_fit": planned.problem,
    }

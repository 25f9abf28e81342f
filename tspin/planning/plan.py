"""`tspin plan`: what an experiment needs, before any GPU is booked. For memory see tspin.planning.peaks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tspin.config import Config, RunSettings, unknown
from tspin.errors import UserError
from tspin.objectives import METHODS
from tspin.planning.architectures import Shape, adapter_parameters, find_config, shape_of
from tspin.planning.peaks import (
    MicroBatch,
    Parts,
    Precision,
    cache_bytes,
    sampling_parts,
    scoring_parts,
    training_parts,
)

USABLE = 0.95  # of a GPU's memory: the driver, the libraries and fragments take the rest
DECODED_TOGETHER = 256  # sequences of a vLLM copy, its own default


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. flops: dense bfloat16, a second. bandwidth: bytes a second. Vendors' public figures."""

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
class Stage:
    """One kind of work of a method, over all its iterations. hours: on the clock."""

    method: str
    stage: str
    tokens: int
    flops: float
    hours: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found. memory: stage → parts in bytes on one GPU; problem: the first thing that does not fit."""

    shape: Shape
    memory: dict[str, Parts]
    stages: list[Stage]
    disk: int
    problem: str | None


def plan(
    config: Config,
    *,
    gpus: int = 8,
    gpu: str = "h100",
    utilisation: float = 0.4,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    rows: int | None = None,
) -> Plan:
    """Memory, tokens, time and disk of a config's methods.

    gpus, gpu: how many of a key of GPUS; training is sharded over all of them (FSDP; adapters have whole weights on
    each), sampling has a copy on each, log-probabilities one on engine.data_parallel of them.
    utilisation: the share of the GPU's arithmetic, and of its bandwidth, that is reached. prompt_tokens,
    response_tokens: means, half of the configured maxima when left out. rows: of the data, where a method's `labels` is
    empty. Evaluation is not in it. Raises UserError for unknown GPUs and models that cannot be planned.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: {unknown('GPU', gpu, GPUS)}")
    device, model = GPUS[gpu], find_config(config.model.path, config.model.revision, config.model.trust_remote_code)
    shape = shape_of(model)
    settings = {name: config.for_method(name) for name in config.methods or ["tspin"]}
    heaviest = max(settings.values(), key=lambda own: METHODS[own.method].self_play)
    training = heaviest.training
    prompt = prompt_tokens or training.max_prompt_length // 2
    labelled = response_tokens or training.max_completion_length // 2
    synthetic = response_tokens or training.max_new_tokens // 2
    weight = torch.empty(0, dtype=getattr(torch, config.model.dtype)).element_size()
    compute = weight if training.bf16 is False else 2
    lora = training.lora
    trained = None if lora is None else adapter_parameters(model, lora.rank, lora.target_modules)
    tokens = training.micro_batch_tokens
    row = _row_tokens(heaviest, prompt, labelled, synthetic)
    batch = MicroBatch(
        tokens=tokens,
        row_tokens=min(row, tokens),
        response_tokens=tokens * (row - prompt) // row,
        count=max(training.batch_size * row // (gpus * tokens), 1),
        dense_mask=config.model.attention != "flex_attention",
        all_logits=training.layout == "padded",
    )
    together = DECODED_TOGETHER if training.sampling_backend == "vllm" else training.sampling_batch_size
    precision = Precision(weight, compute)
    # As trainings in shards compute, see tspin.engines.launch.trains_in_bfloat16.
    scored = Precision(compute, compute) if gpus > 1 and lora is None else precision
    memory = {
        "training": training_parts(
            shape,
            precision,
            batch,
            optimizer=training.optim,
            checkpointing=training.gradient_checkpointing,
            gpus=gpus if lora is None else 1,  # adapters are trained beside whole weights on every GPU
            trained=trained,
        ),
        "scoring": scoring_parts(shape, scored, batch),
        "sampling": sampling_parts(
            shape, 2 if training.sampling_backend == "vllm" else weight, together, prompt, synthetic
        ),
    }
    stages = [
        stage
        for name, own in settings.items()
        for stage in _stages(name, own, shape, device, gpus, utilisation, (prompt, labelled, synthetic), rows, together)
    ]
    checkpoints = sum(own.training.iterations for own in settings.values())
    return Plan(shape, memory, stages, checkpoints * weight * shape.parameters, _problem(memory, device, gpu, gpus))


def _stages(
    name: str,
    own: RunSettings,
    shape: Shape,
    device: Gpu,
    gpus: int,
    utilisation: float,
    lengths: tuple[int, int, int],
    rows: int | None,
    together: int,
) -> list[Stage]:
    """A method's work. lengths: of prompt, y, and y′ or y0.

    FLOPs: 2 P a token forward, 6 P forward and backward, 8 P with checkpointing.

    Decoding reads all weights and the cache for each token of a batch: the larger of that and its arithmetic counts.
    """
    labels = own.data.labels or rows
    if labels is None:
        raise UserError(f"{name} uses all rows of {own.data.path}: say how many they are with --rows")
    method, parameters = METHODS[own.method], shape.parameters
    prompt, _, response = lengths
    per_prompt = _row_tokens(own, *lengths)
    speed = gpus * device.flops * utilisation

    def stage(what: str, tokens: float, per_token: int, seconds: float = 0.0, used: int = gpus) -> Stage:
        flops = tokens * per_token * parameters
        return Stage(name, what, round(tokens), flops, max(flops / (speed * used / gpus), seconds) / 3600)

    backward = 8 if own.training.gradient_checkpointing else 6
    found = [stage("training", own.training.iterations * own.training.num_train_epochs * labels * per_prompt, backward)]
    passes = 2 + (method.reference == "initial")  # diagnostics, before and after; "previous" is the pass before
    scoring = own.training.iterations * passes * labels * per_prompt
    found.append(stage("scoring", scoring, 2, used=min(own.training.engine.data_parallel, gpus)))
    if method.self_play:
        drawn = (own.training.iterations + 1) * labels  # y′ of every iteration, and y0
        steps = drawn * response / (gpus * together)
        read = 2 * parameters + together * (prompt + response) * cache_bytes(shape, 2)
        seconds = steps * read / (device.bandwidth * utilisation) + drawn * prompt * 2 * parameters / speed
        found.append(stage("sampling", drawn * (prompt + response), 2, seconds))
    return found


def _row_tokens(own: RunSettings, prompt: int, labelled: int, synthetic: int) -> int:
    """Tokens of one prompt's row: the prompt once, y, and in self-play y′ and y0."""
    return prompt + labelled + (2 * synthetic if METHODS[own.method].self_play else 0)


def _problem(memory: dict[str, Parts], device: Gpu, gpu: str, gpus: int) -> str | None:
    remedies = {
        "training": "lower micro_batch_tokens, set gradient_checkpointing or lora, or take more GPUs",
        "scoring": "lower micro_batch_tokens",
        "sampling": "lower sampling_batch_size or max_new_tokens, or raise engine.tensor_parallel",
    }
    for stage, parts in memory.items():
        total, largest = sum(parts.values()), max(parts, key=lambda part: parts[part])
        if total > USABLE * device.memory:
            return (
                f"{stage} needs {total / 2**30:.1f} GiB on each of {gpus} {gpu}, which has "
                f"{USABLE * device.memory / 2**30:.1f} to give; most of it is {largest} "
                f"({parts[largest] / 2**30:.1f}): {remedies[stage]}"
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


def as_dict(found: Plan) -> dict[str, Any]:
    """A plan as plain JSON values: bytes, tokens, FLOPs, hours."""
    return {
        "parameters": found.shape.parameters,
        "memory_bytes_per_gpu": found.memory,
        "stages": [vars(stage) for stage in found.stages],
        "disk_bytes": found.disk,
        "does_not_fit": found.problem,
    }

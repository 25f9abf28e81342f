"""`tspin plan`: what an experiment needs, before any GPU is booked.

Memory: tspin.planning.peaks. Tokens and hours: work. What machines are taken for: hardware. What would fit: fitting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tspin.config import Config
from tspin.objectives import METHODS
from tspin.planning import peaks
from tspin.planning.architectures import Architecture, Shape
from tspin.planning.hardware import Hardware
from tspin.planning.work import (
    PASSED_TOGETHER,
    WEIGHT,
    Lengths,
    Stage,
    Work,
    base_evaluation,
    labels_of,
    scoring_passes,
    stages,
    together,
)


@dataclass(frozen=True)
class Data:
    """What is known of the data beside the config: mean lengths, and rows for methods whose `labels` is empty.

    Where a mean is not known, half of the configured maximum stands for it.
    """

    prompt_tokens: int | None = None
    response_tokens: int | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Plan:
    """memory: stage → parts in bytes on one GPU. disk: bytes. problem: the first thing that does not fit."""

    shape: Shape
    hardware: Hardware
    memory: dict[str, peaks.Parts]
    stages: list[Stage]
    disk: int
    problem: str | None

    @property
    def hours(self) -> float:
        """On the clock, of all stages one after the other."""
        return sum(stage.hours for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs from start to end, whether a stage uses all of them or not."""
        return self.hours * self.hardware.all_gpus


def plan(config: Config, hardware: Hardware, data: Data = Data()) -> Plan:
    """Memory, tokens, time and disk of a config's methods, one seed.

    Training is sharded over all GPUs (FSDP; adapters have whole weights on each), log-probabilities have a copy on
    engine.data_parallel of one machine's, vLLM one on engine.tensor_parallel of each.
    Raises UserError for models that cannot be planned, and for rows that have to be said.
    """
    works = works_of(config, Architecture(config.model), hardware, data)
    memory = memory_of(works)
    drawn: set[str] = set()
    found = base_evaluation(works[0])
    for work in works:
        key = _drawing(work)
        found += stages(work, first=key not in drawn)
        drawn |= {key} if METHODS[work.settings.method].self_play else set()
    stay, beside = zip(*(work.disk for work in works), strict=True)
    disk = sum(stay) + max(beside)
    return Plan(works[0].shape, hardware, memory, found, disk, problem_of(memory, hardware))


def works_of(config: Config, model: Architecture, hardware: Hardware, data: Data) -> list[Work]:
    """The work of each of a config's methods; of T-SPIN where it names none."""
    works = []
    lengths = Lengths(
        data.prompt_tokens or config.training.max_prompt_length // 2,
        data.response_tokens or config.training.max_completion_length // 2,
        data.response_tokens or config.training.max_new_tokens // 2,
    )
    for name in config.methods or ["tspin"]:
        settings = config.for_method(name)
        labels, adapters = labels_of(settings, data.rows), model.adapters(settings.training.lora)
        works.append(Work(settings, model.shape, lengths, hardware, labels, adapters))
    return works


def _drawing(work: Work) -> str:
    """What y0 and the first y′ follow from: methods that agree in it share them."""
    fields = work.training.model_dump(include={"template", "temperature", "top_p", "max_new_tokens", "proto_model"})
    return f"{work.settings.data.model_dump()} {fields}"


def memory_of(works: Sequence[Work]) -> dict[str, peaks.Parts]:
    """Stage → parts in bytes on one GPU, for the method with the longest rows; stages that have work."""
    work = max(works, key=lambda work: work.longest_row)
    training, shape = work.training, work.shape
    precision = peaks.Precision(WEIGHT[work.settings.model.dtype], work.compute, work.matrix)
    scored = peaks.Precision(work.compute, work.compute) if work.sharded else precision
    batch = _micro_batch(work)
    if training.lora:
        optimizer = peaks.Optimizer(training.optim, trained=work.adapters)
    else:
        optimizer = peaks.Optimizer(training.optim, shards=work.hardware.all_gpus)
    memory = {"training": peaks.training_parts(shape, precision, batch, optimizer)}
    if any(map(scoring_passes, works)):
        memory["scoring"] = peaks.scoring_parts(shape, scored, batch)
    if any(METHODS[each.settings.method].self_play for each in works):
        memory["sampling"] = _sampling_parts(work)
    return memory


def _sampling_parts(work: Work) -> peaks.Parts:
    """vLLM decodes fewer sequences at once where its cache would be full; Transformers as many as it is told.

    Transformers draws the longest together, so that they are taken to be as long as can be.
    """
    training, lengths, sequences = work.training, work.lengths, together(work.training)
    weight = WEIGHT[training.sampling_dtype or work.settings.model.dtype]
    precision = peaks.Precision(weight, weight, work.matrix)
    if training.sampling_backend != "vllm":
        longest = (training.max_prompt_length, training.max_new_tokens)
        return peaks.sampling_parts(work.shape, precision, sequences, *longest)
    sizes = (lengths.prompt, lengths.drawn)
    split = min(training.engine.tensor_parallel, work.hardware.gpus)
    while True:
        parts = peaks.sampling_parts(work.shape, precision, sequences, *sizes, split, PASSED_TOGETHER)
        if sequences == 1 or total(parts) <= work.hardware.usable:
            return parts
        sequences //= 2


def _micro_batch(work: Work) -> peaks.MicroBatch:
    roles = max((work.roles(t) for t in range(work.training.iterations)), key=work.row)
    responses, row = sum(map(work.lengths.of, roles)), work.longest_row
    tokens = max(work.training.micro_batch_tokens, work.fullest_row)
    padded = work.training.layout == "padded"
    return peaks.MicroBatch(
        tokens=tokens,
        row_tokens=work.lengths.prompt + max(map(work.lengths.of, roles)) if padded else row,
        response_tokens=tokens * responses // row,
        count=work.micro_batches(work.fullest_row),
        padded=padded,
        checkpointing=work.training.gradient_checkpointing,
    )


def total(parts: peaks.Parts) -> int:
    """Bytes of all parts."""
    return sum(parts.values())


def problem_of(memory: dict[str, peaks.Parts], hardware: Hardware) -> str | None:
    """The first stage that needs more than a GPU has, in words; None where all fit."""
    for stage, parts in memory.items():
        largest = max(parts, key=lambda part: parts[part])
        if total(parts) > hardware.usable:
            return (
                f"{stage} needs {total(parts) / 2**30:.1f} GiB on each of {hardware.all_gpus} {hardware.gpu}, which "
                f"has {hardware.usable / 2**30:.1f} to give; most of it is {largest} ({parts[largest] / 2**30:.1f} GiB)"
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
        "hours": planned.hours,
        "gpu_hours": planned.gpu_hours,
        "disk_bytes": planned.disk,
        "does_not_fit": planned.problem,
    }

"""What would fit: the largest useful micro-batch, and the first change of settings or machines that makes a config fit.

Each is found by planning the memory again, as often as there are candidates.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tspin.config import Config, LoraSettings
from tspin.planning.architectures import Architecture
from tspin.planning.hardware import Hardware
from tspin.planning.peaks import Parts
from tspin.planning.plan import Data, memory_of, total, works_of

MOST_GPUS = 1024
RANK = 16  # of adapters, LoraSettings' default


@dataclass(frozen=True)
class Setup:
    """A config on machines, and what to type for the changes that led to it."""

    config: Config
    hardware: Hardware
    typed: tuple[str, ...] = ()

    def with_settings(self, typed: str, **fields: Any) -> "Setup":
        """With these fields of SelfPlayConfig."""
        training = self.config.training.model_copy(update=fields)
        return Setup(replace(self.config, training=training), self.hardware, (*self.typed, f"--set {typed}"))

    def with_model(self, typed: str, **fields: Any) -> "Setup":
        """With these fields of ModelSettings."""
        model = self.config.model.model_copy(update=fields)
        return Setup(replace(self.config, model=model), self.hardware, (*self.typed, f"--set {typed}"))

    def with_tokens(self, tokens: int) -> "Setup":
        """With micro-batches of so many tokens."""
        return self.with_settings(f"micro_batch_tokens={tokens}", micro_batch_tokens=tokens)


@dataclass(frozen=True)
class Fitting:
    """A model and data that setups are planned with."""

    model: Architecture
    data: Data

    @classmethod
    def of(cls, config: Config, data: Data) -> "Fitting":
        """Raises UserError as tspin.planning.plan.plan does."""
        return cls(Architecture(config.model), data)

    def memory(self, setup: Setup) -> Mapping[str, Parts]:
        """Stage → parts, see tspin.planning.plan.memory_of."""
        return memory_of(works_of(setup.config, self.model, setup.hardware, self.data))

    def fits(self, setup: Setup, stage: str) -> bool:
        """Whether a stage does; one without work does."""
        return total(self.memory(setup).get(stage, {})) <= setup.hardware.usable

    def micro_batches(self, setup: Setup) -> list[int]:
        """The powers of two that micro_batch_tokens can be: from a GPU's part of a step, first, to one prompt's."""
        works = works_of(setup.config, self.model, setup.hardware, self.data)
        row = max(work.fullest_row for work in works)
        step = max(work.training.batch_size * work.longest_row for work in works) / setup.hardware.all_gpus
        sizes = [2**power for power in range(6, 31)]
        useful = [size for size in sizes if row <= size < 2 * max(step, row)]
        return sorted(useful, reverse=True)

    def largest(self, setup: Setup) -> Setup | None:
        """The setup with the largest micro-batch that fits in training and scoring; None where none does."""
        candidates = map(setup.with_tokens, self.micro_batches(setup))
        return next((each for each in candidates if self.fits(each, "training") and self.fits(each, "scoring")), None)

    def remedied(self, setup: Setup) -> Setup | None:
        """The setup with the first changes after which every stage fits; None where nothing here helps."""
        for stage in self.memory(setup):
            if not self.fits(setup, stage):
                candidates = CANDIDATES[stage](self, setup)
                setup = next((each for each in candidates if self.fits(each, stage)), None)  # type: ignore[assignment]
                if setup is None:
                    return None
        return setup

    def _smaller(self, setup: Setup) -> Iterator[Setup]:
        now = setup.config.training.micro_batch_tokens
        return (setup.with_tokens(tokens) for tokens in self.micro_batches(setup) if tokens < now)

    def _trainings(self, setup: Setup) -> Iterator[Setup]:
        """Smaller micro-batches, then recomputed activations, adapters, more GPUs, each with smaller ones too.

        Adapters first on the weights as they are, then on weights in bfloat16.
        """
        yield from self._smaller(setup)
        changed = setup
        if not setup.config.training.gradient_checkpointing:
            changed = setup.with_settings("gradient_checkpointing=true", gradient_checkpointing=True)
            yield changed
            yield from self._smaller(changed)
        adapted = changed
        if not setup.config.training.lora:
            adapted = changed.with_settings(f"lora='{{rank: {RANK}}}'", lora=LoraSettings(rank=RANK))
            yield adapted
            yield from self._smaller(adapted)
        if setup.config.model.dtype == "float32":
            halved = adapted.with_model("model.dtype=bfloat16", dtype="bfloat16")
            yield halved
            yield from self._smaller(halved)
        if not setup.config.training.lora:
            yield from _more_gpus(changed)

    def _scorings(self, setup: Setup) -> Iterator[Setup]:
        yield from self._smaller(setup)
        yield setup.with_settings("diagnostics=false", diagnostics=False)  # enough for methods without a reference

    def _samplings(self, setup: Setup) -> Iterator[Setup]:
        """vLLM's copies on more GPUs each; batches of fewer prompts."""
        training = setup.config.training
        if training.sampling_backend == "vllm":
            for split in (2, 4, 8):
                if training.engine.tensor_parallel < split <= setup.hardware.gpus:
                    copies = max(setup.hardware.gpus // split, 1)
                    engine = training.engine.model_copy(update={"tensor_parallel": split, "data_parallel": copies})
                    typed = f"engine.tensor_parallel={split} --set engine.data_parallel={copies}"
                    yield setup.with_settings(typed, engine=engine)
            return
        size = training.sampling_batch_size // 2
        while size:
            yield setup.with_settings(f"sampling_batch_size={size}", sampling_batch_size=size)
            size //= 2


def _more_gpus(setup: Setup) -> Iterator[Setup]:
    """Twice as many again and again: up to eight in a machine, then machines."""
    hardware = setup.hardware
    while hardware.all_gpus < MOST_GPUS:
        if hardware.nodes == 1 and hardware.gpus < 8:
            hardware = replace(hardware, gpus=min(2 * hardware.gpus, 8))
        else:
            hardware = replace(hardware, nodes=2 * hardware.nodes)
        typed = f"--gpus {hardware.gpus}" + f" --nodes {hardware.nodes}" * (hardware.nodes > 1)
        yield Setup(setup.config, hardware, (*setup.typed, typed))


CANDIDATES: dict[str, Callable[[Fitting, Setup], Iterator[Setup]]] = {
    "training": Fitting._trainings,
    "scoring": Fitting._scorings,
    "sampling": Fitting._samplings,
}


def advice(config: Config, hardware: Hardware, data: Data) -> str:
    """One line: the largest micro-batch that fits, or what makes the config fit, each with what to type."""
    fitting, setup = Fitting.of(config, data), Setup(config, hardware)
    if all(fitting.fits(setup, stage) for stage in fitting.memory(setup)):
        best = fitting.largest(setup)
        if best is None:
            return "No power of two is a useful micro-batch here: one prompt fills it."
        used = total(fitting.memory(best)["training"]) / 2**30
        return (
            f"Largest micro-batch that fits and is of use: {' '.join(best.typed)} "
            f"({used:.1f} of {hardware.usable / 2**30:.1f} GiB in training)"
        )
    better = fitting.remedied(setup)
    if better is None:
        return "No micro-batch, checkpointing, adapters or number of GPUs makes it fit: take GPUs with more memory"
    return f"It fits with {' '.join(better.typed)}"

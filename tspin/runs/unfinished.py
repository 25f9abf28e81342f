"""A training that was stopped: the states that it keeps before its end, and goes on from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

from tspin.runs.stages import DamagedStage, check_stage, remove_stage, run_stage, stage_record


@dataclass(frozen=True)
class State:
    """What a training goes on from. step: optimizer steps done, 0 where nothing is kept. checkpoint: Trainer's folder.

    seconds: trained until then. facts: what else was kept with it.
    """

    step: int = 0
    checkpoint: Path | None = None
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unfinished:
    """States of one training, `folder`/step-<n>, each a stage made from `inputs`."""

    folder: Path
    inputs: Any

    def steps(self) -> list[int]:
        """The optimizer steps that states were written after, newest first, whole or not."""
        states = (path for path in self.folder.glob("step-*") if path.suffix == "")
        return sorted((int(path.name.removeprefix("step-")) for path in states), reverse=True)

    def newest(self) -> State:
        """The newest whole state."""
        for step in self.steps():
            output = self.folder / f"step-{step}"
            record = stage_record(output, self.inputs)
            try:
                check_stage(output)
            except DamagedStage:
                continue
            if record is not None:
                facts = dict(record["facts"])
                return State(step, output / f"checkpoint-{step}", facts.pop("training_seconds"), facts)
        return State()

    def keep(
        self, step: int, seconds: float, write: Callable[[Path], None], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Write a state by `write(folder)`, and then remove the older ones."""

        def produce(target: Path) -> dict[str, Any]:
            write(target)
            return {**(facts or {}), "training_seconds": seconds}

        older = self.steps()
        remove_stage(self.folder / f"step-{step}")
        run_stage(self.folder / f"step-{step}", self.inputs, produce)
        for other in older:
            if other != step:
                remove_stage(self.folder / f"step-{other}")

    def forget(self) -> None:
        """Remove all states: the training has ended."""
        rmtree(self.folder, ignore_errors=True)

"""A training that was stopped: the states that it keeps before its end, and goes on from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from tspin.runs.stages import DamagedStage, check_stage, remove_stage, run_stage, stage_record


@dataclass(frozen=True)
class Unfinished:
    """States of one training, `folder`/step-<n>, each a stage made from `inputs`."""

    folder: Path
    inputs: Any

    def steps(self) -> list[int]:
        """The optimizer steps that states were written after, newest first, whole or not."""
        states = (path for path in self.folder.glob("step-*") if path.suffix == "")
        return sorted((int(path.name.removeprefix("step-")) for path in states), reverse=True)

    def newest(self) -> tuple[int, Path | None, float]:
        """(step, Trainer's checkpoint, seconds trained until then) of the newest whole state, or (0, None, 0.0)."""
        for step in self.steps():
            output = self.folder / f"step-{step}"
            record = stage_record(output, self.inputs)
            try:
                check_stage(output)
            except DamagedStage:
                continue
            if record is not None:
                return step, output / f"checkpoint-{step}", record["facts"]["training_seconds"]
        return 0, None, 0.0

    def keep(self, step: int, seconds: float, write: Callable[[Path], None]) -> None:
        """Write a state by `write(folder)`, and then remove the older ones."""

        def produce(target: Path) -> dict[str, float]:
            write(target)
            return {"training_seconds": seconds}

        older = self.steps()
        remove_stage(self.folder / f"step-{step}")
        run_stage(self.folder / f"step-{step}", self.inputs, produce)
        for other in older:
            if other != step:
                remove_stage(self.folder / f"step-{other}")

    def forget(self) -> None:
        """Remove all states: the training has ended."""
        rmtree(self.folder, ignore_errors=True)

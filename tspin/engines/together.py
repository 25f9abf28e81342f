"""Processes that train together keep one state: all write into its folder, the first one makes it whole."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from tspin.runs.unfinished import State, Unfinished


@dataclass(frozen=True)
class Together(Unfinished):
    """`Unfinished` of several processes, each of which calls everything, in the same order as the others.

    first: whether this is the one that reads and writes the folder for all.
    """

    first: bool = True

    def steps(self) -> list[int]:
        """What the first process sees."""
        found: list[int] = told(super().steps() if self.first else None)
        return found

    def newest(self) -> State:
        """What the first process finds whole."""
        # Not by `steps`, which the others would have to call as well.
        alone = Unfinished(self.folder, self.inputs)
        found: State = told(alone.newest() if self.first else None)
        return found

    def keep(
        self, step: int, seconds: float, write: Callable[[Path], None], facts: Mapping[str, Any] | None = None
    ) -> None:
        """All write into the folder of the first one, which seals it once all have. Nobody goes on before that."""
        alone = Unfinished(self.folder, self.inputs)

        def write_with_others(target: Path) -> None:
            told(target)
            write(target)
            torch.distributed.barrier()

        if self.first:
            alone.keep(step, seconds, write_with_others, facts)
        else:
            write(told(None))
            torch.distributed.barrier()
        torch.distributed.barrier()


def told(what: Any) -> Any:
    """`what` of the first process, in all."""
    return broadcast_object_list([what])[0]

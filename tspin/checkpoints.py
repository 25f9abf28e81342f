"""Which checkpoints a run keeps (`keep_checkpoints`): at a hundred bytes a parameter, a few runs fill a disk.

An iteration's checkpoint is given up when the next iteration is finished. By then all that reads it is: its
diagnostics and evaluation, which end before the loop goes on, and of the next iteration y′, the reference and the
training. What is given up stays a finished stage (tspin.runs.stages.give_up): a run goes past it, and who would read it
is told. Adapters, step logs and tables stay.

The best is that of the run's own rule, `best_iteration`, which is fixed before it: no checkpoint is chosen by the
benchmarks that it is evaluated on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tspin.models import load_model
from tspin.runs.stages import check_stage, give_up, given_up, run_stage
from tspin.states import IterationResult

ARCHIVE = "model-bfloat16"  # the folder, beside where the checkpoint was


def settle(
    results: Sequence[IterationResult],
    best: int,
    keep: str,
    loading: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Give up checkpoints of iterations before the last of `results`, as `keep` says.

    best: the number of the best one. keep: see SelfPlayConfig. loading: of their models. Raises DamagedStage where a
    checkpoint to copy is not what was written.
    """
    if keep == "all":
        return
    for result in results[:-1]:
        checkpoint = result.model_path
        if keep == "best" and result.iteration == best:
            continue
        if keep == "bfloat16" and given_up(checkpoint) is None:
            _archive(result, loading, tokenizer)
        copy = f", a copy in bfloat16 is {checkpoint.with_name(ARCHIVE)}" if keep == "bfloat16" else ""
        adapter = f", its adapter is {result.adapter.folder}" if result.adapter else ""
        give_up(checkpoint, f"keep_checkpoints={keep}{copy}{adapter}")


def _archive(result: IterationResult, loading: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    def produce(target: Path) -> None:
        check_stage(result.model_path)
        model = load_model(str(result.model_path), {**loading, "dtype": torch.bfloat16, "quantize": None})
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    run_stage(result.model_path.with_name(ARCHIVE), {"policy": result.fingerprint}, produce, check=False)

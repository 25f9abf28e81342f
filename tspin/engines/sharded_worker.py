"""One of the processes that score a model in shards: `accelerate launch … -m tspin.engines.sharded_worker FOLDER`.

Each has a share of the triplets. A sharded model computes only when all call it at once, so that whoever is done goes
on calling it, for nothing, until all are.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from tspin.config import SelfPlayConfig
from tspin.devices import out_of_memory, without_denormals
from tspin.engines.adapters import load_policy
from tspin.engines.here import collator_of
from tspin.engines.launch import LOGPS, TOKENIZER, TRIPLETS
from tspin.engines.launched import in_process, shard_on_cpu
from tspin.engines.workers import read_job
from tspin.errors import UserError
from tspin.models import load_tokenizer, policy_of
from tspin.trainer import OutOfMemory
from tspin.triplets import compute_logps, dealt, load_triplets, logps_of, token_logps_of, tokens_of


@in_process
@without_denormals()
def main(folder: Path) -> None:
    job = read_job(folder)
    args = SelfPlayConfig(**job["arguments"])
    shard_on_cpu()
    loading = {**job["loading"], "dtype": getattr(torch, job["loading"]["dtype"])}
    model, tokenizer = load_policy(policy_of(job["policy"]), loading), load_tokenizer(str(folder / TOKENIZER))
    triplets = load_triplets(folder / TRIPLETS)
    collator = collator_of(model, triplets, tokenizer, args)
    accelerator = Accelerator()
    if args.bf16:  # as tspin.trainer has it: what a model returns stays float32
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    # Accelerate cuts no model without an optimizer; this one has no state and takes no step.
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    share = dealt(list(map(tokens_of, triplets)), accelerator.num_processes)[accelerator.process_index]
    # One without a share gets a triplet all the same: it needs something to call the model with.
    together = InStep(token_logps_of if job["by_token"] else logps_of, accelerator.device)
    logps = compute_logps(model, triplets.select(share or [0]), collator, False, job["of"], together)
    together.until_all_are_done(model)
    if share:
        target = folder / LOGPS.replace("*", str(accelerator.process_index))
        pd.DataFrame({"place": share, **logps}).to_parquet(target, index=False)


class InStep:
    """`of`, each call of which is one of all processes."""

    def __init__(self, of: Any, device: torch.device):
        self.of = of
        self.device = device
        self.last: tuple[Mapping[str, Any], Sequence[str]] | None = None

    def __call__(self, model: torch.nn.Module, batch: Mapping[str, Any], roles: Sequence[str]) -> Mapping[str, Any]:
        self._any(True)
        self.last = batch, roles
        try:
            found: Mapping[str, Tensor | list[list[float]]] = self.of(model, batch, roles)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch["prompt_ids"]) == 1:
                raise UserError("out of memory with a single prompt: lower maximum lengths") from error
            raise OutOfMemory(0, batch["tokens"] // 2) from error  # the others are in the middle of this pass
        return found

    def until_all_are_done(self, model: torch.nn.Module) -> None:
        """Call the model for nothing as long as others need it."""
        assert self.last is not None
        with torch.no_grad():
            while self._any(False):
                self.of(model, *self.last)

    def _any(self, mine: bool) -> bool:
        at_work = torch.tensor(int(mine), device=self.device)
        torch.distributed.all_reduce(at_work)
        return bool(at_work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Log-probabilities of triplets' responses under a model: of a micro-batch, and of a whole data set."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tspin.devices import out_of_memory
from tspin.logprobs import sequence_logps, shared_prefix_logps
from tspin.triplets import Triplet, TripletCollator

REFERENCE_WINDOW = 256  # triplets planned into micro-batches together


def logps_of(model: torch.nn.Module, batch: Mapping[str, Any], roles: Sequence[str]) -> dict[str, Tensor]:
    """Sequence log-probabilities of a micro-batch, role → float32 (batch,)."""
    sequences = batch["sequences"]
    logps = shared_prefix_logps if "branches" in sequences else sequence_logps
    return dict(zip(roles, logps(model, **sequences).chunk(len(roles)), strict=True))


@torch.no_grad()
def compute_logps(
    model: PreTrainedModel,
    triplets: Sequence[Triplet],
    collator: TripletCollator,
    autocast: bool,
    description: str = "log-probabilities",
) -> dict[str, list[float]]:
    """log π of every response under the model as it is: role → nats, in the triplets' order."""
    logps = {role: [0.0] * len(triplets) for role in collator.roles}
    # Longest first across the whole data: micro-batches of like lengths.
    order = sorted(range(len(triplets)), key=lambda i: -len(triplets[i].prompt_ids))
    model.eval()
    with tqdm(total=len(order), desc=description, unit="prompt") as bar:
        for start in range(0, len(order), REFERENCE_WINDOW):
            window = order[start : start + REFERENCE_WINDOW]
            chosen = [triplets[i] for i in window]
            pending = collator(chosen)["micro_batches"]
            while pending:
                micro_batch = pending[0]
                try:
                    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                        values = logps_of(model, _to(micro_batch, model.device), collator.roles)
                    finer = None
                except (RuntimeError, MemoryError) as error:
                    finer = collator.finer(chosen) if out_of_memory(error) else None
                    if finer is None:
                        raise
                if finer is not None:  # the error is gone here, and the memory that its frames held
                    tqdm.write(
                        f"tspin: {description}: out of memory; micro-batches of {finer.max_tokens} tokens from here on "
                        f"({collator.max_tokens} before)",
                        file=sys.stderr,
                    )
                    collator = finer
                    pending = collator(chosen)["micro_batches"]
                    continue
                for role in collator.roles:
                    for i, value in zip(micro_batch["indices"], values[role].tolist(), strict=True):
                        logps[role][window[i]] = value
                pending.pop(0)
            bar.update(len(window))
    return logps


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _to(entry, device) for name, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value

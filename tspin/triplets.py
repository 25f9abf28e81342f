"""Triplets of responses: rows of a data set, their layouts as rows of tokens, micro-batches, log-probabilities.

Two layouts hold the same sequences. "shared": a flat run of tokens, of each example its prompt once and its responses
after it, without padding; a triplet of short responses to a long prompt then costs a third. "padded": one row per
response, its prompt before it, for models that cannot share. Both are planned by tokens, longest first, so that a
micro-batch holds as much as memory allows.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, concatenate_datasets, load_from_disk
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tspin.data.encoding import Examples
from tspin.data.mapped import TypedRows, column, rows_at, without_bars
from tspin.data.responses import Response, Responses
from tspin.devices import out_of_memory
from tspin.layouts import Layout
from tspin.logprobs import flat_logps, flat_run, flat_token_logps, pad_rows, padded_token_logps, sequence_logps
from tspin.schema import LABELLED

IDLE = {"share": 0.0, "tokens": 0}  # a micro-batch that counts for nothing
REFERENCE_WINDOW = 256  # triplets planned into micro-batches together


@dataclass(frozen=True)
class Triplet:
    """A prompt with its responses by role, and log π_θt of each role where a reference is used."""

    prompt_id: int
    prompt_ids: list[int]
    responses: Mapping[str, Response]
    reference_logps: Mapping[str, float] = field(default_factory=dict)


class Triplets(TypedRows[Triplet]):
    """The triplets in the rows of a data set. The responses' texts, which no training needs, are empty.

    Its columns: prompt_id, prompt_ids; of each role <role>/ids and <role>/finished; of each role that a reference
    policy scored <role>/reference.
    """

    def __init__(self, dataset: Dataset):
        super().__init__(dataset, self._triplet)
        self.roles = [name.removesuffix("/ids") for name in dataset.column_names if name.endswith("/ids")]
        self._scored = [name.removesuffix("/reference") for name in dataset.column_names if name.endswith("/reference")]

    def _triplet(self, prompt_id: int, prompt_ids: list[int], *cells: Any) -> Triplet:
        of_role = zip(self.roles, cells[0::2], cells[1::2], strict=False)
        responses = {role: Response(ids, "", finished) for role, ids, finished in of_role}
        logps = dict(zip(self._scored, cells[2 * len(self.roles) :], strict=True))
        return Triplet(prompt_id, prompt_ids, responses, logps)

    def select(self, places: Sequence[int]) -> "Triplets":
        """Those at these places."""
        return Triplets(self.dataset.select(places, new_fingerprint="rows"))

    def of(self, roles: Sequence[str]) -> "Triplets":
        """With the responses of these roles alone."""
        cells = [f"{role}/{name}" for role in roles for name in ("ids", "finished")]
        return Triplets(self.dataset.select_columns(["prompt_id", "prompt_ids", *cells]))

    def save(self, folder: Path) -> None:
        """Write them for another process's `load_triplets`."""
        with without_bars():
            self.dataset.save_to_disk(folder)


def load_triplets(folder: Path) -> Triplets:
    """What `Triplets.save` wrote."""
    return Triplets(load_from_disk(folder))


def make_triplets(examples: Examples, responses: Mapping[str, Responses]) -> Triplets:
    """Triplets from labelled examples and, by role, sampled responses. Raises KeyError where a response is missing."""
    prompt_ids = examples.prompt_ids
    parts = [examples.dataset.select_columns(["prompt_id", "prompt_ids"])]
    of_role = {LABELLED: examples.labelled, **{role: drawn.of(prompt_ids) for role, drawn in responses.items()}}
    for role, rows in of_role.items():
        cells = rows.dataset.select_columns(["ids", "finished"])
        parts.append(cells.rename_columns({name: f"{role}/{name}" for name in cells.column_names}))
    return Triplets(concatenate_datasets(parts, axis=1))


def joined(parts: Sequence[Triplets]) -> Triplets:
    """Triplets of the same roles, one after the other."""
    return parts[0] if len(parts) == 1 else Triplets(concatenate_datasets([part.dataset for part in parts]))


def reference_table(triplets: Triplets, logps: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """prompt_id and a column per role, in nats: what a reference policy's log-probabilities are kept as."""
    return pd.DataFrame({"prompt_id": column(triplets.dataset, "prompt_id"), **logps})


def with_reference(triplets: Triplets, table: pd.DataFrame) -> Triplets:
    """Triplets with their reference log-probabilities from `reference_table`, made of the same triplets."""
    if not np.array_equal(column(triplets.dataset, "prompt_id"), table["prompt_id"]):
        raise ValueError("these reference log-probabilities are of other prompts")
    dataset = triplets.dataset
    for role in triplets.roles:
        dataset = dataset.add_column(f"{role}/reference", table[role].to_numpy(), new_fingerprint="rows")
    return Triplets(dataset)


class TripletCollator:
    """Turns triplets into micro-batches of at most `max_tokens` tokens: {"triplets", "micro_batches": […]}.

    A micro-batch is {"sequences": tensors for `logps_of`, "indices": which triplets, "lengths", "reference",
    "share": its part of the triplets, "tokens"}. All roles of a triplet stand together, so that a
    micro-batch is one forward and one backward pass whatever the method. What is computed does not
    depend on `max_tokens`: an optimizer step sums the micro-batches of the triplets it is given.

    Where several processes train together, each is given all triplets of a step and makes micro-batches of its own
    part, which `dealt` gives it by tokens. One without a part gets one triplet with share 0, so that all call the
    model.
    """

    process, processes = 0, 1

    def __init__(self, roles: Sequence[str], pad_token_id: int, layout: Layout, max_tokens: int):
        self.roles = tuple(roles)
        self.pad_token_id = pad_token_id
        self.layout = layout
        self.max_tokens = max_tokens

    def finer(self, triplets: Sequence[Triplet]) -> "TripletCollator | None":
        """A collator that cuts these triplets into more micro-batches; None where each holds one triplet already."""
        count, finer = len(self(triplets)["micro_batches"]), copy.copy(self)
        while finer.max_tokens > 1:
            finer.max_tokens //= 2
            if len(finer(triplets)["micro_batches"]) > count:
                return finer
        return None

    def __call__(self, triplets: Sequence[Triplet]) -> dict[str, list[Any]]:
        of_all = triplets
        part = [triplets[i] for i in dealt(list(map(tokens_of, triplets)), self.processes)[self.process]]
        triplets = part or triplets[:1]
        if self.layout == "shared":
            micro_batches = plan_flat(list(map(tokens_of, triplets)), self.max_tokens)
        else:
            micro_batches = plan_padded([longest_row(t) * len(self.roles) for t in triplets], self.max_tokens)
        return {
            "triplets": list(of_all),
            "micro_batches": [
                {**self._micro_batch([triplets[i] for i in indices]), "indices": indices,
                 "share": len(indices) / len(of_all), **({} if part else IDLE)}
                for indices in micro_batches
            ]
        }  # fmt: skip

    def _micro_batch(self, triplets: Sequence[Triplet]) -> dict[str, Any]:
        prompts = [t.prompt_ids for t in triplets]
        responses = [[t.responses[role].ids for t in triplets] for role in self.roles]
        if self.layout == "shared":
            sequences = flat_run(prompts, responses)
        else:
            repeated = [prompt for _ in self.roles for prompt in prompts]
            sequences = pad_rows(repeated, [ids for role in responses for ids in role], self.pad_token_id)
        known = [role for role in self.roles if role in triplets[0].reference_logps]
        return {
            "sequences": sequences,
            "prompt_ids": [t.prompt_id for t in triplets],
            "lengths": {role: torch.tensor([len(t.responses[role].ids) for t in triplets]) for role in self.roles},
            "reference": {role: torch.tensor([t.reference_logps[role] for t in triplets]) for role in known},
            "tokens": sum(map(len, prompts)) * len(self.roles) + sum(len(ids) for role in responses for ids in role),
        }


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id, or the end token's where there is none: padding is masked everywhere."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(token, int)
    return token


def tokens_of(triplet: Triplet) -> int:
    """Tokens of a triplet: its prompt once, and all its responses."""
    return len(triplet.prompt_ids) + sum(len(response.ids) for response in triplet.responses.values())


def longest_row(triplet: Triplet) -> int:
    """Tokens of a triplet's prompt with the longest of its responses."""
    return len(triplet.prompt_ids) + max(len(response.ids) for response in triplet.responses.values())


def dealt(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Which of some pieces of work each hand gets: the largest first, each to the one with the least so far.

    The same wherever it is computed; a hand's pieces are in their own order.
    """
    loads = [0] * hands
    parts: list[list[int]] = [[] for _ in range(hands)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        hand = loads.index(min(loads))
        loads[hand] += sizes[i]
        parts[hand].append(i)
    return [sorted(part) for part in parts]


def in_parts(pieces: Sequence[int], sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of pieces of work in their order, in parts of at most `most` tokens, or of one piece.

    sizes: tokens, by number.
    """
    part: list[int] = []
    tokens = 0
    for piece in pieces:
        if part and tokens + sizes[piece] > most:
            yield part
            part, tokens = [], 0
        part.append(piece)
        tokens += sizes[piece]
    if part:
        yield part


def plan_flat(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Micro-batches of example indices, first-fit decreasing: at most `max_tokens` each, one example at least.

    sizes: tokens of each example, its prompt and all its responses.
    """
    plan: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = next((n for n, room in enumerate(free) if room >= sizes[i]), None)
        if fits is None:
            fits = len(plan)
            plan.append([])
            free.append(max_tokens)
        plan[fits].append(i)
        free[fits] -= sizes[i]
    return plan


def plan_padded(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Micro-batches of example indices, longest first: `max_tokens` hold each with its padding, one example at least.

    sizes: tokens of an example's longest row times its rows.
    """
    plan: list[list[int]] = []
    room = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if not room:
            plan.append([])
            room = max(max_tokens // sizes[i], 1)
        plan[-1].append(i)
        room -= 1
    return plan


def logps_of(model: torch.nn.Module, batch: Mapping[str, Any], roles: Sequence[str]) -> dict[str, Tensor]:
    """Sequence log-probabilities of a micro-batch, role → float32 (batch,)."""
    sequences = batch["sequences"]
    if "lengths" in sequences:
        return dict(zip(roles, flat_logps(model, **sequences).unbind(1), strict=True))
    return dict(zip(roles, sequence_logps(model, **sequences).chunk(len(roles)), strict=True))


def token_logps_of(
    model: torch.nn.Module, batch: Mapping[str, Any], roles: Sequence[str]
) -> dict[str, list[list[float]]]:
    """The same before it is summed: role → of each response, a number a token."""
    sequences, count = batch["sequences"], len(batch["prompt_ids"])
    if "lengths" in sequences:
        values, owners = flat_token_logps(model, **sequences)
    else:
        values, owners = padded_token_logps(model, **sequences)
    by_response = [part.tolist() for part in values.cpu().split(owners.bincount().tolist())]
    step = len(roles) if "lengths" in sequences else 1  # flat: example by example; padded: role by role
    starts = range(len(roles)) if "lengths" in sequences else range(0, count * len(roles), count)
    return {role: by_response[start : start + step * count : step] for role, start in zip(roles, starts, strict=True)}


@torch.no_grad()
def compute_logps(
    model: PreTrainedModel,
    triplets: Sequence[Triplet],
    collator: TripletCollator,
    autocast: bool,
    description: str = "log-probabilities",
    of: Callable[..., Mapping[str, Tensor | list[list[float]]]] = logps_of,
) -> dict[str, list[Any]]:
    """log π of every response under the model as it is: role → nats, in the triplets' order.

    of: `logps_of`, or `token_logps_of` for a list of each response's tokens.
    """
    logps: dict[str, list[Any]] = {role: [None] * len(triplets) for role in collator.roles}
    # Longest first across the whole data: micro-batches of like lengths.
    lengths = [len(t.prompt_ids) for t in triplets]
    order = sorted(range(len(triplets)), key=lambda i: -lengths[i])
    model.eval()
    with tqdm(total=len(order), desc=description, unit="prompt") as bar:
        for start in range(0, len(order), REFERENCE_WINDOW):
            window = order[start : start + REFERENCE_WINDOW]
            chosen = rows_at(triplets, window)
            pending = collator(chosen)["micro_batches"]
            while pending:
                micro_batch = pending[0]
                try:
                    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                        values = of(model, send_to_device(micro_batch, model.device), collator.roles)
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
                    found = values[role]
                    found = found.tolist() if isinstance(found, Tensor) else found  # one copy from the device
                    for i, value in zip(micro_batch["indices"], found, strict=True):
                        logps[role][window[i]] = value
                pending.pop(0)
            bar.update(len(window))
    return logps

"""Triplets of responses, and their collation into micro-batches."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from tspin.data.tables import Example, Response, View
from tspin.logprobs import Layout, choose_layout, uses_flex_attention
from tspin.packing import (
    FLEX_BLOCK,
    ROW_TOKENS,
    Tensors,
    example_sizes,
    pack_shared_prefixes,
    pad_rows,
    plan_padded,
    plan_shared,
)
from tspin.schema import LABELLED

IDLE = {"share": 0.0, "tokens": 0}  # a micro-batch that counts for nothing


@dataclass(frozen=True)
class Triplet:
    """A prompt with its responses by role, and log π_θt of each role where a reference is used."""

    prompt_id: int
    prompt_ids: list[int]
    responses: Mapping[str, Response]
    reference_logps: Mapping[str, float] = field(default_factory=dict)


def make_triplets(examples: Sequence[Example], responses: Mapping[str, Mapping[int, Response]]) -> Sequence[Triplet]:
    """Triplets from labelled examples and, by role, sampled responses by prompt id; each is made when asked for."""

    def triplet(i: int) -> Triplet:
        example = examples[i]
        number = example.prompt_id
        given = {role: found[number] for role, found in responses.items()}
        return Triplet(number, example.prompt_ids, {LABELLED: example.labelled, **given})

    return View(len(examples), triplet)


def with_reference(triplets: Sequence[Triplet], table: pd.DataFrame) -> Sequence[Triplet]:
    """Triplets with their reference log-probabilities from `reference_table`, made of the same triplets."""
    roles = {str(role): table[role].to_numpy() for role in table.columns.drop("prompt_id")}
    numbers = table["prompt_id"].to_numpy()

    def triplet(i: int) -> Triplet:
        found = triplets[i]
        if found.prompt_id != numbers[i]:
            raise ValueError(f"row {i} is of prompt {numbers[i]}, the triplet of {found.prompt_id}")
        return replace(found, reference_logps={role: float(of[i]) for role, of in roles.items()})

    return View(len(triplets), triplet)


class TripletCollator:
    """Turns triplets into micro-batches of at most `max_tokens` tokens: {"triplets", "micro_batches": […]}.

    A micro-batch is {"sequences": tensors for `logps_of`, "indices": which triplets, "lengths", "reference",
    "share": its part of the triplets, "tokens"}. All roles of a triplet stand together, so that a
    micro-batch is one forward and one backward pass whatever the method. What is computed does not
    depend on `max_tokens`: an optimizer step sums the micro-batches of the triplets it is given.

    Where several processes train together, each is given all triplets of a step and makes micro-batches of its own
    part: every `processes`th, from the `process`th. One without a part gets one triplet with share 0, so that all
    call the model.
    """

    process, processes = 0, 1

    def __init__(self, roles: Sequence[str], pad_token_id: int, layout: Layout, max_tokens: int, flex: bool = False):
        self.roles = tuple(roles)
        self.pad_token_id = pad_token_id
        self.layout = layout
        self.max_tokens = max_tokens
        self.flex = flex  # block masks skip what is masked: one long row; dense masks: short rows

    def finer(self, triplets: Sequence[Triplet]) -> "TripletCollator | None":
        """A collator that cuts these triplets into more micro-batches; None where each holds one triplet already."""
        count, finer = len(self(triplets)["micro_batches"]), copy.copy(self)
        while finer.max_tokens > (FLEX_BLOCK if self.flex else 1):
            finer.max_tokens = max(finer.max_tokens // 2, FLEX_BLOCK if self.flex else 1)
            if len(finer(triplets)["micro_batches"]) > count:
                return finer
        return None

    def __call__(self, triplets: Sequence[Triplet]) -> dict[str, list[Any]]:
        of_all, part = triplets, triplets[self.process :: self.processes]
        triplets = part or triplets[:1]
        prompts = [t.prompt_ids for t in triplets]
        responses = [[t.responses[role].ids for t in triplets] for role in self.roles]
        rows_of: list[list[list[int]] | None]
        if self.layout == "shared":
            row_tokens = self.max_tokens // FLEX_BLOCK * FLEX_BLOCK if self.flex else min(ROW_TOKENS, self.max_tokens)
            rows_of = list(plan_shared(example_sizes(prompts, responses), self.max_tokens, row_tokens))
            micro_batches = [sum(rows, []) for rows in rows_of if rows]
        else:
            longest = [len(p) + max(len(role[i]) for role in responses) for i, p in enumerate(prompts)]
            micro_batches = plan_padded([size * len(self.roles) for size in longest], self.max_tokens)
            rows_of = [None] * len(micro_batches)
        return {
            "triplets": list(of_all),
            "micro_batches": [
                {**self._micro_batch([triplets[i] for i in indices], rows), "indices": indices,
                 "share": len(indices) / len(of_all), **({} if part else IDLE)}
                for indices, rows in zip(micro_batches, rows_of, strict=True)
            ]
        }  # fmt: skip

    def _micro_batch(self, triplets: Sequence[Triplet], rows: list[list[int]] | None) -> dict[str, Any]:
        prompts = [t.prompt_ids for t in triplets]
        responses = [[t.responses[role].ids for t in triplets] for role in self.roles]
        sequences: Tensors
        if rows is not None:
            # The examples stand in the order of their rows.
            ends = list(accumulate(map(len, rows), initial=0))
            rows = [list(range(first, last)) for first, last in pairwise(ends)]
            sequences = pack_shared_prefixes(
                prompts, responses, self.pad_token_id, rows, multiple=FLEX_BLOCK if self.flex else 1
            )
        else:
            repeated = [prompt for _ in self.roles for prompt in prompts]
            sequences = dict(pad_rows(repeated, [ids for role in responses for ids in role], self.pad_token_id))
        known = [role for role in self.roles if role in triplets[0].reference_logps]
        return {
            "sequences": sequences,
            "prompt_ids": [t.prompt_id for t in triplets],
            "lengths": {role: torch.tensor([len(t.responses[role].ids) for t in triplets]) for role in self.roles},
            "reference": {role: torch.tensor([t.reference_logps[role] for t in triplets]) for role in known},
            "tokens": sum(map(len, prompts)) * len(self.roles) + sum(len(ids) for role in responses for ids in role),
        }


def collator_for(
    model: torch.nn.Module,
    triplets: Sequence[Triplet],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    layout: str = "auto",
) -> TripletCollator:
    """The collator that suits a model. Raises ValueError where it does not support the layout asked for."""
    return TripletCollator(
        tuple(triplets[0].responses),
        pad_token(tokenizer),
        choose_layout(model, layout),
        max_tokens,
        uses_flex_attention(model),
    )


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id, or the end token's where there is none: padding is masked everywhere."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(token, int)
    return token

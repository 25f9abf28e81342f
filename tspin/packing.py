"""Layouts: how prompts and their responses become rows of tokens, and rows become micro-batches.

Two layouts hold the same sequences. "padded": one row a response, its prompt before it.
"shared": a prompt once, all its responses after it, several such examples in a row; a triplet of
short responses to a long prompt then costs a third. Both are planned by tokens, longest first, so
that a micro-batch holds as much as memory allows and next to no padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Ids = Sequence[int]
Tensors = dict[str, Tensor | int]

# Attention under a dense mask grows with a row's square: rows are no longer than they need to be
# for several short examples to fill them.
ROW_TOKENS = 128
FLEX_BLOCK = 128  # FlexAttention skips whole blocks of this size; rows are multiples of it


def pad_rows(prompts: Sequence[Ids], responses: Sequence[Ids], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded tensors for `sequence_logps`: input_ids, attention_mask (int64), response_mask (bool).

    Each has shape (len(prompts), longest prompt + response).
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    response_mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, : len(row)] = 1
        response_mask[i, len(prompt) : len(row)] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}


def pack_shared_prefixes(
    prompts: Sequence[Ids],
    responses: Sequence[Sequence[Ids]],
    pad_token_id: int,
    rows: Sequence[Sequence[int]] | None = None,
    multiple: int = 1,
) -> Tensors:
    """Tensors for `shared_prefix_logps`: prompts[i] once, then responses[k][i] for every k.

    rows: the examples of each row; one row an example when left out. multiple: the rows' length is
    rounded up to it. The log-probability of responses[k][i] comes out at k · len(prompts) + i.
    Raises ValueError for an empty prompt: nothing would predict its responses' first tokens.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a response has no prompt token before it: nothing predicts its first token")
    rows = [[i] for i in range(len(prompts))] if rows is None else rows
    sizes = example_sizes(prompts, responses)
    length = -(-max(sum(sizes[i] for i in row) for row in rows) // multiple) * multiple
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    branches = torch.full((len(rows), length, 2), -1, dtype=torch.long)
    source: list[int] = []
    target: list[int] = []
    sequence: list[int] = []
    for r, row in enumerate(rows):
        start = 0
        for slot, i in enumerate(row):
            prompt_end = start + len(prompts[i])
            position = prompt_end
            for branch, tokens in enumerate([prompts[i], *(role[i] for role in responses)]):
                begin = start if branch == 0 else position
                end = begin + len(tokens)
                input_ids[r, begin:end] = torch.tensor(tokens, dtype=torch.long)
                first = 0 if branch == 0 else len(prompts[i])
                position_ids[r, begin:end] = torch.arange(first, first + len(tokens))
                branches[r, begin:end, 0], branches[r, begin:end, 1] = slot, branch
                if branch:
                    # The prompt's last token predicts each response's first.
                    source += [r * length + at for at in (prompt_end - 1, *range(begin, end - 1))][: len(tokens)]
                    target += tokens
                    sequence += [(branch - 1) * len(prompts) + i] * len(tokens)
                    position = end
            start = position
    return {
        "input_ids": input_ids,
        "branches": branches,
        "position_ids": position_ids,
        "source": torch.tensor(source),
        "target": torch.tensor(target),
        "sequence": torch.tensor(sequence),
        "count": len(prompts) * len(responses),
    }


def example_sizes(prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> list[int]:
    """Tokens of each example in the shared layout: its prompt and all its responses."""
    return [len(prompt) + sum(len(role[i]) for role in responses) for i, prompt in enumerate(prompts)]


def plan_shared(sizes: Sequence[int], max_tokens: int, row_tokens: int) -> list[list[list[int]]]:
    """Micro-batches of rows of example indices, first-fit decreasing.

    Rows are as long as the micro-batch's longest example, `row_tokens` at least; a micro-batch has
    as many of them as `max_tokens` hold, one at least.
    """
    plan: list[list[list[int]]] = []
    left = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while left:
        capacity = max(row_tokens, sizes[left[0]])
        rows: list[list[int]] = []
        free: list[int] = []
        rest: list[int] = []
        for i in left:
            row = next((r for r, room in enumerate(free) if room >= sizes[i]), None)
            if row is None and len(rows) < max(max_tokens // capacity, 1):
                row = len(rows)
                rows.append([])
                free.append(capacity)
            if row is None:
                rest.append(i)
            else:
                rows[row].append(i)
                free[row] -= sizes[i]
        plan.append(rows)
        left = rest
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

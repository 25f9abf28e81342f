"""Sequence log-probabilities of responses under a causal language model: the hot path.

Two layouts give the same numbers. Plain: one row a response, its prompt before it, padded. Shared
prefix: a prompt once, all its responses after it, each seeing the prompt and itself only, positions
going on from the prompt's end; several such examples in a row. A triplet of short responses to a
long prompt then costs about a third.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Families whose attention takes a 4-D mask as it is, under SDPA (tests compare each with the plain layout).
SHARED_PREFIX_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
ROW_TOKENS = 256  # rows at least this long are filled with several examples: attention is still cheap here

Ids = Sequence[int]


def sequence_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    """log π(z|x) for each row: the sum over the response's tokens, never the mean, never the prompt.

    input_ids: int64 (batch, length), prompt then response, padded on either side.
    attention_mask: int64 or bool (batch, length), 0 on padding.
    response_mask: bool (batch, length), True on response tokens (the end token is one of them).
    Returns float32 (batch,), in nats. Carries gradient when the model does.

    The first token of a row has no left context to be predicted from: a response must follow at
    least one prompt token. Raises ValueError otherwise.
    """
    # Positions count real tokens only, so that left- and right-padded rows agree.
    counted = attention_mask.long().cumsum(dim=-1)
    if bool(((counted == 1) & attention_mask.bool() & response_mask).any()):
        raise ValueError("a response has no prompt token before it: nothing predicts its first token")
    position_ids = (counted - 1).clamp(min=0)
    predicted = response_mask.nonzero()
    source = predicted[:, 0] * input_ids.shape[1] + predicted[:, 1] - 1
    target = input_ids[response_mask]
    return _summed(model, input_ids, attention_mask, position_ids, source, target, predicted[:, 0], len(input_ids))


def shared_prefix_logps(
    model: nn.Module, input_ids: Tensor, branches: Tensor, position_ids: Tensor, source: Tensor, target: Tensor,
    sequence: Tensor, count: int,
) -> Tensor:  # fmt: skip
    """log π(z|x) of the responses packed by `pack_shared_prefixes`; float32 (count,), in nats.

    input_ids, position_ids: int64 (rows, length). branches: int64 (rows, length, 2), each token's
    example within its row (−1 on padding) and its response within the example (0 for the prompt).
    source, target, sequence: int64 (response tokens,): where in the flattened rows each token is
    predicted, which token it is, and which response it belongs to.
    """
    example, branch = branches.unbind(-1)
    same_example = example[:, :, None] == example[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    length = input_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    mask = (same_example & visible & causal)[:, None]
    return _summed(model, input_ids, mask, position_ids, source, target, sequence, count)


def _summed(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, source: Tensor, target: Tensor,
    sequence: Tensor, count: int,
) -> Tensor:  # fmt: skip
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).logits
    # Softmax in float32 and over response positions only: log-probabilities are summed over
    # hundreds of tokens, and half precision would lose them.
    rows = logits.flatten(0, 1)[source].float()
    token_logps = -nn.functional.cross_entropy(rows, target, reduction="none")
    return torch.zeros(count, device=rows.device).index_add(0, sequence, token_logps)


def supports_shared_prefix(model: nn.Module) -> bool:
    """Whether a model's attention takes the mask that shared prefixes need."""
    config = getattr(model, "config", None)
    return (
        getattr(config, "model_type", None) in SHARED_PREFIX_FAMILIES
        and getattr(config, "_attn_implementation", None) == "sdpa"
    )


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
    prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]], pad_token_id: int
) -> dict[str, Tensor | int]:
    """Tensors for `shared_prefix_logps`: prompts[i] once, then responses[k][i] for every k.

    The log-probability of responses[k][i] comes out at k · len(prompts) + i. Raises ValueError for
    an empty prompt: nothing would predict its responses' first tokens.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a response has no prompt token before it: nothing predicts its first token")
    sizes = [len(prompt) + sum(len(role[i]) for role in responses) for i, prompt in enumerate(prompts)]
    rows = _first_fit(sizes, max(ROW_TOKENS, *sizes))
    length = max(sum(sizes[i] for i in row) for row in rows)
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
                branches[r, begin:end] = torch.tensor([slot, branch])
                if branch:
                    # The prompt's last token predicts each response's first.
                    source += [r * length + at for at in (prompt_end - 1, *range(begin, end - 1))]
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


def _first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices grouped into rows of at most `capacity`, first-fit decreasing."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, room in enumerate(free) if room >= sizes[i]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(i)
        free[row] -= sizes[i]
    return rows

"""Sequence log-probabilities of responses under a causal language model: the hot path."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
    position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    first_real = (attention_mask.long().cumsum(dim=-1) == 1) & attention_mask.bool()
    if bool((first_real & response_mask).any()):
        raise ValueError("a response has no prompt token before it: nothing predicts its first token")
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).logits
    predicted = response_mask[:, 1:]
    # Softmax in float32 and over response positions only: log-probabilities are summed over
    # hundreds of tokens, and half precision would lose them.
    rows = logits[:, :-1][predicted].float()
    token_logps = -nn.functional.cross_entropy(rows, input_ids[:, 1:][predicted], reduction="none")
    row_of_token = predicted.nonzero()[:, 0]
    return torch.zeros(len(input_ids), device=rows.device).index_add(0, row_of_token, token_logps)


def pad_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int
) -> dict[str, Tensor]:
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

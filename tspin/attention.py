"""Decoding on a CPU, for models whose query heads share key–value heads: the cache is read as it is, never repeated.

With left-padded rows there is a mask, and with a mask Transformers copies every key and value once a query head, in
each layer at each token. The query heads of a group may as well be rows of one query: the same numbers, in half the
time a token at contexts of 500 tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tspin_grouped_sdpa"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' SDPA attention, other where one new token a row meets a cache.

    query: (batch, heads, new tokens, size); key, value: (batch, key–value heads, length, size); attention_mask:
    (batch, 1, new tokens, length), or None. Returns (batch, new tokens, heads, size), and None for the weights.
    """
    batch, heads, new, size = query.shape
    groups = heads // key.shape[1]
    if new > 1 or groups == 1 or kwargs.keys() & {"position_bias", "cache"}:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows = query.reshape(batch, heads // groups, groups, size)
    found = scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, is_causal=False
    )
    return found.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Let a model on a CPU that uses SDPA attend by groups in this block; others stay as they are."""
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")

"""Sequence log-probabilities of responses under a causal language model: the hot path.

`sequence_logps` is the plain definition, for any model. `shared_prefix_logps` gives the same
numbers from the shared layout (see triplets): a prompt is computed once for all its responses, and
logits exist for response tokens only, a chunk at a time. No model code is changed: the model gets
a 4-D mask (SDPA) or a block mask (FlexAttention).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

Layout = Literal["shared", "padded"]

# Families whose attention takes a ready mask as it is, and whose logits are the head's output as it
# is (tests compare each with the plain layout). Gemma 2 is not one: it caps its logits.
SHARED_PREFIX_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma", "gemma3_text"}
MASKS_BY_LAYER = {"qwen2", "qwen3", "gemma3_text"}  # take one mask a kind of layer, full or sliding
LOGITS_PER_CHUNK = 2**25  # 128 MiB in float32


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
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).logits
    sequence, position = response_mask.nonzero(as_tuple=True)
    token_logps = _token_logps(logits[sequence, position - 1], input_ids[sequence, position])
    return _summed(token_logps, sequence, len(input_ids))


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
    head = _unwrapped(model).get_output_embeddings()
    project = head.forward

    def token_logps(hidden: Tensor) -> Tensor:
        predicting = hidden.flatten(0, 1)[source]
        chunk = max(LOGITS_PER_CHUNK // head.weight.shape[0], 1)
        if len(target) <= chunk:
            return _token_logps(project(predicting), target)
        # Chunks forget their logits and compute them again in the backward pass.
        chunks = zip(predicting.split(chunk), target.split(chunk), strict=True)
        return torch.cat([checkpoint(_projected, project, *one, use_reentrant=False) for one in chunks])

    masks = _attention_masks(_unwrapped(model).config, branches, position_ids)
    with _head_returns(head, token_logps):
        values = model(input_ids=input_ids, attention_mask=masks, position_ids=position_ids, use_cache=False).logits
    return _summed(values, sequence, count)


def choose_layout(model: nn.Module, wanted: str = "auto") -> Layout:
    """The fastest layout that the model supports, or the one asked for.

    "auto" warns where it falls back to "padded"; "shared" raises ValueError where it cannot be had.
    """
    if wanted == "padded":
        return "padded"
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    attention = getattr(config, "_attn_implementation", None)
    if family not in SHARED_PREFIX_FAMILIES or getattr(config, "final_logit_softcapping", None):
        reason = f"{family} models are not among {', '.join(sorted(SHARED_PREFIX_FAMILIES))}"
    elif attention not in {"sdpa", "flex_attention"}:
        reason = f"{attention} attention takes no mask of that form; load the model with sdpa or flex_attention"
    else:
        return "shared"
    if wanted == "shared":
        raise ValueError(f"layout: this model cannot share prompts: {reason}")
    warnings.warn(f"every response is trained with a prompt of its own, several times slower: {reason}", stacklevel=2)
    return "padded"


def uses_flex_attention(model: nn.Module) -> bool:
    """Whether the model's attention takes block masks rather than dense ones."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == "flex_attention"


def _token_logps(logits: Tensor, target: Tensor) -> Tensor:
    # Softmax in float32: log-probabilities are summed over hundreds of tokens, and half precision
    # would lose them.
    return -cross_entropy(logits.float(), target, reduction="none")


def _projected(project: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor) -> Tensor:
    return _token_logps(project(hidden), target)


def _summed(token_logps: Tensor, sequence: Tensor, count: int) -> Tensor:
    return torch.zeros(count, device=token_logps.device).index_add(0, sequence, token_logps)


def _unwrapped(model: Any) -> Any:
    return model.module if hasattr(model, "module") else model


@contextmanager
def _head_returns(head: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the language-model head return `function` of the hidden states in place of logits.

    The model is still called as a whole, so that what wraps it (FSDP, DDP, hooks) does its part.
    """
    head.forward = function  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward  # type: ignore[attr-defined]  # the class's own method is back


def _attention_masks(config: Any, branches: Tensor, position_ids: Tensor) -> Any:
    window = getattr(config, "sliding_window", None)
    flex = config._attn_implementation == "flex_attention"

    def mask(window: int | None) -> Tensor | BlockMask:
        sees = visibility(branches, position_ids, window)
        rows, length = position_ids.shape
        if flex:
            device = branches.device.type
            return create_block_mask(sees, rows, None, length, length, device=device, _compile=device == "cuda")
        at = torch.arange(length, device=branches.device)
        row = torch.arange(rows, device=branches.device)
        return sees(row[:, None, None], None, at[None, :, None], at[None, None, :])[:, None]

    if config.model_type in MASKS_BY_LAYER:
        kinds = set(config.layer_types)
        return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    return mask(window)


def visibility(branches: Tensor, position_ids: Tensor, window: int | None) -> Callable[..., Tensor]:
    """Which token attends to which, as FlexAttention's mask_mod(row, head, query, key) → bool.

    A token sees its own example's prompt and its own branch, up to itself; with a sliding window,
    only what is less than `window` positions back. Padding sees padding before it, so that no
    token is left without anything to attend to.
    """
    example, branch = branches.unbind(-1)

    def sees(row: Tensor, head: Any, query: Tensor, key: Tensor) -> Tensor:
        own = (branch[row, key] == 0) | (branch[row, key] == branch[row, query])
        seen = (query >= key) & own & (example[row, key] == example[row, query])
        if window is not None:
            seen = seen & (position_ids[row, query] - position_ids[row, key] < window)
        return seen

    return sees

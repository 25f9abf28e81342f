"""Sequence log-probabilities of responses under a causal language model: the hot path.

`sequence_logps` is the plain definition, for any model. `flat_logps` gives the same numbers from the flat layout (see
tspin.segments): a prompt is computed once for all its responses, nothing is padded, and logits exist for response
tokens only, a chunk at a time. tspin.layouts finds out which models can take it. Both are sums over what
`padded_token_logps` and `flat_token_logps` give token by token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from tspin.segments import Segments, spans

Ids = Sequence[int]

LOGITS_PER_CHUNK = 2**25  # 128 MiB in float32
# What models do to their head's logits: the number that says how much, the one that does nothing, and how.
AFTER_THE_HEAD: dict[str, tuple[float | None, Callable[[Tensor, float], Tensor]]] = {
    "final_logit_softcapping": (None, lambda logits, cap: cap * torch.tanh(logits / cap)),
    "logit_scale": (1.0, lambda logits, scale: logits * scale),
    "logits_scaling": (1.0, lambda logits, scaling: logits / scaling),
}


def sequence_logps(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    """log π(z|x) for each row: the sum over the response's tokens, never the mean, never the prompt.

    input_ids: int64 (batch, length), prompt then response, padded on either side.
    attention_mask: int64 or bool (batch, length), 0 on padding.
    response_mask: bool (batch, length), True on response tokens (the end token is one of them).
    Returns float32 (batch,), in nats. Carries gradient when the model does.

    The first token of a row has no left context to be predicted from: a response must follow at
    least one prompt token. Raises ValueError otherwise.
    """
    values, owners = padded_token_logps(model, input_ids, attention_mask, response_mask)
    return _summed(values, owners, len(input_ids))


def padded_token_logps(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """log π of every response token, and whose it is: float32 and int64 (response tokens,), row by row, in order.

    Arguments, gradient and ValueError as `sequence_logps`.
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
    return _token_logps(logits[sequence, position - 1], input_ids[sequence, position]), sequence


def pad_rows(prompts: Sequence[Ids], responses: Sequence[Ids], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded tensors for `sequence_logps`: input_ids, attention_mask (int64), response_mask (bool).

    Each has shape (len(prompts), longest prompt + response).
    """
    rows = [torch.tensor([*p, *r], dtype=torch.long) for p, r in zip(prompts, responses, strict=True)]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    position = torch.arange(input_ids.shape[1])
    real = position < torch.tensor([len(row) for row in rows])[:, None]
    response_mask = real & (position >= torch.tensor([len(prompt) for prompt in prompts])[:, None])
    return {"input_ids": input_ids, "attention_mask": real.long(), "response_mask": response_mask}


def flat_run(prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> dict[str, Tensor]:
    """Tensors for `flat_logps`: of each i prompts[i], then responses[k][i] for every k."""
    parts = [[prompt, *(role[i] for role in responses)] for i, prompt in enumerate(prompts)]
    return {
        "input_ids": torch.tensor([token for example in parts for part in example for token in part]),
        "lengths": torch.tensor([[len(part) for part in example] for example in parts]),
    }


def flat_logps(model: nn.Module, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """log π(z|x) of every response of a flat run: float32 (examples, responses), in nats.

    input_ids: int64 (tokens,), of each example its prompt and then its responses, without padding.
    lengths: int64 (examples, 1 + responses), the tokens of each part.
    Carries gradient when the model does. For models that can share (tspin.layouts). Raises ValueError for an empty
    prompt: nothing would predict its responses' first tokens.
    """
    values, owners = flat_token_logps(model, input_ids, lengths)
    examples, responses = lengths.shape[0], lengths.shape[1] - 1
    return _summed(values, owners, examples * responses).view(examples, responses)


def flat_token_logps(model: nn.Module, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """log π of every response token of a flat run, and whose it is: float32 and int64 (response tokens,), in order.

    Response k (from 0) of example i is number i · responses + k. Arguments, gradient and ValueError as `flat_logps`.
    """
    counts = lengths.cpu()
    parts = counts.tolist()
    if any(prompt == 0 for prompt, *_ in parts):
        raise ValueError("a response has no prompt token before it: nothing predicts its first token")
    where = spans(parts)
    (targets,) = where.branch.nonzero(as_tuple=True)
    example, response = where.example[targets], where.branch[targets] - 1
    # A response's first token is predicted by the last one of its prompt, any other by the one before it.
    prompts, sizes = counts[:, 0], counts.sum(1)
    last_of_prompt = sizes.cumsum(0) - sizes + prompts - 1
    sources = torch.where(where.position[targets] == prompts[example], last_of_prompt[example], targets - 1)
    device = input_ids.device
    with _head_returns(unwrapped(model), sources.to(device), input_ids[targets.to(device)]):
        values = model(
            input_ids=input_ids[None],
            attention_mask=Segments.of(parts, device),
            position_ids=where.position.to(device)[None],
            use_cache=False,
        ).logits
    return values, (example * (counts.shape[1] - 1) + response).to(device)


def _token_logps(logits: Tensor, target: Tensor) -> Tensor:
    # Softmax in float32: log-probabilities are summed over hundreds of tokens, and half precision
    # would lose them.
    return -cross_entropy(logits.float(), target, reduction="none")


def _summed(token_logps: Tensor, sequence: Tensor, count: int) -> Tensor:
    return torch.zeros(count, device=token_logps.device).index_add(0, sequence, token_logps)


def unwrapped(model: Any) -> Any:
    """The model itself, where several processes train it together through a wrapper."""
    return model.module if hasattr(model, "module") else model


@contextmanager
def _head_returns(model: Any, sources: Tensor, targets: Tensor) -> Iterator[None]:
    """Let the language-model head return log-probabilities in place of logits, and the model leave them as they are.

    sources, targets: int64 (response tokens,), where in the flat run each is predicted, and which token it is.
    The model is still called as a whole, so that what wraps it (FSDP, DDP, hooks) does its part.
    """
    head: Any = model.get_output_embeddings()
    project = head.forward
    after = list(_after_the_head(model))

    def logps(hidden: Tensor, target: Tensor) -> Tensor:
        logits = project(hidden)
        for _, _, value, changed in after:
            logits = changed(logits, value)
        return _token_logps(logits, target)

    def in_chunks(hidden: Tensor) -> Tensor:
        predicting = hidden.flatten(0, 1)[sources]
        chunk = max(LOGITS_PER_CHUNK // head.weight.shape[0], 1)
        if len(targets) <= chunk:
            return logps(predicting, targets)
        # Chunks forget their logits and compute them again in the backward pass.
        chunks = zip(predicting.split(chunk), targets.split(chunk), strict=True)
        return torch.cat([checkpoint(logps, *one, use_reentrant=False) for one in chunks])

    head.forward = in_chunks
    for holder, name, _, _ in after:
        setattr(holder, name, AFTER_THE_HEAD[name][0])
    try:
        yield
    finally:
        del head.forward  # the class's own method is back
        for holder, name, value, _ in after:
            setattr(holder, name, value)


def _after_the_head(model: Any) -> Iterator[tuple[Any, str, float, Callable[[Tensor, float], Tensor]]]:
    """What a model does to its head's logits: who holds the number, its name and value, and the function."""
    for name, (nothing, changed) in AFTER_THE_HEAD.items():
        for holder in (model, model.config, model.config.get_text_config()):
            value = getattr(holder, name, None)
            if value is not None:
                if value != nothing:
                    yield holder, name, value, changed
                break  # a model's own number is a copy of its config's

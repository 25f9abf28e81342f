"""Which layout a model can take: found by trying, whatever the model is called.

A few random tokens go through the model in both layouts, the flat one of `flat_logps` and the plain definition. A model
whose layers carry a state along, look past attention, or see positions in another way gives other numbers, and gets
rows of its own for every response.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tspin.devices import out_of_memory
from tspin.errors import reason
from tspin.logprobs import Ids, flat_logps, flat_run, pad_rows, sequence_logps, unwrapped
from tspin.segments import NAME

Layout = Literal["shared", "padded"]

TRIED = [[7, 4, 6, 1], [2, 1, 5, 3]]  # tokens of a prompt and its responses
# What two ways to the same log-probability of a few tokens differ by: nats, and as a share of Trial.context.
ROUNDING = {torch.float32: (1e-3, 0.02), torch.bfloat16: (1.0, 0.25), torch.float16: (0.2, 0.1)}
REACHES = ("sliding_window", "attention_chunk_size")  # how far a layer sees, in a config and in its modules


def choose_layout(model: nn.Module, wanted: str = "auto", longest: int = 0) -> Layout:
    """The fastest layout that the model supports, or the one asked for; lets the model attend by segments where shared.

    longest: tokens of the longest prompt with its response. "auto" warns where it falls back to "padded"; "shared"
    raises ValueError where it cannot be had. Found by trying (`tried`), not by the model's name.
    """
    if wanted == "padded":
        return "padded"
    refused = why_not_shared(model, longest)
    if refused is None:
        return "shared"
    if wanted == "shared":
        raise ValueError(f"layout: this model cannot share prompts: {refused}")
    warnings.warn(f"every response is trained with a prompt of its own, several times slower: {refused}", stacklevel=2)
    return "padded"


def take_layout(model: nn.Module, layout: Layout) -> None:
    """Set a model up for a layout that was found elsewhere for the same one; its weights need not be there."""
    inner: Any = unwrapped(model)
    if layout == "shared" and inner._can_set_attn_implementation():
        inner.set_attn_implementation(NAME)


def why_not_shared(model: nn.Module, longest: int = 0) -> str | None:
    """What keeps a model from the flat layout, in words; None where nothing does, and its attention is set for it."""
    inner = unwrapped(model)
    attention = getattr(getattr(inner, "config", None), "_attn_implementation", None)
    if attention not in {"sdpa", NAME}:
        remedy = "; load the model with sdpa (model.attention)" if getattr(inner, "_supports_sdpa", False) else ""
        return f"its attention ({attention}) cannot be computed by segments{remedy}"
    if attention == "sdpa" and inner._can_set_attn_implementation():  # others call PyTorch's function themselves
        inner.set_attn_implementation(NAME)
    try:
        trial = tried(inner, longest)
    except Exception as error:  # a model is code of someone else's: what it cannot take shows as anything
        if isinstance(error, MemoryError) or out_of_memory(error):
            raise
        refused = f"its code takes no flat run of tokens ({reason(error)})"
    else:
        if trial.same(inner.dtype):
            return None
        refused = f"log-probabilities would be off by {max(trial.deviation, trial.leak):.2g} nats"
    if attention == "sdpa" and inner._can_set_attn_implementation():
        inner.set_attn_implementation(attention)
    return refused


class Trial(NamedTuple):
    """What came of a few random tokens in both layouts: the largest differences, in nats."""

    deviation: float  # of the flat layout from the plain definition
    leak: float  # in the flat layout, by the order of the responses before one's own, which it must not see
    context: float  # in the plain one, where these responses are part of the prompt: the size of a layer's mistake
    logp: float  # the largest log-probability

    def same(self, dtype: torch.dtype) -> bool:
        """Whether the differences are no more than rounding, in a model of this type."""
        nats, share = ROUNDING.get(dtype, ROUNDING[torch.float32])
        # Rows of one product do not know of each other, and as many go to each expert: what does not leak is the same
        # to the last digits, in any type.
        closed = self.leak <= 16 * torch.finfo(torch.float32).eps * self.logp
        return closed and self.deviation <= nats and self.deviation <= share * self.context


@torch.no_grad()
def tried(model: Any, longest: int = 0) -> Trial:
    """A few random tokens in both layouts.

    Windows that rows of `longest` tokens reach beyond are made shorter than the trial's for as long as it takes, so
    that what they hide is seen.
    """
    device, was_training = next(model.parameters()).device, model.training
    generator, vocabulary = torch.Generator().manual_seed(0), len(model.get_input_embeddings().weight)

    examples = [
        [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths] for lengths in TRIED
    ]
    swapped = [[prompt, second, first, third] for prompt, first, second, third in examples]
    rows = [(prompt, response) for prompt, *responses in examples for response in responses]
    within = [(sum(of[:number], []), of[number]) for of in examples for number in range(1, len(of))]
    padded = pad_rows([prompt for prompt, _ in rows + within], [response for _, response in rows + within], 0)
    model.eval()
    try:
        with _reaches_shortened(model, longest):
            plain, inside = sequence_logps(model, **{k: v.to(device) for k, v in padded.items()}).chunk(2)
            flat, other = (_flat(model, of) for of in (examples, swapped))
    finally:
        model.train(was_training)
    gaps = (flat.flatten() - plain, flat[:, -1] - other[:, -1], inside - plain, plain)
    return Trial(*(float(gap.abs().max()) for gap in gaps))


def _flat(model: Any, examples: Sequence[Sequence[Ids]]) -> Tensor:
    prompts, *responses = zip(*examples, strict=True)
    device = next(model.parameters()).device
    return flat_logps(model, **{name: tensor.to(device) for name, tensor in flat_run(prompts, responses).items()})


@contextmanager
def _reaches_shortened(model: Any, longest: int) -> Iterator[None]:
    """While this holds, layers that see less than `longest` tokens see three."""
    held = [
        (holder, name, value)
        for holder in {id(h): h for h in (model.config, model.config.get_text_config(), *model.modules())}.values()
        for name in REACHES
        if isinstance(value := getattr(holder, name, None), int) and value < longest
    ]
    try:
        for holder, name, _ in held:
            setattr(holder, name, 3)
        yield
    finally:
        for holder, name, value in held:
            setattr(holder, name, value)

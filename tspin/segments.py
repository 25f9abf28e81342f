"""Attention in the flat layout: several examples in one run of tokens, each a prompt and, after it, its responses.

A prompt attends causally to itself; a response attends to its prompt and, causally, to itself; nothing else is seen,
and there is no padding. What the layers need to know of it travels through the model in the place of an attention
mask: `Segments` is a tensor of four dimensions, which Transformers hands on as it is, and the attention function that
is registered here reads it. No model code is changed.

On CUDA in half precision one kernel takes all segments (varlen_attn). Elsewhere they are cut into pieces, and pieces
of like shape are batched for scaled_dot_product_attention: short examples whole, under a small mask; of long ones
each prompt by the causal kernel, and each response with its prompt's keys before its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "tspin_segments"
WHOLE = 128  # an example of so few tokens is one piece: what its mask hides costs less than more kernels would
PADDED = 1.25  # a batch of pieces is computed as large as its largest: up to this factor over what is asked for
FREE = 2**15  # … or this many products of a query and a key, next to which a further kernel costs more
# How varlen_attn is told that heads share keys; PyTorch before 2.12 has no word for it.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


class Spans(NamedTuple):
    """Where every token of a flat run stands. All int64 (tokens,)."""

    example: Tensor
    branch: Tensor  # 0 in the prompt, then the response's number from 1
    position: Tensor  # within prompt and response together


def spans(lengths: Sequence[Sequence[int]]) -> Spans:
    """lengths: of each example the tokens of its prompt and of each of its responses, as they stand."""
    counts = torch.tensor(lengths)
    parts = counts.flatten()
    example = torch.arange(len(counts)).repeat_interleave(counts.sum(1))
    branch = torch.arange(counts.shape[1]).repeat(len(counts)).repeat_interleave(parts)
    within = torch.arange(len(example)) - (parts.cumsum(0) - parts).repeat_interleave(parts)
    return Spans(example, branch, within + counts[:, 0][example] * (branch > 0))


class Piece(NamedTuple):
    """Queries that stand together, the ranges of their keys, and whether the causal kernel serves them as they are."""

    queries: range
    keys: tuple[range, ...]
    causal: bool

    @property
    def size(self) -> tuple[int, int]:
        return len(self.queries), sum(map(len, self.keys))


def pieces(lengths: Sequence[Sequence[int]]) -> Iterator[Piece]:
    """What every token's attention is computed as part of, once."""
    start = 0
    for example in lengths:
        bounds = list(accumulate(example, initial=start))
        whole, prompt = range(start, bounds[-1]), range(start, bounds[1])
        start = bounds[-1]
        if len(whole) <= WHOLE:
            yield Piece(whole, (whole,), False)
            continue
        yield Piece(prompt, (prompt,), True)
        for begin, end in zip(bounds[1:], bounds[2:], strict=False):
            if begin < end:
                yield Piece(range(begin, end), (prompt, range(begin, end)), False)


def batches(of: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces of one kind and like shape together, so that padding them to one shape costs little."""
    groups: list[list[Piece]] = []
    real = longest = 0
    for piece in sorted(of, key=lambda piece: (piece.causal, piece.size[::-1])):
        queries, keys = piece.size
        if groups and groups[-1][0].causal == piece.causal:
            most = max(longest, queries)
            padded, asked = (len(groups[-1]) + 1) * most * keys, real + queries * keys  # keys: none before has more
            if padded <= max(PADDED * asked, asked + FREE):
                groups[-1].append(piece)
                real, longest = asked, most
                continue
        groups.append([piece])
        real, longest = queries * keys, queries
    return groups


class Batch(NamedTuple):
    """Pieces that are computed at once, as large as the largest of them."""

    queries: Tensor  # int64 (pieces, most queries), into the flat run; the last again where other pieces have more
    keys: Tensor  # int64 (pieces, most keys)
    mask: Tensor | None  # bool (pieces, 1, most queries, most keys); None: the causal kernel
    first: Tensor  # bool (pieces, most queries): not repeated

    @classmethod
    def of(cls, group: Sequence[Piece], where: Spans, window: int | None) -> "Batch":
        """window: how far back a token sees, itself included; None: to the beginning."""
        counts = torch.tensor([len(piece.queries) for piece in group])[:, None]
        offsets = torch.arange(int(counts.max()))
        queries = torch.tensor([piece.queries.start for piece in group])[:, None] + offsets.minimum(counts - 1)
        ranges = ([torch.arange(part.start, part.stop) for part in piece.keys] for piece in group)
        keys = pad_sequence([torch.cat(parts) for parts in ranges], batch_first=True, padding_value=-1)
        first, real, keys = offsets < counts, keys >= 0, keys.clamp(min=0)
        if group[0].causal and (window is None or window >= keys.shape[1]):
            return cls(queries, keys, None, first)
        own, other = where.branch[queries][:, :, None], where.branch[keys][:, None]
        back = where.position[queries][:, :, None] - where.position[keys][:, None]
        seen = ((other == 0) | (other == own)) & (back >= 0) & real[:, None]
        if window is not None:
            seen &= back < window
        return cls(queries, keys, seen[:, None], first)


@dataclass(frozen=True)
class Plan:
    """All batches of a run, each batch's rows after those of the one before."""

    queries: Tensor  # int64, into the flat run
    keys: Tensor
    order: Tensor  # int64 (tokens,): which of `queries` is a token's own
    shapes: list[tuple[int, int, int]]  # of each batch: pieces, most queries, most keys
    masks: list[Tensor | None]  # of each batch, to be added to the products

    @classmethod
    def of(
        cls, lengths: Sequence[Sequence[int]], window: int | None, dtype: torch.dtype, device: torch.device
    ) -> "Plan":
        where = spans(lengths)
        made = [Batch.of(group, where, window) for group in batches(list(pieces(lengths)))]
        queries, keys = (torch.cat([tensor.flatten() for tensor in of]) for of in list(zip(*made, strict=True))[:2])
        at = torch.cat([batch.first.flatten() for batch in made]).nonzero()[:, 0]
        order = torch.empty_like(at)
        order[queries[at]] = at
        masks = [None if batch.mask is None else _added(batch.mask, dtype).to(device) for batch in made]
        shapes = [(*batch.queries.shape, batch.keys.shape[1]) for batch in made]
        return cls(queries.to(device), keys.to(device), order.to(device), shapes, masks)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Attention of a flat run, (tokens, heads, size); the masks know of the window."""
        # Every batch's rows at once: taken one by one, each batch's would have gradients of the whole run's size.
        rows_of = [pieces * queries for pieces, queries, _ in self.shapes]
        keys_of = [pieces * keys for pieces, _, keys in self.shapes]
        queries = query.index_select(0, self.queries).split(rows_of)
        keys, values = (of.index_select(0, self.keys).split(keys_of) for of in (key, value))
        found = []
        for (count, _, _), mask, *parts in zip(self.shapes, self.masks, queries, keys, values, strict=True):
            of_query, of_key, of_value = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in parts)
            attended = scaled_dot_product_attention(
                of_query, of_key, of_value, attn_mask=mask, is_causal=mask is None, scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
            found.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(found).index_select(0, self.order)


@dataclass(frozen=True)
class Varlen:
    """Segments as varlen_attn takes them: their queries as they stand, their keys one after the other."""

    keys: Tensor  # int64, into the flat run
    query_ends: Tensor  # int32 (segments + 1,)
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], device: torch.device) -> "Varlen":
        keys: list[int] = []
        queries_of, keys_of, start = [], [], 0
        for example in lengths:
            prompt = range(start, start + example[0])
            for number, length in enumerate(example):
                before = prompt if number else ()
                keys += [*before, *range(start, start + length)]
                queries_of.append(length)
                keys_of.append(len(before) + length)
                start += length
        query_ends, key_ends = (
            torch.tensor([0, *accumulate(of)], dtype=torch.int32, device=device) for of in (queries_of, keys_of)
        )
        return cls(torch.tensor(keys, device=device), query_ends, key_ends, max(queries_of), max(keys_of))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Attention of a flat run, (tokens, heads, size): queries stand at the end of their keys."""
        keys, values = (of.index_select(0, self.keys) for of in (key, value))
        sharing = query.shape[1] // key.shape[1]  # query heads of a key's
        if sharing > 1 and not GROUPED:
            keys, values = (of.repeat_interleave(sharing, 1) for of in (keys, values))
        found = varlen_attn(
            query, keys, values, self.query_ends, self.key_ends, self.most_queries, self.most_keys, scale=scale,
            window_size=(-1 if window is None else window - 1, 0),  # a token, and so many before it
            **(GROUPED if sharing > 1 else {}),
        )  # fmt: skip
        assert isinstance(found, Tensor)
        return found


class Segments(Tensor):
    """The layout of a flat run, in the place of its attention mask: an empty tensor of four dimensions that knows it.

    Any function of PyTorch's that gets it computes with that tensor, but for scaled_dot_product_attention, which
    models without a choice of attention functions call themselves.
    """

    lengths: list[list[int]]
    _plans: dict[Any, Any]

    @staticmethod
    def of(lengths: Sequence[Sequence[int]], device: torch.device) -> "Segments":
        """lengths: as of `spans`."""
        made = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device).as_subclass(Segments)
        made.lengths, made._plans = [list(example) for example in lengths], {}
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention and isinstance(kwargs.get("attn_mask"), Segments):
            query, key, value = args[:3] if args else (kwargs["query"], kwargs["key"], kwargs["value"])
            return kwargs["attn_mask"].attend(query, key, value, kwargs.get("scale"))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @torch.compiler.disable  # its batches are others in each run of tokens: nothing that a compiled graph could keep
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Attention of every token to those that it may see.

        query: (1, heads, tokens, size); key, value: (1, key–value heads, tokens, size). scale: of the products; None:
        1/√size. window: how far back a token sees, itself included. Returns (1, heads, tokens, size of a value).
        """
        if torch.is_autocast_enabled(query.device.type):
            chosen = torch.get_autocast_dtype(query.device.type)
            query, key, value = (tensor.to(chosen) for tensor in (query, key, value))
        half = query.dtype in (torch.bfloat16, torch.float16)
        if query.is_cuda and half and query.shape[-1] == value.shape[-1] <= 256:
            plan = self._planned((), partial(Varlen.of, self.lengths, query.device))
        else:
            make = partial(Plan.of, self.lengths, window, query.dtype, query.device)
            plan = self._planned((window, query.dtype), make)
        with torch.autocast(query.device.type, enabled=False):
            found = plan.attend(*(tensor[0].transpose(0, 1) for tensor in (query, key, value)), scale, window)
        return found.transpose(0, 1)[None]

    def _planned(self, name: Any, make: Callable[[], Any]) -> Any:
        """What is the same for all layers is made for the first one."""
        if name not in self._plans:
            self._plans[name] = make()
        return self._plans[name]


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' SDPA attention, other where `attention_mask` is a flat run's Segments.

    Shapes as AttentionInterface has them: query (batch, heads, tokens, size), returns (batch, tokens, heads, size).
    Raises ValueError for a model whose attention has sinks or biases of positions: it does not share prompts.
    """
    if not isinstance(attention_mask, Segments):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
        )
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention by segments has no such term: {name}")
    return attention_mask.attend(query, key, value, scaling, sliding_window).transpose(1, 2), None


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)

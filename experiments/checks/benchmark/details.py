"""Where a step's and an iteration's time goes, and what the choices behind the fast path were made by."""

from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import ContinuousBatchingConfig, GenerationConfig

import tspin.sampling
from experiments.checks.benchmark.contenders import CONTENDERS, MICRO_BATCH_TOKENS
from experiments.checks.benchmark.workload import (
    ARITHMETIC,
    DEVICE,
    EVEN,
    MIXES,
    SHAPES,
    Sizes,
    build,
    chat_lengths,
    pocket_prompts,
    seconds,
    triplets,
)
from tspin.config import Decoding
from tspin.logprobs import LOGITS_PER_CHUNK
from tspin.models import POCKET_MODEL, load_model, load_tokenizer
from tspin.schema import ROLES
from tspin.segments import Segments, spans
from tspin.triplets import dealt, plan_padded


def timed(column: str, ways: Mapping[str, Callable[[], object]], rounds: int, **sizes: int) -> list[dict]:
    """A row for each way to work: the fastest round after a warm-up. A way that does not run here is left out."""
    rows = []
    for name, work in ways.items():
        try:
            times = [seconds(work) for _ in range(rounds + 1)]
        except Exception as error:  # continuous batching needs what not every machine has
            print(f"{name}: did not run ({type(error).__name__}: {error})", flush=True)
            continue
        rows.append({column: name, **sizes, "seconds": min(times[1:])})
        print(f"{name}: {rows[-1]['seconds']:.2f} s", flush=True)
    return rows


def head_rows(vocabulary: int, width: int, tokens: int) -> list[dict]:
    """Log-probabilities of response tokens from hidden states, forward and backward, three ways."""
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, width, device=DEVICE) * 0.05).to(ARITHMETIC).requires_grad_()
    states = torch.randn(tokens, width, device=DEVICE, dtype=ARITHMETIC).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=DEVICE)
    chunk = LOGITS_PER_CHUNK // vocabulary

    def whole(states, target):
        return cross_entropy(linear(states, weight).float(), target, reduction="none")

    def chunked(states, target):
        pairs = zip(states.split(chunk), target.split(chunk), strict=True)
        return torch.cat([checkpoint(whole, *pair, use_reentrant=False) for pair in pairs])

    def library(states, target):  # PyTorch has it since 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        return torch.nn.functional.linear_cross_entropy(states, weight, target, reduction="none", options=options)

    def liger(states, target):  # one sum of all tokens: it has no weights for sequences, and is here for its time
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, states, target)

    heads = {"all logits at once": whole, "chunks, computed again (ours)": chunked, "linear_cross_entropy": library}
    heads |= {"Liger's fused linear cross entropy": liger} if DEVICE == "cuda" else {}
    ways = {name: lambda head=head: head(states, target).float().sum().backward() for name, head in heads.items()}
    return timed("head", ways, rounds=3, tokens=tokens, vocabulary=vocabulary)


def attention_rows(shape: str, sizes: Sizes) -> list[dict]:
    """Attention of one layer by itself, forward and backward, as examples grow while their tokens stay the same."""
    config = SHAPES[shape]
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    rows = []
    for length in sizes.lengths:
        count, prompt, response = sizes.fixed_tokens // length, length // 4, length // 4
        lengths = [[prompt, *[response] * len(ROLES)]] * count
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts = [torch.randn(1, h, count * length, width, device=DEVICE, dtype=ARITHMETIC) for h in heads]
        parts = [part.requires_grad_() for part in parts]
        ways = attention_ways(parts, lengths)
        attended = {name: lambda way=way: way().float().sum().backward() for name, way in ways.items()}
        rows += timed("attention", attended, rounds=3, tokens_of_an_example=length, examples=count)
    return rows


def attention_ways(parts: list[Tensor], lengths: list[list[int]]) -> dict[str, Callable[[], Tensor]]:
    """Ways to attend: by segments, under a mask, on padded rows; on a GPU also by FlexAttention.

    parts: query, key and value of a flat run, (1, heads, tokens, size). lengths: of its examples, which are alike.
    """
    where, count, (prompt, response, *_) = spans(lengths), len(lengths), lengths[0]
    branch, example, shared = where.branch.to(DEVICE), where.example.to(DEVICE), parts[0].shape[1] != parts[1].shape[1]
    segments = Segments.of(lengths, parts[0].device)

    def sees(row, head, query, key):
        own = (branch[key] == 0) | (branch[key] == branch[query])
        return (query >= key) & own & (example[query] == example[key])

    def by_example(part: Tensor) -> Tensor:
        return part[0].unflatten(1, (count, -1)).transpose(0, 1)  # (examples, heads, tokens, size)

    at = torch.arange(sum(lengths[0]), device=DEVICE)
    mask = sees(None, None, at[:, None], at[None, :])

    def masked() -> Tensor:
        return scaled_dot_product_attention(*map(by_example, parts), attn_mask=mask, enable_gqa=shared)

    def padded() -> Tensor:
        rows = [
            torch.cat([torch.cat([part[:, :, :prompt], part[:, :, start : start + response]], 2)
                       for start in range(prompt, part.shape[2], response)])
            for part in map(by_example, parts)
        ]  # fmt: skip
        return scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=shared)

    ways = {"segments (ours)": lambda: segments.attend(*parts), "a mask for each example": masked}
    ways["padded rows"] = padded
    if DEVICE == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        blocks = create_block_mask(sees, None, None, len(branch), len(branch), device=DEVICE)
        compiled = torch.compile(flex_attention)
        ways["FlexAttention"] = lambda: compiled(*parts, block_mask=blocks, enable_gqa=shared)
    return ways


def balance_rows(sizes: Sizes) -> list[dict]:
    """Eight processes with a step's triplets of chat: tokens of a mean process over those of the one with the most.

    Simulated, by the code that deals and plans; padded rows count their padding.
    """
    generator = np.random.default_rng(0)
    shares: dict[str, list[float]] = {"by tokens, flat (ours)": [], "by stride, flat": [], "by stride, padded rows": []}
    for _ in range(sizes.steps):
        lengths = chat_lengths(8 * sizes.processes, generator)
        flat = [sum(parts) for parts in lengths]
        rows = [(parts[0] + max(parts[1:])) * len(ROLES) for parts in lengths]
        strides = [list(range(len(lengths)))[first :: sizes.processes] for first in range(sizes.processes)]

        def padded(part: list[int], rows: list[int] = rows) -> int:
            plan = plan_padded([rows[i] for i in part], MICRO_BATCH_TOKENS)
            return sum(len(batch) * max(rows[part[i]] for i in batch) for batch in plan)

        alone = sum(parts[0] * len(ROLES) + sum(parts[1:]) for parts in lengths)
        for name, ideal, loads in (
            (
                "by tokens, flat (ours)",
                sum(flat),
                [sum(flat[i] for i in part) for part in dealt(flat, sizes.processes)],
            ),
            ("by stride, flat", sum(flat), [sum(flat[i] for i in part) for part in strides]),
            ("by stride, padded rows", alone, [padded(part) for part in strides]),
        ):
            shares[name].append(ideal / sizes.processes / max(loads))
    return [
        {"dealt": name, "processes": sizes.processes, "share_of_ideal": float(np.mean(of)), "lowest": min(of)}
        for name, of in shares.items()
    ]


def sampling_rows(count: int) -> list[dict]:
    """Responses of the pocket model to the first `count` of its prompts: three ways to decode."""
    model, tokenizer = load_model(str(POCKET_MODEL)).to(DEVICE), load_tokenizer(str(POCKET_MODEL))
    prompts = pocket_prompts(tokenizer, count)
    decoding = Decoding(0.0, 1.0, 40, batch_size=64)  # the preset's, but for its temperature
    segment = tspin.sampling.FIRST_SEGMENT

    def in_segments_from(first: int) -> None:
        tspin.sampling.FIRST_SEGMENT = first
        tspin.sampling.sample(model, tokenizer, prompts, decoding, seed=0)

    greedy = GenerationConfig(max_new_tokens=decoding.max_new_tokens, do_sample=False,
                              eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    # As many rows at once as the others have; unbounded, the cache takes nine tenths of the machine's memory.
    cache = ContinuousBatchingConfig(num_blocks=decoding.batch_size, max_batch_tokens=1024)

    def continuous() -> None:
        model.generate_batch(inputs=prompts, generation_config=greedy, continuous_batching_config=cache)

    ways = {
        "generate": lambda: in_segments_from(10_000),
        "generate in segments (ours)": lambda: in_segments_from(segment),
        "continuous batching": continuous,
    }
    try:
        return timed("decoding", ways, rounds=2, prompts=count)
    finally:
        tspin.sampling.FIRST_SEGMENT = segment


KINDS = {
    "matrix products": ("mm", "linear", "bmm", "gemm"),
    "attention": ("attention", "flash", "fmha"),
    "copies and allocation": ("copy_", "cat", "fill_", "zero_", "empty", "clone", "to_copy"),
    "softmax and loss": ("softmax", "nll", "logsumexp", "cross_entropy"),
}


def profile_rows(shape: str, sizes: Sizes) -> list[dict]:
    """Share of the processor's time by kind of operation, in one T-SPIN step of each model."""
    work = {
        "pocket": (load_model(str(POCKET_MODEL)).to(DEVICE), triplets(sizes.pocket_batch, 60, 0.8)),
        shape: (build(shape), triplets(sizes.batch, sizes.tokens, MIXES[EVEN])),
    }
    rows = []
    for name, (model, batch) in work.items():
        step = CONTENDERS["tspin shared"].make(model, batch)
        step(batch)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
            step(batch)
        spent: dict[str, float] = defaultdict(float)
        for event in measured.key_averages():
            time = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
            spent[next((k for k, parts in KINDS.items() if any(p in event.key for p in parts)), "the rest")] += time
        total, what = sum(spent.values()), f"{name}, {len(batch)} triplets"
        rows += [{"step": what, "kind": kind, "share": time / total} for kind, time in sorted(spent.items())]
    return rows

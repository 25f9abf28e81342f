"""Where a step's and an iteration's time goes, and what the choices behind the fast path were made by."""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import ContinuousBatchingConfig, GenerationConfig

import tspin.sampling
from experiments.checks.benchmark.contenders import CONTENDERS
from experiments.checks.benchmark.workload import DEVICE, EVEN, MIXES, Sizes, build, pocket_prompts, seconds, triplets
from tspin.config import Decoding
from tspin.devices import multiplies_bfloat16
from tspin.logprobs import LOGITS_PER_CHUNK
from tspin.models import POCKET_MODEL, load_model, load_tokenizer


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
    dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, width, device=DEVICE) * 0.05).to(dtype).requires_grad_()
    states = torch.randn(tokens, width, device=DEVICE, dtype=dtype).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=DEVICE)
    chunk = LOGITS_PER_CHUNK // vocabulary

    def whole(states, target):
        return cross_entropy(linear(states, weight).float(), target, reduction="none")

    def chunked(states, target):
        pairs = zip(states.split(chunk), target.split(chunk), strict=True)
        return torch.cat([checkpoint(whole, *pair, use_reentrant=False) for pair in pairs])

    def library(states, target):
        options = torch.nn.LinearCrossEntropyOptions()
        return linear_cross_entropy(states, weight, target, reduction="none", options=options)

    heads = {"all logits at once": whole, "chunks, computed again (ours)": chunked, "linear_cross_entropy": library}
    ways = {name: lambda head=head: head(states, target).float().sum().backward() for name, head in heads.items()}
    return timed("head", ways, rounds=3, tokens=tokens, vocabulary=vocabulary)


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

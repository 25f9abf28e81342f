"""Where a step's and an iteration's time goes, and what the choices behind the fast path were made by."""

import dataclasses

import torch
from contenders import CONTENDERS, ours
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from workload import MIXES, build, triplets

import tspin.sampling
from tspin.config import load_config
from tspin.data.encoding import encode_dataset
from tspin.experiment.preset import load_dataset, training_arguments
from tspin.logprobs import LOGITS_PER_CHUNK
from tspin.models import POCKET_MODEL, load_model, load_tokenizer, multiplies_bfloat16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def head_rows(seconds) -> list[dict]:
    """Log-probabilities of response tokens from hidden states, forward and backward, three ways."""
    vocabulary, hidden, tokens = 49152, 576, 1536
    dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, hidden, device=DEVICE) * 0.05).to(dtype).requires_grad_()
    states = torch.randn(tokens, hidden, device=DEVICE, dtype=dtype).requires_grad_()
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

    rows = []
    ways = {"all logits at once": whole, "chunks, computed again (ours)": chunked, "linear_cross_entropy": library}
    for name, function in ways.items():
        times = [seconds(lambda f=function: f(states, target).float().sum().backward()) for _ in range(4)]
        rows.append({"head": name, "tokens": tokens, "vocabulary": vocabulary, "seconds": min(times[1:])})
        print(f"{name}: {rows[-1]['seconds']:.2f} s", flush=True)
    return rows


def sampling_rows(seconds) -> list[dict]:
    """Responses of the pocket model to 256 of its prompts: three ways to decode."""
    settings = load_config("pocket").for_method("tspin")
    arguments = training_arguments(settings, POCKET_MODEL / "unused", 0)
    model, tokenizer = load_model(str(POCKET_MODEL)).to(DEVICE), load_tokenizer(str(POCKET_MODEL))
    prompts = encode_dataset(load_dataset(settings.data), tokenizer, arguments).prompts[:256]
    decoding = dataclasses.replace(arguments.decoding, temperature=0)
    segment = tspin.sampling.FIRST_SEGMENT

    def sampled(first: int) -> None:
        tspin.sampling.FIRST_SEGMENT = first
        tspin.sampling.sample(model, tokenizer, prompts, decoding, seed=0)

    def continuous() -> None:
        greedy = GenerationConfig(max_new_tokens=decoding.max_new_tokens, do_sample=False,
                                  eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        model.generate_batch(inputs=[list(ids) for ids in prompts], generation_config=greedy, progress_bar=False)

    rows = []
    ways = {
        "generate": lambda: sampled(10_000),
        "generate in segments (ours)": lambda: sampled(segment),
        "continuous batching": continuous,
    }
    for name, work in ways.items():
        try:
            times = [seconds(work) for _ in range(3)]
        except Exception as error:  # continuous batching needs what not every machine has
            print(f"{name}: did not run ({type(error).__name__}: {error})", flush=True)
            continue
        rows.append({"decoding": name, "prompts": len(prompts), "seconds": min(times[1:])})
        print(f"{name}: {rows[-1]['seconds']:.2f} s", flush=True)
    tspin.sampling.FIRST_SEGMENT = segment
    return rows


KINDS = {
    "matrix products": ("mm", "linear", "bmm", "gemm"),
    "attention": ("attention", "flash", "fmha"),
    "copies and allocation": ("copy_", "cat", "fill_", "zero_", "empty", "clone", "to_copy"),
    "softmax and loss": ("softmax", "nll", "logsumexp", "cross_entropy"),
}


def profile_rows() -> list[dict]:
    """Share of the processor's time by kind of operation, in one T-SPIN step of each model."""
    batch = triplets(8, 128, MIXES["even 1:1"])
    settings = load_config("pocket").for_method("tspin").training
    pocket = load_model(str(POCKET_MODEL)).to(DEVICE)
    cases = {
        f"pocket, {settings.batch_size} triplets": (
            ours("tspin", "shared", pocket, triplets(settings.batch_size, 60, 0.8)), triplets(32, 60, 0.8)),
        "SmolLM2-135M, 8 triplets": (CONTENDERS["tspin shared"][2](build("SmolLM2-135M"), batch), batch),
    }  # fmt: skip
    rows = []
    for name, (step, work) in cases.items():
        step(work)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
            step(work)
        spent: dict[str, float] = {}
        for event in measured.key_averages():
            time = event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total
            kind = next((k for k, parts in KINDS.items() if any(part in event.key for part in parts)), "the rest")
            spent[kind] = spent.get(kind, 0.0) + time
        total = sum(spent.values())
        rows += [{"step": name, "kind": kind, "share": time / total} for kind, time in sorted(spent.items())]
    return rows

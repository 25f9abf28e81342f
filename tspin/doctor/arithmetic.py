"""Log-probabilities: each layout and each sampler against the plain definition and the trainer."""

from importlib.util import find_spec

import numpy as np
import pandas as pd
import torch

from tspin.canaries import sampler
from tspin.devices import device
from tspin.doctor.bench import Bench, triplets_of
from tspin.engines.engine import Engine
from tspin.engines.here import Scoring, score
from tspin.models import load_model
from tspin.planning.checks import Finding
from tspin.schema import SYNTHETIC

BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}  # nats per token: two ways to a number differ by rounding
LAYOUTS = ("shared", "padded")
PROMPTS = 12
NEW_TOKENS = 12


def check_layouts(bench: Bench) -> Finding:
    """The trainer's layouts in float32 against sums of a plain forward pass, row by row."""
    return _layouts(bench, "float32", "layouts")


def check_kernel(bench: Bench) -> Finding:
    """The same in bfloat16, where one kernel takes all segments (tspin.segments)."""
    name = "layouts, bfloat16"
    return _layouts(bench, "bfloat16", name) if bench.on_gpu else Finding(name, "skipped", "no GPU, no such kernel")


def _layouts(bench: Bench, dtype: str, name: str) -> Finding:
    wanted = plain_logps(bench, dtype)
    gaps = {}
    for layout in LAYOUTS:
        model = load_model(bench.policy.folder, {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"})
        found = score(model, bench.triplets, Scoring(bench.tokenizer, bench.args("layouts", layout=layout)))
        each = [
            abs(value - plain) / length
            for role, values in found.items()
            for value, (plain, length) in zip(values, wanted[role], strict=True)
        ]
        gaps[layout] = float(np.max(each))  # Python's max passes over what is no number
    return _bounded(name, "largest distance from the plain definition, nats per token", gaps, BOUNDS[dtype])


@torch.no_grad()
def plain_logps(bench: Bench, dtype: str) -> dict[str, list[tuple[float, int]]]:
    """Role → (log π in nats, tokens) of each response: one row, no padding, no cache."""
    loading = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    model = load_model(bench.policy.folder, loading).to(device()).eval()  # type: ignore[arg-type]
    found: dict[str, list[tuple[float, int]]] = {role: [] for role in bench.triplets.roles}
    for triplet in bench.triplets:
        for role, response in triplet.responses.items():
            row = torch.tensor([[*triplet.prompt_ids, *response.ids]], device=device())
            logps = model(input_ids=row, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            drawn = logps.gather(1, row[0, 1:, None])[len(triplet.prompt_ids) - 1 :]
            found[role].append((float(drawn.sum()), len(response.ids)))
    return found


def check_sampler(bench: Bench) -> Finding:
    """The sampler of Transformers against the trainer."""
    return _sampler(bench, "transformers", "sampler")


def check_vllm(bench: Bench) -> Finding:
    """vLLM against the trainer."""
    name = "sampler, vllm"
    if find_spec("vllm") is None:
        return Finding(name, "skipped", "vllm is not installed (pip install 'tspin[gpu]')")
    return _sampler(bench, "vllm", name) if bench.on_gpu else Finding(name, "skipped", "no GPU")


def _sampler(bench: Bench, backend: str, name: str) -> Finding:
    args = bench.args(name, sampling_backend=backend, max_new_tokens=NEW_TOKENS)
    engine = Engine(args, bench.tokenizer, {"dtype": torch.float32, "attn_implementation": "sdpa"})
    prompts = [triplet.prompt_ids for triplet in bench.triplets]
    drawn = engine.sample(bench.policy, prompts, seed=0)
    triplets = triplets_of(prompts, {SYNTHETIC: [response.ids for response in drawn]})
    scored = engine.score(bench.policy, triplets, "the sampler")
    engine.release()
    table = pd.DataFrame({"role": SYNTHETIC, "prompt_id": range(len(prompts)), "before": scored[SYNTHETIC]})
    canary = sampler(enumerate(drawn), table, "float32")["sampler"]
    return _bounded(name, "mean distance from the trainer, nats per token", {backend: canary.value}, canary.bound)


def _bounded(name: str, what: str, values: dict[str, float], bound: float) -> Finding:
    """The finding of numbers none of which may be larger than `bound`."""
    text = f"{what}: {', '.join(f'{of} {value:.1e}' for of, value in values.items())}"
    if all(value <= bound for value in values.values()):  # never true of what is no number
        return Finding(name, "ok", text, values)
    return Finding(name, "failed", f"{text} (at most {bound:g})", values)

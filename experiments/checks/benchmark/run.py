"""`make benchmark`: time and memory of a training step, ours beside what users would run instead.

    python -m experiments.checks.benchmark.run                  # about 20 minutes on two cores
    python -m experiments.checks.benchmark.run --tiny --out /tmp/benchmark    # every part, on a model of no use

Writes results/benchmarks/<cpu, cpu-float32 or gpu>/: steps.csv, memory.csv, growth.csv, attention.csv, balance.csv,
heads.csv, sampling.csv, profile.csv and provenance.json. All contenders of a table run in one process on the same
triplets, warmed up, taking turns; memory is measured in a process of its own each. Every figure is a median over
rounds; compare ratios, not seconds.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from experiments.checks.benchmark.contenders import CONTENDERS, MICRO_BATCH_TOKENS, installed
from experiments.checks.benchmark.details import attention_rows, balance_rows, head_rows, profile_rows, sampling_rows
from experiments.checks.benchmark.workload import (
    ARITHMETIC,
    DEVICE,
    EVEN,
    FULL,
    LARGE,
    MIXES,
    SHAPES,
    TINY,
    Sizes,
    build,
    flops,
    prompt_tokens,
    response_tokens,
    seconds,
    triplets,
)
from experiments.checks.evidence import measured_apart, write_evidence
from tspin.cli.guard import quiet_libraries
from tspin.devices import peak_bytes, reset_peak, resident, without_denormals


def matmul_rate(size: int) -> float:
    """Floating-point operations per second of a matrix product in the steps' arithmetic, the best of several."""
    a, b = (torch.randn(size, size, dtype=ARITHMETIC, device=DEVICE) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10))


def step_rows(shape: str, sizes: Sizes, rate: float) -> list[dict]:
    """Time of a step by length mix and contender; how far its matrix products are from the machine's speed."""
    rows = []
    for mix, share in MIXES.items():
        batch = triplets(sizes.batch, sizes.tokens, share)
        left_out = [] if mix == EVEN else sizes.even_alone
        contenders = {k: v for k, v in installed().items() if k not in left_out}
        if shape == LARGE:
            contenders = {k: v for k, v in contenders.items() if k in sizes.large_alone}
        steps = {name: contender.make(build(shape), batch) for name, contender in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(sizes.rounds + 1):
            for name, step in steps.items():
                taken = seconds(lambda step=step, batch=batch: step(batch))
                if turn:  # the first is a warm-up
                    times[name].append(taken)
        for name, contender in contenders.items():
            median = statistics.median(times[name])
            rows.append({
                "model": shape, "mix": mix, "step": name, "batch": sizes.batch, "seconds": median,
                "fastest": min(times[name]), "slowest": max(times[name]), "prompts_per_second": sizes.batch / median,
                "response_tokens_per_second": response_tokens(batch, contender.responses) / median,
                "share_of_matmul_rate": flops(shape, batch, contender.responses, contender.prompts) / median / rate,
            })  # fmt: skip
            print(f"{shape}, {mix}, {name}: {median:.2f} s", flush=True)
        del steps, step  # one mix's models at a time
        gc.collect()
    return rows


def memory_rows(shape: str, sizes: Sizes, options: list[str]) -> list[dict]:
    """Peak memory of a step of sizes.memory_batch prompts: everything but the interpreter and its libraries."""
    rows = []
    for name in sizes.weighed:
        try:
            peak = measured_apart(__spec__.name, ["--memory-of", name, "--shape", shape, *options])
        except RuntimeError as error:  # one that does not fit leaves the others'
            print(f"memory of {name}: not measured ({error})", flush=True)
            continue
        rows.append({"model": shape, "mix": EVEN, "step": name, "batch": sizes.memory_batch, "peak_bytes": peak})
        print(f"memory of {name}: {peak / 2**30:.2f} GiB", flush=True)
    return rows


def peak_memory(name: str, shape: str, sizes: Sizes) -> int:
    """Bytes that a step takes at its peak, the model and the optimizer's state included."""
    batch = triplets(sizes.memory_batch, sizes.tokens, MIXES[EVEN])
    before = 0 if DEVICE == "cuda" else resident("VmRSS") or 0
    step = CONTENDERS[name].make(build(shape), batch)
    step(batch[:1])  # the optimizer's state
    reset_peak()
    step(batch)
    return (peak_bytes() or 0) - before


def growth_rows(shape: str, sizes: Sizes) -> list[dict]:
    """Time of T-SPIN's step as the batch grows, and as sequences grow while their tokens together stay the same."""
    cases = [("batch", size, triplets(size, sizes.tokens, MIXES[EVEN], spread=0)) for size in sizes.batches]
    for length in sizes.lengths:  # a prompt of half the length, three responses share the rest
        count, tokens, prompt_share = sizes.fixed_tokens // length, length * 2 // 3, 3 / 4
        cases.append(("length", length, triplets(count, tokens, prompt_share, spread=0)))
    step = CONTENDERS["tspin shared"].make(build(shape), cases[0][2])
    step(cases[1][2])
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(sizes.rounds):
        for of, (_, _, batch) in zip(times, cases, strict=True):
            of.append(seconds(lambda batch=batch: step(batch)))
    rows = []
    for of, (what, value, batch) in zip(times, cases, strict=True):
        tokens, median = prompt_tokens(batch) + response_tokens(batch), statistics.median(of)
        rows.append({"model": shape, "grows": what, "value": value, "examples": len(batch), "tokens": tokens,
                     "seconds": median, "seconds_per_1000_tokens": 1000 * median / tokens})  # fmt: skip
        print(f"{what} {value}: {median:.2f} s, {tokens} tokens", flush=True)
    return rows


@without_denormals()  # for all contenders: by themselves, TRL and the others would be slower on a CPU
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: results/benchmarks")
    parser.add_argument("--shape", choices=SHAPES, help="measure this model alone")
    parser.add_argument("--tiny", action="store_true", help="every part in seconds; its numbers mean nothing")
    parser.add_argument("--memory-of", choices=CONTENDERS, help="print the bytes of one contender's step, no more")
    arguments = parser.parse_args()
    quiet_libraries()
    warnings.filterwarnings("ignore")
    sizes = TINY if arguments.tiny else FULL
    if arguments.shape:
        sizes = dataclasses.replace(sizes, shapes=(arguments.shape,))
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments.memory_of, sizes.shapes[0], sizes)))
        return
    if arguments.tiny and not arguments.out:
        parser.error("--tiny needs --out FOLDER: results/ is for real measurements")
    start = time.monotonic()
    first, options = sizes.shapes[0], ["--tiny"] if arguments.tiny else []
    rate = matmul_rate(sizes.matrix)
    print(f"matrix product in {str(ARITHMETIC).removeprefix('torch.')}: {rate / 1e9:.0f} GFLOP/s", flush=True)
    tables: dict[str, Callable[[], list[dict]]] = {
        "memory": lambda: [row for shape in sizes.shapes for row in memory_rows(shape, sizes, options)],
        "steps": lambda: [row for shape in sizes.shapes for row in step_rows(shape, sizes, rate)],
        "growth": lambda: growth_rows(first, sizes),
        "attention": lambda: attention_rows(first, sizes),
        "balance": lambda: balance_rows(sizes),
        "heads": lambda: head_rows(*sizes.head),
        "sampling": lambda: sampling_rows(sizes.prompts),
        "profile": lambda: profile_rows(first, sizes),
    }
    kind = "gpu" if DEVICE == "cuda" else "cpu" if ARITHMETIC == torch.bfloat16 else "cpu-float32"
    folder = (arguments.out or Path("results/benchmarks")) / kind
    facts = {"matmul_flops_per_second": round(rate), "micro_batch_tokens": MICRO_BATCH_TOKENS, "rounds": sizes.rounds}
    facts["arithmetic"] = str(ARITHMETIC).removeprefix("torch.")
    for name, measure in tables.items():  # each is written when it is there: what ends early leaves them
        write_evidence(folder, {name: pd.DataFrame(measure())}, start, **facts)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

"""`make benchmark`: time and memory of a training step, ours beside what users would run instead.

Writes results/benchmarks/<device>/: steps.csv, memory.csv, growth.csv, heads.csv, sampling.csv, profile.csv and
provenance.json. All contenders of a table run in one process on the same triplets, warmed up, taking turns; memory
is measured in a process of its own each. Every figure is a median over rounds; compare ratios, not seconds.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tspin.cli.guard import quiet_libraries  # noqa: E402

quiet_libraries()

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from contenders import CONTENDERS, MICRO_BATCH_TOKENS  # noqa: E402
from details import head_rows, profile_rows, sampling_rows  # noqa: E402
from workload import MIXES, SHAPES, build, flops, triplets  # noqa: E402

from tspin.runs.files import write_json, write_text  # noqa: E402
from tspin.runs.provenance import provenance  # noqa: E402

TOKENS = 128  # of a prompt with its response, in the mean
BATCH, MEMORY_BATCH, ROUNDS = 8, 16, 2
BATCHES, LENGTHS, FIXED_TOKENS = (1, 4, 16, 64), (256, 512, 1024, 2048, 4096), 4096


def seconds(work) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def matmul_rate() -> float:
    """Floating-point operations per second of this machine's bfloat16 matrix product, the best of several."""
    size = 8192 if torch.cuda.is_available() else 2048
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10))


def step_rows(shape: str, rate: float) -> list[dict]:
    rows = []
    for mix, share in MIXES.items():
        batch = triplets(BATCH, TOKENS, share)
        steps = {name: make(build(shape), batch) for name, (_, _, make) in CONTENDERS.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(ROUNDS + 1):
            for name, step in steps.items():
                taken = seconds(lambda step=step, batch=batch: step(batch))
                if turn:  # the first is a warm-up
                    times[name].append(taken)
        for name, (responses, prompts, _) in CONTENDERS.items():
            median = statistics.median(times[name])
            answered = sum(len(r.ids) for t in batch for r in list(t.responses.values())[:responses])
            rows.append({
                "model": shape, "mix": mix, "step": name, "batch": BATCH, "seconds": median,
                "fastest": min(times[name]), "slowest": max(times[name]), "prompts_per_second": BATCH / median,
                "response_tokens_per_second": answered / median,
                "share_of_matmul_rate": flops(shape, batch, responses, prompts) / median / rate,
            })  # fmt: skip
            print(f"{shape}, {mix}, {name}: {median:.2f} s", flush=True)
        del steps, step  # one mix's models at a time
        gc.collect()
    return rows


def memory_rows(shape: str) -> list[dict]:
    """Peak memory of a step of MEMORY_BATCH prompts: everything but the interpreter and its libraries."""
    rows = []
    for name in ("tspin shared", "tspin padded", "tspin concatenated", "TRL DPO", "SPIN, live reference"):
        command = [sys.executable, __file__, "--memory-of", name, "--shape", shape]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(
                f"memory of {name}: not measured ({(done.stderr.strip().splitlines() or ['killed'])[-1]})", flush=True
            )
            continue
        rows.append({"model": shape, "mix": "even 1:1", "step": name, "batch": MEMORY_BATCH,
                     "peak_bytes": json.loads(done.stdout.splitlines()[-1])})  # fmt: skip
        print(f"memory of {name}: {rows[-1]['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    return rows


def peak_memory(name: str, shape: str) -> int:
    batch = triplets(MEMORY_BATCH, TOKENS, MIXES["even 1:1"])
    make = CONTENDERS[name][2]
    before = resident("VmRSS")
    step = make(build(shape), batch)
    step(batch[:1])  # the optimizer's state
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    step(batch)
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def growth_rows(shape: str) -> list[dict]:
    """Time of T-SPIN's step as the batch grows, and as sequences grow while their tokens together stay the same."""
    even = MIXES["even 1:1"]
    cases = [("batch", size, triplets(size, TOKENS, even, spread=0)) for size in BATCHES]
    for length in LENGTHS:  # a prompt of half the length, three responses share the rest
        prompt_share = 3 / 4
        one = length * 2 // 3
        cases.append(("length", length, triplets(FIXED_TOKENS // length, one, prompt_share, spread=0)))
    step = CONTENDERS["tspin shared"][2](build(shape), cases[0][2])
    rows = []
    step(cases[1][2])
    for what, value, batch in cases:
        times = [seconds(lambda batch=batch: step(batch)) for _ in range(2)]
        tokens = sum(len(t.prompt_ids) + sum(len(r.ids) for r in t.responses.values()) for t in batch)
        rows.append({"model": shape, "grows": what, "value": value, "examples": len(batch), "tokens": tokens,
                     "seconds": min(times), "seconds_per_1000_tokens": 1000 * min(times) / tokens})  # fmt: skip
        print(f"{what} {value}: {min(times):.2f} s, {tokens} tokens", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--shape", choices=SHAPES, default="SmolLM2-135M")
    parser.add_argument("--memory-of", choices=CONTENDERS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    if given.memory_of:
        print(peak_memory(given.memory_of, given.shape))
        return
    start = time.perf_counter()
    rate = matmul_rate()
    print(f"bfloat16 matrix product: {rate / 1e9:.0f} GFLOP/s", flush=True)
    shapes = list(SHAPES) if torch.cuda.is_available() else [given.shape]
    folder = given.out / ("gpu" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        # Memory first: this process holds no model yet.
        "memory": lambda: [row for shape in shapes for row in memory_rows(shape)],
        "steps": lambda: [row for shape in shapes for row in step_rows(shape, rate)],
        "growth": lambda: growth_rows(given.shape),
        "heads": lambda: head_rows(seconds),
        "sampling": lambda: sampling_rows(seconds),
        "profile": profile_rows,
    }
    for name, measured in tables.items():
        write_text(folder / f"{name}.csv", pd.DataFrame(measured()).to_csv(index=False, float_format="%.5g"))
    facts = {
        "matmul_flops_per_second": round(rate),
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "rounds": ROUNDS,
        "seconds": round(time.perf_counter() - start),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write_json(folder / "provenance.json", {**provenance(), **facts})
    print(f"wrote {folder}, {facts['seconds']} s")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

"""The memory model of `tspin plan` against measured peaks: two optimizer steps per case, each in a process of its own.

    make plan-check               # 10 to 20 minutes on two cores → results/benchmarks/plan/memory.csv

On a CPU the peak is the process's resident memory, above what it was before the model was built. The allocator is told
to give back what is freed, so that resident is what tensors hold.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import pandas as pd

from experiments.checks.evidence import measured_apart, write_evidence
from tspin.doctor.peaks import MODELS, ROW, WIDE, predicted, step

# glibc keeps freed blocks below its threshold, which grows by itself unless it is set.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096], help=f"of micro-batches; {ROW} or more")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/plan"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*json.loads(arguments.case))))
        return
    rows, start = [], time.monotonic()
    for case in product(arguments.models, arguments.tokens, (False, True)):
        model, tokens, checkpointing = case
        if model == WIDE and tokens > 1024:  # more than these machines have
            continue
        row = measured_apart(__spec__.name, ["--case", json.dumps(case)], ALLOCATOR)
        row["error_percent"] = round(100 * (row["predicted_bytes"] / row["measured_bytes"] - 1), 1)
        rows.append(row)
        predicted, measured = (row[f"{what}_bytes"] / 2**30 for what in ("predicted", "measured"))
        print(
            f"{model}, {tokens} tokens{', gradient checkpointing' * checkpointing}: {predicted:.2f} GiB predicted, "
            f"{measured:.2f} measured, {row['error_percent']:+.0f} %",
            flush=True,
        )
    write_evidence(arguments.out, {"memory": pd.DataFrame(rows)}, start)


def measure(name: str, tokens: int, checkpointing: bool) -> dict:
    """T-SPIN steps of two micro-batches of `tokens` tokens: predicted and measured peak."""
    step("pocket", ROW, False)  # what libraries load at first use is not the model's
    args, _, peak = step(name, tokens, checkpointing)
    return {
        "model": name,
        "micro_batch_tokens": tokens,
        "gradient_checkpointing": checkpointing,
        "bf16": bool(args.bf16),
        "predicted_bytes": predicted(name, tokens, checkpointing, bool(args.bf16)),
        "measured_bytes": peak,
    }


if __name__ == "__main__":
    main()

"""The memory model of `tspin plan` against measured peaks: two optimizer steps a case, each in a process of its own.

    make plan-check               # 10 to 20 minutes on two cores → results/benchmarks/plan/memory.csv

On a CPU the peak is the process's resident memory, above what it was before the model was built. The allocator is told
to give back what is freed, so that resident is what tensors hold.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tspin.data.responses import Response
from tspin.devices import resident
from tspin.engines.here import train_iteration
from tspin.models import POCKET_MODEL, load_tokenizer
from tspin.objectives import LABELLED, PROTO, SYNTHETIC
from tspin.planning.architectures import find_config, shape_of
from tspin.planning.peaks import MicroBatch, Precision, training_parts
from tspin.runs.stages import provenance, write_json, write_text
from tspin.selfplay_config import SelfPlayConfig
from tspin.triplets import Triplet

OUT = Path("results/benchmarks/plan")
LAYERS = {"two layers of 7B width": ("mistralai/Mistral-7B-v0.1", {"num_hidden_layers": 2, "vocab_size": 8192})}
MODELS = {"pocket": ("pocket", {}), "SmolLM2-135M": ("HuggingFaceTB/SmolLM2-135M", {}), **LAYERS}
LENGTHS = (64, 64)  # of each prompt and of each response
STEPS = 2  # optimizers make their state at the end of the first
ROW = LENGTHS[0] + 3 * LENGTHS[1]
CASES = [
    (model, tokens, checkpointing)
    for model in MODELS
    for tokens in (1024, 4096)
    for checkpointing in (False, True)
    if not (model in LAYERS and tokens > 1024)
]


# glibc keeps freed blocks below its threshold, which grows by itself unless it is set.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
        return
    rows, start = [], time.monotonic()
    for case in CASES:
        command, environment = [sys.executable, __file__, json.dumps(case)], {**os.environ, **ALLOCATOR}
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(output.stdout.splitlines()[-1])
        row["error_percent"] = 100 * (row["predicted_bytes"] / row["measured_bytes"] - 1)
        rows.append(row)
        predicted, measured = (row[f"{what}_bytes"] / 2**30 for what in ("predicted", "measured"))
        checkpointing = ", gradient checkpointing" if row["gradient_checkpointing"] else ""
        print(
            f"{row['model']}, {row['micro_batch_tokens']} tokens{checkpointing}: {predicted:.2f} GiB predicted, "
            f"{measured:.2f} measured, {row['error_percent']:+.0f} %",
            flush=True,
        )
    table = pd.DataFrame(rows)
    write_text(OUT / "memory.csv", table.to_csv(index=False, float_format="%.1f", lineterminator="\n"))
    write_json(OUT / "provenance.json", {**provenance(), "seconds": round(time.monotonic() - start)})
    print(f"wrote {OUT / 'memory.csv'}")


def measure(name: str, tokens: int, checkpointing: bool) -> dict:
    """T-SPIN steps of two micro-batches of `tokens` tokens: predicted and measured peak."""
    step("pocket", ROW, False)  # what libraries load at first use is not the model's
    config, args, peak = step(name, tokens, checkpointing)
    batch = MicroBatch(tokens=tokens, row_tokens=ROW, response_tokens=tokens * 3 * LENGTHS[1] // ROW, count=2)
    precision = Precision(4, 2 if args.bf16 else 4)
    parts = training_parts(
        shape_of(config), precision, batch, optimizer="rmsprop", checkpointing=checkpointing, foreach=False
    )
    return {
        "model": name,
        "micro_batch_tokens": tokens,
        "gradient_checkpointing": checkpointing,
        "bf16": bool(args.bf16),
        "predicted_bytes": sum(parts.values()),
        "measured_bytes": peak,
    }


def step(name: str, tokens: int, checkpointing: bool) -> tuple[PreTrainedConfig, SelfPlayConfig, int]:
    """Make a model and train it for STEPS steps; its config, the settings, and the peak above what was there before."""
    path, changes = MODELS[name]
    config = AutoConfig.for_model(**{**find_config(path).to_dict(), **changes})
    batch = 2 * tokens // ROW
    count = STEPS * batch
    prompt, response = ([5] * length for length in LENGTHS)
    drawn = Response(response, "", False)
    responses = dict.fromkeys((LABELLED, SYNTHETIC, PROTO), drawn)
    triplets = [Triplet(number, prompt, responses) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        args = SelfPlayConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            micro_batch_tokens=tokens,
            gradient_checkpointing=checkpointing,
            report_to=[],
            disable_tqdm=True,
        )
        before = resident("VmRSS") or 0
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        arguments = {"checkpoint": Path(folder) / "model", "log_folder": Path(folder)}
        facts = train_iteration(model, triplets, load_tokenizer(str(POCKET_MODEL)), args, 1, **arguments)
    return config, args, facts["peak_memory_bytes"] - before


if __name__ == "__main__":
    main()

"""The memory model of `tspin plan` against measured peaks: two optimizer steps per case, each in a process of its own.

    make plan-check               # 10 to 20 minutes on two cores → results/benchmarks/plan/memory.csv

On a CPU the peak is the process's resident memory, above what it was before the model was built. The allocator is told
to give back what is freed, so that resident is what tensors hold.
"""

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from experiments.checks.evidence import measured_apart, write_evidence
from tspin.config import SelfPlayConfig
from tspin.data.responses import Response
from tspin.devices import resident
from tspin.engines.here import Training, train
from tspin.models import POCKET_MODEL, load_tokenizer
from tspin.planning.architectures import find_config, shape_of
from tspin.planning.peaks import MicroBatch, Optimizer, Precision, training_parts
from tspin.schema import LABELLED, PROTO, SYNTHETIC
from tspin.triplets import Triplet

WIDE = "two layers of 7B width"  # at 4,096 tokens more than these machines have
MODELS = {
    "pocket": ("pocket", {}),
    "SmolLM2-135M": ("HuggingFaceTB/SmolLM2-135M", {}),
    WIDE: ("mistralai/Mistral-7B-v0.1", {"num_hidden_layers": 2, "vocab_size": 8192}),
}
LENGTHS = (64, 64)  # of each prompt and of each response
STEPS = 2  # optimizers make their state at the end of the first
ROW = LENGTHS[0] + 3 * LENGTHS[1]
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
        if model == WIDE and tokens > 1024:
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
    _, args, peak = step(name, tokens, checkpointing)
    return {
        "model": name,
        "micro_batch_tokens": tokens,
        "gradient_checkpointing": checkpointing,
        "bf16": bool(args.bf16),
        "predicted_bytes": predicted(name, tokens, checkpointing, bool(args.bf16)),
        "measured_bytes": peak,
    }


def predicted(name: str, tokens: int, checkpointing: bool, bf16: bool) -> int:
    """Bytes that `tspin plan` predicts for the same steps."""
    responses = tokens * 3 * LENGTHS[1] // ROW
    batch = MicroBatch(tokens, row_tokens=ROW, response_tokens=responses, count=2, checkpointing=checkpointing)
    precision, optimizer = Precision(4, 2 if bf16 else 4), Optimizer("rmsprop", foreach=False)
    return sum(training_parts(shape_of(model_config(name)), precision, batch, optimizer).values())


def model_config(name: str) -> PreTrainedConfig:
    """Of one of MODELS."""
    path, changes = MODELS[name]
    return AutoConfig.for_model(**{**find_config(path).to_dict(), **changes})


def step(name: str, tokens: int, checkpointing: bool) -> tuple[PreTrainedConfig, SelfPlayConfig, int]:
    """Make a model and train it for STEPS steps; its config, the settings, and the peak above what was there before."""
    config = model_config(name)
    batch = 2 * tokens // ROW
    count = STEPS * batch
    prompt, response = ([5] * length for length in LENGTHS)
    drawn = Response(response, "", False)
    responses = dict.fromkeys((LABELLED, SYNTHETIC, PROTO), drawn)
    triplets = [Triplet(number, prompt, responses) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        args = SelfPlayConfig(
            output_dir=folder,
            batch_size=batch,
            micro_batch_tokens=tokens,
            gradient_checkpointing=checkpointing,
            report_to=[],
            disable_tqdm=True,
        )
        before = resident("VmRSS") or 0
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tokenizer, place = load_tokenizer(str(POCKET_MODEL)), Path(folder)
        facts = train(model, Training(triplets, tokenizer, args, 1, place / "model", place))
    return config, args, facts["peak_memory_bytes"] - before


if __name__ == "__main__":
    main()

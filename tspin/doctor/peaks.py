"""Peak memory and speed of a few optimizer steps, beside what `tspin plan` predicts of them."""

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tspin.config import SelfPlayConfig
from tspin.data.responses import Response
from tspin.devices import accelerator_names, give_back, occupied_bytes
from tspin.doctor.bench import Bench
from tspin.engines.here import Training, train
from tspin.models import POCKET_MODEL, load_tokenizer
from tspin.planning.architectures import find_config, shape_of
from tspin.planning.checks import Finding
from tspin.planning.hardware import GPUS, Hardware
from tspin.planning.peaks import MicroBatch, Optimizer, Precision, training_parts
from tspin.schema import LABELLED, PROTO, SYNTHETIC
from tspin.triplets import Triplet

WIDE = "two layers of 7B width"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pocket": ("pocket", {}),
    "SmolLM2-135M": ("HuggingFaceTB/SmolLM2-135M", {}),
    WIDE: ("mistralai/Mistral-7B-v0.1", {"num_hidden_layers": 2, "vocab_size": 8192}),
}
LENGTHS = (64, 64)  # of each prompt and of each response
ROW = LENGTHS[0] + 3 * LENGTHS[1]
STEPS = 2  # optimizers make their state at the end of the first
TIMED = 6  # steps, the first of which start kernels and caches
TOKENS = 4096  # of a micro-batch
OFF = 0.25  # a prediction that is off by more is worth a report
SLOW = 0.25  # so much of the predicted speed: something is wrong with the machine, or it is not alone on it


def check_peak(bench: Bench) -> Finding:
    """Memory and tokens per second of T-SPIN steps of two layers of 7B width, measured and predicted."""
    if not bench.on_gpu:
        text = "no GPU: `make plan-check` measures memory on a CPU, in processes of their own"
        return Finding("memory and speed", "skipped", text)
    give_back()
    args, facts, peak = step(WIDE, TOKENS, False, TIMED)
    shape = shape_of(model_config(WIDE))
    return peak_finding(predicted(WIDE, TOKENS, False, bool(args.bf16)), peak, speed(shape.parameters), facts["speed"])


def peak_finding(planned: int, peak: int, planned_speed: float | None, found_speed: float) -> Finding:
    """planned, peak: bytes. The speeds are tokens per second; None: of a GPU that plan has no figures of."""
    numbers = {
        "predicted_bytes": planned,
        "measured_bytes": peak,
        "predicted_tokens_per_second": planned_speed,
        "measured_tokens_per_second": found_speed,
    }
    told = f"{peak / 2**30:.2f} GiB ({planned / 2**30:.2f} predicted), {found_speed:,.0f} tokens/s"
    told += f" ({planned_speed:,.0f} predicted)" if planned_speed else " (no prediction for this GPU)"
    if abs(planned / peak - 1) > OFF:
        text = f"{told}: plan's memory is off by {planned / peak - 1:+.0%}"
        return Finding("memory and speed", "warning", text, numbers)
    if planned_speed and found_speed < SLOW * planned_speed:
        return Finding("memory and speed", "warning", f"{told}: slow; is the GPU shared, or throttled?", numbers)
    return Finding("memory and speed", "ok", told, numbers)


def speed(parameters: int) -> float | None:
    """Tokens per second of a training on a GPU of this machine's kind as plan has it; None of an unknown one."""
    name = accelerator_names()[0].lower().replace(" ", "")
    kind = next((kind for kind in GPUS if kind in name), None)
    return Hardware(gpus=1, gpu=kind).flops / (6 * parameters) if kind else None  # see tspin.planning.work


def predicted(name: str, tokens: int, checkpointing: bool, bf16: bool) -> int:
    """Bytes that `tspin plan` predicts for T-SPIN steps of two micro-batches of `tokens` tokens."""
    responses = tokens * 3 * LENGTHS[1] // ROW
    batch = MicroBatch(tokens, row_tokens=ROW, response_tokens=responses, count=2, checkpointing=checkpointing)
    precision, optimizer = Precision(4, 2 if bf16 else 4), Optimizer("rmsprop", foreach=False)
    return sum(training_parts(shape_of(model_config(name)), precision, batch, optimizer).values())


def model_config(name: str) -> PreTrainedConfig:
    """Of one of MODELS."""
    path, changes = MODELS[name]
    return AutoConfig.for_model(**{**find_config(path).to_dict(), **changes})


def step(name: str, tokens: int, checkpointing: bool, steps: int = STEPS) -> tuple[SelfPlayConfig, dict[str, Any], int]:
    """Make a model and train it; returns the settings, train's facts, and the peak above what was there before.

    The facts have "speed" too: tokens per second of the later half of the steps.
    """
    batch = 2 * tokens // ROW
    prompt, response = ([5] * length for length in LENGTHS)
    drawn = Response(response, "", False)
    responses = dict.fromkeys((LABELLED, SYNTHETIC, PROTO), drawn)
    triplets = [Triplet(number, prompt, responses) for number in range(steps * batch)]
    with tempfile.TemporaryDirectory(prefix="tspin-doctor-") as folder:
        args = SelfPlayConfig(
            output_dir=folder,
            batch_size=batch,
            micro_batch_tokens=tokens,
            gradient_checkpointing=checkpointing,
            report_to=[],
            disable_tqdm=True,
        )
        before = occupied_bytes()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config(name), dtype=torch.float32)
        tokenizer, place = load_tokenizer(str(POCKET_MODEL)), Path(folder)
        facts = train(model, Training(triplets, tokenizer, args, 1, place / "model", place))
        speeds = pd.read_parquet(place / "steps.parquet")["tokens_per_second"]
    return args, {**facts, "speed": float(speeds[steps // 2 :].mean())}, facts["peak_memory_bytes"] - before

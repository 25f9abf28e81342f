"""Sampling and evaluation by vLLM, in processes of their own.

An engine keeps its GPU memory as long as its process lives, and its weights cannot follow a policy's. So every
sampling and every evaluation starts `python -m tspin.engines.vllm_worker` on a checkpoint's folder and waits for its
end: the weights are that checkpoint's, and the memory is free before training starts.
"""

import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value, interleave_datasets

from tspin.config import Decoding, EngineSettings
from tspin.data.mapped import FILE, read_in, without_bars
from tspin.data.turns import Stops
from tspin.engines.workers import Worker, gpu_environment, run_workers
from tspin.errors import UserError

PROMPTS = Features({"ids": List(Value("int32")), "seed": Value("int64"), "watched": Value("bool")})
PROMPT_FOLDER = "prompts"
DRAWN_SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float64()))])


def require_vllm(key: str, engine: EngineSettings, evaluates: bool = False) -> None:
    """Raise UserError where vLLM, or what it needs for `engine`, is missing. key: the setting that asks for it."""
    if find_spec("vllm") is None:
        raise UserError(f"{key}: vllm is not installed; pip install 'tspin[gpu]', or set {key}=transformers")
    if evaluates and engine.data_parallel > 1 and find_spec("ray") is None:
        raise UserError("engine.data_parallel: lm-eval's copies of vLLM need ray; pip install ray, or set it to 1")


@dataclass(frozen=True)
class Served:
    """A checkpoint as vLLM is to serve it. folder: the checkpoint's. dtype: "float32" or "bfloat16", of the weights."""

    folder: str
    dtype: str
    engine: EngineSettings
    trust_remote_code: bool = False

    def job(self, task: str) -> dict[str, Any]:
        """What the worker is told of it, as JSON values."""
        engine = self.engine.model_dump()
        known = {"model": self.folder, "dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        return {"task": task, "engine": engine, **known}


def generate_tokens(
    served: Served,
    prompts: Sequence[Sequence[int]],
    stop: Stops,
    *,
    decoding: Decoding,
    seed: int,
    watched: Collection[int] = (),
) -> Dataset:
    """One response per prompt: {"ids": token ids, those of its end included, "logprobs": nats per token}.

    prompts: token ids, special tokens included. watched: positions of those whose responses get log-probabilities,
    under the policy itself whatever the temperature. Each prompt has a generator of its own, seeded by `seed` and its
    position: neither data_parallel nor the batches decide what is drawn.
    Raises UserError, with the engine's last line, when an engine fails.
    """
    job = {
        **served.job("generate"),
        "end_tokens": stop.tokens,
        "end_text": stop.end.text if stop.end.token is None else None,  # which ordinary tokens spell
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "max_new_tokens": decoding.max_new_tokens,
        # Of the longest prompt of all, so that every copy is the same engine.
        "max_model_len": max(map(len, prompts)) + decoding.max_new_tokens,
    }
    copies = min(served.engine.data_parallel, len(prompts))
    seeded = ({"ids": list(ids), "seed": (seed + i) % 2**31, "watched": i in watched} for i, ids in enumerate(prompts))
    rows = read_in(lambda: seeded, PROMPTS)
    with tempfile.TemporaryDirectory(prefix="tspin-vllm-") as temporary, without_bars():
        folders = [Path(temporary) / str(copy) for copy in range(copies)]
        for copy, folder in enumerate(folders):
            rows.select(range(copy, len(rows), copies)).save_to_disk(folder / PROMPT_FOLDER)
        _run(folders, [job] * copies, served.engine.tensor_parallel)
        drawn = [Dataset.from_file(str(folder / FILE)) for folder in folders]
    # The copies had their prompts in turn.
    return interleave_datasets(drawn, stopping_strategy="all_exhausted_without_replacement")


def evaluate_folder(
    served: Served, suite: dict[str, Any], target: Path, *, limit: int | None, seed: int = 1234
) -> None:
    """Write scores.csv and samples.parquet, as tspin.evaluation.harness has them, to the folder `target`.

    suite: a Suite as JSON. lm-eval's own vLLM class runs it; with data_parallel, on Ray. Raises UserError, with the
    engine's last line, when it fails.
    """
    job = {
        **served.job("evaluate"),
        "suite": suite,
        "limit": limit,
        "seed": seed,
        "target": str(target.resolve()),
    }
    with tempfile.TemporaryDirectory(prefix="tspin-vllm-") as folder:
        _run([Path(folder) / "0"], [job], gpus=0)


def _run(folders: Sequence[Path], jobs: Sequence[dict[str, Any]], gpus: int) -> None:
    """A worker for each job, all at once. gpus: how many each has to itself; 0: all for the one job."""
    command = [sys.executable, "-m", "tspin.engines.vllm_worker"]
    run_workers(
        "vllm",
        [Worker(folder, command, _environment(number, gpus)) for number, folder in enumerate(folders)],
        jobs,
    )


def _environment(number: int, gpus: int) -> dict[str, str]:
    return {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **gpu_environment(number, gpus)}

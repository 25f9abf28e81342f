"""Sampling and evaluation by vLLM, in processes of their own: engine.data_parallel of them, with GPUs of their own.

An engine keeps its GPU memory as long as its process lives, and its weights cannot follow a policy's. So every
sampling and every evaluation starts `python -m tspin.engines.vllm_worker` on a checkpoint's folder and waits for its
end: the weights are that checkpoint's, and the memory is free before training starts.

An evaluation is lm-eval's in this process. What it asks is dealt over the engines (tspin.engines.serving), which give
back a log-probability for each choice, and a response's tokens, and nothing else.
"""

import logging
import os
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
from tspin.engines.serving import Engines
from tspin.engines.workers import Worker, gpu_environment, run_workers
from tspin.errors import UserError
from tspin.evaluation.backend import ENGINES_OWN, ServedLM
from tspin.evaluation.harness import Evaluation, evaluate_lm, lm_eval_log
from tspin.evaluation.suites import Suite
from tspin.models import load_shape, load_tokenizer
from tspin.sampling import generation_settings

WORKER = [sys.executable, "-m", "tspin.engines.vllm_worker"]
FIRST_PORT, LAST_PORT, PORTS = 10_240, 32_768, 64  # below those that systems give out by themselves; of one copy
PROMPTS = Features({"ids": List(Value("int32")), "seed": Value("int64"), "watched": Value("bool")})
PROMPT_FOLDER = "prompts"
DRAWN_SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float64()))])


def require_vllm(key: str) -> None:
    """Raise UserError where vLLM is missing. key: the setting that asks for it."""
    if find_spec("vllm") is None:
        raise UserError(f"{key}: vllm is not installed; pip install 'tspin[gpu]', or set {key}=transformers")


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
        gpus = served.engine.tensor_parallel
        workers = [Worker(folder, WORKER, _environment(copy, gpus)) for copy, folder in enumerate(folders)]
        run_workers("vllm", workers, [job] * copies)
        drawn = [Dataset.from_file(str(folder / FILE)) for folder in folders]
    # The copies had their prompts in turn.
    return interleave_datasets(drawn, stopping_strategy="all_exhausted_without_replacement")


def evaluate_folder(served: Served, suite: Suite, *, limit: int | None, seed: int = 1234) -> Evaluation:
    """The scores of a checkpoint, as tspin.evaluation.harness.evaluate gives them.

    Raises UserError, with the engine's last line, when an engine fails.
    """
    loading = {"trust_remote_code": served.trust_remote_code}
    shape, tokenizer = load_shape(served.folder, loading), load_tokenizer(served.folder, loading)
    shape.generation_config = generation_settings(served.folder) or shape.generation_config
    engine = served.engine
    environments = [_environment(copy, engine.tensor_parallel) for copy in range(engine.data_parallel)]
    with Engines(WORKER, environments, served.job("answer")) as engines:
        with lm_eval_log(logging.ERROR):  # it warns of ready-made models as such
            lm = ServedLM(shape, suite, engines.ask, seed, tokenizer=tokenizer)
        engines.job["max_model_len"] = lm.max_length + ENGINES_OWN
        return evaluate_lm(lm, suite, limit=limit, seed=seed)


def _environment(number: int, gpus: int) -> dict[str, str]:
    """Of copy `number`: its GPUs, and ports of its own, where copies that start together would try the same ones.

    VLLM_PORT, where it is set, is the first copy's.
    """
    environment = gpu_environment(number, gpus)
    ranges = (LAST_PORT - FIRST_PORT) // PORTS
    base = int(environment.get("VLLM_PORT") or FIRST_PORT + os.getpid() % ranges * PORTS)
    port = FIRST_PORT + (base - FIRST_PORT + number * PORTS) % (ranges * PORTS)
    ports = {"VLLM_PORT": str(port), "MASTER_PORT": str(port + PORTS - 1)}
    return {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **environment, **ports}

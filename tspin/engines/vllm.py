"""Sampling and evaluation by vLLM, in processes of their own: engine.data_parallel of them, with GPUs of their own.

An engine keeps its GPU memory as long as its process lives, and its weights cannot follow a policy's. So engines
(`python -m tspin.engines.vllm_worker`) are started for one checkpoint. They stay from its evaluation to the sampling
that follows it (`Serving`), and are ended before anything else takes place: the memory is free for training.

An evaluation is lm-eval's in this process. What it asks is dealt over the engines (tspin.engines.serving), which give
back a log-probability for each choice, and a response's tokens, and nothing else. Responses are drawn from files of
prompts into files, however many they are.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
from datasets import Dataset, Features, List, Value, interleave_datasets

from tspin.config import Decoding, EngineSettings
from tspin.data.mapped import FILE, read_in, without_bars
from tspin.data.turns import Stops
from tspin.engines.serving import Engines
from tspin.engines.workers import gpu_environment
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
    """A checkpoint as vLLM is to serve it. folder: the checkpoint's. dtype: "float32" or "bfloat16", of the weights.

    fingerprint: of the weights (tspin.models.Policy): engines that have read others do not serve these.
    """

    folder: str
    dtype: str
    engine: EngineSettings
    trust_remote_code: bool = False
    fingerprint: str = ""

    def job(self, length: int, *, texts: bool, evaluates: bool) -> dict[str, Any]:
        """What a worker is told of its engine, as JSON values.

        length: tokens of a prompt and its response. texts: texts are looked for in what is drawn. evaluates: choices
        are scored too, whose contexts the engine keeps.
        """
        known = {"model": self.folder, "dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        asked = {"max_model_len": length, "texts": texts or evaluates, "evaluates": evaluates}
        return {**known, **asked, "engine": self.engine.model_dump()}


class Serving:
    """The engines of one checkpoint at a time. From `with` to its end, or to `release`.

    context: tokens that an evaluation's prompts may have (`context_of`); 0 where vLLM evaluates nothing. Else every
    engine is made for an evaluation, one that is started for a sampling too: after a kill between the two, the same is
    drawn.
    """

    def __init__(self, context: int = 0):
        self.context = context
        self._kept: tuple[Served, Engines] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def engines(self, served: Served, length: int, *, texts: bool = False) -> Engines:
        """Those of a checkpoint, which are there or are started; another's are ended. See Served.job."""
        job = served.job(max(length, self.context), texts=texts, evaluates=self.context > 0)
        if self._kept and (self._kept[0], self._kept[1].job) == (served, job):
            return self._kept[1]
        self.release()
        environments = [
            _environment(copy, served.engine.tensor_parallel) for copy in range(served.engine.data_parallel)
        ]
        self._kept = (served, Engines(WORKER, environments, job).__enter__())
        return self._kept[1]

    def release(self) -> None:
        """End the engines: their memory is free."""
        kept, self._kept = self._kept, None
        if kept:
            kept[1].__exit__(None, None, None)


def generate_tokens(
    served: Served,
    prompts: Sequence[Sequence[int]],
    stop: Stops,
    *,
    decoding: Decoding,
    seed: int,
    watched: Collection[int] = (),
    serving: Serving | None = None,
) -> Dataset:
    """One response per prompt: {"ids": token ids, those of its end included, "logprobs": nats per token}.

    prompts: token ids, special tokens included. watched: positions of those whose responses get log-probabilities,
    under the policy itself whatever the temperature. Each prompt has a generator of its own, seeded by `seed` and its
    position: neither data_parallel nor the batches decide what is drawn. serving: of the run, whose engines may be
    there and are ended; what they computed before does not decide what is drawn either.
    Raises UserError, with the engine's last line, when an engine fails.
    """
    end_text = stop.end.text if stop.end.token is None else None  # which ordinary tokens spell
    piece = {
        "end_tokens": stop.tokens,
        "end_text": end_text,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "max_new_tokens": decoding.max_new_tokens,
    }
    copies = min(served.engine.data_parallel, len(prompts))
    seeded = ({"ids": list(ids), "seed": (seed + i) % 2**31, "watched": i in watched} for i, ids in enumerate(prompts))
    rows = read_in(lambda: seeded, PROMPTS)
    with (
        tempfile.TemporaryDirectory(prefix="tspin-vllm-") as temporary,
        without_bars(),
        serving or Serving() as own,  # whatever follows a sampling needs the memory
    ):
        folders = [Path(temporary) / str(copy) for copy in range(copies)]
        for copy, folder in enumerate(folders):
            rows.select(range(copy, len(rows), copies)).save_to_disk(folder / PROMPT_FOLDER)
        # Of the longest prompt of all, so that every copy is the same engine.
        length = max(map(len, prompts)) + decoding.max_new_tokens
        engines = own.engines(served, length, texts=end_text is not None)
        engines.ask("generate", [{**piece, "folder": str(folder)} for folder in folders], [1] * copies)
        drawn = [Dataset.from_file(str(folder / FILE)) for folder in folders]
    # The copies had their prompts in turn.
    return interleave_datasets(drawn, stopping_strategy="all_exhausted_without_replacement")


def evaluate_folder(
    served: Served, suite: Suite, *, limit: int | None, seed: int = 1234, serving: Serving | None = None
) -> Evaluation:
    """The scores of a checkpoint, as tspin.evaluation.harness.evaluate gives them.

    serving: of the run, with the `context_of` it; the engines stay there, for the sampling that follows.
    Raises UserError, with the engine's last line, when an engine fails.
    """
    lm = _asking(served, suite, seed)
    length = lm.max_length + ENGINES_OWN
    keeper = serving or Serving(length)

    def ask(task: str, pieces: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
        return keeper.engines(served, length).ask(task, pieces, sizes)

    lm.ask = ask
    with ExitStack() as ending:
        ending.callback(keeper.release)
        evaluation = evaluate_lm(lm, suite, limit=limit, seed=seed)
        if serving is not None:
            ending.pop_all()
    return evaluation


def context_of(served: Served, suite: Suite) -> int:
    """Tokens that an engine needs to have room for where it evaluates a checkpoint."""
    return _asking(served, suite, seed=0).max_length + ENGINES_OWN


def _asking(served: Served, suite: Suite, seed: int) -> ServedLM:
    """What lm-eval is given. It asks nobody yet."""
    loading = {"trust_remote_code": served.trust_remote_code}
    shape, tokenizer = load_shape(served.folder, loading), load_tokenizer(served.folder, loading)
    shape.generation_config = generation_settings(served.folder) or shape.generation_config
    with lm_eval_log(logging.ERROR):  # it warns of ready-made models as such
        return ServedLM(shape, suite, seed, tokenizer=tokenizer)


def _environment(number: int, gpus: int) -> dict[str, str]:
    """Of copy `number`: its GPUs, and ports of its own, where copies that start together would try the same ones.

    VLLM_PORT, where it is a number, is the first copy's; Kubernetes sets an address of that name.
    """
    environment = gpu_environment(number, gpus)
    ranges = (LAST_PORT - FIRST_PORT) // PORTS
    given = environment.get("VLLM_PORT", "")
    base = int(given) if given.isdecimal() else FIRST_PORT + os.getpid() % ranges * PORTS
    port = FIRST_PORT + (base - FIRST_PORT + number * PORTS) % (ranges * PORTS)
    ports = {"VLLM_PORT": str(port), "MASTER_PORT": str(port + PORTS - 1)}
    return {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **environment, **ports}

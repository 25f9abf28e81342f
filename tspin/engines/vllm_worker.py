"""The process that holds a vLLM engine: `python -m tspin.engines.vllm_worker FOLDER`, started by tspin.engines.vllm.

FOLDER/job.json says which engine. It answers what it is asked (tspin.engines.serving): choices' log-probabilities and
responses, of an evaluation; and responses to a folder of prompts, written beside them.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import load_from_disk

from tspin.data.mapped import FILE, mapped, table_of
from tspin.engines.serving import answering
from tspin.engines.vllm import DRAWN_SCHEMA, PROMPT_FOLDER
from tspin.engines.workers import read_job

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, RequestOutput
    from vllm.logprobs import Logprob

WINDOW = 50_000  # prompts that the engine holds at a time
TOGETHER = 128  # tokens whose log-probabilities one request can name (vllm.sampling_params.MAX_LOGPROB_TOKEN_IDS)
Answer = tuple[float, bool]


def main() -> None:
    from vllm import LLM

    folder = Path(sys.argv[1])
    llm = LLM(**_engine_arguments(read_job(folder)))
    answers = {"score": _score, "draw": _draw, "generate": _generate}
    answering(folder, lambda task, pieces: answers[task](llm, pieces))


def _generate(llm: "LLM", pieces: list[dict[str, Any]]) -> tuple[list[None], int]:
    """Responses to the prompts in PIECE/prompts into PIECE/rows.arrow; their tokens are not counted."""
    for piece in pieces:
        llm.reset_prefix_cache()  # what is drawn is what an engine draws that was asked nothing before
        folder = Path(piece["folder"])
        prompts = load_from_disk(folder / PROMPT_FOLDER)
        mapped(prompts, partial(_responses, llm, piece), DRAWN_SCHEMA, batch_size=WINDOW, path=folder / FILE)
    return [None] * len(pieces), 0


def _responses(llm: "LLM", piece: dict[str, Any], batch: dict[str, list[Any]]) -> pa.Table:
    from vllm import SamplingParams, TokensPrompt

    settings = [
        SamplingParams(
            temperature=piece["temperature"],
            top_p=piece["top_p"],
            max_tokens=piece["max_new_tokens"],
            stop_token_ids=piece["end_tokens"],
            seed=seed,
            logprobs=0 if watched else None,
            stop=piece["end_text"],
            include_stop_str_in_output=True,
            detokenize=piece["end_text"] is not None,  # a text is looked for in the text so far
        )
        for seed, watched in zip(batch["seed"], batch["watched"], strict=True)
    ]
    drawn = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in batch["ids"]], settings)
    return table_of([_row(request.outputs[0]) for request in drawn], DRAWN_SCHEMA)


def _row(completion: "CompletionOutput") -> tuple[list[int], list[float]]:
    """Tokens, and their log-probabilities where they were asked for."""
    drawn = completion.logprobs or []
    pairs = zip(completion.token_ids, drawn, strict=bool(drawn))
    return list(completion.token_ids), [values[token].logprob for token, values in pairs]


def _draw(llm: "LLM", pieces: list[dict[str, Any]]) -> tuple[list[list[int]], int]:
    from vllm import SamplingParams, TokensPrompt

    given = [
        SamplingParams(**piece["settings"], include_stop_str_in_output=True, skip_special_tokens=False)
        for piece in pieces
    ]
    drawn = llm.generate([TokensPrompt(prompt_token_ids=piece["ids"]) for piece in pieces], given, use_tqdm=False)
    return [list(request.outputs[0].token_ids) for request in drawn], _computed(drawn)


def _score(llm: "LLM", pieces: list[dict[str, Any]]) -> tuple[list[list[Answer]], int]:
    """(log-probability in nats, whether it is what greedy decoding gives) of each piece's continuations.

    A context is computed once, by a request that draws one token after it and gives the log-probabilities of all first
    tokens. What follows those is scored as the end of a prompt, whose beginning is in the engine's cache by then.
    """
    firsts = [sorted({continuation[0] for continuation in piece["continuations"]}) for piece in pieces]
    asked = [(number, ids[i : i + TOGETHER]) for number, ids in enumerate(firsts) for i in range(0, len(ids), TOGETHER)]
    after = _generated(
        llm,
        [pieces[number]["context"] for number, _ in asked],
        [{"logprob_token_ids": ids, "logprobs": len(ids)} for _, ids in asked],
    )
    logps: list[dict[int, float]] = [{} for _ in pieces]
    greedy = [0] * len(pieces)
    for (number, _), request in zip(asked, after, strict=True):
        completion = request.outputs[0]
        greedy[number] = completion.token_ids[0]
        logps[number] |= {token: found.logprob for token, found in completion.logprobs[0].items()}
    answers = [
        [(logps[n][tokens[0]], tokens[0] == greedy[n]) for tokens in piece["continuations"]]
        for n, piece in enumerate(pieces)
    ]
    places = [
        (n, i, piece["context"], tokens)
        for n, piece in enumerate(pieces)
        for i, tokens in enumerate(piece["continuations"])
        if len(tokens) > 1
    ]
    ends, computed = _ends(llm, [(context, tokens) for _, _, context, tokens in places])
    for (n, i, _, _), (logp, best) in zip(places, ends, strict=True):
        answers[n][i] = (answers[n][i][0] + logp, answers[n][i][1] and best)
    return answers, computed + _computed(after)


def _ends(llm: "LLM", rows: list[tuple[list[int], list[int]]]) -> tuple[list[Answer], int]:
    """The same of continuations without their first tokens, and how many tokens were computed. rows: with contexts.

    Log-probabilities of a prompt are those of what is not in the cache. That may have more than the context, where
    another continuation began alike: such ones are computed anew.
    """
    prompts = [context + tokens for context, tokens in rows]
    settings = {"prompt_logprobs": 1, "flat_logprobs": True}
    found = _generated(llm, prompts, [{**settings, "skip_reading_prefix_cache": False}] * len(rows))
    computed = _computed(found)
    again = [i for i, (context, _) in enumerate(rows) if (found[i].num_cached_tokens or 0) > len(context)]
    anew = _generated(llm, [prompts[i] for i in again], [settings] * len(again))
    for i, request in zip(again, anew, strict=True):
        found[i] = request
    answers = []
    for (_, tokens), request in zip(rows, found, strict=True):
        last = len(request.prompt_logprobs) - len(tokens) + 1
        places = [(request.prompt_logprobs[last + i], token) for i, token in enumerate(tokens[1:])]
        logp = sum(found[token].logprob for found, token in places)
        answers.append((logp, all(_is_likeliest(found, token) for found, token in places)))
    return answers, computed + _computed(anew)


def _is_likeliest(found: Mapping[int, "Logprob"], token: int) -> bool:
    """Whether greedy decoding gives it. found: the token and the likeliest one; of like ones the first, as by argmax.

    vLLM's ranks do not say: of two tokens that are as likely, which bfloat16 often makes them, both have rank 2.
    """
    return token == min(found, key=lambda each: (-found[each].logprob, each))


def _generated(llm: "LLM", prompts: list[list[int]], settings: list[dict[str, Any]]) -> list["RequestOutput"]:
    """One greedy token after each prompt, with the log-probabilities that its settings ask for."""
    from vllm import SamplingParams, TokensPrompt

    given = [SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, **each) for each in settings]
    tokens = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    return llm.generate(tokens, given, use_tqdm=False) if tokens else []


def _computed(requests: list["RequestOutput"]) -> int:
    """Tokens of prompts that were not in the cache."""
    return sum(len(request.prompt_token_ids) - (request.num_cached_tokens or 0) for request in requests)


def _engine_arguments(job: dict[str, Any]) -> dict[str, Any]:
    engine = job["engine"]
    # An evaluation's contexts stay in the cache until their choices are scored.
    evaluating = {"max_logprobs": TOGETHER, "enable_prefix_caching": True} if job["evaluates"] else {}
    return {
        "model": job["model"],
        "dtype": job["dtype"],
        "trust_remote_code": job["trust_remote_code"],
        "max_model_len": job["max_model_len"],
        "skip_tokenizer_init": not job["texts"],  # token ids go in and come out
        "logprobs_mode": "raw_logprobs",
        "tensor_parallel_size": engine["tensor_parallel"],
        "gpu_memory_utilization": engine["memory"],
        "enforce_eager": engine["enforce_eager"],
        # Not the checkpoint's own sampling settings: responses are drawn from the policy.
        "generation_config": "vllm",
        # The files that Transformers reads, where a folder has its maker's own format beside them (Mistral's).
        "config_format": "hf",
        "load_format": "hf",
        "tokenizer_mode": "hf",
        "language_model_only": True,  # a checkpoint of ours has no files of an image processor
        **evaluating,
    }


if __name__ == "__main__":
    main()

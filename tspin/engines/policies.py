"""Responses from a policy that is a checkpoint's folder, by the backend that the settings name."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tspin.data.mapped import TypedRows
from tspin.data.responses import Response
from tspin.engines.vllm import Engine, generate_tokens, require_vllm
from tspin.errors import UserError
from tspin.models import dtype_name, load_model
from tspin.sampling import end_tokens, response_of, sample
from tspin.selfplay_config import SelfPlayConfig


def sample_policy(
    folder: str,
    model_arguments: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    args: SelfPlayConfig,
    *,
    seed: int,
    description: str = "sampling",
) -> Sequence[Response]:
    """One response a prompt, in the prompts' order; both backends stop at the same tokens (tspin.sampling.sample).

    prompts: token ids, special tokens included. Equal seeds give equal responses on one machine with one backend;
    between backends only greedy responses can be compared. Raises UserError where the model cannot be loaded or the
    engine fails.
    """
    loading = dict(model_arguments)
    if args.sampling_dtype is not None:
        loading["dtype"] = getattr(torch, args.sampling_dtype)
    if args.sampling_backend == "transformers":
        model = load_model(folder, loading).to(args.device)  # type: ignore[arg-type]
        return sample(model, tokenizer, prompts, args.decoding, seed=seed, description=description)
    engine = Engine(**(args.engine or {}))
    require_vllm("sampling.backend", engine)
    ends = end_tokens(generation_settings(folder), tokenizer)
    answers = generate_tokens(
        folder,
        prompts,
        ends,
        temperature=args.temperature,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        dtype=dtype_name(loading),
        engine=engine,
        seed=seed,
        trust_remote_code=bool(loading.get("trust_remote_code")),
    )
    return TypedRows(answers.select_columns(["ids"]), lambda ids: response_of(ids, ends, tokenizer))


def generation_settings(folder: str) -> GenerationConfig | None:
    """The checkpoint's generation settings; what its config says where it has none of its own."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        pass
    try:
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json")
    except OSError as error:
        raise UserError(f"{folder}: no model is here: it has no config.json") from error

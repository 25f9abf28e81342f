"""Whether model, data and settings fit together: what cannot work is said in one line before the first sample.

A check is a function of one thing. It raises UserError where the run would fail, and tells a line on stderr where it
would go on to something else than was asked for. The model is looked at by its shape alone, on the meta device, or by a
part of its weights.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from tspin.config import SelfPlayConfig
from tspin.data.encoding import Examples
from tspin.data.mapped import BATCH
from tspin.data.responses import Responses
from tspin.errors import UserError, reason, tell
from tspin.models import dtype_name, load_shape, say_sampling
from tspin.sampling import generation_settings
from tspin.triplets import pad_token

HOTTEST = 2.0  # temperature (vllm.sampling_params)
LOOKED_AT = 2**16  # weights of a tensor
LEAST_OF_ADAPTERS = 2e-6  # recipes have 5e-6 and more, and 5e-7 to 1e-6 for all weights


def check_rows(
    source: str | PreTrainedModel,
    loading: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    responses: Mapping[str, Responses] | None = None,
    new_tokens: int = 0,
) -> None:
    """Check that a model has the tokens and the positions that its rows take.

    source: the model, or its folder, and loading: arguments of `from_pretrained`. responses: drawn ones, role → one for
    each example. new_tokens: of a response that is still to be drawn, at most.
    """
    model = source if isinstance(source, PreTrainedModel) else load_shape(source, dict(loading))
    prompts, largest = _lists(examples.dataset, "prompt_ids")
    used, longest = {"a prompt": largest}, int(prompts.max()) + new_tokens
    drawn = {f"a {role} response": of.of(examples.prompt_ids).dataset for role, of in (responses or {}).items()}
    for what, dataset in {"a labelled response": examples.dataset, **drawn}.items():
        lengths, used[what] = _lists(dataset, "ids")
        longest = max(longest, int((prompts + lengths).max()))
    check_tokens(model, tokenizer, used)
    check_positions(model, longest)


def check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, used: Mapping[str, int]) -> None:
    """Raise UserError for a token without a row in the embedding. used: where from → the largest id there.

    The pad token is one of them, as sampling and training take it, and the end token.
    """
    rows = len(next(model.get_input_embeddings().parameters()))
    ours = {"the pad token": pad_token(tokenizer), "the end token": tokenizer.eos_token_id}
    for what, token in {**ours, **used}.items():
        if token >= rows:
            of = "is" if what in ours else "has"
            raise UserError(
                f"{what} {of} {tokenizer.convert_ids_to_tokens(token)!r} with the id {token}, past the model's "
                f"embedding of {rows} rows: resize_token_embeddings({token + 1}) and save the model"
                + (", or give its tokenizer another pad token" if what == "the pad token" else "")
            )


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Raise UserError where a row, of `longest` tokens, is past a table of positions; tell where it is merely long."""
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if made_for is None or not 0 < made_for < longest:
        return
    what = f"the longest prompt with its response is {longest} tokens long, and the model has {made_for} positions"
    remedy = "lower max_new_tokens, max_completion_length or max_prompt_length"
    if table := position_table(model, made_for):
        raise UserError(f"{what}, a table ({table}): {remedy}")
    tell(f"{what} (max_position_embeddings); it was not made for what is past them: {remedy}")


def check_engine(
    source: str | PreTrainedModel, loading: Mapping[str, Any], args: SelfPlayConfig, examples: Examples
) -> None:
    """Raise UserError for what vLLM, where it draws the responses, refuses.

    It takes no request past the positions that a model was made for, and no temperature above HOTTEST.
    """
    if args.sampling_backend != "vllm":
        return
    if args.temperature > HOTTEST:
        raise UserError(
            f"temperature: {args.temperature:g}, and vLLM takes {HOTTEST:g} at most: lower it, or set "
            "sampling_backend=transformers"
        )
    config = (source if isinstance(source, PreTrainedModel) else load_shape(source, dict(loading))).config
    text = config.get_text_config()
    scaled = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    made_for = getattr(text, "max_position_embeddings", None)
    longest = int(_lists(examples.dataset, "prompt_ids")[0].max()) + args.max_new_tokens
    if made_for and not scaled and longest > made_for:
        raise UserError(
            f"the longest prompt with max_new_tokens is {longest} tokens long, and the model has {made_for} positions "
            "(max_position_embeddings), past which vLLM draws nothing: lower max_new_tokens or max_prompt_length, or "
            "set sampling_backend=transformers"
        )


def position_table(model: PreTrainedModel, positions: int) -> str | None:
    """The name of a table with a row for each position, past which a model fails; None where positions are computed."""
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            before = getattr(module, "offset", 0)  # rows before the first position's
            if module.num_embeddings - before == positions:
                return name
    for name, buffer in model.named_buffers():  # a table that is not learned: GPT-J's, CTRL's
        if "pos" in name.rsplit(".", 1)[-1] and buffer.dim() == 2 and len(buffer) == positions:
            return name
    return None


def check_training(source: str | PreTrainedModel, loading: Mapping[str, Any], args: SelfPlayConfig, rows: int) -> None:
    """Check that a training of `rows` triplets has steps, and steps that its weights can follow."""
    check_schedule(args, rows)
    model = source if isinstance(source, PreTrainedModel) else load_shape(source, dict(loading))
    check_router(model)
    check_softcap(model, loading)
    if model.can_generate():
        check_generation(source)
    if args.gradient_checkpointing:
        check_checkpointing(model)
    if args.lora:
        check_rate(args)
    elif dtype_name(dict(loading)) == "bfloat16":  # adapters are float32
        check_spacing(source, max(args.learning_rates))


def check_schedule(args: SelfPlayConfig, rows: int) -> None:
    """Raise UserError where an iteration has no step; tell of a warm-up that it is too short for."""
    rounded = math.floor if args.dataloader_drop_last else math.ceil
    batches = rounded(rows / args.batch_size)
    if not batches:
        raise UserError(f"dataloader_drop_last: {rows} rows make no step of {args.batch_size}: lower batch_size")
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * batches)
    if args.warmup_steps >= max(steps, 1):
        tell(
            f"warmup_steps is {args.warmup_steps:g}, and an iteration has no more than {steps} "
            f"({rows} rows in steps of {args.batch_size}): the warm-up takes {args.get_warmup_steps(steps)} of them"
        )


def check_checkpointing(model: PreTrainedModel) -> None:
    """Raise UserError for a model without layers that gradient checkpointing could compute twice."""
    if not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise UserError(
            f"gradient_checkpointing: {type(model).__name__} has no layers made for it: lower micro_batch_tokens, or "
            "set lora"
        )


def check_router(model: PreTrainedModel) -> None:
    """Raise UserError for a mixture of experts whose config asks for its router's auxiliary loss."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise UserError(
            "output_router_logits: the model's config asks for its router's auxiliary loss, which no objective here "
            "has; set it to false in the model's config.json to train without"
        )


def check_generation(source: str | PreTrainedModel) -> None:
    """Raise UserError for generation settings that Transformers would not save, and so no checkpoint with them."""
    try:
        settings = source.generation_config if isinstance(source, PreTrainedModel) else generation_settings(source)
        settings = copy.deepcopy(settings)
        say_sampling(settings)
        settings.validate(strict=True)
    except ValueError as error:
        listed = (line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- "))
        raise UserError(
            f"generation_config.json: Transformers saves no model with such settings: {next(listed, reason(error))} "
            "Correct that file of the model"
        ) from error


def check_softcap(model: PreTrainedModel, loading: Mapping[str, Any]) -> None:
    """Tell where a cap on the logits of attention, Gemma 2's, is left out, as Transformers does with sdpa."""
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    attention = loading.get("attn_implementation") or model.config._attn_implementation
    if cap and attention == "sdpa":
        tell(
            f"attention: sdpa leaves out the cap of {cap:g} on the model's attention logits (attn_logit_softcapping), "
            "here as everywhere in transformers; model.attention=eager has it, several times slower"
        )


def check_rate(args: SelfPlayConfig) -> None:
    """Tell where adapters are trained at a rate that is meant for all weights."""
    assert args.lora is not None
    rate = max(args.learning_rates)
    if args.lora.learning_rate is None and rate < LEAST_OF_ADAPTERS:
        tell(
            f"lora: learning_rate, {rate:g}, is one for all weights, and adapters take ten times as much: set "
            f"lora.learning_rate={10 * rate:g}, or to {rate:g} to have it so"
        )


def check_spacing(source: str | PreTrainedModel, rate: float) -> None:
    """Tell where most weights of a bfloat16 model are too coarse for a learning rate."""
    share = movable_share(source, rate)
    if share < 0.5:
        tell(
            f"weights in bfloat16: only for {share:.1%} of them is learning_rate, {rate:g}, at least half of the "
            "distance to the next such number; smaller steps are lost. Train float32 weights (model.dtype), and "
            "bf16=true multiplies them in bfloat16"
        )


def movable_share(source: str | PreTrainedModel, rate: float) -> float:
    """The share of a model's weights that a step of `rate` changes when they are stored in bfloat16.

    Those for which it is at least half of the distance between the neighbouring numbers. Of each tensor, the first
    LOOKED_AT weights are looked at.
    """
    moved = total = 0.0
    for weights, count in _first_weights(source):
        stored = weights.to(torch.bfloat16).abs()
        distance = torch.nextafter(stored, torch.full_like(stored, math.inf)).float() - stored.float()
        moved += count * float((rate >= distance / 2).float().mean())
        total += count
    return moved / total if total else 1.0


def _lists(dataset: Dataset, name: str) -> tuple[np.ndarray, int]:
    """A column of lists of token ids: their lengths, and the largest id."""
    lengths, largest = [], 0
    for part in dataset.select_columns([name]).with_format("arrow").iter(BATCH):
        lengths.append(pc.list_value_length(part[name]).to_numpy())
        largest = max(largest, pc.max(pc.list_flatten(part[name])).as_py())
    return np.concatenate(lengths), largest


def _first_weights(source: str | PreTrainedModel) -> Iterator[tuple[Tensor, int]]:
    """The first weights of each tensor of a model, and how many it has; of a folder, from its safetensors."""
    if isinstance(source, PreTrainedModel):
        for parameter in source.parameters():
            yield parameter.detach().flatten()[:LOOKED_AT], parameter.numel()
        return
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                left, chosen = LOOKED_AT, []
                for size in reversed(part.get_shape()):  # whole rows, and as many of them as there is room for
                    chosen.append(slice(0, min(size, max(left, 1))))
                    left //= max(size, 1)
                weights = part[tuple(reversed(chosen))] if chosen else tensors.get_tensor(name)
                if weights.is_floating_point():
                    yield weights, math.prod(part.get_shape())

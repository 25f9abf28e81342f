"""Responses from a policy."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import groupby
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from tspin.attention import grouped
from tspin.config import Decoding
from tspin.data.mapped import mapped, table_of
from tspin.data.responses import RESPONSE_SCHEMA, Response, Responses
from tspin.data.turns import Stops, TurnEnd, stops, turn_end
from tspin.errors import UserError, tell
from tspin.triplets import pad_token

# Layers of a cache that can give up rows. Those with a state beside keys and values would keep all of the state's.
ROWS_CAN_LEAVE = {DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer}
ROUNDING = 1e-6  # nats between two ways to the same policy, in float32
FIRST_SEGMENT = 8  # tokens after which ended rows leave for the first time; twice as many each time after


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    seed: int,
    end: TurnEnd | None = None,
    description: str = "sampling",
) -> Sequence[Response]:
    """One response per prompt, in the prompts' order, each with its log π. prompts: token ids, special tokens included.

    end: what closes a response, which keeps it as its last tokens; None: what the chat template says. Other end tokens
    of the model and the tokenizer stop a response too, without closing it (see `response_of`).
    The same seed on the same machine gives the same responses; PyTorch's global generator is left
    as it was.
    """
    stop = stops(tokenizer, model.generation_config, end or turn_end(tokenizer))
    settings = _settings(decoding, stop.tokens, pad_token(tokenizer))
    # Prompts of similar length share a batch, the longest first: least padding, and memory runs
    # out at once or not at all.
    lengths = list(map(len, prompts))
    longest_first = sorted(range(len(prompts)), key=lambda i: -lengths[i])
    order = Dataset.from_dict({"prompt": longest_first})
    with _drawing(model), tqdm(total=len(prompts), desc=description, unit="prompt") as bar:
        pads = len({*lengths}) == 1 or masks_padding(model, settings)

        def draw(batch: dict[str, list[int]]) -> pa.Table:
            rows = []
            for _, alike in groupby(batch["prompt"], lambda i: pads or lengths[i]):
                chosen = list(alike)
                watch = Watch(len(chosen))
                drawn = _generate(model, [prompts[i] for i in chosen], settings, stop.end, tokenizer, watch)
                for i, ids, logps in zip(chosen, drawn, watch.logps, strict=True):
                    response = response_of(ids, stop, tokenizer, logps)
                    rows.append((i, response.text, response.ids, response.finished, response.logp))
                bar.update(len(chosen))
            return table_of(rows, RESPONSE_SCHEMA)

        torch.manual_seed(seed)
        drawn = Responses(mapped(order, draw, RESPONSE_SCHEMA, batch_size=decoding.batch_size))
    return drawn.of(range(len(prompts)))


def _settings(decoding: Decoding, ends: list[int], pad: int) -> GenerationConfig:
    sampled = decoding.temperature > 0
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=sampled,
        temperature=decoding.temperature if sampled else None,
        top_p=decoding.top_p if sampled else None,
        top_k=0 if sampled else None,  # Transformers' default of 50 would truncate the distribution unasked
        eos_token_id=ends,
        pad_token_id=pad,
    )


@contextmanager
def _drawing(model: PreTrainedModel) -> Iterator[None]:
    """While this holds, `generate` draws from the policy as it is; model and generators are then as they were."""
    was_training, configured = model.training, model.generation_config
    model.eval()
    # generate() fills what its settings leave open from the model's own (a repetition penalty, min-p): the responses
    # would not be drawn from the policy.
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
            yield
    finally:
        model.generation_config = configured
        model.train(was_training)


def masks_padding(model: PreTrainedModel, settings: GenerationConfig) -> bool:
    """Whether a prompt padded on its left goes on as it does alone: not with a state that padding runs through too.

    Found by trying: padding must change the policy by no more than a share of what it does where nothing masks it.
    Prompts of a model that it changes are drawn together with those of their own length, which is told.
    """
    trial = copy.deepcopy(settings)
    trial.max_new_tokens, trial.do_sample, trial.temperature, trial.top_p, trial.top_k = 4, False, None, None, None
    trial.eos_token_id = None
    trial.output_logits = trial.return_dict_in_generate = True
    alone = torch.arange(1, 5, device=model.device)[None] % model.config.get_text_config().vocab_size
    padded = torch.cat([torch.full_like(alone, settings.pad_token_id), alone], dim=1)
    masked = torch.ones_like(padded)
    masked[:, : alone.shape[1]] = 0
    told = []
    for ids, mask in ((alone, torch.ones_like(alone)), (padded, masked), (padded, torch.ones_like(padded))):
        output: Any = model.generate(ids, attention_mask=mask, generation_config=trial)  # type: ignore[operator]
        told.append([logits[0].float().log_softmax(-1) for logits in output.logits])
    plain, behind, seen = told
    share = 0.02 if model.dtype == torch.float32 else 0.25
    if _apart(plain, behind) <= max(share * _apart(plain, seen), ROUNDING):
        return True
    tell("sampling: padding changes what this model writes, so that prompts are drawn with those of their own length")
    return False


def _apart(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """The largest divergence of two policies, in nats, over tokens up to where they go on with other ones."""
    most = 0.0
    for p, q in zip(first, second, strict=True):
        most = max(most, float((p.exp() * (p - q)).nansum()))
        if p.argmax() != q.argmax():
            break
    return most


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    end: TurnEnd,
    tokenizer: PreTrainedTokenizerBase,
    watch: "Watch",
) -> list[list[int]]:
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), settings.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):  # left padding: every response starts in the same column
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, length - len(prompt) :] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    if end.token is not None:
        return generate_in_segments(model, input_ids, attention_mask, settings, watch=watch)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [end.text])])
    return generate_in_segments(
        model, input_ids, attention_mask, settings,
        lambda rows: criteria, lambda ids: end.text in tokenizer.decode(ids), watch,
    )  # fmt: skip


@torch.inference_mode()
def generate_in_segments(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: GenerationConfig,
    stops: Callable[[int], StoppingCriteriaList] | None = None,
    has_stopped: Callable[[list[int]], bool] | None = None,
    watch: "Watch | None" = None,
) -> list[list[int]]:
    """New tokens of each row by `generate`, in segments: rows that have ended leave between two of them.

    One long response would otherwise keep its whole batch computing to the end, as it does for models whose cache rows
    cannot leave. input_ids, attention_mask: int64 (batch, length), left-padded. A row ends at settings.eos_token_id;
    stops: further stopping criteria for a number of rows, has_stopped: whether a continuation ended by them.
    watch: gets the log-probabilities of the new tokens.
    """
    ends = set(settings.eos_token_id)
    continuations: list[list[int]] = [[] for _ in input_ids]
    rows = list(range(len(input_ids)))
    cache, left = None, settings.max_new_tokens
    in_segments = rows_can_leave(model)
    segment = FIRST_SEGMENT if in_segments else left
    while rows and left > 0:
        part = copy.deepcopy(settings)
        part.max_new_tokens, part.return_dict_in_generate = min(segment, left), True
        with grouped(model), watch.over(model) if watch else nullcontext():
            output: Any = model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                generation_config=part,
                stopping_criteria=stops(len(rows)) if stops else None,
            )
        new = output.sequences[:, input_ids.shape[1] :]
        if watch:
            watch.last(rows, new[:, -1])
        still_open = []
        for position, tokens in enumerate(new.tolist()):
            row = continuations[rows[position]]
            row += tokens
            if ends.isdisjoint(tokens) and not (has_stopped and has_stopped(row)):
                still_open.append(position)
        left -= new.shape[1]
        segment *= 2
        if not in_segments:
            break
        rows = [rows[position] for position in still_open]
        kept = torch.tensor(still_open, dtype=torch.long, device=input_ids.device)
        input_ids = output.sequences[kept]
        attention_mask = torch.cat([attention_mask[kept], torch.ones_like(new[kept])], dim=1)
        cache = output.past_key_values
        cache.batch_select_indices(kept)
    return continuations


def rows_can_leave(model: PreTrainedModel) -> bool:
    """Whether rows of a batch can leave a model's cache: not where it holds a state of past tokens in another form."""
    if model._is_stateful or "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))  # as `generate` makes it
    return {type(layer) for layer in cache.layers} <= ROWS_CAN_LEAVE


class Watch:
    """The log-probabilities of the tokens that `generate` draws, under the policy itself whatever the temperature.

    logps: for each row one per token, in nats; past a row's end they mean nothing.
    """

    def __init__(self, rows: int):
        self.logps: list[list[float]] = [[] for _ in range(rows)]
        self._logits: torch.Tensor | None = None  # of the token to come, (rows, vocabulary)
        self._drawn: list[torch.Tensor] = []  # log-probabilities, (rows,) for each token

    @contextmanager
    def over(self, model: PreTrainedModel) -> Iterator[None]:
        """While this holds, `model` is called for continuations; `last` says of which rows."""
        hook = model.register_forward_hook(self._called, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def last(self, rows: list[int], tokens: torch.Tensor) -> None:
        """The newest tokens of these rows, (rows,): the model is not called on them any more."""
        self._draw(tokens)
        for row, values in zip(rows, torch.stack(self._drawn, dim=1).tolist(), strict=True):  # one transfer of them all
            self.logps[row] += values
        self._logits, self._drawn = None, []

    def _draw(self, tokens: torch.Tensor) -> None:
        assert self._logits is not None
        # Transformers works on a copy: these are the model's own, whatever temperature and top-p make of them.
        logits = self._logits.float()
        self._drawn.append(-cross_entropy(logits, tokens.to(logits.device), reduction="none"))

    def _called(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._logits is not None:
            self._draw(kwargs["input_ids"][:, -1])
        self._logits = output.logits[:, -1].clone()  # not the whole prompt's


def response_of(
    ids: list[int], stop: Stops, tokenizer: PreTrainedTokenizerBase, logps: Sequence[float] = ()
) -> Response:
    """The response that new tokens are. logps: of each, where they are known.

    It is finished where it has the turn's end, which it keeps, and cut after it. Another end token is no part of it,
    unless it is the first of all: a response has a token.
    """
    response = _cut(ids, stop, tokenizer)
    return replace(response, logp=sum(logps[: len(response.ids)])) if logps else response


def _cut(ids: list[int], stop: Stops, tokenizer: PreTrainedTokenizerBase) -> Response:
    last = next((position for position, token in enumerate(ids) if token in stop.tokens), None)
    kept = ids if last is None else ids[: last + 1]
    if stop.end.token is None:
        return _ended_by_text(kept, stop, tokenizer)
    finished = last is not None and ids[last] == stop.end.token
    if last and not finished:
        kept = ids[:last]
    text = tokenizer.decode(kept[:-1] if finished else kept, skip_special_tokens=True)
    return Response(kept, str(text), finished)


def _ended_by_text(ids: list[int], stop: Stops, tokenizer: PreTrainedTokenizerBase) -> Response:
    """As `_cut`, where ordinary tokens spell the turn's end: the last of them may spell more."""
    text, finished, _ = str(tokenizer.decode(ids)).partition(stop.end.text)
    if not finished:
        kept = ids[:-1] if len(ids) > 1 and ids[-1] in stop.others else ids
        return Response(kept, str(tokenizer.decode(kept, skip_special_tokens=True)), False)
    count = next(n for n in range(1, len(ids) + 1) if stop.end.text in str(tokenizer.decode(ids[:n])))
    return Response(ids[:count], text, True)


def generation_settings(folder: str) -> GenerationConfig:
    """The checkpoint's generation settings; what its config says where it has none of its own. Raises UserError."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        pass
    try:
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json")
    except OSError as error:
        raise UserError(f"{folder}: no model is here: it has no config.json") from error

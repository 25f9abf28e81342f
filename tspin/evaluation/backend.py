"""Our model behind lm-evaluation-harness: its backends, asking as training does; less work for the same numbers."""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from typing import Any, Protocol

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from tspin.data.templates import Template, special_tokens
from tspin.data.turns import Stops, stops, template_arguments
from tspin.errors import UserError, reason, tell
from tspin.evaluation.suites import Suite, check_chat_template
from tspin.sampling import generate_in_segments, rows_can_leave
from tspin.triplets import in_parts

Request = tuple[tuple[str, str], list[int], list[int]]  # texts; tokens of a context, of a continuation
Answer = tuple[float, bool]  # log-probability of the continuation in nats; whether it is what greedy decoding gives
PLAIN = Suite(columns=())
ENGINES_OWN = 2  # positions of a model that an engine's prompts do not take
# Of generation's settings: what engines are told in other words, or not at all.
TRANSFORMERS_ALONE = {"attention_mask", "do_sample", "temperature", "eos_token_id", "pad_token_id", "use_cache"}
# The checkpoint's own, which Transformers heeds where a task does not say; the others where responses are drawn alone.
PENALTIES = {"repetition_penalty"}
OWN = {*PENALTIES, "top_p", "top_k", "min_p"}


class AsTrained(TemplateLM):
    """What lm-eval's classes lack to ask as a suite and training say; before one of them among a class's bases.

    suite: how its tasks are asked. generation: the checkpoint's settings, for its end tokens. All else: the other
    class's arguments.
    """

    END_TOKENS: str  # the generation setting of the other class that takes the end tokens
    add_bos_token: bool | None
    think_end_token: str | int | None

    def __init__(self, *args: Any, suite: Suite, generation: GenerationConfig | None, **kwargs: Any):
        self.rendering = suite.rendering
        self._generation = generation
        arguments = template_arguments(self.rendering)
        thinking = {"enable_thinking": arguments.pop("enable_thinking", None), "think_end_token": suite.think_end_token}
        super().__init__(*args, chat_template_args=arguments, **thinking, **kwargs)
        if isinstance(suite.apply_chat_template, str):
            self._choose_template(suite.apply_chat_template)
        check_chat_template(suite, self.tokenizer)

    def _choose_template(self, name: str) -> None:
        """lm-eval takes the name of a template, and goes on with the tokenizer's default one."""
        known = self.tokenizer.chat_template
        if not isinstance(known, dict) or name not in known:
            named = ", ".join(known) if isinstance(known, dict) else "none of a name"
            raise UserError(f"apply_chat_template: the tokenizer has no template {name!r} (it has: {named})")
        self.use_template(known[name])
        arguments = {**(self.rendering.chat_template_kwargs or {}), "chat_template": known[name]}
        self.rendering = replace(self.rendering, chat_template_kwargs=arguments)

    def use_template(self, template: str) -> None:
        """Render by this template in place of the tokenizer's."""
        self.chat_template_args["chat_template"] = template

    @cached_property
    def template(self) -> Template:
        """How training writes a response: where it begins and what closes it. Raises UserError."""
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token): set one, or responses could never end")
        return Template(self.tokenizer, self.rendering)

    @cached_property
    def stops(self) -> Stops:
        """Where generation stops: where drawing responses does."""
        return stops(self.tokenizer, self._generation, self.template.end)

    @cached_property
    def _before_end(self) -> str:
        """What stands before the turn's end token, as a part of the end."""
        end = self.stops.end
        return "" if end.token is None else end.text.removesuffix(str(self.tokenizer.convert_ids_to_tokens(end.token)))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """lm-eval's. Raises UserError for messages that the template refuses, without a system's among them too."""
        try:
            return super().apply_chat_template(chat_history, add_generation_prompt)  # type: ignore[safe-super]
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"the tokenizer's chat template refuses a task's messages ({reason(error)})") from error

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """lm-eval's, of prompts and up to ends that are training's; nothing of an end is in what is returned."""
        seams = [self._seam(request.args[0]) for request in requests]
        asked = [self._asked(request, seam) for request, seam in zip(requests, seams, strict=True)]
        responses = super().generate_until(asked, disable_tqdm)  # type: ignore[safe-super]
        return [
            response.removeprefix(request.args[0][seam:]).removesuffix(self._before_end)
            for request, seam, response in zip(requests, seams, responses, strict=True)
        ]

    def _seam(self, context: str) -> int:
        """Where a prompt is cut: white space that the tokenizer merges with a first word belongs to the response."""
        return len(context) - self.template.moved(context) or len(context)

    def _asked(self, request: Instance, seam: int) -> Instance:
        context, settings = request.args
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [*until]
        if self.stops.end.token is None:
            until.append(self.stops.end.text)
        given = settings.get(self.END_TOKENS) or []
        tokens = sorted({*self.stops.tokens, *(given if isinstance(given, list) else [given])})
        return replace(request, arguments=(context[:seam], {**settings, self.END_TOKENS: tokens, "until": until}))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """lm-eval's, which puts the begin token before each text: neither text nor tokenizer may add another."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        bare = [replace(request, arguments=(request.args[0].removeprefix(begin),)) for request in requests]
        given, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(bare, disable_tqdm)  # type: ignore[safe-super]
        finally:
            self.add_bos_token = given


class SegmentedLM(AsTrained, HFLM):
    """HFLM whose greedy decoding lets rows leave a batch as they end, and whose choices share their context.

    A problem's choices are continuations of one context, worked examples and all: it is computed once for all of them.
    All else is lm-eval's.
    """

    END_TOKENS = "eos_token_id"

    def __init__(self, pretrained: PreTrainedModel, suite: Suite = PLAIN, **kwargs: Any):
        super().__init__(pretrained=pretrained, suite=suite, generation=pretrained.generation_config, **kwargs)
        self._at_most = suite.max_length
        self._shortened = 0
        if self.think_end_token in special_tokens(self.tokenizer):  # which texts of responses do not show
            self.think_end_token = self.tokenizer.convert_tokens_to_ids(self.think_end_token)

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its response: the model's context, or fewer where the suite says so."""
        own = int(super().max_length)
        return own if self._at_most is None else min(own, self._at_most)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask, (texts, longest): lm-eval's, but each text is asked whether it has the begin token."""
        rows = [self.tok_encode(text) for text in strings]
        kept = [row[-left_truncate_len:] for row in rows] if left_truncate_len else rows
        self._shortened += sum(len(row) > len(rest) for row, rest in zip(rows, kept, strict=True))
        return _padded(kept, self.device, padding_side, self.tokenizer.pad_token_id)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See AsTrained; says how many prompts the model's context had no room for."""
        self._shortened = 0
        responses = super().generate_until(requests, disable_tqdm)
        if self._shortened:
            tell(
                f"{self._shortened} of {len(requests)} prompts were asked without their beginnings: a context of "
                f"{self.max_length} tokens has no room for them and their answers"
            )
        return responses

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        size = override_bs or int(self.batch_size)
        shared = self._sharing(requests, size)
        answers: dict[int, Answer] = {}
        with tqdm(total=sum(map(len, shared)), disable=disable_tqdm or not shared, desc="choices") as bar:
            for batch in _batches(shared, requests, size):
                contexts = [requests[numbers[0]][1] for numbers in batch]
                continuations = [(row, requests[n][2]) for row, numbers in enumerate(batch) for n in numbers]
                scored = self._score(contexts, continuations)
                for number, answer in zip((n for numbers in batch for n in numbers), scored, strict=True):
                    answers[number] = answer
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                bar.update(len(scored))
        others = [number for number in range(len(requests)) if number not in answers]
        if others:
            scored = super()._loglikelihood_tokens([requests[n] for n in others], disable_tqdm, override_bs)
            answers.update(zip(others, scored, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _sharing(self, requests: Sequence[Request], size: int) -> list[list[int]]:
        """Numbers of requests that share a context, at most `size` together; none where the model cannot do it."""
        if self.backend != "causal" or not rows_can_leave(self.model):
            return []
        if not {"position_ids", "logits_to_keep"} <= inspect.signature(self.model.forward).parameters.keys():
            return []
        by_context = defaultdict(list)
        for number, (_, context, _) in enumerate(requests):
            by_context[tuple(context)].append(number)
        shared = []
        for tokens, numbers in by_context.items():
            longest = max(len(requests[number][2]) for number in numbers)
            if len(numbers) > 1 and len(tokens) + longest <= self.max_length:
                shared += [numbers[start : start + size] for start in range(0, len(numbers), size)]
        return shared

    def _score(self, contexts: list[list[int]], continuations: list[tuple[int, list[int]]]) -> list[Answer]:
        with torch.inference_mode(), self._autocast():
            logits = continuation_logits(self.model, contexts, continuations)
        answers = []
        logps = log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        for row, (_, tokens) in zip(logps, continuations, strict=True):
            wanted, row = torch.tensor(tokens, device=row.device), row[: len(tokens)]
            chosen = row.gather(1, wanted[:, None])
            answers.append((float(chosen.sum()), bool((row.argmax(dim=-1) == wanted).all())))
        return answers

    def _autocast(self) -> torch.autocast:
        amp = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=amp, enabled=amp is not None)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Contexts and responses, padded from their end token on."""
        if self.think_end_token is not None:  # what stops a task's response may well stand among its reasoning
            stop = [text for text in stop if text == self.stops.end.text]
        tokens = self._decode(context, max_length, stop, generation_kwargs)
        responses = tokens[:, context.shape[1] :]
        ends = torch.tensor(generation_kwargs["eos_token_id"], device=tokens.device)
        ended = torch.isin(responses, ends).cumsum(dim=1) > 0
        return torch.cat([context, responses.masked_fill(ended, self.tokenizer.pad_token_id)], dim=1)

    def _decode(
        self, context: torch.Tensor, max_length: int, stop: list[str], generation_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Contexts and responses, which nothing past an end token is asked of."""
        temperature = generation_kwargs.get("temperature") or 0.0
        known = {"attention_mask", "temperature", "do_sample", "eos_token_id"}
        if temperature > 0 or generation_kwargs.get("do_sample") or generation_kwargs.keys() - known:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        return self._decode_greedily(context, max_length, stop, generation_kwargs)

    def _decode_greedily(
        self, context: torch.Tensor, max_length: int, stop: list[str], generation_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        length = context.shape[1]
        settings = GenerationConfig(
            max_new_tokens=max_length - length,
            do_sample=False,
            eos_token_id=generation_kwargs["eos_token_id"],
            pad_token_id=self.tokenizer.pad_token_id,
        )
        texts = self._texts(stop)
        with self._autocast():
            rows = generate_in_segments(
                self.model,
                context,
                generation_kwargs["attention_mask"],
                settings,
                lambda rows: stop_sequences_criteria(self.tokenizer, texts, length, rows),
                lambda tokens: any(text in self.tokenizer.decode(tokens) for text in texts),
            )
        return self._joined(context, rows)

    def _texts(self, stop: list[str]) -> list[str]:
        """Of what stops a response, the texts: the end token's is known by its token."""
        return [text for text in stop if text != self.tokenizer.decode([self.tokenizer.eos_token_id])]

    def _joined(self, context: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
        width = max(map(len, rows))
        padded = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([context, torch.tensor(padded, device=context.device)], dim=1)


class Ask(Protocol):
    """What hands pieces of work to engines; one answer for each, in their order.

    task: "score", of pieces {"context": tokens, "continuations": [tokens]}, answered by an Answer for each of these;
    or "draw", of {"ids": tokens, "settings": of vllm.SamplingParams}, answered by the tokens drawn. sizes: tokens of
    each piece's work.
    """

    def __call__(self, task: str, pieces: Sequence[Any], sizes: Sequence[int]) -> list[Any]: ...


class ServedLM(SegmentedLM):
    """SegmentedLM whose model is elsewhere: prompts, choices and responses are the same, `ask` has them computed.

    pretrained: the model's shape, on the meta device. seed: of responses that are drawn, each with one of its own.
    ask: to be set before anything is asked.
    """

    REQUESTS = 8192  # responses that lm-eval asks for at once

    ask: Ask

    def __init__(self, pretrained: PreTrainedModel, suite: Suite, seed: int, **kwargs: Any):
        super().__init__(pretrained, suite, batch_size=self.REQUESTS, **kwargs)
        self._seeds = count(seed)

    @property
    def device(self) -> torch.device:
        """Of the tokens."""
        return torch.device("cpu")

    @property
    def max_length(self) -> int:
        """Tokens of a context: an engine's prompt leaves a position to a token that it draws."""
        return super().max_length - ENGINES_OWN

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        cut = 0
        for number, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # as lm-eval has it: nothing is asked after the last token
            if room < 1:
                raise UserError(f"an answer has {len(continuation)} tokens, and the context {self.max_length}")
            cut += len(context) > room
            by_context[tuple(context[-room:])].append(number)
        if cut:
            tell(
                f"{cut} of {len(requests)} contexts were scored without their beginnings: a context of "
                f"{self.max_length} tokens has no room for them"
            )
        lengths = [len(continuation) for _, _, continuation in requests]
        groups = [
            (context, part)
            for context, numbers in by_context.items()
            for part in in_parts(numbers, lengths, self.max_length)  # windows of texts all have the same context
        ]
        pieces = [{"context": list(of), "continuations": [requests[n][2] for n in numbers]} for of, numbers in groups]
        sizes = [len(of) + sum(lengths[n] for n in numbers) for of, numbers in groups]
        answers: list[Answer] = [(0.0, False)] * len(requests)
        for (_, numbers), scored in zip(groups, self.ask("score", pieces, sizes), strict=True):
            for number, (logp, greedy) in zip(numbers, scored, strict=True):
                answers[number] = (logp, greedy)
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return answers

    def _decode(
        self, context: torch.Tensor, max_length: int, stop: list[str], generation_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        drawn = generation_kwargs.get("do_sample")
        own = {name: getattr(self._generation, name, None) for name in OWN if drawn or name in PENALTIES}
        settings = {name: value for name, value in own.items() if value is not None}
        settings |= {name: value for name, value in generation_kwargs.items() if name not in TRANSFORMERS_ALONE}
        if settings.get("num_beams") == 1:  # one beam is none
            del settings["num_beams"]
        settings["temperature"] = generation_kwargs.get("temperature") or (1.0 if drawn else 0.0)
        settings |= {"max_tokens": max_length - context.shape[1], "stop": self._texts(stop)}
        settings["stop_token_ids"] = generation_kwargs["eos_token_id"]
        prompts = [
            row[kept].tolist() for row, kept in zip(context, generation_kwargs["attention_mask"].bool(), strict=True)
        ]
        pieces = [{"ids": ids, "settings": {**settings, "seed": next(self._seeds) % 2**31}} for ids in prompts]
        return self._joined(context, self.ask("draw", pieces, [len(ids) + settings["max_tokens"] for ids in prompts]))


def _batches(groups: list[list[int]], requests: Sequence[Request], size: int) -> Iterator[list[list[int]]]:
    """Groups of requests together, of at most `size` requests, those with the longest contexts first."""
    batch: list[list[int]] = []
    for numbers in sorted(groups, key=lambda numbers: -len(requests[numbers[0]][1])):
        if batch and sum(map(len, batch)) + len(numbers) > size:
            yield batch
            batch = []
        batch.append(numbers)
    if batch:
        yield batch


def continuation_logits(
    model: PreTrainedModel, contexts: list[list[int]], continuations: list[tuple[int, list[int]]]
) -> torch.Tensor:
    """Logits that predict continuations of contexts, each context computed once.

    contexts: tokens.
    continuations: (which context, tokens).
    Returns (continuations, tokens of the longest, vocabulary) in the model's type; position i of a row predicts the
    continuation's token i, and means nothing past its end.
    """
    ids, mask = _padded(contexts, model.device, "left")  # the last column predicts every first token
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    owners = torch.tensor([owner for owner, _ in continuations], device=model.device)
    first = output.logits[owners]
    following, following_mask = _padded([tokens[:-1] for _, tokens in continuations], model.device, "right")
    width = following.shape[1]
    if width == 0:
        return first
    cache = output.past_key_values
    cache.batch_select_indices(owners)
    later = model(
        following,
        attention_mask=torch.cat([mask[owners], following_mask], dim=1),
        position_ids=mask[owners].sum(dim=1, keepdim=True) + torch.arange(width, device=model.device),
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first, later.logits], dim=1)


def _padded(
    rows: list[list[int]], device: torch.device, side: str, token: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded by `token` on one side, and the mask of those that are no padding: int64 (rows, longest)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
    padded = pad_sequence(ids, batch_first=True, padding_value=token, padding_side=side)
    return padded.to(device), pad_sequence(mask, batch_first=True, padding_side=side).to(device)

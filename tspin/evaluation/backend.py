"""Our model behind lm-evaluation-harness: its Hugging Face backend, with less work for the same numbers."""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from tspin.sampling import end_tokens, generate_in_segments, rows_can_leave

Request = tuple[tuple[str, str], list[int], list[int]]  # texts; tokens of a context, of a continuation
Answer = tuple[float, bool]  # log-probability of the continuation in nats; whether it is what greedy decoding gives


class SegmentedLM(HFLM):
    """HFLM whose greedy decoding lets rows leave a batch as they end, and whose choices share their context.

    A problem's choices are continuations of one context, worked examples and all: it is computed once for all of them.
    All else is lm-eval's.
    """

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
        temperature = generation_kwargs.get("temperature") or 0.0
        known = {"attention_mask", "temperature", "do_sample"}
        if temperature > 0 or generation_kwargs.get("do_sample") or generation_kwargs.keys() - known:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        length, end = context.shape[1], self.tokenizer.eos_token_id
        settings = GenerationConfig(
            max_new_tokens=max_length - length,
            do_sample=False,
            eos_token_id=end_tokens(self.model.generation_config, self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        texts = [text for text in stop if text != self.tokenizer.decode([end])]
        with self._autocast():
            rows = generate_in_segments(
                self.model,
                context,
                generation_kwargs["attention_mask"],
                settings,
                lambda rows: stop_sequences_criteria(self.tokenizer, texts, length, rows),
                lambda tokens: any(text in self.tokenizer.decode(tokens) for text in texts),
            )
        width = max(map(len, rows))
        padded = [row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([context, torch.tensor(padded, device=context.device)], dim=1)


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


def _padded(rows: list[list[int]], device: torch.device, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded by zeros on one side, and the mask of those that are tokens: int64 (rows, longest)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
    first, second = (pad_sequence(tensors, batch_first=True, padding_side=side) for tensors in (ids, mask))
    return first.to(device), second.to(device)

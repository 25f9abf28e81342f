"""One iteration's training: a transformers.Trainer over triplets of responses."""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from tspin.data import Example, Response
from tspin.errors import UserError
from tspin.logprobs import (
    pack_shared_prefixes,
    pad_rows,
    sequence_logps,
    shared_prefix_logps,
    supports_shared_prefix,
)
from tspin.objectives import LABELLED, PROTO, SYNTHETIC, Coefficients, Method, SequenceLogps


@dataclass(frozen=True)
class Triplet:
    """A prompt with its responses by role, and log π_θt of each role where a reference is used."""

    prompt_id: int
    prompt_ids: list[int]
    responses: Mapping[str, Response]
    reference_logps: Mapping[str, float] = field(default_factory=dict)


def make_triplets(examples: Sequence[Example], responses: Mapping[str, Mapping[int, Response]]) -> list[Triplet]:
    """Triplets from labelled examples and, by role, sampled responses by prompt id."""
    return [
        Triplet(
            example.prompt_id,
            example.prompt_ids,
            {LABELLED: example.labelled, **{role: given[example.prompt_id] for role, given in responses.items()}},
        )
        for example in examples
    ]


class TripletCollator:
    """Batches of triplets as {"sequences": tensors for `logps_of`, "lengths", "reference", "tokens"}.

    All roles of all triplets stand in one block, so that a step is one forward and one backward
    pass whatever the method.
    """

    def __init__(self, roles: Sequence[str], pad_token_id: int, share_prefixes: bool):
        self.roles = tuple(roles)
        self.pad_token_id = pad_token_id
        self.share_prefixes = share_prefixes

    def __call__(self, triplets: Sequence[Triplet]) -> dict[str, Any]:
        prompts = [t.prompt_ids for t in triplets]
        responses = [[t.responses[role].ids for t in triplets] for role in self.roles]
        sequences: dict[str, Any]
        if self.share_prefixes:
            sequences = pack_shared_prefixes(prompts, responses, self.pad_token_id)
        else:
            repeated = [prompt for _ in self.roles for prompt in prompts]
            sequences = dict(pad_rows(repeated, [ids for role in responses for ids in role], self.pad_token_id))
        known = [role for role in self.roles if role in triplets[0].reference_logps]
        return {
            "sequences": sequences,
            "lengths": {role: torch.tensor([len(t.responses[role].ids) for t in triplets]) for role in self.roles},
            "reference": {role: torch.tensor([t.reference_logps[role] for t in triplets]) for role in known},
            "tokens": sum(map(len, prompts)) * len(self.roles) + sum(len(ids) for role in responses for ids in role),
        }


def logps_of(model: torch.nn.Module, batch: Mapping[str, Any], roles: Sequence[str]) -> dict[str, Tensor]:
    """Sequence log-probabilities of a collated batch, role → float32 (batch,)."""
    sequences = batch["sequences"]
    logps = shared_prefix_logps if "branches" in sequences else sequence_logps
    return dict(zip(roles, logps(model, **sequences).chunk(len(roles)), strict=True))


class TripletTrainer(Trainer):
    """Trains a policy on triplets with one method's objective, at one iteration.

    Logs, at every logging step: loss, gradient norm, tokens per second, both advantages, and for
    each role the reward by the method's own definition and the log-likelihood (nats, summed over
    the response), all means over the batch. Tokens count every response with a prompt of its own,
    shared or not, so that tokens per second compare layouts by the work they deliver.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        triplets: Sequence[Triplet],
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        coefficients: Coefficients,
        **trainer_arguments: Any,
    ):
        self.method = method
        self.coefficients = coefficients
        self.roles = tuple(triplets[0].responses)
        collator = TripletCollator(self.roles, pad_token(tokenizer), supports_shared_prefix(model))
        # Columns are ours, not the model's arguments.
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=triplets,  # type: ignore[arg-type]
            data_collator=collator,
            processing_class=tokenizer,
            **trainer_arguments,
        )
        # Our loss is a mean over the micro-batch: let Trainer divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, float] = defaultdict(float)
        self._micro_batches = 0
        self._last_log = time.perf_counter()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: D102
        logps = logps_of(model, inputs, self.roles)
        loss = self.method.loss(SequenceLogps(logps, inputs["reference"], inputs["lengths"]), self.coefficients).mean()
        detached = {role: values.detach() for role, values in logps.items()}
        self._record(SequenceLogps(detached, inputs["reference"]), loss.detach(), inputs["tokens"])
        return (loss, detached) if return_outputs else loss

    def _record(self, logps: SequenceLogps, loss: Tensor, tokens: int) -> None:
        step = step_metrics(self.method, self.coefficients, logps)
        values = torch.stack([loss, *step.values()]).tolist()  # one transfer from the device
        if not math.isfinite(values[0]):
            raise UserError(
                f"step {self.state.global_step + 1}: the {self.coefficients.loss} loss is {values[0]}, so nothing was "
                "saved; lower training.learning_rate or alpha, or use the logistic loss"
            )
        for name, value in zip(step, values[1:], strict=True):
            self._sums[name] += value
        self._sums["tokens"] += tokens
        self._micro_batches += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to what Trainer logs."""
        if self._micro_batches:
            tokens = self._sums.pop("tokens")
            now = time.perf_counter()
            logs = {
                **logs,
                **{name: total / self._micro_batches for name, total in self._sums.items()},
                "tokens": tokens,
                "tokens_per_second": tokens / (now - self._last_log),
            }
            self._sums.clear()
            self._micro_batches = 0
            self._last_log = now
        super().log(logs, start_time)


def step_metrics(method: Method, coefficients: Coefficients, logps: SequenceLogps) -> dict[str, Tensor]:
    """Means over a batch, name → scalar tensor: log-likelihoods, rewards, both advantages."""
    metrics = {f"log_likelihood/{role}": values.mean() for role, values in logps.policy.items()}
    if method.reward is None:
        return metrics
    rewards = {
        role: method.reward(logps, coefficients, role).mean()
        for role in logps.policy
        if not method.uses_reference or role in logps.reference
    }
    metrics |= {f"reward/{role}": value for role, value in rewards.items()}
    if {LABELLED, SYNTHETIC} <= rewards.keys():
        metrics["advantage/current"] = rewards[LABELLED] - rewards[SYNTHETIC]
    if {SYNTHETIC, PROTO} <= rewards.keys():
        metrics["advantage/historical"] = rewards[SYNTHETIC] - rewards[PROTO]
    return metrics


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id, or the end token's where there is none: padding is masked everywhere."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(token, int)
    return token


@torch.no_grad()
def compute_logps(
    model: PreTrainedModel,
    triplets: Sequence[Triplet],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    autocast: bool,
) -> dict[str, list[float]]:
    """log π of every response under the model as it is: role → nats, in the triplets' order."""
    roles = tuple(triplets[0].responses)
    collate = TripletCollator(roles, pad_token(tokenizer), supports_shared_prefix(model))
    logps = {role: [0.0] * len(triplets) for role in roles}
    order = sorted(range(len(triplets)), key=lambda i: -len(triplets[i].prompt_ids))
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="reference log-probabilities", unit="batch"):
        indices = order[start : start + batch_size]
        batch = _to(collate([triplets[i] for i in indices]), model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            values = logps_of(model, batch, roles)
        for role in roles:
            for i, value in zip(indices, values[role].tolist(), strict=True):
                logps[role][i] = value
    return logps


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _to(entry, device) for name, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value

"""One iteration's training: a transformers.Trainer over triplets of responses."""

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
from tspin.logprobs import pad_rows, sequence_logps
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


def padded_role(triplets: Sequence[Triplet], role: str, pad_token_id: int) -> dict[str, Tensor]:
    """`pad_rows` of one role's responses."""
    return pad_rows([t.prompt_ids for t in triplets], [t.responses[role].ids for t in triplets], pad_token_id)


class TripletCollator:
    """Batches of triplets as {"train" | "monitor": padded rows, "reference": role → (batch,), …}.

    The rows of all roles that carry gradient stand in one block, role after role, so that a step
    is one forward and one backward pass whatever the method. Monitored roles come in a second
    block, evaluated without gradient.
    """

    def __init__(self, train_roles: Sequence[str], monitor_roles: Sequence[str], pad_token_id: int):
        self.blocks = {"train": tuple(train_roles), "monitor": tuple(monitor_roles)}
        self.pad_token_id = pad_token_id

    def __call__(self, triplets: Sequence[Triplet]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for block, roles in self.blocks.items():
            if roles:
                batch[block] = pad_rows(
                    [t.prompt_ids for _ in roles for t in triplets],
                    [t.responses[role].ids for role in roles for t in triplets],
                    self.pad_token_id,
                )
        roles = [role for roles in self.blocks.values() for role in roles]
        batch["lengths"] = {role: torch.tensor([len(t.responses[role].ids) for t in triplets]) for role in roles}
        batch["reference"] = {
            role: torch.tensor([t.reference_logps[role] for t in triplets])
            for role in roles
            if role in triplets[0].reference_logps
        }
        return batch


class TripletTrainer(Trainer):
    """Trains a policy on triplets with one method's objective, at one iteration.

    Logs, at every logging step: loss, gradient norm, tokens per second, both advantages, and for
    each role the reward by the method's own definition and the log-likelihood (nats, summed over
    the response), all means over the batch.
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
        train_roles = method.gradient_roles(coefficients)
        monitor_roles = [role for role in triplets[0].responses if role not in train_roles]
        self.collator = TripletCollator(train_roles, monitor_roles, pad_token(tokenizer))
        # Columns are ours, not the model's arguments.
        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=triplets,  # type: ignore[arg-type]
            data_collator=self.collator,
            processing_class=tokenizer,
            **trainer_arguments,
        )
        # Our loss is a mean over the micro-batch: let Trainer divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, float] = defaultdict(float)
        self._micro_batches = 0
        self._last_log = time.perf_counter()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: D102
        logps = split_roles(sequence_logps(model, **inputs["train"]), self.collator.blocks["train"])
        detached = {role: values.detach() for role, values in logps.items()}
        if "monitor" in inputs:
            with torch.no_grad():
                monitored = sequence_logps(model, **inputs["monitor"])
            detached |= split_roles(monitored, self.collator.blocks["monitor"])
        loss = self.method.loss(
            SequenceLogps(logps, inputs["reference"], inputs["lengths"]), self.coefficients
        ).mean()
        self._record(SequenceLogps(detached, inputs["reference"], inputs["lengths"]), inputs)
        return (loss, detached) if return_outputs else loss

    def _record(self, logps: SequenceLogps, inputs: Mapping[str, Any]) -> None:
        step = step_metrics(self.method, self.coefficients, logps)
        names, values = list(step), torch.stack(list(step.values()))
        for name, value in zip(names, values.tolist(), strict=True):  # one transfer from the device
            self._sums[name] += value
        self._sums["tokens"] += sum(int(inputs[b]["attention_mask"].sum()) for b in ("train", "monitor") if b in inputs)
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


def split_roles(values: Tensor, roles: Sequence[str]) -> dict[str, Tensor]:
    """A block's (roles · batch,) values as role → (batch,)."""
    return dict(zip(roles, values.chunk(len(roles)), strict=True))


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id, or the end token's where there is none: padding is masked everywhere."""
    token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(token, int)
    return token


@torch.no_grad()
def compute_logps(
    model: PreTrainedModel,
    triplets: Sequence[Triplet],
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    autocast: bool,
) -> list[float]:
    """log π of every triplet's response in one role, under the model as it is, in the triplets' order."""
    order = sorted(range(len(triplets)), key=lambda i: -len(triplets[i].prompt_ids) - len(triplets[i].responses[role].ids))
    logps = [0.0] * len(triplets)
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc=f"log-probabilities of {role}", unit="batch"):
        batch = order[start : start + batch_size]
        inputs = padded_role([triplets[i] for i in batch], role, pad_token(tokenizer))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            values = sequence_logps(model, **{name: tensor.to(model.device) for name, tensor in inputs.items()})
        for i, value in zip(batch, values.tolist(), strict=True):
            logps[i] = value
    return logps

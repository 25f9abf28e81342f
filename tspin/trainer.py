"""One iteration's training: a transformers.Trainer over triplets of responses."""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from tspin.data import Example, Response
from tspin.errors import UserError
from tspin.logprobs import Layout, choose_layout, sequence_logps, shared_prefix_logps, uses_flex_attention
from tspin.objectives import LABELLED, PROTO, SYNTHETIC, Coefficients, Method, SequenceLogps
from tspin.packing import (
    FLEX_BLOCK,
    ROW_TOKENS,
    Tensors,
    example_sizes,
    pack_shared_prefixes,
    pad_rows,
    plan_padded,
    plan_shared,
)

REFERENCE_WINDOW = 256  # triplets planned into micro-batches together


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
    """Turns triplets into micro-batches of at most `max_tokens` tokens: {"micro_batches": […]}.

    Each is {"sequences": tensors for `logps_of`, "indices": which triplets, "lengths", "reference",
    "share": its part of the triplets, "tokens"}. All roles of a triplet stand together, so that a
    micro-batch is one forward and one backward pass whatever the method. What is computed does not
    depend on `max_tokens`: an optimizer step sums the micro-batches of the triplets it is given.
    """

    def __init__(self, roles: Sequence[str], pad_token_id: int, layout: Layout, max_tokens: int, flex: bool = False):
        self.roles = tuple(roles)
        self.pad_token_id = pad_token_id
        self.layout = layout
        self.max_tokens = max_tokens
        self.flex = flex  # block masks skip what is masked: one long row; dense masks: short rows

    def __call__(self, triplets: Sequence[Triplet]) -> dict[str, list[dict[str, Any]]]:
        prompts = [t.prompt_ids for t in triplets]
        responses = [[t.responses[role].ids for t in triplets] for role in self.roles]
        rows_of: list[list[list[int]] | None]
        if self.layout == "shared":
            row_tokens = self.max_tokens // FLEX_BLOCK * FLEX_BLOCK if self.flex else min(ROW_TOKENS, self.max_tokens)
            rows_of = list(plan_shared(example_sizes(prompts, responses), self.max_tokens, row_tokens))
            micro_batches = [sum(rows, []) for rows in rows_of if rows]
        else:
            longest = [len(p) + max(len(role[i]) for role in responses) for i, p in enumerate(prompts)]
            micro_batches = plan_padded([size * len(self.roles) for size in longest], self.max_tokens)
            rows_of = [None] * len(micro_batches)
        return {
            "micro_batches": [
                {**self._micro_batch([triplets[i] for i in indices], rows), "indices": indices,
                 "share": len(indices) / len(triplets)}
                for indices, rows in zip(micro_batches, rows_of, strict=True)
            ]
        }  # fmt: skip

    def _micro_batch(self, triplets: Sequence[Triplet], rows: list[list[int]] | None) -> dict[str, Any]:
        prompts = [t.prompt_ids for t in triplets]
        responses = [[t.responses[role].ids for t in triplets] for role in self.roles]
        sequences: Tensors
        if rows is not None:
            # The examples stand in the order of their rows.
            ends = list(accumulate(map(len, rows), initial=0))
            rows = [list(range(first, last)) for first, last in pairwise(ends)]
            sequences = pack_shared_prefixes(
                prompts, responses, self.pad_token_id, rows, multiple=FLEX_BLOCK if self.flex else 1
            )
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


def collator_for(
    model: torch.nn.Module,
    triplets: Sequence[Triplet],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    layout: str = "auto",
) -> TripletCollator:
    """The collator that suits a model. Raises ValueError where it does not support the layout asked for."""
    return TripletCollator(
        tuple(triplets[0].responses),
        pad_token(tokenizer),
        choose_layout(model, layout),
        max_tokens,
        uses_flex_attention(model),
    )


def logps_of(model: torch.nn.Module, batch: Mapping[str, Any], roles: Sequence[str]) -> dict[str, Tensor]:
    """Sequence log-probabilities of a micro-batch, role → float32 (batch,)."""
    sequences = batch["sequences"]
    logps = shared_prefix_logps if "branches" in sequences else sequence_logps
    return dict(zip(roles, logps(model, **sequences).chunk(len(roles)), strict=True))


class TripletTrainer(Trainer):
    """Trains a policy on triplets with one method's objective, at one iteration.

    args.per_device_train_batch_size counts the triplets of a step on one device; they pass through
    the model in micro-batches planned by tokens (see TripletCollator). Dropout is off: log π is the
    policy's, as it was when y′ was drawn.

    Logs, at every logging step: loss, gradient norm, tokens per second, both advantages, and for
    each role the reward by the method's own definition and the log-likelihood (nats, summed over
    the response), all means over the triplets. Tokens count every response with a prompt of its own,
    shared or not, so that tokens per second compare layouts by the work they deliver.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        triplets: Sequence[Triplet],
        collator: TripletCollator,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        coefficients: Coefficients,
        **trainer_arguments: Any,
    ):
        self.method = method
        self.coefficients = coefficients
        self.roles = collator.roles
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
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
        # Our loss is a mean over the step's triplets: let Trainer divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, float] = defaultdict(float)
        self._weight = 0.0
        self._last_log = time.perf_counter()

    def training_step(self, model, inputs, num_items_in_batch=None):  # noqa: D102
        *first, last = inputs["micro_batches"]
        losses = []
        for micro_batch in first:
            with self.accelerator.no_sync(model):  # gradients are exchanged once, after the last
                losses.append(super().training_step(model, micro_batch))
        losses.append(super().training_step(model, last))
        return torch.stack(losses).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A micro-batch's part of the mean loss over the step's triplets."""
        logps = logps_of(model, inputs, self.roles)
        loss = self.method.loss(SequenceLogps(logps, inputs["reference"], inputs["lengths"]), self.coefficients).mean()
        detached = {role: values.detach() for role, values in logps.items()}
        self._record(
            SequenceLogps(detached, inputs["reference"], inputs["lengths"]),
            loss.detach(),
            inputs["tokens"],
            inputs["share"],
        )
        loss = loss * inputs["share"]
        return (loss, detached) if return_outputs else loss

    def _record(self, logps: SequenceLogps, loss: Tensor, tokens: int, share: float) -> None:
        step = step_metrics(self.method, self.coefficients, logps)
        values = torch.stack([loss, *step.values()]).tolist()  # one transfer from the device
        if not math.isfinite(values[0]):
            raise UserError(
                f"step {self.state.global_step + 1}: the {self.coefficients.loss} loss is {values[0]}, so nothing was "
                "saved; lower training.learning_rate or alpha, or use the logistic loss"
            )
        for name, value in zip(step, values[1:], strict=True):
            self._sums[name] += value * share
        self._sums["tokens"] += tokens
        self._weight += share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to what Trainer logs."""
        if self._weight:
            tokens = self._sums.pop("tokens")
            now = time.perf_counter()
            logs = {
                **logs,
                **{name: total / self._weight for name, total in self._sums.items()},
                "tokens": tokens,
                "tokens_per_second": tokens / (now - self._last_log),
            }
            self._sums.clear()
            self._weight = 0.0
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
    collator: TripletCollator,
    autocast: bool,
    description: str = "log-probabilities",
) -> dict[str, list[float]]:
    """log π of every response under the model as it is: role → nats, in the triplets' order."""
    logps = {role: [0.0] * len(triplets) for role in collator.roles}
    # Longest first across the whole data: micro-batches of like lengths.
    order = sorted(range(len(triplets)), key=lambda i: -len(triplets[i].prompt_ids))
    model.eval()
    with tqdm(total=len(order), desc=description, unit="prompt") as bar:
        for start in range(0, len(order), REFERENCE_WINDOW):
            window = order[start : start + REFERENCE_WINDOW]
            for micro_batch in collator([triplets[i] for i in window])["micro_batches"]:
                with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                    values = logps_of(model, _to(micro_batch, model.device), collator.roles)
                for role in collator.roles:
                    for i, value in zip(micro_batch["indices"], values[role].tolist(), strict=True):
                        logps[role][window[i]] = value
                bar.update(len(micro_batch["indices"]))
    return logps


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _to(entry, device) for name, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value

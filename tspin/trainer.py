"""One iteration's training: a transformers.Trainer over triplets of responses."""

import copy
import errno
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from tspin.errors import UserError
from tspin.logprobs import Layout, choose_layout, sequence_logps, shared_prefix_logps, uses_flex_attention
from tspin.memory import out_of_memory
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
from tspin.records import Example, Response, View

REFERENCE_WINDOW = 256  # triplets planned into micro-batches together
IDLE = {"share": 0.0, "tokens": 0}  # a micro-batch that counts for nothing
UNLOGGED = "unlogged.json"  # in a training's state: what was summed since the last log


@dataclass(frozen=True)
class Triplet:
    """A prompt with its responses by role, and log π_θt of each role where a reference is used."""

    prompt_id: int
    prompt_ids: list[int]
    responses: Mapping[str, Response]
    reference_logps: Mapping[str, float] = field(default_factory=dict)


def make_triplets(examples: Sequence[Example], responses: Mapping[str, Mapping[int, Response]]) -> Sequence[Triplet]:
    """Triplets from labelled examples and, by role, sampled responses by prompt id; each is made when asked for."""

    def triplet(i: int) -> Triplet:
        example = examples[i]
        number = example.prompt_id
        given = {role: found[number] for role, found in responses.items()}
        return Triplet(number, example.prompt_ids, {LABELLED: example.labelled, **given})

    return View(len(examples), triplet)


class TripletCollator:
    """Turns triplets into micro-batches of at most `max_tokens` tokens: {"triplets", "micro_batches": […]}.

    A micro-batch is {"sequences": tensors for `logps_of`, "indices": which triplets, "lengths", "reference",
    "share": its part of the triplets, "tokens"}. All roles of a triplet stand together, so that a
    micro-batch is one forward and one backward pass whatever the method. What is computed does not
    depend on `max_tokens`: an optimizer step sums the micro-batches of the triplets it is given.

    Where several processes train together, each is given all triplets of a step and makes micro-batches of its own
    part: every `processes`th, from the `process`th. One without a part gets one triplet with share 0, so that all
    call the model.
    """

    process, processes = 0, 1

    def __init__(self, roles: Sequence[str], pad_token_id: int, layout: Layout, max_tokens: int, flex: bool = False):
        self.roles = tuple(roles)
        self.pad_token_id = pad_token_id
        self.layout = layout
        self.max_tokens = max_tokens
        self.flex = flex  # block masks skip what is masked: one long row; dense masks: short rows

    def finer(self, triplets: Sequence[Triplet]) -> "TripletCollator | None":
        """A collator that cuts these triplets into more micro-batches; None where each holds one triplet already."""
        count, finer = len(self(triplets)["micro_batches"]), copy.copy(self)
        while finer.max_tokens > (FLEX_BLOCK if self.flex else 1):
            finer.max_tokens = max(finer.max_tokens // 2, FLEX_BLOCK if self.flex else 1)
            if len(finer(triplets)["micro_batches"]) > count:
                return finer
        return None

    def __call__(self, triplets: Sequence[Triplet]) -> dict[str, list[Any]]:
        of_all, part = triplets, triplets[self.process :: self.processes]
        triplets = part or triplets[:1]
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
            "triplets": list(of_all),
            "micro_batches": [
                {**self._micro_batch([triplets[i] for i in indices], rows), "indices": indices,
                 "share": len(indices) / len(of_all), **({} if part else IDLE)}
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
            "prompt_ids": [t.prompt_id for t in triplets],
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
        if self.is_fsdp_enabled and args.bf16:
            # Accelerate's policy returns what a model returns as bfloat16, and exchanges gradients so. A
            # log-probability summed over a response needs more digits.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        # Our loss is a mean over the step's triplets: let Trainer divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.collator = collator
        collator.process, collator.processes = args.process_index, args.world_size
        self.keep_state: Callable[[int, Callable[[Path], None]], None] | None = None
        self._sums: dict[str, float] = defaultdict(float)
        self._weight = 0.0
        self._last_log = time.perf_counter()
        self._step: tuple[int, list[Sequence[Triplet]], dict[str, float], float] = (-1, [], {}, 0.0)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The gradients of a batch, micro-batch by micro-batch; smaller ones from here on where memory runs out."""
        if self._step[0] != self.state.global_step:
            self._step = (self.state.global_step, [], dict(self._sums), self._weight)
        _, earlier, sums, weight = self._step  # what this optimizer step has done and where its means began
        triplets, micro_batches = inputs["triplets"], inputs["micro_batches"]
        if self.collator is not self.data_collator:  # collated before memory ran out
            micro_batches = self.collator(triplets)["micro_batches"]
        if self.args.world_size > 1:
            micro_batches = self._as_many_everywhere(micro_batches)
        while True:
            try:
                loss = self._accumulate(model, micro_batches)
                earlier.append(triplets)
                return loss
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.args.world_size > 1:
                    raise
            # Here the error is gone, and with it the activations that its frames held. A backward pass may have added
            # half of its gradients, so the optimizer step starts anew.
            self._use_less_memory(triplets)
            self._sums, self._weight = defaultdict(float, sums), weight
            model.zero_grad()
            for batch in earlier:
                with self._keeping_gradients(model):
                    self._accumulate(model, self.collator(batch)["micro_batches"])
            micro_batches = self.collator(triplets)["micro_batches"]

    def _accumulate(self, model: torch.nn.Module, micro_batches: Sequence[dict[str, Any]]) -> Tensor:
        *first, last = micro_batches
        losses = []
        for micro_batch in first:
            with self._keeping_gradients(model):
                losses.append(super().training_step(model, micro_batch))
        losses.append(super().training_step(model, last))
        return torch.stack(losses).sum()

    def get_train_dataloader(self) -> DataLoader:
        """Batches in one order whatever the number of processes: each gets all of a step, and the collator its part."""
        loader = super().get_train_dataloader()
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            sampler = loader.batch_sampler
            # Neither other batches for each process, nor the last one filled up with triplets of the first.
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def _as_many_everywhere(self, micro_batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """As many micro-batches as the process with the most has: a sharded model must be called by all at once."""
        most = torch.tensor(len(micro_batches), device=self.args.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        idle = {**micro_batches[-1], **IDLE}
        return [*micro_batches, *[idle] * (int(most) - len(micro_batches))]

    @contextmanager
    def _keeping_gradients(self, model: torch.nn.Module) -> Iterator[None]:
        """Gradients of the next backward pass are added up here; processes exchange them after a later one."""
        if self.is_fsdp_enabled:
            yield  # exchanged each time: adding up would hold every gradient whole on every GPU
        elif self.is_deepspeed_enabled:
            self.accelerator.gradient_state._set_sync_gradients(False)
            yield
            self.accelerator.gradient_state._set_sync_gradients(True)
        else:
            with self.accelerator.no_sync(model):
                yield

    def _use_less_memory(self, triplets: Sequence[Triplet]) -> None:
        finer, step = self.collator.finer(triplets), self.state.global_step + 1
        if finer is None:
            raise UserError(
                f"step {step}: out of memory with a single prompt and its responses in a micro-batch (prompts "
                f"{_ids(triplets)}); set training.gradient_checkpointing, training.lora or a lower data.max_*_tokens"
            )
        tqdm.write(
            f"tspin: step {step}: out of memory; micro-batches of {finer.max_tokens} tokens from here on "
            f"({self.collator.max_tokens} before), the same prompts a step",
            file=sys.stderr,
        )
        self.collator = finer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradients' norm, before the optimizer uses them. Raises UserError where it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise self._diverged(f"the gradients' norm is {float(norm)}", sum(map(list, self._step[1]), []))
        return norm

    def _diverged(self, what: str, triplets: Sequence[Triplet] | Sequence[int]) -> UserError:
        return UserError(
            f"step {self.state.global_step + 1}: {what} (prompts {_ids(triplets)}), so nothing of this step was kept; "
            "earlier checkpoints stay as they are; lower training.learning_rate or alpha, or use the logistic loss"
        )

    def _save_checkpoint(self, model, trial):
        """Trainer's checkpoint, given to `keep_state`, which writes it whole; without its pickled settings."""
        if self.keep_state is None:
            super()._save_checkpoint(model, trial)
            return

        def write(target: Path) -> None:
            place = self.args.output_dir
            self.args.output_dir = str(target)
            try:
                super(TripletTrainer, self)._save_checkpoint(model, trial)
            except RuntimeError as error:  # torch.save's own words for a disk that takes no more
                if not re.search("inline_container|PytorchStreamWriter|iostream error", str(error)):
                    raise
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
            finally:
                self.args.output_dir = place
            (checkpoint,) = target.iterdir()
            (checkpoint / "training_args.bin").unlink(missing_ok=True)
            unlogged = {"sums": dict(self._sums), "weight": self._weight, "loss": self._tr_loss.item()}
            unlogged |= {"logged": self._globalstep_last_logged, "columns": [list(e) for e in self.state.log_history]}
            (checkpoint / UNLOGGED).write_text(json.dumps(unlogged))

        self.keep_state(self.state.global_step, write)

    def restore_unlogged(self, checkpoint: Path) -> None:
        """Go on with the means of a logging interval that a kept state was in the middle of; after training began."""
        unlogged = json.loads((checkpoint / UNLOGGED).read_text())
        self._sums, self._weight = defaultdict(float, unlogged["sums"]), unlogged["weight"]
        self._tr_loss += unlogged["loss"]
        self._globalstep_last_logged = unlogged["logged"]
        history = zip(self.state.log_history, unlogged["columns"], strict=True)
        self.state.log_history = [{name: entry[name] for name in names} for entry, names in history]  # read sorted
        self._last_log = time.perf_counter()

    def _issue_warnings_after_load(self, load_result):
        """Trainer only warns when a kept state lacks weights; going on from it would give other numbers."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = set(load_result.missing_keys) - set(tied)
        if missing or load_result.unexpected_keys:
            name = sorted(missing or load_result.unexpected_keys)[0]
            raise UserError(f"the training's saved state does not fit this model ({name}): delete its folder")

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
            inputs["prompt_ids"],
        )
        loss = loss * inputs["share"] * self.args.world_size  # processes' gradients are averaged, shares are of all
        return (loss, detached) if return_outputs else loss

    def _record(self, logps: SequenceLogps, loss: Tensor, tokens: int, share: float, prompt_ids: Sequence[int]) -> None:
        step = step_metrics(self.method, self.coefficients, logps)
        values = torch.stack([loss, *step.values()]).tolist()  # one transfer from the device
        if not math.isfinite(values[0]):
            raise self._diverged(f"the {self.coefficients.loss} loss is {values[0]}", prompt_ids)
        for name, value in zip(step, values[1:], strict=True):
            self._sums[name] += value * share
        self._sums["tokens"] += tokens
        self._weight += share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to what Trainer logs."""
        if self._weight or self.args.world_size > 1:
            self._sum_over_processes()
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

    def _sum_over_processes(self) -> None:
        if self.args.world_size > 1:
            names = list(self._sums)  # in one order everywhere: all run the same code
            sums = torch.tensor([self._weight, *(self._sums[name] for name in names)], dtype=torch.float64)
            if self.args.device.type != "cpu":
                sums = sums.to(self.args.device)
            torch.distributed.all_reduce(sums)
            self._weight, *values = sums.tolist()
            self._sums = defaultdict(float, zip(names, values, strict=True))


def _ids(triplets: Sequence[Triplet] | Sequence[int]) -> str:
    """prompt_ids for a message, the first ten of them."""
    ids = [t.prompt_id if isinstance(t, Triplet) else t for t in triplets]
    return ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


class AtTrainBegin(TrainerCallback):
    """Calls a function when training begins."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: D102
        self.function()


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
            chosen = [triplets[i] for i in window]
            pending = collator(chosen)["micro_batches"]
            while pending:
                micro_batch = pending[0]
                try:
                    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                        values = logps_of(model, _to(micro_batch, model.device), collator.roles)
                    finer = None
                except (RuntimeError, MemoryError) as error:
                    finer = collator.finer(chosen) if out_of_memory(error) else None
                    if finer is None:
                        raise
                if finer is not None:  # the error is gone here, and the memory that its frames held
                    tqdm.write(
                        f"tspin: {description}: out of memory; micro-batches of {finer.max_tokens} tokens from here on "
                        f"({collator.max_tokens} before)",
                        file=sys.stderr,
                    )
                    collator = finer
                    pending = collator(chosen)["micro_batches"]
                    continue
                for role in collator.roles:
                    for i, value in zip(micro_batch["indices"], values[role].tolist(), strict=True):
                        logps[role][window[i]] = value
                pending.pop(0)
            bar.update(len(window))
    return logps


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _to(entry, device) for name, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value

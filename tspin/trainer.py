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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from peft.functional import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from tspin.devices import give_back, out_of_memory, widest_float
from tspin.errors import UserError
from tspin.objectives import Coefficients, Method, SequenceLogps
from tspin.runs.signals import Asked
from tspin.schema import LABELLED, PROTO, SYNTHETIC
from tspin.triplets import IDLE, Triplet, TripletCollator, logps_of

UNLOGGED = "unlogged-*.json"  # in a training's state: what a process has summed since the last log


class OutOfMemory(Exception):
    """One of several processes has no memory left at a step: all must start again, with smaller micro-batches.

    step: from 1; 0 outside of a training. max_tokens: of those that may fit.
    """

    def __init__(self, step: int, max_tokens: int):
        super().__init__(f"step {step}: out of memory")
        self.step = step
        self.max_tokens = max_tokens


class TripletTrainer(Trainer):
    """Trains a policy on triplets with one method's objective, at one iteration.

    args.per_device_train_batch_size counts the triplets of a step, whatever the number of devices
    (SelfPlayConfig.batch_size); they pass through the model in micro-batches planned by tokens (see
    TripletCollator). The model is in evaluation mode: log π is the policy's, as it was when y′ was drawn.

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
        self._tokenizer = tokenizer
        self._checkpointed = checkpointed_layers(model) if args.gradient_checkpointing else []
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
        self.means = Means()
        self._asked = self._agreed = Asked()
        self._triplets: Sequence[Triplet] = []  # of the step in hand
        self.signal: GradientSignal | None = None  # a caller that wants to know sets one
        self.keep_first_step: Callable[[dict[str, Any]], None] | None = None  # its means, "loss" too, and "prompt_ids"

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The gradients of a step, micro-batch by micro-batch; smaller ones from here on where memory runs out."""
        triplets, micro_batches = inputs["triplets"], inputs["micro_batches"]
        self._triplets, means = triplets, self.means.state()
        if self.collator is not self.data_collator:  # collated before memory ran out
            micro_batches = self.collator(triplets)["micro_batches"]
        if self.args.world_size > 1:
            micro_batches = self._as_many_everywhere(micro_batches)
        while True:
            try:
                loss = self._accumulate(model, micro_batches)
                if self.state.global_step == 0:
                    self._record_first_step()
                return loss
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.args.world_size > 1:  # the others are in the middle of a pass that needs this one
                    raise OutOfMemory(self.state.global_step + 1, self._finer(triplets).max_tokens) from error
            # Here the error is gone, and with it the activations that its frames held. A backward pass may have added
            # half of its gradients, so the step starts anew.
            self._use_less_memory(triplets)
            self.means.restore(means)
            model.zero_grad()
            micro_batches = self.collator(triplets)["micro_batches"]

    def _record_first_step(self) -> None:
        means = copy.deepcopy(self.means)
        if self.args.world_size > 1:
            means.sum_over_processes(self.args.device)
        if self.keep_first_step:
            self.keep_first_step({**means.pop(), "prompt_ids": [triplet.prompt_id for triplet in self._triplets]})

    def _accumulate(self, model: torch.nn.Module, micro_batches: Sequence[dict[str, Any]]) -> Tensor:
        *first, last = micro_batches
        losses = []
        for micro_batch in first:
            with self._keeping_gradients(model):
                losses.append(super().training_step(model, micro_batch))
        losses.append(super().training_step(model, last))
        return torch.stack(losses).sum()

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """Trainer's, without the warm-up of a schedule-free optimizer: the schedule has one.

        It would take a share of the steps, a tenth, for their number, and have ten times the rate at its first.
        """
        kind, given = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return kind, {name: 0 if name == "warmup_steps" else value for name, value in given.items()}

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Trainer's schedule, its warm-up a step earlier: of w steps, step k has k/w of the rate, counted from 1.

        Trainer's own first step has a rate of 0: it costs a pass over its triplets and moves nothing.
        """
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [partial(_step_earlier, shape, warmup) for shape in scheduler.lr_lambdas]
            for group, rate, shape in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = rate * shape(scheduler.last_epoch)
            # What get_last_lr() gives, which Trainer logs.
            scheduler._last_lr[:] = [group["lr"] for group in scheduler.optimizer.param_groups]
        return scheduler

    def get_train_dataloader(self) -> DataLoader:
        """Batches in one order whatever the number of processes: each gets all of a step, and the collator its part."""
        loader = super().get_train_dataloader()
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            sampler = loader.batch_sampler
            # Neither other batches for each process, nor the last one filled up with triplets of the first.
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def listen(self, asked: Asked) -> Asked:
        """Where the training looks for signals; returns what all processes have agreed upon by the end of a step."""
        self._asked = asked
        self._agreed = asked if self.args.world_size == 1 else Asked()
        return self._agreed

    def agree(self, micro_batches: int = 0) -> int:
        """The most micro-batches of any process. A signal that came to one of them is agreed upon by this."""
        if self.args.world_size == 1:
            return micro_batches
        both = torch.tensor([micro_batches, self._asked.number or 0], device=self.args.device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        most, number = both.tolist()
        self._agreed.number = number or self._agreed.number
        self._asked.number = None  # what comes after the last time is for the process that waits for all
        return most

    def _as_many_everywhere(self, micro_batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """As many micro-batches as the process with the most has: a sharded model must be called by all at once."""
        idle = {**micro_batches[-1], **IDLE}
        return [*micro_batches, *[idle] * (self.agree(len(micro_batches)) - len(micro_batches))]

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
        finer, step = self._finer(triplets), self.state.global_step + 1
        tqdm.write(
            f"tspin: step {step}: out of memory; micro-batches of {finer.max_tokens} tokens from here on "
            f"({self.collator.max_tokens} before), the same prompts a step",
            file=sys.stderr,
        )
        self.collator = finer
        give_back()

    def _finer(self, triplets: Sequence[Triplet]) -> TripletCollator:
        """One of smaller micro-batches. Raises UserError where each has a single prompt already."""
        finer = self.collator.finer(triplets)
        if finer is None:
            raise UserError(
                f"step {self.state.global_step + 1}: out of memory with a single prompt and its responses in a "
                f"micro-batch (prompts {_ids(triplets)}); set gradient_checkpointing, lora, or lower maximum lengths"
            )
        return finer

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradients' norm, before the optimizer uses them. Raises UserError where it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            raise self._diverged(f"the gradients' norm is {float(norm)}", self._triplets)
        if self.signal is not None:
            self.signal.add(model.parameters())
        return norm

    def _diverged(self, what: str, triplets: Sequence[Triplet] | Sequence[int]) -> UserError:
        return UserError(
            f"step {self.state.global_step + 1}: {what} (prompts {_ids(triplets)}), so nothing of this step was kept; "
            "earlier checkpoints stay as they are; lower learning_rate or alpha, or use the logistic loss"
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
            checkpoint = target / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / "training_args.bin").unlink(missing_ok=True)
            unlogged = {**self.means.state(), "loss": self._tr_loss.item()}
            unlogged |= {"logged": self._globalstep_last_logged, "columns": [list(e) for e in self.state.log_history]}
            (checkpoint / UNLOGGED.replace("*", str(self.args.process_index))).write_text(json.dumps(unlogged))

        self.keep_state(self.state.global_step, write)

    def save_model(self, output_dir=None, _internal_call=False):
        """Trainer's. Under FSDP a whole model, however states are kept: these have the weights in another form."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call=_internal_call)
        elif not _internal_call:
            weights = self.accelerator.get_state_dict(self.model)
            for tied in getattr(self.model, "all_tied_weights_keys", None) or {}:
                weights.pop(tied, None)  # gathered apart from what it is one with
            if self.args.should_save:
                self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=weights)
                self._tokenizer.save_pretrained(output_dir)

    def restore_unlogged(self, checkpoint: Path) -> None:
        """Go on with the means of a logging interval that a kept state was in the middle of; after training began."""
        kept = [json.loads(path.read_text()) for path in sorted(checkpoint.glob(UNLOGGED))]
        if len(kept) == self.args.world_size:
            mine = json.loads((checkpoint / UNLOGGED.replace("*", str(self.args.process_index))).read_text())
            self.means.restore(mine)
        else:  # of other processes: the first one takes all
            parts = kept if self.args.process_index == 0 else []
            for part in parts:
                self.means.take(part)
            # Trainer logs the mean over processes.
            mine = {**kept[0], "loss": sum(part["loss"] for part in parts) / len(kept) * self.args.world_size}
        self._tr_loss += mine["loss"]
        self._globalstep_last_logged = mine["logged"]
        history = zip(self.state.log_history, mine["columns"], strict=True)
        self.state.log_history = [{name: entry[name] for name in names} for entry, names in history]  # read sorted

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Weights of a kept state; of a model with adapters those alone, which is all that Trainer writes of it."""
        adapters = Path(resume_from_checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME
        if adapters.exists():
            set_peft_model_state_dict(self.model, load_file(adapters))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result):
        """Trainer only warns when a kept state lacks weights; going on from it would give other numbers."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = set(load_result.missing_keys) - set(tied)
        if missing or load_result.unexpected_keys:
            name = sorted(missing or load_result.unexpected_keys)[0]
            raise UserError(f"the training's saved state does not fit this model ({name}): delete its folder")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A micro-batch's part of the mean loss over the step's triplets."""
        # Trainer has set training mode. Dropout, dropped layers and jitter ask for that, whatever they are called.
        assert self.model is not None
        self.model.eval()
        for layer in self._checkpointed:
            layer.training = True
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
            kind = self.coefficients.get("loss_type", self.method.name)
            raise self._diverged(f"the {kind} loss is {values[0]}", prompt_ids)
        self.means.add(dict(zip(["loss", *step], values, strict=True)), tokens, share)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log to what Trainer logs."""
        if self.args.world_size > 1:
            self.means.sum_over_processes(self.args.device)
        means = self.means.pop()
        means.pop("loss", None)  # Trainer's own is logged
        super().log({**logs, **means}, start_time)


def _step_earlier(shape: Callable[[int], float], warmup: int, step: int) -> float:
    return shape(step + 1 if step < warmup else step)


def checkpointed_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that gradient checkpointing computes twice, each made to run in evaluation mode.

    It is done for layers that are in training mode, and dropout within a layer asks for the same: a layer is taken out
    of that mode as its own computation begins, and put back into what it was before.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.register_forward_pre_hook(_end_training)
        layer.register_forward_hook(_begin_training)
    return layers


def _end_training(layer: torch.nn.Module, arguments: Any) -> None:
    layer.training = False


def _begin_training(layer: torch.nn.Module, arguments: Any, output: Any) -> None:
    layer.training = True  # some models call a layer several times


class Means:
    """Means over triplets since the last log, and tokens per second.

    A micro-batch counts by its share of its step's triplets.
    """

    _sums: dict[str, float]
    _tokens: float
    _weight: float

    def __init__(self) -> None:
        self.restore({"sums": {}, "tokens": 0.0, "weight": 0.0})

    def add(self, values: Mapping[str, float], tokens: int, share: float) -> None:
        """A micro-batch's own means, its tokens, and its share of the step's triplets."""
        for name, value in values.items():
            self._sums[name] += value * share
        self._tokens += tokens
        self._weight += share

    def pop(self) -> dict[str, float]:
        """The means by name, "tokens" and "tokens_per_second"; nothing where nothing was added. Starts anew."""
        if not self._weight:
            return {}
        means = {name: total / self._weight for name, total in self._sums.items()}
        means |= {"tokens": self._tokens, "tokens_per_second": self._tokens / (time.perf_counter() - self._since)}
        self.restore({"sums": {}, "tokens": 0.0, "weight": 0.0})
        return means

    def sum_over_processes(self, device: torch.device) -> None:
        """Add up what all processes that train together have added."""
        names = list(self._sums)  # in one order everywhere: all run the same code
        sums = [self._weight, self._tokens, *(self._sums[name] for name in names)]
        total = torch.tensor(sums, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        self._weight, self._tokens, *values = total.tolist()
        self._sums = defaultdict(float, zip(names, values, strict=True))

    def state(self) -> dict[str, Any]:
        """As JSON values, for `restore`."""
        return {"sums": dict(self._sums), "tokens": self._tokens, "weight": self._weight}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._sums, self._tokens, self._weight = defaultdict(float), 0.0, 0.0
        self._since = time.perf_counter()
        self.take(state)

    def take(self, state: Mapping[str, Any]) -> None:
        """Add what another process had added."""
        for name, value in state["sums"].items():
            self._sums[name] += value
        self._tokens += state["tokens"]
        self._weight += state["weight"]


class GradientSignal:
    """Signal to noise of the steps' gradients: whether they agree, or cancel.

    With g the gradient of a step before clipping, of n steps: signal² is the unbiased estimate of ‖E g‖²,
    (‖Σg‖² − Σ‖g‖²) / (n(n − 1)), noise² the rest of the mean of ‖g‖². The policy moves while they are taken, so that it
    is of the training as a whole. Costs the memory of one more gradient.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, parameters: Iterable[Tensor]) -> None:
        """The gradients of a step: whole on this process, or FSDP's part of each, of which all processes call this."""
        gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
        self._squares.append(_square(gradients))
        if self._sums:
            for total, gradient in zip(self._sums, gradients, strict=True):
                total.add_(gradient)
        else:
            self._sums = [gradient.clone() for gradient in gradients]

    def ratio(self) -> float | None:
        """Signal over noise, of norms; 0 where the gradients do not agree at all. None of fewer than two steps.

        All processes call it.
        """
        n = len(self._squares)
        if n < 2:
            return None
        squares = float(torch.stack(self._squares).sum())
        signal = max((float(_square(self._sums)) - squares) / (n * (n - 1)), 0.0)
        noise = squares / n - signal
        return float((signal / noise) ** 0.5) if noise > 0 else None


def _square(gradients: Sequence[Tensor]) -> Tensor:
    sums = [gradient.to(widest_float()).square().sum() for gradient in gradients]
    return torch.stack([each.full_tensor() if isinstance(each, DTensor) else each for each in sums]).sum()


def _ids(triplets: Sequence[Triplet] | Sequence[int]) -> str:
    """prompt_ids for a message, the first ten of them."""
    ids = [t.prompt_id if isinstance(t, Triplet) else t for t in triplets]
    return ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


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

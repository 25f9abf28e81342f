"""What is timed: one optimizer step on a batch of triplets, done our way and as users do it elsewhere."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from tspin.devices import multiplies_bfloat16
from tspin.layouts import choose_layout
from tspin.logprobs import pad_rows
from tspin.models import POCKET_MODEL, load_tokenizer
from tspin.objectives import METHODS, spin_loss, tspin_loss
from tspin.schema import LABELLED, ROLES, SYNTHETIC
from tspin.trainer import TripletTrainer
from tspin.triplets import Triplet, TripletCollator, longest_row, pad_token

Step = Callable[[Sequence[Triplet]], None]
MICRO_BATCH_TOKENS = 16384 if torch.cuda.is_available() else 2048  # fewer leave a GPU waiting for kernels to launch
SCRATCH = tempfile.TemporaryDirectory(prefix="tspin-benchmark-")  # trainers want a folder


def updating(model: PreTrainedModel, backward: Callable[[Sequence[Triplet]], object]) -> Step:
    """A step from a function that leaves gradients: clipping and RMSProp, the same for every contender."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-6)

    def step(triplets: Sequence[Triplet]) -> None:
        backward(triplets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def arguments(kind: type[TrainingArguments], **more) -> TrainingArguments:
    """A trainer's settings: bfloat16 where the machine multiplies it, and nothing reported."""
    on_cpu = not torch.cuda.is_available()
    return kind(
        output_dir=SCRATCH.name, use_cpu=on_cpu, bf16=multiplies_bfloat16(), report_to=[], disable_tqdm=True, **more
    )


def in_training(trainer: Trainer) -> torch.nn.Module:
    """The model as the training loop prepares it: Accelerate runs its forward pass in bfloat16."""
    trainer.current_gradient_accumulation_steps = 1
    model: torch.nn.Module = trainer.accelerator.prepare_model(trainer.model)
    return model


def ours(method: str, layout: str, model: PreTrainedModel, triplets: Sequence[Triplet]) -> Step:
    """This project's step, from the same trainer and collator that a run uses."""
    trained = [as_trained(method, triplet) for triplet in triplets]
    tokenizer = load_tokenizer(str(POCKET_MODEL))
    collator = TripletCollator(
        tuple(trained[0].responses),
        pad_token(tokenizer),
        choose_layout(model, layout, max(map(longest_row, trained))),
        MICRO_BATCH_TOKENS,
    )
    settings = arguments(TrainingArguments)
    objective = METHODS[method]
    trainer = TripletTrainer(model, settings, trained, collator, tokenizer, objective, objective.resolve({}))
    prepared = in_training(trainer)

    def backward(batch: Sequence[Triplet]) -> None:
        trainer.training_step(prepared, collator([as_trained(method, triplet) for triplet in batch]))

    return updating(model, backward)


def as_trained(method: str, triplet: Triplet) -> Triplet:
    """The triplet with the responses that a method trains on, and a reference where it has one."""
    roles = METHODS[method].trains_on
    reference = {role: -100.0 for role in roles} if METHODS[method].uses_reference else {}
    return Triplet(triplet.prompt_id, triplet.prompt_ids, {role: triplet.responses[role] for role in roles}, reference)


def trl_dpo(model: PreTrainedModel, triplets: Sequence[Triplet]) -> Step:
    """TRL's DPOTrainer on (y, y′), reference log-probabilities precomputed."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}  # the trainer wants some data; batches come from us
    config = arguments(DPOConfig, per_device_train_batch_size=len(triplets), precompute_ref_log_probs=True,
                       max_length=None, gradient_checkpointing=False)  # fmt: skip
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_dict(words), processing_class=load_tokenizer(str(POCKET_MODEL))
    )
    prepared = in_training(trainer)

    def backward(batch: Sequence[Triplet]) -> None:
        rows = [
            {
                "prompt_ids": triplet.prompt_ids,
                "chosen_ids": triplet.responses[LABELLED].ids,
                "rejected_ids": triplet.responses[SYNTHETIC].ids,
                "ref_chosen_logps": -100.0,
                "ref_rejected_logps": -100.0,
            }
            for triplet in batch
        ]
        trainer.training_step(prepared, trainer.data_collator(rows))

    return updating(model, backward)


def concatenated(model: PreTrainedModel, triplets: Sequence[Triplet], roles: Sequence[str]) -> list[torch.Tensor]:
    """log π of every role's responses as first implementations compute it: one padded batch, logits everywhere."""
    responses = [triplet.responses[role].ids for role in roles for triplet in triplets]
    rows = pad_rows([triplet.prompt_ids for triplet in triplets] * len(roles), responses, 0)
    rows = {name: tensor.to(model.device) for name, tensor in rows.items()}
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    log_probabilities = logits[:, :-1].float().log_softmax(-1)
    taken = log_probabilities.gather(2, rows["input_ids"][:, 1:, None])[..., 0]
    return list((taken * rows["response_mask"][:, 1:]).sum(-1).chunk(len(roles)))


def in_bfloat16(model: PreTrainedModel) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=multiplies_bfloat16())


def tspin_concatenated(model: PreTrainedModel, triplets: Sequence[Triplet]) -> Step:
    """T-SPIN by concatenation."""

    def backward(batch: Sequence[Triplet]) -> None:
        with in_bfloat16(model):
            logps = concatenated(model, batch, ROLES)
        tspin_loss(*logps, alpha=1.0, beta=0.1).mean().backward()

    return updating(model, backward)


def spin_live(model: PreTrainedModel, triplets: Sequence[Triplet]) -> Step:
    """SPIN as it was released: concatenation, the reference run live."""
    reference = copy.deepcopy(model).eval()
    roles = (LABELLED, SYNTHETIC)

    def backward(batch: Sequence[Triplet]) -> None:
        with in_bfloat16(model):
            with torch.no_grad():
                fixed = concatenated(reference, batch, roles)
            logps = concatenated(model, batch, roles)
        spin_loss(*logps, *fixed, lam=0.1).mean().backward()

    return updating(model, backward)


class Contender(NamedTuple):
    """A way to make a step, and what its layout computes for each example."""

    responses: int
    prompts: int  # how often the prompt is computed
    make: Callable[[PreTrainedModel, Sequence[Triplet]], Step]


CONTENDERS = {
    "tspin shared": Contender(3, 1, lambda model, triplets: ours("tspin", "shared", model, triplets)),
    "tspin padded": Contender(3, 3, lambda model, triplets: ours("tspin", "padded", model, triplets)),
    "tspin concatenated": Contender(3, 3, tspin_concatenated),
    "spin shared": Contender(2, 1, lambda model, triplets: ours("spin", "shared", model, triplets)),
    "spin padded": Contender(2, 2, lambda model, triplets: ours("spin", "padded", model, triplets)),
    "TRL DPO": Contender(2, 2, trl_dpo),
    "SPIN, live reference": Contender(2, 2, spin_live),
}


def installed() -> dict[str, Contender]:
    """The contenders whose libraries are there: `make benchmark` installs TRL."""
    return {name: contender for name, contender in CONTENDERS.items() if name != "TRL DPO" or find_spec("trl")}

"""What the checks compute with: a model of two layers, of 7B width on a GPU and tiny on a CPU, and a dozen triplets."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed

from tspin.config import SelfPlayConfig
from tspin.devices import accelerator
from tspin.doctor.tiny import tiny_model
from tspin.models import POCKET_MODEL, Policy, load_tokenizer
from tspin.planning.architectures import find_config
from tspin.schema import LABELLED, PROTO, SYNTHETIC
from tspin.triplets import Triplets

# Tokens of a prompt and of its responses: ragged, single, and rows that are too long to be one piece of attention.
LENGTHS = [(4, 5, 1, 2), (1, 1, 3, 6), (9, 30, 2, 1), (150, 3, 20, 1), (20, 40, 60, 7), (12, 12, 12, 12)]
ROLES = (LABELLED, SYNTHETIC, PROTO)


@dataclass(frozen=True)
class Bench:
    """A folder to work in, and what is in it."""

    folder: Path

    @property
    def on_gpu(self) -> bool:
        """Whether an accelerator computes here."""
        return accelerator() is not None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The pocket model's, which is part of the package."""
        return load_tokenizer(str(POCKET_MODEL))

    @cached_property
    def policy(self) -> Policy:
        """The model of two layers, as a folder."""
        place = self.folder / "policy"
        if self.on_gpu:
            changes = {"num_hidden_layers": 2, "vocab_size": len(self.tokenizer), "bos_token_id": None}
            ends = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id}
            wide = {**find_config("mistralai/Mistral-7B-v0.1").to_dict(), **changes, **ends}
            set_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**wide))
        else:
            model = tiny_model(self.tokenizer)
        model.save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        return Policy(str(place), "doctor")

    @cached_property
    def triplets(self) -> Triplets:
        """A dozen, of random tokens."""
        draw = random.Random(0)
        ordinary = [token for token in range(len(self.tokenizer)) if token not in self.tokenizer.all_special_ids]
        parts = [[draw.choices(ordinary, k=length) for length in lengths] for lengths in LENGTHS * 2]
        return triplets_of([prompt for prompt, *_ in parts], {
            role: [responses[number] for _, *responses in parts] for number, role in enumerate(ROLES)
        })  # fmt: skip

    def args(self, name: str, **settings: Any) -> SelfPlayConfig:
        """Settings of a run of two steps in the folder `name`."""
        given = {"batch_size": 6, "report_to": [], "disable_tqdm": True, "use_cpu": not self.on_gpu, "bf16": False}
        return SelfPlayConfig(output_dir=str(self.folder / name), **{**given, **settings})


def triplets_of(prompts: Sequence[list[int]], responses: dict[str, Sequence[list[int]]]) -> Triplets:
    """Triplets of token ids: a response a prompt for each role."""
    cells: dict[str, Any] = {"prompt_id": list(range(len(prompts))), "prompt_ids": list(prompts)}
    for role, ids in responses.items():
        cells |= {f"{role}/ids": list(ids), f"{role}/finished": [False] * len(prompts)}
    return Triplets(Dataset.from_dict(cells))

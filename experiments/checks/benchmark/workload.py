"""What is timed: models of a named shape with random weights on triplets of random tokens, and the pocket prompts."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, PreTrainedTokenizerBase

from tspin.config import load_config
from tspin.data.encoding import encode_dataset
from tspin.data.responses import Response
from tspin.devices import multiplies_bfloat16
from tspin.experiment.preset import load_dataset, training_arguments
from tspin.schema import ROLES
from tspin.triplets import Triplet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVEN = "even 1:1"
MIXES = {"prompt-heavy 4:1": 0.8, EVEN: 0.5, "response-heavy 1:4": 0.2}  # the prompt's share of prompt + response
VOCABULARY = 700  # ids drawn: in every model's vocabulary

LARGE = "Mistral-7B, 4 layers"  # 16 GB with gradients and the optimizer's state
SHAPES = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    LARGE: MistralConfig(num_hidden_layers=4, sliding_window=None),
    "tiny": LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much is timed. Batches count triplets, lengths count tokens."""

    shapes: tuple[str, ...]  # the first is measured in every table
    matrix: int = 2048 if DEVICE == "cpu" else 8192  # rows of the matrix product that is the machine's speed
    tokens: int = 128  # of a prompt with its response, in the mean
    batch: int = 8
    memory_batch: int = 16
    even_alone: tuple[str, ...] = ("tspin concatenated", "spin padded", "SPIN, live reference")  # not in other mixes
    large_alone: tuple[str, ...] = ("tspin shared", "tspin padded", "TRL DPO")  # of LARGE: a GPU holds three at once
    weighed: tuple[str, ...] = ("tspin shared", "tspin padded", "tspin concatenated", "TRL DPO", "SPIN, live reference")
    rounds: int = 3
    batches: tuple[int, ...] = (1, 4, 16, 64)
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    processes: int = 8  # that a step of 64 triplets is dealt to
    steps: int = 200  # of those, simulated
    fixed_tokens: int = 4096  # of a batch whose sequences grow
    head: tuple[int, int, int] = (49152, 576, 1536)  # vocabulary, width, tokens
    prompts: int = 256  # decoded
    pocket_batch: int = 32  # of the pocket preset


ARITHMETIC = torch.bfloat16 if multiplies_bfloat16() else torch.float32  # of every step
FULL = Sizes(shapes=tuple(name for name in SHAPES if name != "tiny" and (DEVICE == "cuda" or name != LARGE)))
if DEVICE == "cuda":  # a step of 8 short prompts is all launches of kernels there, whoever makes it
    FULL = replace(FULL, batch=32, memory_batch=32, tokens=256)
elif ARITHMETIC == torch.float32:  # three times as slow, in twice the memory
    FULL = replace(FULL, batch=4, memory_batch=8, batches=(1, 4, 16), lengths=(256, 1024, 4096))
TINY = Sizes(
    shapes=("tiny",), matrix=256, tokens=16, batch=2, memory_batch=2, weighed=("tspin shared", "TRL DPO"), rounds=1,
    batches=(1, 2), lengths=(16, 32), fixed_tokens=64, head=(1024, 32, 64), prompts=4, pocket_batch=2, steps=5,
)  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """How long some work takes on the device."""
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def build(shape: str) -> PreTrainedModel:
    """A random model of that shape: the time of a step does not depend on its weights."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float32)
    return model.to(DEVICE)  # type: ignore[arg-type]


def triplets(count: int, tokens: int, prompt_share: float, spread: float = 0.4) -> list[Triplet]:
    """Triplets whose prompt and response have `tokens` tokens in the mean; lengths are log-normal, as real ones are."""
    generator = random.Random(0)

    def ids(mean: float) -> list[int]:
        length = max(round(mean * generator.lognormvariate(-(spread**2) / 2, spread)), 2)
        return [generator.randrange(5, VOCABULARY) for _ in range(length)]

    return [
        Triplet(
            number,
            ids(tokens * prompt_share),
            {role: Response(ids(tokens * (1 - prompt_share)), "", True) for role in ROLES},
        )
        for number in range(count)
    ]


def chat_lengths(count: int, generator: np.random.Generator) -> list[list[int]]:
    """Lengths as in UltraChat's first rounds, a prompt's and three responses': most of some hundred tokens."""
    prompts = 40 + generator.lognormal(4.5, 0.9, count)
    responses = generator.lognormal(5.3, 0.6, (count, len(ROLES)))
    return np.column_stack([prompts, responses]).astype(int).tolist()


def pocket_prompts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """The first prompts that the pocket preset trains on, as tokens."""
    settings = load_config("pocket").for_method("tspin")
    arguments = training_arguments(settings, Path("unused"), 0)
    examples = encode_dataset(load_dataset(settings.data), tokenizer, arguments)
    return [examples[i].prompt_ids for i in range(count)]


def response_tokens(batch: Sequence[Triplet], responses: int = len(ROLES)) -> int:
    """Tokens of the first `responses` responses of every triplet."""
    return sum(len(triplet.responses[role].ids) for triplet in batch for role in ROLES[:responses])


def prompt_tokens(batch: Sequence[Triplet]) -> int:
    """Tokens of the prompts, each counted once."""
    return sum(len(triplet.prompt_ids) for triplet in batch)


def flops(shape: str, batch: Sequence[Triplet], responses: int, prompts: int) -> float:
    """Floating-point operations of the matrix products of a step, attention's scores and all padding left out.

    Six per weight and token (two forward, four backward); the head's at response tokens alone.
    """
    config = SHAPES[shape]
    heads, hidden = config.num_attention_heads, config.hidden_size
    width = (config.head_dim or hidden // heads) * (2 * heads + 2 * config.num_key_value_heads)
    body = config.num_hidden_layers * hidden * (width + 3 * config.intermediate_size)
    predicted = response_tokens(batch, responses)
    tokens = predicted + prompts * prompt_tokens(batch)
    return 6.0 * (body * tokens + hidden * config.vocab_size * predicted)

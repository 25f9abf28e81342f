"""What the steps are timed on: models of a named shape with random weights, triplets of random tokens."""

import random

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel

from tspin.data.responses import Response
from tspin.objectives import ROLES
from tspin.triplets import Triplet

MIXES = {"prompt-heavy 4:1": 0.8, "even 1:1": 0.5, "response-heavy 1:4": 0.2}  # the prompt's share of prompt + response
VOCABULARY = 700  # ids drawn: in every model's vocabulary

SHAPES = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Mistral-7B, 4 layers": MistralConfig(num_hidden_layers=4, sliding_window=None),
}  # fmt: skip


def build(shape: str) -> PreTrainedModel:
    """A random model of that shape: the time of a step does not depend on its weights."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]


def triplets(count: int, tokens: int, prompt_share: float, spread: float = 0.4, seed: int = 0) -> list[Triplet]:
    """Triplets whose prompt and response have `tokens` tokens in the mean; lengths are log-normal, as real ones are."""
    generator = random.Random(seed)

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


def flops(shape: str, batch: list[Triplet], responses: int, prompts: int) -> float:
    """Floating-point operations of the matrix products of a step, attention's scores and all padding left out.

    Six per weight and token (two forward, four backward); the head's at response tokens alone.
    """
    config = SHAPES[shape]
    heads, hidden = config.num_attention_heads, config.hidden_size
    width = (config.head_dim or hidden // heads) * (2 * heads + 2 * config.num_key_value_heads)
    body = config.num_hidden_layers * hidden * (width + 3 * config.intermediate_size)
    predicted = sum(len(triplet.responses[role].ids) for triplet in batch for role in ROLES[:responses])
    tokens = predicted + prompts * sum(len(triplet.prompt_ids) for triplet in batch)
    return 6.0 * (body * tokens + hidden * config.vocab_size * predicted)

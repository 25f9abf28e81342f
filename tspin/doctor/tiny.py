"""A model and data that run every line in no time: two layers of random weights, twelve sums."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def tiny_model(tokenizer: PreTrainedTokenizerBase, positions: int = 256, **settings: Any) -> LlamaForCausalLM:
    """A random Llama of two layers, the same at every call. settings: of its config, besides."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,  # far from uniform, so that samples and gradients mean something
        **settings,
    )
    return LlamaForCausalLM(config)


def tiny_rows() -> list[dict[str, str]]:
    """Twelve prompts with their answers."""
    return [{"prompt": f"{a} + {b} =", "completion": f"The answer is {a + b}."} for a in range(3) for b in range(4)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as JSONL. Returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

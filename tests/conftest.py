"""Fixtures: a random tiny model and a small data set, both made here."""

import json
import os
from pathlib import Path

import pytest

from tspin.cli.guard import quiet_libraries

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
quiet_libraries()


@pytest.fixture(scope="session")
def tokenizer():
    from tspin.models import POCKET_MODEL, load_tokenizer

    return load_tokenizer(str(POCKET_MODEL))


@pytest.fixture
def tiny_model(tokenizer):
    """A random Llama of two layers, the same one for every test."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.3,  # far from uniform, so that samples and gradients mean something
        )
    )


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    return [{"prompt": f"{a} + {b} =", "completion": f"The answer is {a + b}."} for a in range(3) for b in range(4)]


@pytest.fixture
def data_file(tmp_path: Path, rows) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model_folder(tmp_path: Path, tiny_model, tokenizer) -> Path:
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

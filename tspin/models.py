"""Loading policies and tokenizers, with one clear line when there is none."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tspin.errors import UserError
from tspin.run_store import folder_fingerprint

POCKET_MODEL = Path(__file__).parent / "pocket" / "model"


def resolve(path: str) -> str:
    """The folder of the embedded model for "pocket", any other folder or hub name as it is."""
    return str(POCKET_MODEL) if path == "pocket" else path


def policy_fingerprint(path: str, model_arguments: dict[str, Any] | None = None) -> str:
    """Of a folder: its contents. Of a hub name: the commit it resolves to."""
    if Path(path).is_dir():
        return folder_fingerprint(Path(path))
    config = _load(AutoConfig.from_pretrained, path, _hub_arguments(model_arguments))
    return f"{path}@{getattr(config, '_commit_hash', None)}"


def load_model(path: str, model_arguments: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model from a folder or the hub, float32 unless told otherwise. Raises UserError."""
    return _load(AutoModelForCausalLM.from_pretrained, path, {"dtype": torch.float32, **(model_arguments or {})})


def load_tokenizer(path: str, model_arguments: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises UserError when there is none, or it has no end token."""
    tokenizer = _load(AutoTokenizer.from_pretrained, path, _hub_arguments(model_arguments))
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no end token (eos_token): set one in tokenizer_config.json")
    return tokenizer


def _hub_arguments(model_arguments: dict[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (model_arguments or {}).items() if k in {"revision", "trust_remote_code"}}


def _load(loader: Any, path: str, arguments: dict[str, Any]) -> Any:
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is no model: a model folder has a config.json, weights and a tokenizer")
    try:
        return loader(path, **arguments)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: no model could be loaded from this folder or hub name ({reason})") from error




def multiplies_bfloat16() -> bool:
    """Whether this machine's GPU, or without one its CPU, has bfloat16 matrix instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags

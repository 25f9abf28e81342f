"""Loading policies and tokenizers, with one clear line when there is none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tspin.devices import out_of_memory
from tspin.errors import UserError
from tspin.hub.offline import limit_waiting, offline_folder, offline_model
from tspin.runs.files import fingerprint, folder_fingerprint


@dataclass(frozen=True)
class Policy:
    """A policy as files: its folder, and what tells it from any other."""

    folder: str
    fingerprint: str


POCKET_MODEL = Path(__file__).parent / "pocket" / "model"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve(path: str, revision: str | None = None) -> str:
    """A local folder: "pocket" and folders as they are, a hub name downloaded at one commit. Raises UserError.

    Weights must be safetensors: pickled ones are not downloaded.
    """
    if path == "pocket":
        return str(POCKET_MODEL)
    if Path(path).exists():
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{path} is no model: a model folder has a config.json, weights and a tokenizer")
        refuse_pickles(Path(path))
        return path
    if folder := offline_folder():
        return str(offline_model(folder, path, revision))
    from huggingface_hub import snapshot_download

    limit_waiting()
    try:
        return snapshot_download(path, revision=revision, allow_patterns=HUB_FILES)
    except Exception as error:  # the hub client raises many kinds for "not there"
        raise UserError(f"{path}: no model is in this folder or under this hub name ({_reason(error)})") from error


def refuse_pickles(folder: Path) -> None:
    """Raise UserError for weights that are pickles and nothing else: reading a pickle can run any program."""
    pickles = sorted(path for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{pickles[0]}: pickled weights are not read, they can run any program; convert them where you trust them: "
            "from_pretrained(…, use_safetensors=False), then save_pretrained(…), which writes safetensors"
        )


def policy_fingerprint(folder: str) -> str:
    """Of a downloaded model: its commit, which names the folder. Of any other folder: its contents."""
    if Path(folder).parent.name == "snapshots":
        return f"{Path(folder).parents[1].name}@{Path(folder).name}"
    return folder_fingerprint(Path(folder))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides what a text's tokens are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint([type(tokenizer).__name__, rules, tokenizer.chat_template, str(tokenizer.special_tokens_map)])


def load_model(folder: str, model_arguments: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model, float32 unless told otherwise.

    Raises UserError for files that cannot be read, and for weights that are missing: Transformers
    would fill them with random numbers.
    """
    refuse_pickles(Path(folder))
    arguments = {"dtype": torch.float32, "use_safetensors": True, **(model_arguments or {})}
    model, info = _load(AutoModelForCausalLM.from_pretrained, folder, {**arguments, "output_loading_info": True})
    if info["missing_keys"]:
        raise UserError(f"{folder}: the weights of {sorted(info['missing_keys'])[0]} are missing from this model")
    return model


def dtype_name(model_arguments: dict[str, Any]) -> str:
    """What the weights are loaded as, "float32" unless told otherwise."""
    return str(model_arguments.get("dtype", torch.float32)).removeprefix("torch.")


def load_tokenizer(folder: str, model_arguments: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises UserError when there is none, or it has no end token."""
    arguments = {k: v for k, v in (model_arguments or {}).items() if k == "trust_remote_code"}
    tokenizer = _load(AutoTokenizer.from_pretrained, folder, arguments)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end token (eos_token): set one in tokenizer_config.json")
    return tokenizer


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file as a model folder, de-quantised to bfloat16. Needs the `gguf` package; raises UserError."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(f"{path}: reading GGUF files needs one more package: pip install gguf") from None
    arguments = {"gguf_file": path.name}
    loaded = _load(AutoModelForCausalLM.from_pretrained, str(path.parent), {**arguments, "dtype": torch.bfloat16})
    loaded.config.__dict__.pop("quantization_config", None)
    # A model that came from a GGUF file refuses to be saved: its weights move into one that did not.
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    _load(AutoTokenizer.from_pretrained, str(path.parent), arguments).save_pretrained(folder)


def _load(loader: Any, folder: str, arguments: dict[str, Any]) -> Any:
    try:
        return loader(folder, **arguments)
    except UserError:
        raise
    except Exception as error:  # broken files surface as whatever the library's parsers stumble over
        if isinstance(error, MemoryError) or out_of_memory(error):
            raise
        raise UserError(f"{folder}: could not be loaded as a model with its tokenizer ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

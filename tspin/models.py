"""Loading policies and tokenizers, with one clear line when there is none."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tspin.devices import out_of_memory
from tspin.errors import UserError, reason
from tspin.hub.offline import check_model, model_folder
from tspin.pocket import EMBEDDED
from tspin.pocket import POCKET_MODEL as POCKET_MODEL
from tspin.runs.files import fingerprint, folder_fingerprint


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters as files: their folder, and that of the frozen model below them.

    quantize, merged_dtype: of the frozen weights when they are loaded, and of the merged ones; see LoraSettings.
    """

    folder: str
    base: str
    quantize: str | None = None
    merged_dtype: str = "float32"


@dataclass(frozen=True)
class Policy:
    """A policy as files: its folder, and what tells it from any other.

    adapter: what it was trained as, where that was adapters; the folder has them merged.
    """

    folder: str
    fingerprint: str
    adapter: Adapter | None = None


def policy_of(values: Mapping[str, Any]) -> Policy:
    """A Policy from its values as JSON has them (dataclasses.asdict)."""
    adapter = values["adapter"]
    return Policy(values["folder"], values["fingerprint"], Adapter(**adapter) if adapter else None)


def resolve(path: str, revision: str | None = None) -> str:
    """A model's local folder: of an embedded one, of a folder, or of a hub name, downloaded at one commit.

    Raises UserError for what is no model.
    Weights must be safetensors: pickled ones are neither read nor downloaded.
    """
    if path in EMBEDDED:
        return str(EMBEDDED[path])
    check_model(path)
    if Path(path).exists():
        refuse_pickles(Path(path))
        return path
    return model_folder(path, revision)


def refuse_pickles(folder: Path) -> None:
    """Raise UserError for weights that are pickles and nothing else: reading a pickle can run any program."""
    pickles = sorted(path for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{pickles[0]}: pickled weights are not read, they can run any program; convert them where you trust them: "
            "from_pretrained(…, use_safetensors=False), then save_pretrained(…), which writes safetensors"
        )


def policy_fingerprint(folder: str) -> str:
    """What identifies a policy: a downloaded model's name and commit, of any other folder its contents."""
    if in_hub_cache(Path(folder)):
        return f"{Path(folder).parents[1].name}@{Path(folder).name}"
    return folder_fingerprint(Path(folder))


def in_hub_cache(folder: Path) -> bool:
    """Whether a folder is a commit in the hub's cache, models--OWNER--NAME/snapshots/COMMIT, which nothing changes."""
    commit = re.fullmatch("[0-9a-f]{40}", folder.name)
    return bool(commit) and folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What identifies a tokenizer: all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and (backend.padding or backend.truncation):  # left there by a call: the next sets its own
        backend = copy.deepcopy(backend)
        backend.no_padding()
        backend.no_truncation()
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return fingerprint([type(tokenizer).__name__, rules, tokenizer.chat_template, str(tokenizer.special_tokens_map)])


def loading_of(source: str | PreTrainedModel, model_arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` in one form: `torch_dtype` is `dtype`, and "auto" what it stands for in `source`.

    source: the model, or its folder. Raises UserError for two types of weights, for what is none, and for "auto" where
    the model's config says none.
    """
    loading = {name: value for name, value in (model_arguments or {}).items() if value is not None or name != "dtype"}
    if older := loading.pop("torch_dtype", None):  # its name before Transformers 5
        if dtype_name({"dtype": loading.setdefault("dtype", older)}) != dtype_name({"dtype": older}):
            raise UserError(
                f"model_arguments: dtype is {loading['dtype']} and torch_dtype {older}, two names of one argument: "
                "leave torch_dtype out"
            )
    if loading.get("dtype") == "auto":
        loading["dtype"] = _own_dtype(source, bool(loading.get("trust_remote_code")))
    if not isinstance(getattr(torch, dtype_name(loading), None), torch.dtype):
        given = (model_arguments or {}).get("dtype", older)
        raise UserError(f"model_arguments: dtype is {given!r}: give torch.float32 or torch.bfloat16")
    return loading


def _own_dtype(source: str | PreTrainedModel, trusted: bool) -> torch.dtype | str | None:
    """The type that a model says its weights have; None where its config does not."""
    if isinstance(source, PreTrainedModel):
        return source.dtype
    own: torch.dtype | str | None = _load(AutoConfig.from_pretrained, source, {"trust_remote_code": trusted}).dtype
    return own


def load_model(folder: str, model_arguments: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model, float32 unless told otherwise.

    model_arguments: of `from_pretrained` (see `loading_of`); and `quantize`, "nf4" for its layers' matrices in 4 bits,
    which are computed with in the type of the others (LoraSettings). Generation settings are such as can be saved,
    where `say_sampling` helps.
    Raises UserError for files that cannot be read, and for weights that are missing: Transformers
    would fill them with random numbers.
    """
    refuse_pickles(Path(folder))
    arguments = {"dtype": torch.float32, "use_safetensors": True, **loading_of(folder, model_arguments)}
    if kind := arguments.pop("quantize", None):
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_compute_dtype=arguments["dtype"],
            bnb_4bit_use_double_quant=True,
        )
    model, info = _load(AutoModelForCausalLM.from_pretrained, folder, {**arguments, "output_loading_info": True})
    if info["missing_keys"]:
        raise UserError(f"{folder}: the weights of {sorted(info['missing_keys'])[0]} are missing from this model")
    if model.can_generate():
        say_sampling(model.generation_config)
    return model


def say_sampling(generation: GenerationConfig) -> None:
    """Have settings of how to sample (temperature, top_p) say that there is sampling (do_sample), as Vicuna's do not.

    Transformers reads such settings, and refuses to save them: a trained model would be lost. Whoever asks for greedy
    responses says so.
    """
    if not _can_be_saved(generation):
        said, generation.do_sample = generation.do_sample, True
        if not _can_be_saved(generation):  # for another reason (tspin.fits.check_generation)
            generation.do_sample = said


def _can_be_saved(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device: every parameter's shape, no memory. No random number is drawn."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def load_shape(folder: str, model_arguments: dict[str, Any] | None = None) -> PreTrainedModel:
    """The model in a folder on the meta device, from its config alone. Raises UserError where that describes none."""
    trusted = bool((model_arguments or {}).get("trust_remote_code"))

    def load(folder: str, trust_remote_code: bool) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return meta_model(config, trust_remote_code)

    shape: PreTrainedModel = _load(load, folder, {"trust_remote_code": trusted})
    return shape


def dtype_name(model_arguments: dict[str, Any]) -> str:
    """The name of the type that weights are loaded in, "float32" unless told otherwise."""
    return str(model_arguments.get("dtype", torch.float32)).removeprefix("torch.")


def load_tokenizer(folder: str, model_arguments: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises UserError when there is none, or it has no end token."""
    arguments = {k: v for k, v in (model_arguments or {}).items() if k == "trust_remote_code"}
    tokenizer = _load(AutoTokenizer.from_pretrained, folder, arguments)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end token (eos_token): set one in tokenizer_config.json")
    return tokenizer


def _load(loader: Any, folder: str, arguments: dict[str, Any]) -> Any:
    try:
        return loader(folder, **arguments)
    except UserError:
        raise
    except Exception as error:  # broken files surface as whatever the library's parsers stumble over
        if isinstance(error, MemoryError) or out_of_memory(error):
            raise
        raise UserError(f"{folder}: could not be loaded as a model with its tokenizer ({reason(error)})") from error

"""A model's shape without its weights: its config, a model of it on the meta device, and what is counted there."""

import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from tspin.errors import UserError
from tspin.hub.offline import Item, check_name, offline_folder
from tspin.models import EMBEDDED, meta_model
from tspin.settings import LoraSettings, ModelSettings

FACTS = Path(__file__).with_name("architectures.yaml")


@dataclass(frozen=True)
class Shape:
    """What memory and arithmetic follow from. Widths and counts; parameters are exact, tied ones counted once."""

    parameters: int
    layer_parameters: int  # of one layer
    layer_matrices: int  # those of them in matrices, which autocast copies
    largest_parameter: int
    layers: int
    hidden: int
    intermediate: int
    query: int  # heads × their width
    key: int  # key–value heads × their width
    heads: int
    vocabulary: int

    @property
    def root_parameters(self) -> int:
        """Embeddings, last norm and head: what belongs to no layer."""
        return self.parameters - self.layers * self.layer_parameters


class Architecture:
    """A model's config and what is counted on it, once. trust_remote_code and the rest: see ModelSettings."""

    def __init__(self, settings: ModelSettings):
        """Raises UserError where the model's config cannot be had."""
        self.config = find_config(settings.path, settings.revision, settings.trust_remote_code)
        self._adapters: dict[str, int] = {}

    @cached_property
    def shape(self) -> Shape:
        """Raises UserError for a model that is not built as Llama is."""
        return shape_of(self.config)

    def adapters(self, lora: LoraSettings | None) -> int:
        """Parameters of low-rank adapters; 0 without."""
        if lora is None:
            return 0
        key = lora.model_dump_json()
        if key not in self._adapters:
            self._adapters[key] = adapter_parameters(self.config, lora.rank, lora.target_modules)
        return self._adapters[key]


@cache
def known_architectures() -> dict[str, Any]:
    """Hub name → {"parameters", "config"} of architectures.yaml."""
    known: dict[str, Any] = yaml.safe_load(FACTS.read_text(encoding="utf-8"))
    return known


def find_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's config: of a folder or an embedded one, of the hub's cache, of architectures.yaml, of the hub.

    Weights are never downloaded. Raises UserError where none of these has it.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    folder = offline_folder()
    fetched = folder / Item("model", path).place if folder and path not in EMBEDDED else None
    place = str(fetched if fetched and fetched.is_dir() else EMBEDDED.get(path, path))
    try:
        return AutoConfig.from_pretrained(place, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        if Path(place).is_dir():
            raise UserError(f"{path}: its config.json does not describe a model ({error})") from error
    if path in known_architectures():
        return AutoConfig.for_model(**known_architectures()[path]["config"])
    check_name(path)
    try:
        return AutoConfig.from_pretrained(place, **options)
    except Exception as error:  # the hub client raises many kinds for "not there"
        raise UserError(
            f"{path}: no config.json in this folder, in the hub's cache or on the hub; {FACTS} takes the facts of a "
            "model that cannot be reached"
        ) from error


def shape_of(config: PreTrainedConfig) -> Shape:
    """The shape of a causal language model. Raises UserError for one that is not built as Llama is."""
    model = meta_model(config)
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not hasattr(config, "intermediate_size") or not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"{config.model_type}: plan knows decoders built as Llama is (attention and a gated MLP in model.layers); "
            "this one would have to be measured"
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    layer = list(layers[0].parameters())
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=sum(parameter.numel() for parameter in layer),
        layer_matrices=sum(parameter.numel() for parameter in layer if parameter.dim() == 2),
        largest_parameter=max(parameter.numel() for parameter in model.parameters()),
        layers=len(layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query=heads * width,
        key=(getattr(config, "num_key_value_heads", None) or heads) * width,
        heads=heads,
        vocabulary=config.vocab_size,
    )


def adapter_parameters(config: PreTrainedConfig, rank: int, target_modules: str | list[str]) -> int:
    """Parameters of low-rank adapters: rank × (inputs + outputs) of every adapted matrix, the head left out.

    target_modules: as PEFT takes them, "all-linear", a regular expression of whole names, or ends of names.
    """
    model = meta_model(config)
    head = model.get_output_embeddings()

    def adapted(name: str) -> bool:
        if isinstance(target_modules, str):
            return target_modules == "all-linear" or re.fullmatch(target_modules, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in target_modules)

    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and adapted(name)
    )

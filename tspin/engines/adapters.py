"""Low-rank adapters (LoRA, arXiv 2106.09685): put into a model for a training, kept beside its merged checkpoint."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tspin.config import LoraSettings
from tspin.errors import UserError, reason, unknown
from tspin.runs.files import atomic_path

ADAPTER = "adapter"  # the folder, beside a checkpoint
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names in it
# Of LoraConfig: what `lora.options` may say besides rank, alpha and target_modules.
OPTIONS = (
    *("exclude_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    *("layers_pattern", "init_lora_weights", "fan_in_fan_out"),
)
INITIAL = (True, "gaussian", "orthogonal")  # the others change the weights below the adapters
ABOUT = (  # says what a config is of, and changes nothing
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
)


def lora_settings(config: Any, model_type: str) -> LoraSettings:
    """The settings that a peft.LoraConfig says. Raises UserError for other methods of PEFT, and for what cannot act.

    model_type: of the model's config; PEFT knows by it where adapters go when target_modules is None.
    """
    if type(config) is not LoraConfig:
        raise UserError(f"peft_config: {type(config).__name__} is not supported, peft.LoraConfig is")
    if config.lora_dropout:
        raise UserError(
            "peft_config.lora_dropout: log π is the policy's own while it is trained, without any dropout: set it to 0"
        )
    targets = config.target_modules or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if targets is None:
        raise UserError(f"peft_config.target_modules: PEFT knows none for {model_type}: name them, or 'all-linear'")
    default = LoraConfig()
    others = {
        field.name: getattr(config, field.name)
        for field in fields(LoraConfig)
        if field.name not in ("r", "lora_alpha", "target_modules", *ABOUT)
        and getattr(config, field.name) != getattr(default, field.name)
    }
    options = {name: sorted(value) if isinstance(value, set) else value for name, value in others.items()}
    listed = targets if isinstance(targets, str) else sorted(targets)
    settings = LoraSettings(rank=config.r, alpha=config.lora_alpha, target_modules=listed, options=options)
    lora_config(settings, "peft_config")
    return settings


def lora_config(settings: LoraSettings, called: str = "lora.options") -> LoraConfig:
    """The peft.LoraConfig of settings. called: what a message calls its options. Raises UserError."""
    for name in settings.options:
        if name not in OPTIONS:
            raise UserError(f"{called}: {unknown('option', name, OPTIONS)}")
    initial = settings.options.get("init_lora_weights", True)
    if initial not in INITIAL:
        raise UserError(
            f"{called}.init_lora_weights: {initial!r} changes the weights below the adapters, so that the policy "
            f"would not start as π_θt; choose of {', '.join(map(repr, INITIAL))}"
        )
    try:
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
            target_modules=settings.target_modules,
            lora_dropout=0.0,
            **settings.options,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{called}: {reason(error)}") from error


def add_adapters(model: PreTrainedModel, settings: LoraSettings) -> LoraModel:
    """Put adapters into `model`, in place, and freeze everything else.

    The model itself, not a wrapper, goes on being trained: the layouts that share prompts look into it. Raises
    UserError where it has no such modules.
    """
    try:
        return LoraModel(model, {"default": lora_config(settings)}, "default")
    except ValueError as error:
        raise UserError(f"lora.target_modules: {reason(error)}") from error


def adapted_weights(adapters: LoraModel) -> set[str]:
    """The names, in the model without adapters, of the weights that these change once they are merged."""
    names = (name for name, _ in adapters.model.named_parameters())
    return {name.replace(".base_layer.", ".") for name in names if ".base_layer." in name}


def save_adapter(adapters: LoraModel, policy: str, target: Path) -> None:
    """Write adapters that are not merged yet as `PeftModel.from_pretrained` on the folder `policy` loads them."""
    config = adapters.peft_config["default"]
    config.base_model_name_or_path, config.task_type, config.inference_mode = policy, "CAUSAL_LM", True
    weights = {f"base_model.{name}": value for name, value in get_peft_model_state_dict(adapters).items()}
    with atomic_path(target) as temporary:
        temporary.mkdir()
        save_file({name: value.contiguous().cpu() for name, value in weights.items()}, temporary / WEIGHTS)
        config.save_pretrained(str(temporary))

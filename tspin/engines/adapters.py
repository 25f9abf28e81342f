"""Low-rank adapters (LoRA, arXiv 2106.09685): put into a model for a training, kept beside its merged checkpoint.

A policy that is trained as adapters is the frozen π_θ0, in the type that model.dtype says or in 4 bits, and adapters in
float32. These go on from iteration to iteration, as the whole weights of other runs do, and are never rounded: a merge
into bfloat16 weights, the distance between which is some hundred times a training's steps, would lose them. So

- training goes on from π_θ0 and the adapters of the iteration before; the policy's rank stays `lora.rank`;
- log-probabilities and responses are computed with weights and adapters apart, as in training (`load_policy`);
- each checkpoint has both merged, in float32, for whatever reads whole models: vLLM, other programs, people. It is
  rounded only by `lora.merged_dtype`, or by who loads it so; no iteration starts from it.

Single steps on files (tspin.experiment.steps) put new adapters into the whole model that they are given. The frozen
weights of a 4-bit run are what the 4 bits stand for, and so are those of its checkpoints.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.functional import cast_adapter_dtype, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tspin.config import LoraSettings, SelfPlayConfig
from tspin.errors import UserError, reason, unknown
from tspin.models import Policy, dtype_name, load_model, load_shape, meta_model
from tspin.runs.files import atomic_path

ADAPTER = "adapter"  # the folder, beside a checkpoint
NAME = "default"  # of the adapters within a model, PEFT's own
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


def check_lora(args: SelfPlayConfig) -> None:
    """Raise UserError where the settings' adapters cannot be trained, here or at all."""
    if args.lora is None:
        return
    lora_config(args.lora)
    if args.lora.quantize and find_spec("bitsandbytes") is None:
        raise UserError(
            "lora.quantize: bitsandbytes is not installed; pip install 'tspin[qlora]', or leave lora.quantize out"
        )
    if args.lora.quantize and args.sampling_backend == "vllm":
        raise UserError(
            "lora.quantize: the first responses are the 4-bit model's, and vLLM would draw them from the whole one; "
            "set sampling_backend=transformers, or leave lora.quantize out"
        )


def check_targets(source: str | PreTrainedModel, loading: Mapping[str, Any], settings: LoraSettings) -> None:
    """Raise UserError where adapters have no place in a model, or one in a weight that is another layer's too.

    Such an adapter acts in one of the layers, and a checkpoint with it merged would have it in both: another policy.
    source: the model, or its folder, of which the shape alone is looked at. loading: arguments of `from_pretrained`.
    """
    if isinstance(source, PreTrainedModel):
        shape = meta_model(copy.deepcopy(source.config), bool(loading.get("trust_remote_code")))
    else:
        shape = load_shape(source, dict(loading))
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT warns of is said below, or when the adapters are trained
        add_adapters(shape, lora_config(settings))
    holders = Counter(id(weight) for _, weight in shape.named_parameters(remove_duplicate=False))
    for name, layer in shape.named_modules():
        if isinstance(layer, LoraLayer) and holders[id(layer.get_base_layer().weight)] > 1:
            raise UserError(
                f"lora.target_modules: the weight of {name} is another layer's too (tie_word_embeddings of the model), "
                f"and a checkpoint would have its adapter in both: leave {name.rsplit('.', 1)[-1]} out"
            )


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
            task_type="CAUSAL_LM",
            **settings.options,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{called}: {reason(error)}") from error


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put new adapters, which change nothing yet, into `model`, in float32, and freeze everything else.

    The model itself, not a wrapper, goes on being trained: the layouts that share prompts look into it. Raises
    UserError where it has no such modules.
    """
    try:
        model.add_adapter(config, NAME)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {reason(error)}") from error
    cast_adapter_dtype(model, NAME)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether a model has adapters in it."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def check_source(model: Any) -> None:
    """Raise UserError for what is neither the name of a model nor a loaded one, and for adapters in it."""
    if isinstance(model, str | Path):
        return
    if not isinstance(model, PreTrainedModel):
        merge = ": merge its adapters, model.merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
        kind = type(model).__name__
        raise UserError(f"model: a folder, a hub name or a model of transformers is needed, not a {kind}{merge}")
    if has_adapters(model):
        raise UserError("model: it has adapters in it: merge them into its weights, and give peft_config for new ones")


def load_policy(policy: Policy, loading: dict[str, Any], *, whole: bool = False) -> PreTrainedModel:
    """A policy in memory: one that was trained as adapters as the frozen model with these in it, ready to train on.

    loading: see tspin.models.load_model. whole: take the merged checkpoint in its place where that is in float32, and
    so is the same policy; it computes faster.
    """
    adapter = policy.adapter
    if adapter is None:
        return load_model(policy.folder, loading)
    if whole and dtype_name(loading) == adapter.merged_dtype == "float32":
        return load_model(policy.folder, {**loading, "quantize": None})
    model = load_model(adapter.base, {**loading, "quantize": adapter.quantize})
    add_adapters(model, LoraConfig.from_pretrained(adapter.folder))
    set_peft_model_state_dict(model, load_file(Path(adapter.folder) / WEIGHTS), NAME)
    return model


def save_adapter(model: PreTrainedModel, target: Path) -> None:
    """Write a model's adapters as `PeftModel.from_pretrained` loads them on the model that they are in."""
    with atomic_path(target) as temporary:
        model.save_pretrained(temporary)


def merged(model: PreTrainedModel, adapter: Path, dtype: str) -> PreTrainedModel:
    """The frozen weights of `model` with the adapters in the folder `adapter` added in float32, on the CPU, as `dtype`.

    `model` is used up: its adapters are taken out.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(name, module.get_base_layer())
    model.delete_adapter(NAME)
    model.cpu()
    if getattr(model, "is_quantized", False):
        model.dequantize(dtype=torch.float32)
    whole = PeftModel.from_pretrained(model.float(), str(adapter)).merge_and_unload()
    return whole.to(getattr(torch, dtype))  # type: ignore[no-any-return]

"""The config tree: one YAML file says everything about an experiment but the seeds.

Every key is validated; an unknown key or a bad value raises UserError with the key's path and what
is allowed there. `for_method` gives the settings of one run.
"""

import difflib
import reprlib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tspin.errors import UserError
from tspin.objectives import METHODS

REPOSITORY = Path(__file__).resolve().parents[1]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
MAX_NODES = 100_000  # values in a YAML file, its aliases written out


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Section):
    """The initial policy π_θ0."""

    path: str = "pocket"  # a folder, a hub name, or the embedded "pocket"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; see training.bf16 for the arithmetic
    attention: Literal["sdpa", "flex_attention", "eager"] = "sdpa"  # flex_attention: for long rows on NVIDIA GPUs
    trust_remote_code: bool = False


class DataSettings(Section):
    """Prompts and labelled responses."""

    path: str = "pocket"  # .jsonl, .parquet, a hub name, or the embedded "pocket"
    name: str | None = None  # the hub's configuration name
    split: str = "train"
    revision: str | None = None
    columns: dict[Literal["prompt", "completion"], str] = {}
    template: str = "auto"  # auto, chat, paper, none, or a text with {prompt} in it
    labels: PositiveInt | None = None  # rows used, a nested seeded subset; all when empty
    subset_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    max_prompt_tokens: PositiveInt = 512
    max_response_tokens: PositiveInt = 256
    long_prompts: Literal["error", "truncate", "drop"] = "error"


class EngineSettings(Section):
    """vLLM, where a backend names it; ignored by the others."""

    tensor_parallel: PositiveInt = 1  # GPUs that hold one copy of the model
    data_parallel: PositiveInt = 1  # copies, each with its share of the prompts
    memory: Annotated[float, Field(gt=0, lt=1)] = 0.9  # share of a GPU's memory that the engine may take
    enforce_eager: bool = False  # no CUDA graphs: slower, and quicker to start


class SamplingSettings(Section):
    """Decoding of y′ and y0. temperature 0 is greedy."""

    temperature: NonNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64  # of the transformers backend; vllm plans its own
    backend: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights while sampling; None: as model.dtype


class LoraSettings(Section):
    """Low-rank adapters in place of all weights (PEFT); each iteration's checkpoint has them merged."""

    rank: PositiveInt = 16
    alpha: Positive = 32.0
    target_modules: str | list[str] = "all-linear"


class TrainingSettings(Section):
    """One iteration's optimisation. A list of learning rates gives one an iteration, the last going on."""

    learning_rate: Positive | Annotated[list[Positive], Field(min_length=1)] = 5e-7
    epochs: Positive = 1.0
    batch_size: PositiveInt = 64  # triplets an optimizer step, whatever the hardware
    micro_batch_tokens: PositiveInt = 4096  # tokens a forward pass on one device; lower saves memory
    layout: Literal["auto", "shared", "padded"] = "auto"  # shared: each prompt once for all its responses
    optimizer: str = "rmsprop"
    weight_decay: NonNegative = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the steps
    schedule: str = "linear"
    max_grad_norm: Positive = 1.0
    checkpoint_steps: PositiveInt | None = None  # keep the training's state every so many steps, against crashes
    gradient_checkpointing: bool = False  # saves memory, costs a second forward pass
    bf16: bool | Literal["auto"] = "auto"  # auto: where the hardware multiplies bfloat16
    lora: LoraSettings | None = None  # all weights are trained when empty
    monitor_proto: bool = False  # log y0 where it carries no gradient too; a third more work there
    trainer: dict[str, Any] = {}  # any other transformers.TrainingArguments, by its name there


class MethodSettings(Section):
    """A method's own coefficients, and where its data or training differ from the common ones."""

    alpha: Positive = 1.0
    beta: NonNegative = 0.1
    lam: Positive = 0.1
    loss: Literal["logistic", "exponential"] = "logistic"
    length_scale: Positive = 2.0
    margin: NonNegative = 1.0
    noise_ratio: Positive = 1.0
    data: dict[str, Any] = {}
    training: dict[str, Any] = {}


class EvaluationSettings(Section):
    """Benchmarks: a suite of experiments/suites, or a file."""

    suite: str = "pocket"
    batch_size: PositiveInt = 64
    limit: PositiveInt | None = None  # problems a benchmark, for trials only
    backend: Literal["transformers", "vllm"] = "transformers"
    dtype: Literal["float32", "bfloat16"] | None = None  # of the weights while evaluating; None: as model.dtype


class RunSettings(Section):
    """One run: one method. What `tspin run` and SelfPlayTrainer need."""

    method: str
    iterations: Annotated[int, Field(gt=0, lt=128)]
    coefficients: MethodSettings
    model: ModelSettings
    data: DataSettings
    sampling: SamplingSettings
    training: TrainingSettings
    engine: EngineSettings


class Config(Section):
    """An experiment: methods on one initial policy and one data set."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    sampling: SamplingSettings = SamplingSettings()
    training: TrainingSettings = TrainingSettings()
    engine: EngineSettings = EngineSettings()
    evaluation: EvaluationSettings | None = None
    iterations: Annotated[int, Field(gt=0, lt=128)] = 5  # results/ keeps them in 8 bits
    methods: dict[str, MethodSettings] = {}

    @model_validator(mode="after")
    def _methods_merge(self) -> "Config":
        for name in self.methods:
            self.for_method(name)
        return self

    def for_method(self, name: str) -> RunSettings:
        """The settings of one method's run, its overrides merged in. Raises UserError for an unknown one."""
        if name not in METHODS:
            raise UserError(f"methods: {unknown('method', name, METHODS)}")
        method = self.methods.get(name, MethodSettings())
        # SFT has no self-play: it is one round of training.
        iterations = self.iterations if METHODS[name].self_play else 1
        merged = {
            "data": self.data.model_dump() | method.data,
            "training": self.training.model_dump() | method.training,
        }
        try:
            data, training = DataSettings(**merged["data"]), TrainingSettings(**merged["training"])
        except ValidationError as error:
            section = DataSettings if error.title == "DataSettings" else TrainingSettings
            key = "data" if section is DataSettings else "training"
            raise UserError(explain(error, section, f"methods.{name}.{key}.")) from error
        return RunSettings(
            method=name,
            iterations=iterations,
            coefficients=method.model_copy(update={"data": {}, "training": {}}),
            model=self.model,
            data=data,
            sampling=self.sampling,
            training=training,
            engine=self.engine,
        )


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """Read a preset of experiments/ or a YAML file, `key.path=value` overrides on top.

    Raises UserError for an unknown preset, unreadable YAML, unknown keys and bad values.
    """
    path = find_yaml(name_or_path, "experiments/presets", "preset")
    tree = read_yaml(path)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of sections, this is a {type(tree).__name__}")
    return build_config(tree, overrides, source=f"{path.name}: ")


def build_config(tree: dict[str, Any], overrides: Iterable[str] = (), source: str = "") -> Config:
    """A validated Config from a tree of plain values and `key.path=value` overrides."""
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {override}: write it as key.path=value")
        *parents, last = key.strip().split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"--set {override}: {parent} is a value, not a section")
        try:
            node[last] = _parsed(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"--set {override}: {value!r} is not a YAML value") from error
    try:
        return Config.model_validate(read_numbers(tree))
    except ValidationError as error:
        raise UserError(source + explain(error, Config)) from error


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises UserError for what is no file, no UTF-8 text, no YAML, or endless."""
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45 is no date
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error


def _parsed(text: str) -> Any:
    tree = yaml.safe_load(text)
    open_nodes, count = [tree], 0
    while open_nodes:  # a few lines of aliases can stand for a tree without end
        node, count = open_nodes.pop(), count + 1
        if count > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values")
        if isinstance(node, dict):
            if wrong := [key for key in node if not isinstance(key, str)]:
                raise ValueError(f"the key {wrong[0]!r} is no text: put it in quotes")
            open_nodes += node.values()
        elif isinstance(node, list):
            open_nodes += node
    return tree


def read_numbers(node: Any) -> Any:
    """YAML 1.1 reads 5e-7 as text; people who write it mean a number."""
    if isinstance(node, dict):
        return {key: read_numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [read_numbers(value) for value in node]
    if isinstance(node, str) and node[:1].isdigit() and "e" in node.lower():
        try:
            return float(node)
        except ValueError:
            return node
    return node


def recipes() -> Path:
    """The folder of presets/, suites/, studies/, accelerate/ and slurm/: the package's, or the repository's."""
    packaged = Path(__file__).parent / "recipes"  # a wheel has experiments/ there, see pyproject.toml
    return packaged if packaged.is_dir() else REPOSITORY / "experiments"


def find_yaml(name_or_path: str, folder: str, what: str) -> Path:
    """A YAML file: of that path, or of that name in `folder` ("experiments/presets") here or among the recipes."""
    given = Path(name_or_path)
    if given.suffix in {".yaml", ".yml"}:
        if given.is_file():
            return given
        raise UserError(f"{given}: no such file")
    folders = [Path.cwd() / folder, recipes() / Path(folder).name]
    for candidate in (place / f"{name_or_path}.yaml" for place in folders):
        if candidate.is_file():
            return candidate
    known = sorted({path.stem for place in folders for path in place.glob("*.yaml")})
    raise UserError(unknown(what, name_or_path, known))


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The line for a name that is not among the known ones, with the nearest that is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    return f"unknown {what} {name!r}: {hint}(known: {listed})"


def explain(error: ValidationError, root: type[BaseModel], prefix: str = "") -> str:
    """One line for the first thing that is wrong in a config."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if isinstance(part, str | int)]
    path = prefix + ".".join(map(str, location)) or "the config"
    if first["type"] == "extra_forbidden":
        parent = _section_at(root, location[:-1])
        allowed = list(parent.model_fields) if parent else []
        return f"{path}: " + unknown("key", str(location[-1]), allowed)
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]} (got {reprlib.repr(first.get('input'))})"


def _section_at(root: type[BaseModel], location: Iterable[Any]) -> type[BaseModel] | None:
    annotation: Any = root
    for part in location:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and part in annotation.model_fields:
            annotation = annotation.model_fields[part].annotation
        if get_origin(annotation) in (Union, types.UnionType):
            annotation = next((a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, Section)), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None

"""The types of settings, and a config's sections: all that is declared of them without PyTorch, which takes seconds.

The settings that stand at a config's top level are the fields of tspin.config.SelfPlayConfig, which stands on PyTorch.
"""

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from tspin.sections import Section

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonEmpty = Annotated[str, Field(min_length=1)]
IsoDate = Annotated[str, BeforeValidator(str), AfterValidator(lambda text: date.fromisoformat(text).isoformat())]
Dtype = Literal["float32", "bfloat16"]
Backend = Literal["transformers", "vllm"]


class ModelSettings(Section):
    """The initial policy π_θ0."""

    path: str = "pocket"  # a folder, a hub name, or an embedded one: "pocket", "pocket-cold"
    fine_tuned: bool = False  # on the labels already, as the paper's is: some of its claims can be tested only then
    revision: str | None = None
    dtype: Dtype = "float32"  # of the weights; bf16 is of the arithmetic
    attention: Literal["sdpa", "eager"] = "sdpa"  # eager: written out, to compare; prompts are not shared then
    trust_remote_code: bool = False


class DataSettings(Section):
    """Where the rows, prompts and labelled responses, come from."""

    path: str = "pocket"  # a file or folder (tspin.data.files), a hub name, or embedded (tspin.data.sources.EMBEDDED)
    name: str | None = None  # the configuration's, of the hub or a folder
    split: str = "train"
    revision: str | None = None
    columns: dict[Literal["prompt", "completion"], str] = {}  # of a format that is not known (tspin.data.formats)
    rounds: Literal["first", "all"] = "first"  # of a conversation, the assistant's turns that are responses to learn
    generated: bool = False  # take the column `generated`, as SPIN's sets have it, for iteration 0's y′
    labels: PositiveInt | None = None  # rows used, a nested seeded subset; all when empty
    subset_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    history: Annotated[int, Field(ge=0, lt=128)] = 0  # see SelfPlayConfig


class EvaluationSettings(Section):
    """Benchmarks: a suite of experiments/suites, or a file."""

    suite: str = "pocket"
    batch_size: PositiveInt = 64
    limit: PositiveInt | None = None  # problems per benchmark, for trials only
    backend: Backend = "transformers"
    dtype: Dtype | None = None  # of the weights while evaluating; None: as model.dtype
    held_out: str | None = None  # labelled rows, as data.path takes them, whose −log π(y) is recorded


class EngineSettings(Section):
    """How vLLM, where a backend names it, uses the GPUs."""

    tensor_parallel: PositiveInt = 1  # GPUs that hold one copy of the model together
    data_parallel: PositiveInt = 1  # copies, each with its share of the prompts; as many GPUs compute log-probabilities
    memory: Annotated[float, Field(gt=0, lt=1)] = 0.9  # share of a GPU's memory that the engine may take
    enforce_eager: bool = False  # no CUDA graphs: slower, and quicker to start


class LoraSettings(Section):
    """Low-rank adapters, in float32 on frozen weights, in place of all weights (PEFT): see tspin.engines.adapters."""

    rank: PositiveInt = 16  # of the two factors whose product is added to a weight
    alpha: Positive = 32.0  # the product is scaled by alpha / rank
    target_modules: str | list[str] = "all-linear"  # layers, by PEFT's rules; all-linear: all but the head
    options: dict[str, Any] = {}  # further ones of peft.LoraConfig (tspin.engines.adapters.OPTIONS)
    learning_rate: Positive | Annotated[list[Positive], Field(min_length=1)] | None = None  # None: as of all weights
    quantize: Literal["nf4"] | None = None  # the frozen weights in 4 bits, by bitsandbytes (QLoRA, arXiv 2305.14314)
    merged_dtype: Dtype = "float32"  # of the merged checkpoints, which no iteration trains on

"""Peak memory of a GPU, predicted part by part. Each function states its formula; `make plan-check` measures the error.

Symbols: P parameters, w bytes of a weight (4, or 2 in bfloat16), a of a weight of adapters (4, and so of its gradient),
c bytes of the arithmetic (2 under autocast to bfloat16, else w), T tokens of a micro-batch, L of an example (padded: of
a row), N response tokens, h hidden, m intermediate, q and k the widths of all query and of all key heads, g keys that
are gathered per token, V vocabulary. Below adapters, layers' matrices may have 4 bits (NF4) in place of w.
Activations are those of a decoder built as Llama is.
"""

import sys
from dataclasses import dataclass

from tspin.errors import UserError
from tspin.logprobs import LOGITS_PER_CHUNK
from tspin.planning.architectures import Shape
from tspin.segments import WHOLE

Parts = dict[str, int]  # part → bytes; they exist at once, so that their sum is the peak

# What optimizers keep per parameter, as transformers builds them by name: tensors of the weight's type, and bytes.
OPTIMIZER_STATE = {
    **{"rmsprop": (1, 0), "adagrad": (1, 0), "lion_32bit": (1, 0), "sgd": (0, 0), "adafactor": (0, 0)},
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_apex_fused"), (2, 0)),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), (0, 2)),
    **dict.fromkeys(("rmsprop_bnb_8bit", "lion_8bit", "paged_lion_8bit"), (0, 1)),
}
# Bytes of a weight in 4 bits: a scale of 8 bits for 64 of them, one of 32 for 256 such (arXiv 2305.14314, section 3).
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
ADAPTER = 4  # bytes of a weight of adapters, of its gradient and of each tensor of its optimizer
SUMMED = 4  # bytes of a gradient while GPUs add theirs up (tspin.trainer)
FUSED = {"adamw_torch_fused", "adamw_apex_fused"}  # update in place, nothing of the parameters' size beside them


@dataclass(frozen=True)
class Precision:
    """weight: bytes of a weight, its gradient and its optimizer state. compute: of a product's inputs and outputs.

    matrix: bytes of a weight in a layer's matrices, where those are in other types than the rest.
    """

    weight: int
    compute: int
    matrix: float | None = None

    def weights(self, shape: Shape) -> int:
        """Bytes of a whole model."""
        matrices = shape.layers * shape.layer_matrices
        return round(self.weight * (shape.parameters - matrices) + (self.matrix or self.weight) * matrices)

    def copy(self, shape: Shape) -> int:
        """Bytes of a layer's matrices in the type of the arithmetic, which autocast keeps; of 4 bits it keeps none."""
        return self.compute * shape.layer_matrices if self.autocast and self.matrix is None else 0

    def unpacked(self, shape: Shape) -> int:
        """Bytes of the largest matrix of 4 bits, written out while it is multiplied."""
        return self.compute * shape.intermediate * shape.hidden if self.matrix is not None else 0

    @property
    def autocast(self) -> bool:
        """Whether products take copies of the weights in another type."""
        return self.compute != self.weight

    @property
    def new_gradient(self) -> int:
        """Bytes per weight of a gradient before it is added to others: w, and under autocast in its type too, c + w."""
        return self.weight + (self.compute if self.autocast else 0)


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a step, and how its activations are kept."""

    tokens: int
    row_tokens: int  # of an example, in the padded layout of a row
    response_tokens: int
    count: int  # micro-batches per step
    padded: bool = False  # the padded layout: keys and values repeated, logits of every token
    checkpointing: bool = False  # only layers' inputs are kept

    @property
    def gathered_keys(self) -> float:
        """Keys per token that attention by segments gathers: a prompt's again for each of three responses."""
        if self.padded or self.row_tokens <= WHOLE:
            return 1.0
        return 1 + 3 * (1 - self.response_tokens / self.tokens)


@dataclass(frozen=True)
class Optimizer:
    """What is trained, and how it is updated."""

    name: str  # as Transformers' `optim`
    trained: int | None = None  # parameters with a gradient: adapters' under LoRA; None: all
    shards: int = 1  # GPUs that weights, gradients and state are spread over (FSDP, full shard)
    foreach: bool = True  # all tensors are updated at once, as on GPUs

    @property
    def adapters(self) -> bool:
        """Whether the weights themselves are frozen: no gradient of them exists at any moment."""
        return self.trained is not None

    def state_bytes(self, weight: int) -> int:
        """Bytes of state per parameter. Raises UserError for an optimizer that is not in OPTIMIZER_STATE."""
        if self.name not in OPTIMIZER_STATE:
            known = ", ".join(sorted(OPTIMIZER_STATE))
            raise UserError(f"optim {self.name!r}: plan does not know what it keeps (it knows {known})")
        tensors, further = OPTIMIZER_STATE[self.name]
        return tensors * weight + further


def training_parts(shape: Shape, precision: Precision, batch: MicroBatch, optimizer: Optimizer) -> Parts:
    """Peak memory of an optimizer step on one GPU, by part.

        weights      w P / shards; with adapters w P + a · trained
        gradients    w · trained / shards, of adapters a · trained; the optimizer's: state bytes · trained / shards
        activations  T · saved per token · layers; with checkpointing a layer's input alone, w T h, for each, and all
                     of one layer; embeddings' and the last norm's states, and masks, c T L at most
        copies       one shard, autocast: c per weight in the layers' matrices, from forward to backward pass (with
                     checkpointing during the forward pass, one layer's afterwards)
                     With adapters only without checkpointing, where the backward pass needs them: autocast keeps none
                     of frozen weights
        gathered     several shards: c per weight of two layers and of what belongs to no layer, and their gradients, of
                     one layer and of the rest, which waits for the embeddings'; 4 per weight of a layer, whose
                     gradients are added up in float32 (tspin.trainer) and kept in the weights' own type
        temporary    the larger of a layer's backward pass and the head's

    The largest of several moments counts: forward and backward pass, which meet older gradients when a step has several
    micro-batches; the backward pass's end, where with one micro-batch gradients have taken the activations' place; and
    the update, which needs one more tensor of the trained parameters' size (`foreach`) or of the largest one's.
    """
    w, c, shards = precision.weight, precision.compute, optimizer.shards
    trained = shape.parameters if optimizer.trained is None else optimizer.trained
    each = ADAPTER if optimizer.adapters else w
    gradients = each * trained // shards
    kept = {
        "weights": (precision.weights(shape) + ADAPTER * (optimizer.trained or 0)) // shards,
        "optimizer": optimizer.state_bytes(each) * trained // shards,
    }
    layer = saved_per_token(shape, precision, batch) * batch.tokens
    inputs = w * batch.tokens * shape.hidden
    ends = 3 * inputs + c * batch.tokens * batch.row_tokens
    head = head_bytes(shape, precision, batch, optimizer.adapters)
    backward = layer_backward_bytes(shape, precision, batch, optimizer.adapters)
    copy = precision.copy(shape) if shards == 1 else 0
    copies = copy * shape.layers
    around = c * (3 * shape.layer_parameters + 2 * shape.root_parameters) + SUMMED * shape.layer_parameters
    gathered = {"gathered layers": around} if shards > 1 else {}
    if batch.checkpointing:
        stored = inputs * shape.layers + ends
        cached = copy if optimizer.adapters else copies
        moments = [{"activations": stored, "weight copies": cached, "temporary": head}]
        moments += [{"activations": stored + layer, "weight copies": copy, "temporary": backward}]
    else:
        stored = layer * shape.layers + ends
        moments = [{"activations": stored, "weight copies": copies, "temporary": max(head, backward)}]
    older = gradients if batch.count > 1 else 0
    candidates = [{**kept, "gradients": older, **moment, **gathered} for moment in moments]
    if batch.count == 1:
        candidates.append({**kept, "gradients": gradients, "temporary": backward, **gathered})
    update = (
        0 if optimizer.name in FUSED else each * (trained // shards if optimizer.foreach else shape.largest_parameter)
    )
    candidates.append({**kept, "gradients": gradients, "temporary": update})
    return max(candidates, key=lambda parts: sum(parts.values()))


def saved_per_token(shape: Shape, precision: Precision, batch: MicroBatch) -> int:
    """Bytes per token that one layer keeps for its backward pass.

        norms       2 (4 + w) h + 8, and their outputs: 2 · w h, under autocast a copy for each product, 5 · c h
        attention   c (3 q + 2 g k), in the padded layout, which repeats keys and values, c (4 q + L); + 4 · heads
        MLP         4 c m

    A norm keeps its input and normalised input in float32 (with bfloat16 weights the latter in that) and 4 bytes more.
    """
    c, w = precision.compute, precision.weight
    outputs = 5 * c if precision.autocast else 2 * w
    norms = (2 * (4 + w) + outputs) * shape.hidden + 8
    kept = 4 * shape.query + batch.row_tokens if batch.padded else 3 * shape.query + 2 * shape.key * batch.gathered_keys
    return round(norms + c * kept) + 4 * shape.heads + 4 * c * shape.intermediate


def head_bytes(shape: Shape, precision: Precision, batch: MicroBatch, frozen: bool = False) -> int:
    """The most that the head needs at once, in the backward pass of a chunk of n response tokens (all when padded).

    Log-softmax, its gradient and the gradient before it, float32: 12 n V; the chunk's part of the head's gradient,
    (c + w) V h under autocast and w V h without, of a frozen head its copy under autocast alone, c V h; and the hidden
    states that chunks are made from, 2 w N h, a state and its gradient. The padded layout has the logits of all T
    tokens as well, and in float32 too: (c + 4) T V.
    """
    copied = precision.compute if precision.autocast else 0
    gradient = (copied if frozen else precision.new_gradient) * shape.vocabulary * shape.hidden
    states = 2 * precision.weight * batch.response_tokens * shape.hidden
    every = (precision.compute + 4) * batch.tokens * shape.vocabulary if batch.padded else 0
    n = batch.response_tokens if batch.padded else chunk_tokens(shape, batch)
    return 12 * n * shape.vocabulary + gradient + states + every


def layer_backward_bytes(shape: Shape, precision: Precision, batch: MicroBatch, frozen: bool = False) -> int:
    """What a layer's backward pass needs beside what was saved, at its MLP.

    Gradients of the three tensors m wide and of the residual stream: T (3 c m + 3 · w h); and of one matrix before it
    is added to the others: w m h, under autocast (c + w) m h; of frozen ones none, but of those in 4 bits the matrix
    written out, c m h.
    """
    tokens = batch.tokens * (3 * precision.compute * shape.intermediate + 3 * precision.weight * shape.hidden)
    matrix = precision.unpacked(shape) if frozen else precision.new_gradient * shape.intermediate * shape.hidden
    return tokens + matrix


def scoring_parts(shape: Shape, precision: Precision, batch: MicroBatch) -> Parts:
    """Peak memory of log-probabilities without gradient: weights, autocast's copies, one layer, one chunk's logits.

    One layer's tensors together: T · saved per token at most; the head: 10 n V (logits twice, log-softmax).
    """
    layer = saved_per_token(shape, precision, batch) * batch.tokens
    copies = precision.copy(shape) * shape.layers
    temporary = max(layer + precision.unpacked(shape), 10 * chunk_tokens(shape, batch) * shape.vocabulary)
    return {"weights": precision.weights(shape), "weight copies": copies, "temporary": temporary}


def sampling_parts(
    shape: Shape,
    precision: Precision,
    sequences: int,
    prompt_tokens: int,
    new_tokens: int,
    gpus: int = 1,
    most: int | None = None,
) -> Parts:
    """Peak memory of decoding a batch, on each of the GPUs that share a copy: weights, cache, and the prompts' pass.

    cache: sequences · (prompt + new) · 2 k w · layers; both in equal parts. The prompts' pass: a layer's
    three tensors m wide, the stream
    and its norm, w (3 m + 4 h) per token, with a mask of w · prompt per token. most: tokens of prompts that pass at
    once.
    """
    weight = precision.weight
    per_token = weight * (3 * shape.intermediate + 4 * shape.hidden + prompt_tokens)
    return {
        "weights": precision.weights(shape) // gpus,
        "key-value cache": sequences * (prompt_tokens + new_tokens) * cache_bytes(shape, weight) // gpus,
        "temporary": min(sequences * prompt_tokens, most or sys.maxsize) * per_token
        + 12 * sequences * shape.vocabulary,
    }


def cache_bytes(shape: Shape, weight: int) -> int:
    """Bytes per token of the key–value cache: 2 k w in each layer."""
    return 2 * shape.key * weight * shape.layers


def chunk_tokens(shape: Shape, batch: MicroBatch) -> int:
    """Response tokens whose logits exist at once: n = min(N, 2²⁵ / V)."""
    return min(batch.response_tokens, max(LOGITS_PER_CHUNK // shape.vocabulary, 1))

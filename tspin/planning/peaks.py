"""Memory of a GPU, predicted part by part. Each function states its formula; `make plan-check` measures the error.

Symbols: P parameters, w bytes of a weight (4, or 2 in bfloat16), c bytes of the arithmetic (2 under autocast to
bfloat16, else w), T tokens of a micro-batch with their padding, L of a row, N response tokens, h hidden, m
intermediate, q and k the widths of all query and of all key heads, V vocabulary. Activations are those of a decoder
built as Llama is.
"""

from dataclasses import dataclass

from tspin.errors import UserError
from tspin.logprobs import LOGITS_PER_CHUNK
from tspin.planning.architectures import Shape

Parts = dict[str, int]  # part → bytes; they exist at once, so that their sum is the peak

# Tensors of a parameter's size that the optimizer keeps, in the weight's type, as transformers builds it by that name.
OPTIMIZER_TENSORS = {
    **{"rmsprop": 1, "adagrad": 1, "lion_32bit": 1, "sgd": 0, "adafactor": 0},
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_apex_fused"), 2),
}
OPTIMIZER_BYTES = {  # those that keep bytes instead, whatever the weights are
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2),
    **dict.fromkeys(("rmsprop_bnb_8bit", "lion_8bit", "paged_lion_8bit"), 1),
}
FUSED = {"adamw_torch_fused", "adamw_apex_fused"}  # update in place, nothing of the parameters' size beside them


@dataclass(frozen=True)
class Precision:
    """weight: bytes of a weight, its gradient and its optimizer state. compute: of a product's inputs and outputs."""

    weight: int
    compute: int

    @property
    def autocast(self) -> bool:
        """Whether products take copies of the weights in another type."""
        return self.compute != self.weight


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a step. count: how many micro-batches a step has."""

    tokens: int  # with padding
    row_tokens: int
    response_tokens: int
    count: int
    dense_mask: bool = True  # SDPA with a mask; False for FlexAttention and flash kernels
    all_logits: bool = False  # the padded layout: logits of every token


def optimizer_bytes(name: str, precision: Precision) -> int:
    """Bytes of optimizer state a parameter: tensors × w, or the optimizer's own. Raises UserError for unknown names."""
    if name in OPTIMIZER_BYTES:
        return OPTIMIZER_BYTES[name]
    if name in OPTIMIZER_TENSORS:
        return OPTIMIZER_TENSORS[name] * precision.weight
    known = ", ".join(sorted({*OPTIMIZER_TENSORS, *OPTIMIZER_BYTES}))
    raise UserError(f"optim {name!r}: plan does not know what it keeps (it knows {known})")


def saved_a_token(shape: Shape, precision: Precision, batch: MicroBatch) -> int:
    """Bytes that one layer keeps for its backward pass, a token.

    Two norms keep their input and their normalised input in float32 (with bfloat16 weights the latter in that), 4 more
    bytes each a token, and their output for the products: once, or under autocast as a copy for each of the five
    products. Attention keeps queries, outputs, keys and values: 2q + 2k, or 4q under a dense mask, for which
    Transformers repeats keys and values; a log-sum a head; and a dense mask in the arithmetic's type, L. The MLP keeps
    four m wide.

        norms       2 (4 + w) h + 8           [+ 2 · w h without autocast, 5 · c h with it]
        attention   c (2q + 2k), or 4 c q with a dense mask and c L for it, + 4 · heads
        MLP         4 c m
    """
    c, w = precision.compute, precision.weight
    norms = 2 * (4 + w) * shape.hidden + 8
    norms += (5 * c if precision.autocast else 2 * w) * shape.hidden
    if batch.dense_mask:
        attention = 4 * c * shape.query + c * batch.row_tokens
    else:
        attention = c * (2 * shape.query + 2 * shape.key)
    return norms + attention + 4 * shape.heads + 4 * c * shape.intermediate


def head_bytes(shape: Shape, precision: Precision, batch: MicroBatch) -> int:
    """The most that the head needs at once, in the backward pass of a chunk of n = min(N, 2²⁵ / V) response tokens.

    Log-softmax, its gradient and the gradient before it, float32: 12 n V; the chunk's part of the head's gradient,
    (c + w) V h under autocast and w V h without; and the hidden states that chunks are made from, 2 w N h, a state and
    its gradient. The padded layout has the logits of all T tokens as well, and in float32 too: (c + 4) T V.
    """
    n = min(batch.response_tokens, max(LOGITS_PER_CHUNK // shape.vocabulary, 1))
    if batch.all_logits:
        n = batch.response_tokens
    gradient = (precision.weight + (precision.compute if precision.autocast else 0)) * shape.vocabulary * shape.hidden
    states = 2 * precision.weight * batch.response_tokens * shape.hidden
    every = (precision.compute + 4) * batch.tokens * shape.vocabulary if batch.all_logits else 0
    return 12 * n * shape.vocabulary + gradient + states + every


def layer_backward_bytes(shape: Shape, precision: Precision, batch: MicroBatch) -> int:
    """What a layer's backward pass needs beside what was saved, at its MLP.

    Gradients of the three tensors m wide and of the residual stream: T (3 c m + 3 · w h); and of one matrix before it
    is added to the others: w m h, under autocast in its type too, (c + w) m h.
    """
    tokens = batch.tokens * (3 * precision.compute * shape.intermediate + 3 * precision.weight * shape.hidden)
    matrix = precision.weight + (precision.compute if precision.autocast else 0)
    return tokens + matrix * shape.intermediate * shape.hidden


def training_parts(
    shape: Shape,
    precision: Precision,
    batch: MicroBatch,
    *,
    optimizer: str,
    checkpointing: bool,
    gpus: int = 1,
    trained: int | None = None,
    foreach: bool = True,
) -> Parts:
    """Peak memory of an optimizer step on one GPU, by part.

    trained: parameters with a gradient (adapters' under LoRA; all when left out). gpus: over how many weights,
    gradients and state are sharded (FSDP, full shard). foreach: the optimizer updates all tensors at once, as on GPUs.

        weights      w P / gpus (adapters besides)
        gradients    w · trained / gpus
        optimizer    tensors · w · trained / gpus
        activations  T · saved a token · layers; with checkpointing a layer's input alone, 4 T h (2 with bfloat16
                     weights), for each, and all of one layer; embeddings' and the last norm's states
        copies       one GPU, autocast: c bytes for each matrix of the layers, kept from forward to backward pass (with
                     checkpointing during the forward pass, one layer's afterwards)
        gathered     several GPUs: c bytes for two layers and for what belongs to no layer, and a layer's gradients
        temporary    the larger of a layer's backward pass and the head's

    Forward and backward passes meet older gradients when a step has several micro-batches. With one, activations go as
    gradients come: the larger counts. Another candidate is the update itself, which without activations needs one more
    tensor of the trained parameters' size (`foreach`, except for fused optimizers) or of the largest one's.
    """
    own = shape.parameters if trained is None else trained
    weights = precision.weight * (shape.parameters + (0 if trained is None else trained)) // gpus
    gradients = precision.weight * own // gpus
    kept = {"weights": weights, "optimizer": optimizer_bytes(optimizer, precision) * own // gpus}
    layer = saved_a_token(shape, precision, batch) * batch.tokens
    inputs = min(precision.weight, 4) * batch.tokens * shape.hidden
    ends = 3 * inputs + (batch.tokens * batch.row_tokens if batch.dense_mask else 0)
    head, backward = head_bytes(shape, precision, batch), layer_backward_bytes(shape, precision, batch)
    copy = precision.compute * shape.layer_matrices if precision.autocast and gpus == 1 else 0
    root = precision.compute * shape.root_parameters
    around = precision.compute * 3 * shape.layer_parameters + root if gpus > 1 else 0
    gathered = {"gathered layers": around} if gpus > 1 else {}
    moments: list[Parts] = []
    if checkpointing:
        stored = inputs * shape.layers + ends
        moments.append({"activations": stored, "weight copies": copy * shape.layers, "temporary": head})
        moments.append({"activations": stored + layer, "weight copies": copy, "temporary": backward})
    else:
        stored = layer * shape.layers + ends
        moments.append({"activations": stored, "weight copies": copy * shape.layers, "temporary": max(head, backward)})
    old = gradients if batch.count > 1 else 0
    candidates = [{**kept, "gradients": old, **moment, **gathered} for moment in moments]
    if not batch.count > 1:  # the last layers' gradients are there, the first layers' activations no longer
        candidates.append({**kept, "gradients": gradients, "temporary": backward, **gathered})
    update = 0 if optimizer in FUSED else precision.weight * (own // gpus if foreach else shape.largest_parameter)
    candidates.append({**kept, "gradients": gradients, "temporary": update})
    return _largest(candidates)


def scoring_parts(shape: Shape, precision: Precision, batch: MicroBatch) -> Parts:
    """Peak memory of log-probabilities without gradient: weights, autocast's copies, one layer, one chunk's logits.

    One layer's tensors together: T · saved a token at most; the head: 10 n V (logits twice, log-softmax).
    """
    n = min(batch.response_tokens, max(LOGITS_PER_CHUNK // shape.vocabulary, 1))
    layer = saved_a_token(shape, precision, batch) * batch.tokens
    copies = precision.compute * shape.layer_matrices * shape.layers if precision.autocast else 0
    return {
        "weights": precision.weight * shape.parameters,
        "weight copies": copies,
        "temporary": max(layer, 10 * n * shape.vocabulary),
    }


def cache_bytes(shape: Shape, weight: int) -> int:
    """Bytes of the key–value cache a token: 2 k w in each layer."""
    return 2 * shape.key * weight * shape.layers


def sampling_parts(shape: Shape, weight: int, sequences: int, prompt_tokens: int, new_tokens: int) -> Parts:
    """Peak memory of decoding a batch: weights, cache, and the prompts' pass.

    cache: sequences · (prompt + new) · 2 k w · layers. The prompts' pass: a layer's three tensors m wide, the stream
    and its norm, w (3 m + 4 h) a token, with a mask of w · prompt a token.
    """
    a_token = weight * (3 * shape.intermediate + 4 * shape.hidden + prompt_tokens)
    return {
        "weights": weight * shape.parameters,
        "key-value cache": sequences * (prompt_tokens + new_tokens) * cache_bytes(shape, weight),
        "temporary": sequences * prompt_tokens * a_token + 12 * sequences * shape.vocabulary,
    }


def _largest(candidates: list[Parts]) -> Parts:
    return max(candidates, key=lambda parts: sum(parts.values()))

"""The flat layout against plain rows, family by family; which models can take it is found by trying."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from tspin.layouts import choose_layout, tried, why_not_shared
from tspin.logprobs import flat_logps, flat_run, pad_rows, sequence_logps
from tspin.segments import NAME, WHOLE, Segments, batches, pieces, segment_attention, spans

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OWN_HEADS = ("gpt2", "falcon", "opt", "gpt_neox", "bloom")  # a key–value head for each query head, or their own setting
OF_8 = ("qwen3", "gemma", "gemma2", "gemma3_text", "qwen3_moe", "glm", "glm4", "cohere2", "helium", "seed_oss")
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SHARING = {
    **{name: {} for name in (
        "llama", "qwen2", "qwen3", "gemma", "olmo", "olmo2", "phi", "falcon", "gpt_neox", "smollm3", "stablelm",
        "glm", "glm4", "mixtral", "qwen3_moe", "olmoe", "opt", "nemotron", "seed_oss", "ernie4_5", "apertus", "arcee",
        "helium", "llama4_text", "persimmon", "cohere",
    )},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mistral": {"sliding_window": None},
    "mistral with a window": {"sliding_window": 4},
    "phi3 with a window": {"sliding_window": 4},
    "starcoder2 with a window": {"sliding_window": 4},
    "qwen2 with a window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma2 that caps its logits": {**SLIDING, "final_logit_softcapping": 2.0},
    "gemma3_text with a window": SLIDING,
    "cohere2 with a window": {**SLIDING, "logit_scale": 0.3},
    "olmo3 with a window": SLIDING,
    "exaone4 with a window": SLIDING,
    "granite that scales its logits": {"logits_scaling": 4.0},
}  # fmt: skip
RANDOM = random.Random(0)
LENGTHS = [(4, 5, 1, 2), (1, 1, 3, 6), (9, 30, 2, 1), (150, 3, 20, 1), (20, 40, 140, 7)]  # prompt, then responses


def tokens(count: int) -> list[int]:
    return [RANDOM.randrange(2, 64) for _ in range(count)]


PROMPTS = [tokens(prompt) for prompt, *_ in LENGTHS]
ROLES = [[tokens(lengths[role]) for lengths in LENGTHS] for role in (1, 2, 3)]


def random_model(name: str, attention: str = "sdpa", initializer_range: float = 0.3, **settings):
    family = name.split()[0]
    heads = {} if family in OWN_HEADS else {"num_key_value_heads": 2}
    size = {"head_dim": 8} if family in OF_8 else {}
    given = {**SIZES, **heads, **size, **SHARING.get(name, {}), **settings}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=64, pad_token_id=0, **given)
    config.initializer_range = config.init_std = initializer_range
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def assert_same(model, prompts=PROMPTS, roles=ROLES):
    """Log-probabilities to 1e-4, gradients to 1e-3."""
    found = flat_logps(model, **flat_run(prompts, roles))
    wanted = sequence_logps(model, **pad_rows(prompts * len(roles), sum(roles, []), 0)).view(len(roles), -1).T
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=2e-6)
    used = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x.sum(), used, allow_unused=True) for x in (found, wanted)]
    largest = max(b.abs().max().item() for b in gradients[1] if b is not None)
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:  # some, such as that of a bias of all keys, are nothing but rounding
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-6 * largest)


def test_a_compiled_model_has_the_same_numbers():
    """Attention by segments, whose batches are others in each run of tokens, stays out of what is compiled."""
    model = random_model("mistral with a window")
    assert choose_layout(model, "shared") == "shared"
    for part in (slice(2), slice(None)):  # another run: the graphs of the first do not do
        found = []
        for each in (model, torch.compile(model, backend="eager")):
            logps = flat_logps(each, **flat_run(PROMPTS[part], [role[part] for role in ROLES]))
            found.append([logps, *torch.autograd.grad(logps.sum(), list(model.parameters()))])
        assert all(torch.equal(plain, compiled) for plain, compiled in zip(*found, strict=True))
    torch.compiler.reset()


@pytest.mark.parametrize("name", SHARING)
def test_families_share_and_have_the_numbers_of_plain_rows(name):
    """Ragged lengths, one-token responses, windows shorter than prompts, short examples and long ones."""
    model = random_model(name)
    assert choose_layout(model, longest=200) == "shared"
    assert_same(model)


@pytest.mark.parametrize("name", ["llama", "gemma3_text with a window", "falcon"])
def test_checkpointed_layers_have_the_same_gradients(name):
    model = random_model(name)
    assert choose_layout(model, longest=200) == "shared"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # layers are computed twice in training mode alone; nothing here drops out
    assert_same(model)


@pytest.mark.parametrize("scale", [0.02, 0.3])
@pytest.mark.parametrize(
    ("family", "settings", "longest"),
    [
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, 0),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}, 0),
        ("minimax", {}, 0),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, 0),
        ("llama4_text", {"attention_chunk_size": 100, "layer_types": ["chunked_attention", "full_attention"]}, 101),
    ],
)
def test_a_state_or_a_reach_that_segments_do_not_know_is_found(family, settings, longest, scale):
    """At small random weights too, where a convolution hardly changes a number."""
    model = random_model(family, initializer_range=scale, **settings)
    with pytest.warns(UserWarning, match=r"would be off by [0-9.e-]+ nats") as warned:
        assert choose_layout(model, longest=longest) == "padded"
    assert len(warned) == 1 and model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="cannot share prompts"):
        choose_layout(model, "shared", longest)
    assert choose_layout(model, "padded") == "padded"  # asked for: nothing to warn of


def test_a_window_matters_only_where_rows_are_longer():
    chunked = {"attention_chunk_size": 100, "layer_types": ["chunked_attention", "full_attention"]}
    assert choose_layout(random_model("llama4_text", **chunked), longest=100) == "shared"
    windowed = random_model("mistral", sliding_window=100)
    assert why_not_shared(windowed, longest=500) is None and windowed.config.sliding_window == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_half_precision_is_told_from_a_leak(dtype, scale):
    for name in ("llama", "mixtral", "gemma3_text with a window"):
        assert choose_layout(random_model(name, initializer_range=scale).to(dtype), longest=500) == "shared"
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    assert why_not_shared(random_model("qwen3_next", initializer_range=scale, **layers).to(dtype))


@pytest.mark.parametrize(
    ("family", "reason"), [("llama", "load the model with sdpa"), ("bloom", r"\(eager\) cannot be")]
)
def test_attention_that_is_not_by_pytorchs_function_falls_back(family, reason):
    model = random_model(family, "eager")
    with pytest.warns(UserWarning, match=reason):
        assert choose_layout(model) == "padded"


def test_a_model_that_looks_past_attention_is_found():
    """It adds the mean of all tokens to each: equal to a plain row's only by luck."""
    model = random_model("llama")
    model.model.layers[0].register_forward_hook(lambda layer, args, output: output + output.mean(1, keepdim=True))
    assert tried(model).deviation > 1e-3
    assert "off by" in why_not_shared(model)


@pytest.mark.parametrize("term", ["s_aux", "position_bias"])
def test_a_term_that_segments_do_not_have_is_refused(term):
    query = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=term):
        segment_attention(None, query, query, query, Segments.of([[2, 1]], query.device), **{term: torch.zeros(2)})


def test_a_model_in_double_precision_shares():
    assert choose_layout(random_model("llama").double()) == "shared"


def test_what_is_no_flat_run_is_computed_as_ever():
    """The model goes on to generate and to be scored on padded rows, with the attention set for segments."""
    model = random_model("qwen2 with a window")
    rows = pad_rows(PROMPTS, ROLES[0], 0)
    with torch.no_grad():
        before = sequence_logps(model, **rows)
        assert choose_layout(model) == "shared" and model.config._attn_implementation == NAME
        assert torch.equal(sequence_logps(model, **rows), before)


# Segments by themselves: every token's attention, against one mask over the whole run.


def one_mask(lengths, window):
    where = spans(lengths)
    at = torch.arange(len(where.branch))
    seen = (at[:, None] >= at) & (where.example[:, None] == where.example)
    seen &= (where.branch == 0) | (where.branch[:, None] == where.branch)
    return seen & (where.position[:, None] - where.position < (window or len(at)))


RAGGED = [[RANDOM.randint(1, 60), *(RANDOM.randint(1, 40) for _ in range(3))] for _ in range(12)] + [[200, 90, 1, 150]]


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [RAGGED, [[5, 1]], [[300, 20, 30]], [[1, 1, 1], [2, 0, 4]]])
def test_pieces_are_the_attention_of_one_mask(lengths, window):
    count = sum(map(sum, lengths))
    query = torch.randn(1, 4, count, 8, requires_grad=True)
    key, value = (torch.randn(1, 2, count, 8, requires_grad=True) for _ in range(2))
    found = Segments.of(lengths, query.device).attend(query, key, value, window=window)
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=one_mask(lengths, window), enable_gqa=True)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (found, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_every_token_is_a_query_once_and_batches_pad_little():
    lengths = [[RANDOM.randint(20, 300), *(RANDOM.randint(5, 200) for _ in range(3))] for _ in range(100)]
    of = list(pieces(lengths))
    queries = [token for piece in of for token in piece.queries]
    assert sorted(queries) == list(range(sum(map(sum, lengths))))
    made = batches(of)
    assert sorted(piece.queries.start for batch in made for piece in batch) == [piece.queries.start for piece in of]
    padded = sum(len(b) * max(p.size[0] for p in b) * max(p.size[1] for p in b) for b in made)
    assert padded < 1.35 * sum(queries * keys for queries, keys in (piece.size for piece in of))


def test_a_short_example_is_one_piece_and_a_long_one_a_piece_a_part():
    assert [piece.size for piece in pieces([[20, 30, 40]])] == [(90, 90)]
    assert WHOLE < 300
    assert [(piece.size, piece.causal) for piece in pieces([[200, 60, 40]])] == [
        ((200, 200), True), ((60, 260), False), ((40, 240), False)
    ]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [None, 3, 100])
def test_one_kernel_is_the_attention_of_one_mask(window):
    count = sum(map(sum, RAGGED))
    query = torch.randn(1, 4, count, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, 2, count, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = Segments.of(RAGGED, query.device).attend(query, key, value, window=window)
    mask = one_mask(RAGGED, window).cuda()
    wanted = scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found.float(), wanted, atol=2e-2, rtol=2e-2)

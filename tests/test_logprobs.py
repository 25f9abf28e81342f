"""sequence_logps against a plain float32 reference, row by row."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tspin.logprobs import choose_layout, sequence_logps, shared_prefix_logps, uses_flex_attention
from tspin.triplets import example_sizes, pack_shared_prefixes, pad_rows, plan_shared

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16], [17, 18]]
RESPONSES = [[20, 21, 22, 1], [23], [24, 1], [25, 26, 27, 28, 29, 1]]  # 1 is the end token; [23] was cut


def plain(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """One row, no padding: log_softmax and gather."""
    ids = torch.tensor([[*prompt, *response]])
    log_probabilities = model(input_ids=ids).logits.float().log_softmax(dim=-1)[0]
    positions = torch.arange(len(prompt), ids.shape[1])
    return log_probabilities[positions - 1, ids[0, positions]].sum()


def left_padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    width = batch["input_ids"].shape[1]
    return {
        name: torch.stack([row.roll(width - n) for row, n in zip(rows, lengths, strict=True)])
        for name, rows in batch.items()
    }


@pytest.mark.parametrize("side", ["right", "left"])
def test_agrees_with_the_plain_reference(tiny_model, side):
    batch = pad_rows(PROMPTS, RESPONSES, pad_token_id=0)
    found = sequence_logps(tiny_model, **(left_padded(batch) if side == "left" else batch))
    wanted = torch.stack([plain(tiny_model, p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    assert found.shape == (4,) and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert_close_gradients(tiny_model, found, wanted)


def assert_close_gradients(model, found, wanted):
    gradients = [torch.autograd.grad(x.sum(), list(model.parameters())) for x in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-7)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral with a window": {"sliding_window": 4},
    "qwen2": {},
    "qwen2 with a window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
ROLES = [RESPONSES, RESPONSES[::-1], [[30, 1]] * 4]


def random_model(name: str, attention: str = "sdpa"):
    family = name.split()[0]
    grouped = {} if family == "gpt2" else {"num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=64, initializer_range=0.3, **SIZES, **grouped, **FAMILIES[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def packed(row_tokens: int = 64, multiple: int = 1):
    [rows] = plan_shared(example_sizes(PROMPTS, ROLES), 10_000, row_tokens)
    return pack_shared_prefixes(PROMPTS, ROLES, 0, rows, multiple)


@pytest.mark.parametrize("row_tokens", [8, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_prefixes_agree_with_plain_rows(name, row_tokens):
    """Three responses a prompt, one or several examples a row: same log-probabilities and gradients."""
    model = random_model(name)
    assert choose_layout(model) == "shared"
    found = shared_prefix_logps(model, **packed(row_tokens))
    wanted = sequence_logps(model, **pad_rows(PROMPTS * 3, sum(ROLES, []), pad_token_id=0))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert_close_gradients(model, found, wanted)


@pytest.mark.parametrize("tokens", [1, 5])
def test_logits_in_chunks_are_the_same_numbers(monkeypatch, tiny_model, tokens):
    wanted = shared_prefix_logps(tiny_model, **packed())
    monkeypatch.setattr("tspin.logprobs.LOGITS_PER_CHUNK", tokens * tiny_model.config.vocab_size)
    found = shared_prefix_logps(tiny_model, **packed())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert_close_gradients(tiny_model, found, wanted)
    assert tiny_model(torch.tensor([[5, 6]])).logits.shape == (1, 2, tiny_model.config.vocab_size)  # the head is back


@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma3_text"])
def test_block_masks_agree_with_dense_masks(name):
    """FlexAttention, run eagerly: compiled, it is a GPU's; its backward pass does not exist on CPUs."""
    wanted = shared_prefix_logps(random_model(name), **packed())
    model = random_model(name, "flex_attention")
    assert choose_layout(model) == "shared" and uses_flex_attention(model)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found = shared_prefix_logps(model, **packed(multiple=128))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_model_that_takes_no_such_mask_falls_back_with_one_warning():
    gemma2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", vocab_size=64, head_dim=8, **SIZES))
    for model, reason in ((random_model("llama", "eager"), "eager attention"), (gemma2, "gemma2 models")):
        with pytest.warns(UserWarning, match=reason) as warned:
            assert choose_layout(model) == "padded"
        assert len(warned) == 1
        with pytest.raises(ValueError, match=reason):
            choose_layout(model, "shared")
    assert choose_layout(gemma2, "padded") == "padded"  # asked for: nothing to warn of


def test_truncated_prompt_is_scored_as_the_prompt_it_is(tiny_model):
    kept = PROMPTS[2][-3:]
    batch = pad_rows([kept], [RESPONSES[2]], pad_token_id=0)
    torch.testing.assert_close(sequence_logps(tiny_model, **batch)[0], plain(tiny_model, kept, RESPONSES[2]))


def test_the_end_token_counts_and_the_prompt_does_not(tiny_model):
    prompt, response = PROMPTS[0], RESPONSES[0]
    whole = sequence_logps(tiny_model, **pad_rows([prompt], [response], 0))[0]
    cut = sequence_logps(tiny_model, **pad_rows([prompt], [response[:-1]], 0))[0]
    assert whole < cut - 1e-3
    # As prompt tokens, the same tokens contribute nothing.
    moved = sequence_logps(tiny_model, **pad_rows([prompt + response[:-1]], [response[-1:]], 0))[0]
    torch.testing.assert_close(whole, cut + moved)


def test_half_precision_arithmetic_is_summed_in_float32(tiny_model):
    batch = pad_rows(PROMPTS, RESPONSES, pad_token_id=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert sequence_logps(tiny_model, **batch).dtype == torch.float32


def test_a_response_needs_a_prompt(tiny_model):
    with pytest.raises(ValueError, match="no prompt token"):
        pack_shared_prefixes([[], [5]], [[[6, 7], [8]]], 0)
    with pytest.raises(ValueError, match="no prompt token"):
        sequence_logps(tiny_model, **pad_rows([[], [5]], [[6, 7], [8]], 0))

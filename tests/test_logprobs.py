"""sequence_logps against a plain float32 reference, row by row."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tspin.logprobs import pack_shared_prefixes, pad_rows, sequence_logps, shared_prefix_logps, supports_shared_prefix

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


@pytest.mark.parametrize("row_tokens", [8, 64])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_shared_prefixes_agree_with_plain_rows(monkeypatch, family, row_tokens):
    """Three responses a prompt, one or several examples a row: same log-probabilities and gradients."""
    monkeypatch.setattr("tspin.logprobs.ROW_TOKENS", row_tokens)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=64, num_key_value_heads=2, initializer_range=0.3, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    assert supports_shared_prefix(model)
    responses = [RESPONSES, RESPONSES[::-1], [[30, 1]] * 4]
    found = shared_prefix_logps(model, **pack_shared_prefixes(PROMPTS, responses, pad_token_id=0))
    wanted = sequence_logps(model, **pad_rows(PROMPTS * 3, sum(responses, []), pad_token_id=0))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert_close_gradients(model, found, wanted)


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

"""sequence_logps against a plain float32 reference, row by row; flat_logps for a tiny model (test_layouts: others)."""

import pytest
import torch

from tspin.data.responses import Response
from tspin.layouts import choose_layout
from tspin.logprobs import _token_logps, flat_logps, flat_run, pad_rows, sequence_logps
from tspin.triplets import Triplet, TripletCollator, compute_logps, token_logps_of

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


ROLES = [RESPONSES, RESPONSES[::-1], [[30, 1]] * 4]


@pytest.mark.parametrize("tokens", [1, 5])
def test_logits_in_chunks_are_the_same_numbers(monkeypatch, tiny_model, tokens):
    assert choose_layout(tiny_model) == "shared"
    wanted = flat_logps(tiny_model, **flat_run(PROMPTS, ROLES))
    monkeypatch.setattr("tspin.logprobs.LOGITS_PER_CHUNK", tokens * tiny_model.config.vocab_size)
    found = flat_logps(tiny_model, **flat_run(PROMPTS, ROLES))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert_close_gradients(tiny_model, found, wanted)
    assert tiny_model(torch.tensor([[5, 6]])).logits.shape == (1, 2, tiny_model.config.vocab_size)  # the head is back


def test_a_flat_run_has_a_number_for_each_response_in_its_place(tiny_model):
    """An empty response has log-probability 0, the empty product's."""
    assert choose_layout(tiny_model) == "shared"
    found = flat_logps(tiny_model, **flat_run(PROMPTS[:2], [RESPONSES[:2], [[], [7, 8]]]))
    assert found.shape == (2, 2) and found.dtype == torch.float32
    first, second, third = (
        plain(tiny_model, PROMPTS[i], z) for i, z in ((0, RESPONSES[0]), (1, RESPONSES[1]), (1, [7, 8]))
    )
    wanted = torch.stack([first, torch.zeros_like(first), second, third]).view(2, 2)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


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
    assert choose_layout(tiny_model) == "shared"
    with torch.autocast("cpu", torch.bfloat16):
        assert sequence_logps(tiny_model, **batch).dtype == torch.float32
        assert flat_logps(tiny_model, **flat_run(PROMPTS, ROLES)).dtype == torch.float32


def test_a_response_needs_a_prompt(tiny_model):
    with pytest.raises(ValueError, match="no prompt token"):
        flat_logps(tiny_model, **flat_run([[], [5]], [[[6, 7], [8]]]))
    with pytest.raises(ValueError, match="no prompt token"):
        sequence_logps(tiny_model, **pad_rows([[], [5]], [[6, 7], [8]], 0))


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_token_by_token(tiny_model, layout):
    other = [response[::-1] for response in RESPONSES]
    triplets = [
        Triplet(i, prompt, {"labelled": Response(y, "", True), "synthetic": Response(z, "", True)})
        for i, (prompt, y, z) in enumerate(zip(PROMPTS, RESPONSES, other, strict=True))
    ]
    collator = TripletCollator(("labelled", "synthetic"), 0, layout, max_tokens=24)
    sums = compute_logps(tiny_model, triplets, collator, False)
    tokens = compute_logps(tiny_model, triplets, collator, False, of=token_logps_of)
    for role, responses in (("labelled", RESPONSES), ("synthetic", other)):
        assert [len(values) for values in tokens[role]] == [len(response) for response in responses]
        assert [sum(values) for values in tokens[role]] == pytest.approx(sums[role], abs=1e-5)
    first = torch.log_softmax(tiny_model(input_ids=torch.tensor([PROMPTS[3]])).logits[0, -1].float(), -1)
    assert tokens["synthetic"][3][0] == pytest.approx(first[other[3][0]].item(), abs=1e-5)


def test_half_precision_logits_are_normalised_in_float32():
    logits, target = (
        (10 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))).bfloat16(),
        torch.arange(50),
    )
    wanted = logits.float().log_softmax(-1)[range(50), target]
    torch.testing.assert_close(_token_logps(logits, target), wanted, atol=1e-5, rtol=0)

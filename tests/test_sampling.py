"""Sampling: end token, temperature, seed, order, cutting."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconMambaConfig,
    Gemma3TextConfig,
    GenerationConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OpenAIGPTConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from tspin.config import Decoding
from tspin.evaluation.backend import SegmentedLM
from tspin.sampling import masks_padding, rows_can_leave, sample

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
GREEDY = Decoding(temperature=0.0, top_p=1.0, max_new_tokens=8, batch_size=3)


def draw(model, tokenizer, decoding=GREEDY, prompts=PROMPTS, seed=0):
    return list(sample(model, tokenizer, prompts, decoding, seed=seed))


def test_greedy_takes_the_most_likely_token_and_keeps_the_order(tiny_model, tokenizer):
    for prompt, response in zip(PROMPTS, draw(tiny_model, tokenizer), strict=True):
        context = list(prompt)
        for token in response.ids:
            with torch.no_grad():
                assert tiny_model(input_ids=torch.tensor([context])).logits[0, -1].argmax() == token
            context.append(token)


def test_responses_stop_at_the_end_token_or_are_marked_as_cut(tiny_model, tokenizer):
    end = tokenizer.eos_token_id
    with torch.no_grad():  # make the end token likely enough to come, not at once
        tiny_model.lm_head.weight[end] += 0.4
    responses = draw(
        tiny_model, tokenizer, Decoding(temperature=1.5, top_p=1.0, max_new_tokens=12, batch_size=64), PROMPTS * 20
    )
    assert {response.finished for response in responses} == {True, False}
    for response in responses:
        assert response.ids.count(end) == (1 if response.finished else 0)
        assert not response.finished or response.ids[-1] == end
        assert response.finished or len(response.ids) == 12
        assert tokenizer.eos_token not in response.text


def test_the_models_own_generation_settings_do_not_count(tiny_model, tokenizer):
    plain = draw(tiny_model, tokenizer)
    tiny_model.generation_config.repetition_penalty = 5.0
    tiny_model.generation_config.min_new_tokens = 8
    assert draw(tiny_model, tokenizer) == plain
    assert tiny_model.generation_config.repetition_penalty == 5.0


def test_seed_decides(tiny_model, tokenizer):
    hot = Decoding(temperature=1.0, top_p=1.0, max_new_tokens=8, batch_size=2)
    state = torch.get_rng_state()
    first = draw(tiny_model, tokenizer, hot, seed=1)
    assert draw(tiny_model, tokenizer, hot, seed=1) == first
    assert draw(tiny_model, tokenizer, hot, seed=2) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_and_top_p_are_honoured(tiny_model, tokenizer):
    """First-token frequencies against the policy's own distribution, which top-k would cut."""
    prompt = PROMPTS[0]
    with torch.no_grad():
        logits = tiny_model(input_ids=torch.tensor([prompt])).logits[0, -1]
    for temperature in (0.5, 2.0):
        one = Decoding(temperature=temperature, top_p=1.0, max_new_tokens=1, batch_size=500)
        drawn = torch.tensor([r.ids[0] for r in draw(tiny_model, tokenizer, one, [prompt] * 2000)])
        frequencies = torch.bincount(drawn, minlength=len(logits)) / 2000
        wanted = (logits / temperature).softmax(-1)
        assert (frequencies - wanted).abs().sum() / 2 < 0.9 * (frequencies - logits.softmax(-1)).abs().sum() / 2
        top = wanted.topk(5)
        torch.testing.assert_close(frequencies[top.indices], top.values, atol=0.05, rtol=0)
    assert len(set(drawn.tolist())) > 50  # Transformers' default top-k
    narrow = Decoding(temperature=1.0, top_p=1e-6, max_new_tokens=8, batch_size=3)
    assert draw(tiny_model, tokenizer, narrow) == draw(tiny_model, tokenizer)


def test_segments_change_nothing_but_the_work(monkeypatch, tokenizer):
    from tspin.models import EMBEDDED, load_model

    model = load_model(str(EMBEDDED["pocket-cold"]))  # whose answers are of many lengths
    texts = [f"### Instruction: What is {a} + {a + 7}?\n\n### Response: " for a in range(12)]
    greedy = Decoding(temperature=0, top_p=1.0, max_new_tokens=20, batch_size=8)
    found = []
    for first in (1, 3, 100):
        monkeypatch.setattr("tspin.sampling.FIRST_SEGMENT", first)
        found.append(list(sample(model, tokenizer, [tokenizer(text)["input_ids"] for text in texts], greedy, seed=0)))
    assert found[0] == found[1] == found[2]
    assert len({len(response.ids) for response in found[0]}) > 1


def test_shared_key_value_heads_are_read_as_they_are(monkeypatch, tokenizer):
    """Six query heads on two key–value heads: the same texts with and without attention by groups, and it is used."""
    import tspin.sampling
    from tspin import attention as grouped_attention

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=6, num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM(config).eval()
    calls = []

    def counted(query, *args, **kwargs):
        calls.append(query.shape)
        return torch.nn.functional.scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(grouped_attention, "scaled_dot_product_attention", counted)
    by_groups = draw(model, tokenizer)
    assert calls and {shape[1:] for shape in calls} == {(2, 3, 8)}
    assert model.config._attn_implementation == "sdpa"
    calls.clear()
    monkeypatch.setattr(tspin.sampling, "grouped", lambda model: nullcontext())
    assert draw(model, tokenizer) == by_groups
    assert not calls


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LINEAR = {name: 8 for name in ("linear_key_head_dim", "linear_value_head_dim")}
FEW = {"num_experts": 2, "num_experts_per_tok": 1}
MIXED = ["linear_attention", "full_attention"]
CACHES = {  # what models keep of past tokens, and whether rows can leave it
    "convolutions": (False, Lfm2Config, {**HEADS, "layer_types": ["conv", "full_attention"]}),
    "linear attention": (
        False,
        Qwen3NextConfig,
        {**HEADS, **LINEAR, **FEW, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "layer_types": MIXED},
    ),
    "states, apart from attention": (
        False,
        JambaConfig,
        {**HEADS, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
         "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "states, beside attention": (
        False,
        FalconH1Config,
        {**HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "states alone": (False, MambaConfig, {"state_size": 8}),
    "states alone, scaled": (False, FalconMambaConfig, {"state_size": 8}),
    "states that padding runs through": (False, RwkvConfig, {"attention_hidden_size": 32, "context_length": 64}),
    "states that padding decays": (
        False,
        RecurrentGemmaConfig,
        {**HEADS, "num_key_value_heads": 1, "block_types": ["recurrent", "attention"], "lru_width": 32,
         "attention_window_size": 16},
    ),
    "nothing": (False, OpenAIGPTConfig, {"num_attention_heads": 4}),
    "keys and values": (True, LlamaConfig, HEADS),
    "keys and values of a window": (
        True,
        Gemma3TextConfig,
        {**HEADS, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kept", CACHES)
def test_a_batch_draws_what_single_prompts_draw_whatever_the_cache_is(tokenizer, kept, capsys):
    """Greedily, against plain `generate` without padding. Rows leave in between only where the cache lets them."""
    leave, kind, own = CACHES[kept]
    torch.manual_seed(0)
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = kind(hidden_size=32, num_hidden_layers=2, eos_token_id=tokenizer.eos_token_id, **common, **own)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 3  # far from uniform
    assert rows_can_leave(model) == leave
    ends, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    plain = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=pad)
    prompts = PROMPTS if kind is not RecurrentGemmaConfig else PROMPTS[::2]  # it takes one token for one to go on with
    responses = draw(model, tokenizer, Decoding(temperature=0.0, top_p=1.0, max_new_tokens=20, batch_size=3), prompts)
    # Half precision rounds more and comes to the same answer; what draws slowly is told.
    masks = masks_padding(model, plain)
    assert masks == ("drawn with those of their own length" not in capsys.readouterr().err)
    assert masks_padding(copy.deepcopy(model).to(torch.bfloat16), plain) == masks
    model.generation_config = GenerationConfig()
    for prompt, response in zip(prompts, responses, strict=True):
        ids, mask = torch.tensor([prompt]), torch.ones((1, len(prompt)), dtype=torch.long)
        whole = model.generate(ids, attention_mask=mask, generation_config=plain)
        assert response.ids == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kept", ["convolutions", "keys and values"])
def test_choices_share_a_context_where_rows_can_leave(tokenizer, kept):
    leave, kind, own = CACHES[kept]
    model = AutoModelForCausalLM.from_config(
        kind(hidden_size=32, num_hidden_layers=2, vocab_size=len(tokenizer), **own)
    )
    lm = SegmentedLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    requests = [(("a", "b"), [5, 6, 7], [8, 9]), (("a", "c"), [5, 6, 7], [10])]
    assert bool(lm._sharing(requests, 4)) == leave
    torch.manual_seed(0)
    for (_, context, continuation), (logp, _) in zip(requests, lm._loglikelihood_tokens(requests, True), strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(dim=-1)
        wanted = sum(float(logps[len(context) - 1 + i, token]) for i, token in enumerate(continuation))
        assert logp == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_as_it_was(training, tiny_model, tokenizer):
    own = tiny_model.generation_config
    draw(tiny_model.train(training), tokenizer)
    assert tiny_model.training is training and tiny_model.generation_config is own

"""lm-eval's log-likelihoods with shared contexts, beside its own."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from tspin.evaluation import backend as harness

SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
MODELS = {
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, **GROUPED)),
    "mistral, a sliding window": lambda n: MistralForCausalLM(MistralConfig(vocab_size=n, sliding_window=8, **GROUPED)),
    "gpt2, learned positions": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=n, n_embd=48, n_layer=2, n_head=6, n_positions=64, initializer_range=0.3)
    ),
}


def requests_of(chance: random.Random) -> list[harness.Request]:
    """Twelve contexts, one of twenty continuations, the others of up to five, in no order; one fills the model's."""
    found = []
    for number in range(12):
        context = chance.choices(range(5, 200), k=62 if number == 0 else chance.randint(1, 30))
        for choice in range(20 if number == 1 else number % 5 + 1):
            continuation = chance.choices(range(5, 200), k=chance.randint(1, 6))
            found.append(((f"context {number}", f"choice {choice}"), context, continuation))
    chance.shuffle(found)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_log_likelihoods_are_those_of_lm_eval(name, batch_size, tokenizer):
    torch.manual_seed(0)
    model = MODELS[name](len(tokenizer)).eval()
    requests = requests_of(random.Random(0))
    settings = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch_size, "max_length": 64}
    expected = HFLM(**settings)._loglikelihood_tokens(requests, disable_tqdm=True)
    found = harness.SegmentedLM(**settings)._loglikelihood_tokens(requests, disable_tqdm=True)
    torch.testing.assert_close([f for f, _ in found], [e for e, _ in expected], atol=1e-4, rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_context_is_computed_once(monkeypatch, tokenizer):
    """And the greedy continuation is known as such."""
    torch.manual_seed(0)
    model = MODELS["llama"](len(tokenizer)).eval()
    context = [7, 8, 9]
    with torch.no_grad():
        greedy = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    rows = []
    inner = model.forward

    def counted(*args, **kwargs):
        rows.append(len(args[0]))
        return inner(*args, **kwargs)

    counted.__signature__ = harness.inspect.signature(inner)
    monkeypatch.setattr(model, "forward", counted)
    lm = harness.SegmentedLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    texts = ("", "")
    found = lm._loglikelihood_tokens([(texts, context, greedy), (texts, context, [5, 6])], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False]
    assert rows == [1, 2]

"""Canaries: numbers of a run that are known beforehand, and what is said where they are off."""

import math
import re

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from tspin import SelfPlayConfig, SelfPlayTrainer, canaries
from tspin.canaries import Canary
from tspin.config import Decoding
from tspin.data.responses import Response, read_responses
from tspin.data.sources import source_of
from tspin.engines import here
from tspin.objectives import METHODS
from tspin.runs.files import read_json
from tspin.sampling import sample
from tspin.schema import SYNTHETIC


def run(folder, model, tokenizer, rows, method, **given):
    settings = {"batch_size": 4, "iterations": 2, "max_new_tokens": 12, "learning_rate": 1e-3, "bf16": False}
    args = SelfPlayConfig(output_dir=str(folder), method=method, **{**settings, **given})
    trainer = SelfPlayTrainer(model, args, rows, tokenizer)
    return trainer, [read_json(result.model_path.parent / "guards.json") for result in trainer.iterate()]


@pytest.mark.parametrize("method", ["sft", "spin", "tspin", "tspin_reference", "dpo", "simpo"])
def test_every_runs_canaries_are_sound(method, tmp_path, tiny_model, tokenizer, rows):
    _, guards = run(tmp_path / "run", tiny_model, tokenizer, rows, method)
    for iteration, guard in enumerate(guards):
        found = guard["canaries"]
        assert all(canary["sound"] for name, canary in found.items() if name != "ended")
        assert not guard["warnings"].keys() & found.keys()
        assert found["first loss"]["value"] == pytest.approx(found["first loss"]["expected"], abs=1e-4)
        of_reference = method in ("spin", "tspin_reference") or (method == "dpo" and iteration == 0)
        assert ("first reward" in found) == of_reference
        if method == "spin" or (method == "dpo" and iteration == 0):
            assert found["first loss"]["value"] == pytest.approx(math.log(2), abs=1e-6)
            assert found["first reward"]["value"] == pytest.approx(0.0, abs=1e-5)
        if METHODS[method].self_play:
            assert found["sampler"]["value"] < 1e-5
        assert 0.5 < found["changed"]["value"] <= 1.0


def test_a_run_of_several_steps_a_log_row_knows_its_first_step(tmp_path, tiny_model, tokenizer, rows):
    _, guards = run(tmp_path / "run", tiny_model, tokenizer, rows, "spin", logging_steps=2, iterations=1)
    assert guards[0]["canaries"]["first loss"]["value"] == pytest.approx(math.log(2), abs=1e-6)


def test_history_leaves_spins_first_loss_where_it_is(tmp_path, tiny_model, tokenizer, rows):
    trainer, guards = run(tmp_path / "spin", tiny_model, tokenizer, rows, "spin", history=1, batch_size=8)
    assert guards[1]["canaries"]["first loss"]["value"] == pytest.approx(math.log(2), abs=1e-6)
    counts = [len(pd.read_parquet(tmp_path / "spin" / f"iteration-{t}" / "reference.parquet")) for t in (0, 1)]
    assert counts == [len(rows), 2 * len(rows)]
    _, guards = run(tmp_path / "tspin", tiny_model, tokenizer, rows, "tspin", history=1)
    assert "first loss" in guards[0]["canaries"] and "first loss" not in guards[1]["canaries"]


def test_weights_too_coarse_for_the_rate_are_told(tmp_path, tiny_model, tokenizer, rows):
    args = SelfPlayConfig(str(tmp_path / "run"), method="sft", learning_rate=5e-7, bf16=False)
    trainer = SelfPlayTrainer(tiny_model, args, rows, tokenizer, model_arguments={"dtype": torch.bfloat16})
    guards = [read_json(result.model_path.parent / "guards.json") for result in trainer.iterate()]
    assert guards[0]["canaries"]["changed"]["value"] < 0.5
    assert "the rate is too small for their data type" in guards[0]["warnings"]["changed"]


def test_weights_that_no_text_reaches_are_not_expected_to_change(tmp_path, tokenizer, rows):
    """Of a model that reads images too, whose weights for these are most."""
    sizes = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_key_value_heads": 1, "head_dim": 8, **sizes}
    images = {**sizes, "hidden_size": 64, "num_hidden_layers": 8, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    reading = {name for name, _ in model.named_parameters() if re.search("vision|multi_modal", name)}
    before = here.sampled_weights(model)
    assert sum(len(before[name]) for name in reading) > 0.5 * sum(map(len, before.values()))
    args = SelfPlayConfig(str(tmp_path / "run"), method="sft", learning_rate=1e-3, bf16=False)
    (result,) = SelfPlayTrainer(model, args, rows, tokenizer).train()
    assert result.training["changed_share"] > 0.5 and "changed" not in result.warnings


@pytest.mark.parametrize("decoding", [Decoding(1.0, 1.0, 40, 8), Decoding(0.7, 0.9, 20, 3), Decoding(0.0, 1.0, 9, 8)])
def test_the_sampler_knows_the_policys_own_log_probabilities(decoding, tiny_model, tokenizer):
    with torch.no_grad():  # some responses end early, so that rows leave
        tiny_model.lm_head.weight[tokenizer.eos_token_id] += 0.3
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
    drawn = list(sample(tiny_model, tokenizer, prompts, decoding, seed=3))
    for prompt, response in zip(prompts, drawn, strict=True):
        with torch.no_grad():
            logps = tiny_model(torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = logps.gather(1, torch.tensor(response.ids)[:, None]).sum().item()
        assert response.logp == pytest.approx(own, abs=1e-5 * len(response.ids))


def test_what_is_past_its_bound_is_told(tmp_path, tiny_model, tokenizer, rows):
    trainer, _ = run(tmp_path / "run", tiny_model, tokenizer, rows, "spin", iterations=1)
    table = pd.read_parquet(tmp_path / "run" / "iteration-0" / "diagnostics.parquet")
    first = {"loss": 0.75, "prompt_ids": [0, 1], "reward/labelled": 0.2, "reward/synthetic": 0.0}
    spin, coefficients = METHODS["spin"], {"lam": 0.1, "loss_type": "logistic"}
    found = canaries.first_step(spin, coefficients, first, table, "float32", True)
    drawn = read_responses(trainer.response_path(SYNTHETIC))
    off = [(number, Response(r.ids, r.text, r.finished, r.logp - len(r.ids))) for number, r in drawn.items()]
    found |= canaries.sampler(off, table, "bfloat16")
    found |= {"changed": Canary(0.03, least=0.5), "ended": Canary(0.9, least=0.5)}
    assert canaries.told(found) == {
        "first loss": "the first step's loss is 0.75, the stored log-probabilities give 0.6931",
        "first reward": "rewards are 0.2 at the first step, where policy and reference are the same",
        "sampler": "log π(y′) by the sampler and by the trainer differ by 1 nats per token",
        "changed": "training changed 3.0% of the weights: the rate is too small for their data type; raise "
        "learning_rate, or train float32 weights (model.dtype=float32; bf16=true multiplies them in bfloat16)",
    }
    [still] = canaries.told({"changed": Canary(0.0, least=0.5)}).values()
    assert still.startswith("training changed no weight at all, and the checkpoint is what it started from: raise")
    assert not Canary(math.nan, 0.0, 1.0).sound and not Canary(math.nan, least=0.5).sound


def test_responses_that_came_with_the_data_are_the_first_ys(tmp_path, tiny_model, tokenizer, rows, monkeypatch):
    brought = [{**row, "generated": f"I say {n}."} for n, row in enumerate(rows)]
    trainer, guards = run(
        tmp_path / "run", tiny_model, tokenizer, source_of(brought, generated=True),
        "spin",
    )  # fmt: skip
    first, second = (read_responses(trainer.response_path(SYNTHETIC, t)) for t in (0, 1))
    assert [response.text for response in first.values()] == [row["generated"] for row in brought]
    assert all(response.finished for response in first.values())
    assert [response.text for response in second.values()] != [row["generated"] for row in brought]
    assert "sampler" not in guards[0]["canaries"] and guards[1]["canaries"]["sampler"]["sound"]

"""No log-probability of a run is computed twice: what is scored, where the rest comes from, and that it is right."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_selfplay import LORA, assert_same_run, play
from transformers import LlamaConfig, LlamaForCausalLM

from tspin import SelfPlayConfig
from tspin.config import Decoding
from tspin.data.mapped import spread
from tspin.data.responses import read_responses
from tspin.engines.engine import WATCHED, Engine
from tspin.logprobs import pad_rows, sequence_logps
from tspin.models import Policy
from tspin.runs.files import read_json
from tspin.runs.stages import remove_stage
from tspin.sampling import sample
from tspin.triplets import make_triplets

ALL, COUNT = "labelled synthetic proto", 12
TIMES = {"iterations": 3}


@pytest.fixture
def scored(monkeypatch):
    """What is scored from here on: (policy, roles, how many prompts), in order."""
    passes, plain = [], Engine._score

    def noted(self, policy, triplets, of, keep):
        passes.append((of.removeprefix("the "), " ".join(triplets.roles), len(triplets)))
        return plain(self, policy, triplets, of, keep)

    monkeypatch.setattr(Engine, "_score", noted)
    return passes


def table(run, iteration, name="diagnostics"):
    return pd.read_parquet(run / f"iteration-{iteration}" / f"{name}.parquet")


def of_role(frame, role, column):
    rows = frame[frame["role"] == role].set_index("prompt_id")
    return rows[column].sort_index()


AFTER, CANARY = ("trained policy", ALL, COUNT), ("policy before", "synthetic", COUNT)  # the canary's sample: all 12
REFERENCE = ("reference", "labelled", COUNT)


@pytest.mark.parametrize(
    ("method", "settings", "first", "later"),
    [
        ("sft", {}, [("policy before", "labelled", COUNT), ("trained policy", "labelled", COUNT)], None),
        ("tspin", {}, [("policy before", "labelled", COUNT), AFTER, CANARY], [AFTER, CANARY]),
        ("spin", {}, [REFERENCE, AFTER, CANARY], [AFTER, CANARY]),
        ("spin", {"lora": LORA}, [REFERENCE, AFTER, CANARY], [AFTER, CANARY]),
        ("spin", {"history": 1}, [REFERENCE, AFTER, CANARY], [AFTER, CANARY]),  # y′ of t − 1 is known under π_θt
        ("spin", {"bf16": True}, [("reference", "labelled synthetic", COUNT), ("policy before", "proto", COUNT), AFTER],
         [("reference", "synthetic", COUNT), AFTER]),
        ("dpo", {"history": 2}, [REFERENCE, AFTER, CANARY], [("reference", "synthetic", COUNT), AFTER, CANARY]),
        ("spin", {"diagnostics": False}, [REFERENCE], [REFERENCE]),
        ("tspin", {"diagnostics": False}, [], []),
        # The sampler's arithmetic is another one.
        ("tspin", {"sampling_dtype": "bfloat16"}, [("policy before", ALL, COUNT), AFTER],
         [("policy before", "synthetic", COUNT), AFTER]),
        ("tspin", {"bf16": True}, [("policy before", ALL, COUNT), AFTER],
         [("policy before", "synthetic", COUNT), AFTER]),
    ],
)  # fmt: skip
def test_what_is_scored(tmp_path, model_folder, rows, scored, method, settings, first, later):
    _, results = play(tmp_path / "run", model_folder, rows, method=method, **TIMES, **settings)
    assert scored == [*first, *(later or []) * (len(results) - 1)]
    for result in results:
        found = read_json(result.model_path.parent / "guards.json")["canaries"]
        assert all(canary["sound"] for name, canary in found.items() if name not in ("ended", "changed"))
        if settings.get("diagnostics", True) and method != "sft":
            apart = method == "dpo" and result.iteration > 0  # the first step has earlier y′ too, and a reference
            assert "sampler" in found and ("first loss" in found) != apart


@pytest.mark.parametrize("method", ["tspin", "spin"])
def test_the_numbers_are_those_that_were_computed(tmp_path, model_folder, rows, method):
    """To the bit, float32 columns or not, but for y′ before the training: the sampler's."""
    run = tmp_path / "run"
    trainer, _ = play(run, model_folder, rows, method=method, **TIMES)
    for t in (1, 2):
        earlier, now = table(run, t - 1), table(run, t)
        for role in ("labelled", "proto"):
            assert of_role(earlier, role, "after").equals(of_role(now, role, "before").rename("after"))
        if method == "spin":
            reference = table(run, t, "reference").set_index("prompt_id").sort_index()
            after = of_role(earlier, "labelled", "after")
            np.testing.assert_array_equal(reference["labelled"], after.astype(float))
            np.testing.assert_array_equal(of_role(now, "synthetic", "before"), reference["synthetic"].astype("float32"))
    for t in (0, 1, 2):
        drawn = read_responses(trainer.response_path("synthetic", t))
        logps = [response.logp for response in drawn.of(range(COUNT))]
        before = of_role(table(run, t), "synthetic", "before")
        np.testing.assert_array_equal(before, np.float32(logps))


def test_the_reference_of_earlier_responses_is_that_of_each(tmp_path, model_folder, rows, monkeypatch):
    """Iteration 2 trains on the y′ of all three, and iteration 1 knew the reference of two."""
    trained, plain = [], Engine.train

    def noted(self, policy, training, *rest):
        trained.append(training.triplets)
        return plain(self, policy, training, *rest)

    monkeypatch.setattr(Engine, "train", noted)
    settings = {**TIMES, "method": "dpo", "history": 2, "diagnostics": False}
    trainer, _ = play(tmp_path / "run", model_folder, rows, **settings)
    assert [len(triplets) for triplets in trained] == [COUNT, 2 * COUNT, 3 * COUNT]
    for triplets in trained:
        wanted = trainer.run.engine.score(Policy(str(model_folder), ""), triplets.of(["synthetic"]), "each")
        np.testing.assert_allclose(triplets.dataset["synthetic/reference"], wanted["synthetic"], rtol=1e-4)


@pytest.mark.parametrize("method", ["tspin", "spin", "dpo"])
def test_a_stage_that_is_gone_is_made_again_as_it_was(tmp_path, model_folder, rows, scored, method):
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = {"method": method, "history": 1}
    play(whole, model_folder, rows, **settings)
    play(run, model_folder, rows, **settings)
    weights = [run / f"iteration-{t}" / "model" / "model.safetensors" for t in (0, 1)]
    for gone in (
        "0/diagnostics.parquet",
        "1/diagnostics.parquet 0/guards.json",
        "0/diagnostics.parquet 1/diagnostics.parquet 1/guards.json",
        "0/diagnostics.parquet 1/reference.parquet",
    ):
        written = [path.stat().st_mtime_ns for path in weights]
        for name in gone.split():
            remove_stage(run / f"iteration-{name}")
        play(run, model_folder, rows, **settings)
        assert_same_run(whole, run, iterations=2)
        assert [path.stat().st_mtime_ns for path in weights] == written
    remove_stage(run / "iteration-1" / "model")
    play(run, model_folder, rows, **settings)
    assert_same_run(whole, run, iterations=2)


def test_finished_iterations_stay_where_diagnostics_are_turned_off(tmp_path, model_folder, rows, scored):
    """What an earlier iteration's table knows of the reference decides no number."""
    run = tmp_path / "run"
    play(run, model_folder, rows, method="spin")
    files = [run / "iteration-1" / "reference.parquet", run / "iteration-1" / "model" / "model.safetensors"]
    written, before = [path.stat().st_mtime_ns for path in files], len(scored)
    play(run, model_folder, rows, method="spin", diagnostics=False)
    assert [path.stat().st_mtime_ns for path in files] == written and len(scored) == before


def test_diagnostics_of_some_prompts(tmp_path, model_folder, rows, scored, capsys):
    """The same ones in every iteration. Training and the canary of its first step's loss go on as with all of them."""
    few = {"diagnostics_prompts": 4, "batch_size": 5}
    for method in ("tspin", "spin", "dpo"):
        run, whole = tmp_path / method, tmp_path / f"{method}-all"
        scored.clear()
        _, results = play(run, model_folder, rows, method=method, **few)
        passes = list(scored)
        play(whole, model_folder, rows, method=method, batch_size=5)
        for t in range(len(results)):
            assert sorted(table(run, t)["prompt_id"].unique()) == [0, 3, 6, 9]
            found, same = (read_json(folder / f"iteration-{t}" / "guards.json")["canaries"] for folder in (run, whole))
            assert found["first loss"]["value"] == pytest.approx(same["first loss"]["value"], rel=1e-4)
            assert found["first loss"]["expected"] == pytest.approx(same["first loss"]["expected"], rel=1e-4)
            assert all(canary["sound"] for name, canary in found.items() if name != "ended") and "sampler" in found
            assert found.keys() == same.keys()
        assert ("trained policy", ALL, 4) in passes and ("trained policy", ALL, COUNT) not in passes
        if method == "spin":  # only all of them spare the reference anything
            assert [p for p in passes if p[0] == "reference"] == [REFERENCE] * 2
    assert "note: diagnostics: of 4 of 12 prompts, evenly spread (diagnostics_prompts)" in capsys.readouterr().err
    assert {"diagnostics_prompts"} & SelfPlayConfig().computed().keys() == set()


def test_what_is_spread_is_even_and_what_is_watched_is_diagnosed(tmp_path, tokenizer):
    assert spread(range(10), 20) == list(range(10)) and spread(range(10_000), 5000) == list(range(0, 10_000, 2))
    places = spread(range(9_999), 5_000)
    assert len(places) == 5_000 and places[-1] > 9_990 and set(np.diff(places)) == {1, 2}
    engine = Engine(SelfPlayConfig(str(tmp_path)), tokenizer, {})
    for count in (3, 64, 5000, 50_000, 123_457):
        watched = engine.watched(count)
        assert len(watched) == min(count, WATCHED) and set(watched) <= set(engine.diagnosed(count))


def test_only_what_is_unknown_is_scored(tmp_path, model_folder, rows, scored):
    trainer, (result, _) = play(tmp_path / "run", model_folder, rows, method="tspin")
    synthetic, proto = (read_responses(trainer.response_path(role)) for role in ("synthetic", "proto"))
    engine = trainer.run.engine
    triplets = make_triplets(trainer.examples, {"synthetic": synthetic, "proto": proto})
    whole = engine.score(result.policy, triplets, "all")
    known = {"labelled": np.array(whole["labelled"]), "proto": np.array(whole["proto"]) + 1}
    known["proto"][[2, 7]] = np.nan
    scored.clear()
    found = engine.score(result.policy, triplets.of(["labelled", "proto"]), "the rest", known=known)
    assert scored == [("rest", "proto", 2)]
    assert found["labelled"] == whole["labelled"]
    wanted = np.array(whole["proto"]) + 1
    wanted[[2, 7]] -= 1
    np.testing.assert_allclose(found["proto"], wanted, rtol=1e-6)


@pytest.mark.parametrize("decoding", [Decoding(1.0, 1.0, 40, 8), Decoding(0.7, 0.9, 20, 3), Decoding(0.0, 1.0, 9, 8)])
def test_the_samplers_arithmetic_is_the_trainers(tokenizer, decoding):
    """Left padding, attention by groups, rows that leave, responses that are cut: to 1e-5 nats a token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "initializer_range": 0.3}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=6, num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] += 0.3
    prompts = [[5 + n] * (1 + 3 * n % 11) for n in range(20)]
    drawn = list(sample(model, tokenizer, prompts, decoding, seed=3))
    assert len({len(response.ids) for response in drawn}) > 1
    with torch.no_grad():
        rows = pad_rows(prompts, [response.ids for response in drawn], tokenizer.pad_token_id)
        logps = sequence_logps(model, **rows)
    for response, logp in zip(drawn, logps.tolist(), strict=True):
        assert response.logp == pytest.approx(logp, abs=1e-5 * len(response.ids))

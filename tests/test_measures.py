"""What an iteration looked like: measures of pairs by hand, held-out labels, the gradients' signal."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import log_softmax

from tspin import SelfPlayConfig
from tspin.config import load_config
from tspin.data.encoding import encode_dataset
from tspin.data.sources import load_rows
from tspin.errors import UserError
from tspin.evaluation.suites import load_suite
from tspin.experiment.held_out import held_out_examples, held_out_scores
from tspin.experiment.measures import measures_of_iteration, of_pairs
from tspin.experiment.preset import Evaluator, Where, run_experiment
from tspin.models import Policy, load_model, load_tokenizer
from tspin.schema import HELD_OUT
from tspin.trainer import GradientSignal


def rows(tokens, before, after, reward_before, reward_after) -> pd.DataFrame:
    table = {"tokens": tokens, "before": before, "after": after}
    table |= {"reward_before": reward_before, "reward_after": reward_after}
    return pd.DataFrame(table, index=pd.Index(range(len(tokens)), name="prompt_id"))


def test_measures_of_pairs_by_hand():
    """Four prompts: aligned; misaligned, of like length; aligned, y longer; misaligned by sums and by means."""
    labelled = rows([5, 5, 10, 2], [-9] * 4, [-4, -6, -9, -6], [0, 0, 0, 0], [1, 1, 1, 1])
    synthetic = rows([5, 6, 2, 4], [-2, -3, -1, -4], [-5, -5, -10, -4], [0, 0, np.log(3), 700], [0, 0, 0, 0])
    found = of_pairs(labelled, synthetic)
    assert found["nats"] == 2.5 and found["nats_per_token"] == pytest.approx(10 / 17)
    assert found["misaligned"] == 0.5 and found["matched_share"] == 0.5 and found["misaligned_matched"] == 0.5
    assert found["misaligned_per_token"] == 0.5  # −6/5 < −5/6 and −6/2 < −4/4
    weights = np.array([0.5, 0.5, 0.75, 1.0])  # σ(−u), u = 0, 0, −log 3, −500
    assert found["weight"] == pytest.approx(weights.mean())
    assert found["weight_ess"] == pytest.approx(weights.sum() ** 2 / (4 * (weights**2).sum()))


def test_measures_that_cannot_be_had_are_none():
    found = measures_of_iteration(pd.DataFrame(), {}, pd.DataFrame(columns=["metric", "value"]))
    assert set(found.values()) == {None}
    long, short = (rows([n], [-1], [-1], [np.nan], [np.nan]) for n in (9, 1))
    assert "misaligned" not in of_pairs(long, short)  # a method without a reward
    assert of_pairs(long.fillna(0), short.fillna(0))["misaligned_matched"] is None  # no pair of like length


def test_held_out_labels_are_scored_as_a_plain_forward_pass_scores_them(tmp_path, model_folder):
    model, tokenizer = load_model(str(model_folder)), load_tokenizer(str(model_folder))
    args = SelfPlayConfig(output_dir=str(tmp_path), method="sft", bf16=False, report_to=[])
    examples = held_out_examples("pocket-validation", tokenizer, args, limit=3)
    table = held_out_scores(model, tokenizer, examples, args).set_index("metric")
    assert (table["benchmark"] == HELD_OUT).all() and (table["n"] == 3).all() and table["stderr"].notna().all()
    nats, tokens = [], 0
    for example in encode_dataset(load_rows("pocket-validation", labels=3), tokenizer, args):
        prompt, answer = list(example.prompt_ids), list(example.labelled.ids)
        logps = log_softmax(model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float(), -1)
        nats.append(-logps[range(len(answer)), answer].sum().item())
        tokens += len(answer)
    assert table["value"]["nll,none"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert table["value"]["nll_per_token,none"] == pytest.approx(sum(nats) / tokens, rel=1e-4)


@pytest.mark.parametrize(
    "settings", ["sft_weight=0.5", "scoring=sharded", "hosts=[one, two]", "evaluation.limit=100000", "batch_size=3"]
)
def test_held_out_labels_need_no_training_setting(tmp_path, settings):
    """Of a trial's limit there may be fewer; how a run trains is nothing to them. All are read before any training."""
    config = load_config("pocket", ["evaluation.held_out=pocket-validation", "methods={tspin: {}}", settings])
    evaluator = Evaluator(config, load_suite("pocket"), tmp_path)
    assert evaluator.held_out is not None and len(evaluator.held_out) == 1000


def test_held_out_rows_that_are_no_labels_end_a_run_before_it_trains(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 + 2", "completion": "4"}\n{"prompt": "3", "completion": ""}\n')
    config = load_config("pocket", [f"evaluation.held_out={tmp_path / 'rows.jsonl'}"])
    with pytest.raises(UserError, match="rows.jsonl, row 2: empty response"):
        run_experiment("pocket", config, ["tspin"], [0], Where(tmp_path / "runs", tmp_path / "results"))
    assert not (tmp_path / "runs").exists()


def test_the_base_of_adapters_on_4_bits_is_evaluated_in_4_bits(monkeypatch, tmp_path):
    config = load_config("pocket", ["lora={rank: 4, quantize: nf4}"])
    evaluator = Evaluator(config, load_suite("pocket"))
    asked = []

    def load(policy, loading, whole):
        asked.append(loading.get("quantize"))
        raise UserError("not here")

    monkeypatch.setattr("tspin.experiment.preset.load_policy", load)
    other = Policy(evaluator.policy.folder, "of an iteration")
    for policy in (evaluator.policy, other):
        with pytest.raises(UserError, match="not here"):
            evaluator._write(policy, tmp_path / "scores")
    assert asked == ["nf4", None]


def with_gradients(*gradients: torch.Tensor) -> list[torch.nn.Parameter]:
    weights = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    return [*weights, torch.nn.Parameter(torch.zeros(1))]  # a frozen one has no gradient


def test_signal_of_gradients_against_its_definition():
    steps = torch.randn(400, 50, generator=torch.Generator().manual_seed(0)) + 0.3
    signal = GradientSignal()
    assert signal.ratio() is None
    for gradient in steps:
        signal.add(with_gradients(gradient[:20], gradient[20:]))
    assert signal.ratio() == pytest.approx(0.3, rel=0.05)  # ‖E g‖² = 50 · 0.09 over E‖g − E g‖² = 50
    two = GradientSignal()
    for gradient in ((1.0, 0.0), (1.0, 1.0)):  # (5 − 3) / 2 = 1 of signal², 3 / 2 − 1 of noise²
        two.add(with_gradients(torch.tensor(gradient)))
    assert two.ratio() == pytest.approx(2**0.5)
    cancelling = GradientSignal()
    for sign in (1.0, -1.0):
        cancelling.add(with_gradients(sign * torch.ones(2)))
    assert cancelling.ratio() == 0.0

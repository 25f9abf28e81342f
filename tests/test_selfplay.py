"""Algorithm 1 on a real, tiny run: what it leaves and what it repeats."""

import copy
import gc
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)

from tspin import SelfPlayConfig, SelfPlayTrainer, triplets
from tspin import trainer as trainer_module
from tspin.data.responses import read_responses
from tspin.data.sources import source_of
from tspin.devices import give_back
from tspin.errors import UserError
from tspin.models import load_model
from tspin.objectives import METHODS
from tspin.runs.files import read_json
from tspin.schema import RESPONSE_NAMES
from tspin_analysis.runs import load_run

SETTINGS = {
    "iterations": 2,
    "learning_rate": 1e-3,
    "max_new_tokens": 6,
    "batch_size": 8,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}
LORA = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "down_proj"]}
TIMES = ["tokens_per_second"]


def play(folder, model, rows, tokenizer=None, **settings):
    args = SelfPlayConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    trainer = SelfPlayTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    return trainer, trainer.train()


def steps_of(folder: Path, iteration: int) -> pd.DataFrame:
    return pd.read_parquet(folder / f"iteration-{iteration}" / "steps.parquet").drop(columns=TIMES)


def assert_same_run(a: Path, b: Path, iterations: int) -> None:
    """Responses, step metrics and weights, bit by bit."""
    files = [path.relative_to(a) for path in sorted(a.rglob("*.parquet"))]
    assert files == [path.relative_to(b) for path in sorted(b.rglob("*.parquet"))]
    for file in files:
        left, right = (pd.read_parquet(run / file).drop(columns=TIMES, errors="ignore") for run in (a, b))
        pd.testing.assert_frame_equal(left, right, check_exact=True)
    for iteration in range(iterations):
        left, right = (load_file(run / f"iteration-{iteration}" / "model" / "model.safetensors") for run in (a, b))
        assert all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("loss", ["logistic", "exponential"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_logs(tmp_path, model_folder, rows, method, loss):
    run = tmp_path / "run"
    given = {"loss_type": loss, "beta": 0.5}
    given |= {"alpha": 0.1} if loss == "exponential" else {}  # e^advantage of this random model overflows at 1
    own = {name: value for name, value in given.items() if name in METHODS[method].resolve({})}
    _, results = play(run, model_folder, rows, method=method, monitor_proto=True, **own)
    self_play = METHODS[method].self_play
    assert len(results) == (2 if self_play else 1)
    for result in results:
        AutoTokenizer.from_pretrained(result.model_path)
        AutoModelForCausalLM.from_pretrained(result.model_path)
        assert not list(result.model_path.glob("*.bin"))
    assert list((run / "tensorboard").glob("events*"))
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, results[0].model_path))
    assert any(not np.array_equal(before[name], after[name]) for name in before)

    steps = steps_of(run, len(results) - 1)
    assert len(steps) == 2  # 12 rows, 8 a step
    wanted = {"loss", "grad_norm", "learning_rate", "log_likelihood/labelled"}
    if self_play:
        roles = ("labelled", "synthetic", "proto")
        wanted |= {f"{what}/{role}" for what in ("log_likelihood", "reward") for role in roles}
        wanted |= {"advantage/current", "advantage/historical"}
        facts = results[-1].synthetic
        assert 0 <= facts["end_token_share"] <= 1 and 0 <= facts["duplicate_share"] <= 1 and facts["mean_tokens"] <= 6
    assert wanted <= set(steps) and np.isfinite(steps[sorted(wanted)]).all().all()
    assert "tokens_per_second" in pd.read_parquet(run / "iteration-0" / "steps.parquet")
    assert (run / "iteration-0" / "reference.parquet").exists() == METHODS[method].uses_reference


@pytest.mark.parametrize("method", ["tspin", "spin", "sft"])
def test_adapters_are_merged_into_each_checkpoint(tmp_path, model_folder, rows, method):
    """A checkpoint has the base model's tensors and no others; only those that adapters reach differ, by a low rank."""
    lora = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "down_proj"]}
    _, results = play(tmp_path / "run", model_folder, rows, method=method, lora=lora, learning_rate=1e-2)
    before = load_file(model_folder / "model.safetensors")
    for after in (load_file(result.model_path / "model.safetensors") for result in results):
        assert set(before) == set(after)
        for name in before:
            change = after[name].astype(float) - before[name].astype(float)
            if "q_proj" in name or "down_proj" in name:
                values = np.linalg.svd(change, compute_uv=False)
                assert values[0] > 1e-4 and values[2] < 1e-3 * values[0]
            else:
                assert not change.any()


def test_adapters_for_modules_that_are_not_there(tmp_path, model_folder, rows):
    lora = {"rank": 2, "alpha": 4.0, "target_modules": ["no_such_layer"]}
    with pytest.raises(UserError, match="target_modules"):
        play(tmp_path / "run", model_folder, rows, lora=lora)


def test_the_first_step_is_what_the_objective_says(tmp_path, model_folder, rows):
    """π_θ = π_θt before the first update, so SPIN's rewards are 0 and its loss is log 2."""
    settings = {"batch_size": 12, "learning_rate": 1e-9, "iterations": 1}
    play(tmp_path / "spin", model_folder, rows, method="spin", **settings)
    first = steps_of(tmp_path / "spin", 0).iloc[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(first["reward/labelled"]) < 1e-5 and abs(first["advantage/current"]) < 1e-5


def test_an_sft_term_is_in_the_training_and_in_its_canaries(tmp_path, model_folder, rows):
    """Half of −log π(y) per token beside SPIN's log 2, at the first step of an iteration."""
    settings = {"method": "spin", "batch_size": 12, "iterations": 1}
    play(tmp_path / "run", model_folder, rows, sft_weight=0.5, **settings)
    table = pd.read_parquet(tmp_path / "run" / "iteration-0" / "diagnostics.parquet")
    labelled = table[table["role"] == "labelled"]
    nll = -(labelled["before"] / labelled["tokens"]).mean()
    assert steps_of(tmp_path / "run", 0).iloc[0]["loss"] == pytest.approx(np.log(2) + 0.5 * nll, abs=1e-4)
    guards = json.loads((tmp_path / "run" / "iteration-0" / "guards.json").read_text())
    assert guards["canaries"]["first loss"]["sound"]
    play(tmp_path / "without", model_folder, rows, **settings)
    again = pd.read_parquet(tmp_path / "without" / "iteration-0" / "diagnostics.parquet")
    assert labelled["after"].mean() > again[again["role"] == "labelled"]["after"].mean()


def test_a_coefficient_by_iteration(tmp_path, model_folder, rows):
    """Training, step log and diagnostics of an iteration have its own λ."""
    play(tmp_path / "listed", model_folder, rows, method="spin", lam=[0.1, 5.0])
    play(tmp_path / "one", model_folder, rows, method="spin", lam=0.1)
    for iteration, lam in enumerate([0.1, 5.0]):
        table = pd.read_parquet(tmp_path / "listed" / f"iteration-{iteration}" / "diagnostics.parquet")
        labelled = table[table["role"] != "proto"]
        wanted = lam * (labelled["after"] - labelled["reference"])
        np.testing.assert_allclose(labelled["reward_after"], wanted, rtol=1e-3, atol=1e-4)
    pd.testing.assert_frame_equal(steps_of(tmp_path / "listed", 0), steps_of(tmp_path / "one", 0))
    second = [steps_of(tmp_path / run, 1)["grad_norm"].iloc[0] for run in ("listed", "one")]
    assert second[0] == pytest.approx(50 * second[1], rel=1e-3)  # λ/2 times that of the gap, while the rewards are 0


def test_beta_counts_from_iteration_1_on(tmp_path, model_folder, rows):
    for name, settings in {
        "history": {"method": "tspin", "beta": 0.5},
        "none": {"method": "tspin_no_history"},
    }.items():
        play(tmp_path / name, model_folder, rows, **settings)
    for iteration, same in ((0, True), (1, False)):
        left, right = (steps_of(tmp_path / name, iteration)["loss"] for name in ("history", "none"))
        assert (abs(left - right).max() < 1e-5) == same


def test_proto_responses_of_another_model_act_from_the_first_iteration_on(tmp_path, model_folder, rows):
    """y0 of the pocket model, y′ of the tiny one: β is not 0 at iteration 0, and changes what is learned."""
    ends = {}
    for beta in (0.0, 1.0):
        run = tmp_path / f"{beta}"
        given = {"method": "tspin", "iterations": 1, "beta": beta, "proto_model": "pocket"}
        _, [result] = play(run, model_folder, rows, **given)
        ends[beta] = result.fingerprint
        table = pd.read_parquet(result.model_path.parent / "diagnostics.parquet")
        proto = read_responses(run / "proto.parquet")
        drawn = read_responses(run / "iteration-0-synthetic.parquet")
        assert proto != drawn and set(table["role"]) == {"labelled", "synthetic", "proto"}
    assert ends[0.0] != ends[1.0]


def test_a_proto_model_with_another_tokenizer_is_refused(tmp_path, model_folder, tokenizer, rows):
    other = tmp_path / "other"
    load_model(str(model_folder)).save_pretrained(other)
    odd = copy.deepcopy(tokenizer)
    odd.add_tokens(["<|odd|>"])
    odd.save_pretrained(other)
    with pytest.raises(UserError, match="proto_model: .* has another tokenizer"):
        play(tmp_path / "run", model_folder, rows, method="tspin", proto_model=str(other))


def test_proto_responses_are_sampled_once_and_shared(tmp_path, model_folder, rows):
    shared = str(tmp_path / "shared")
    for method in ("tspin", "spin"):
        play(tmp_path / method, model_folder, rows, method=method, shared_dir=shared, iterations=1)
    names = {path.name for path in (tmp_path / "shared").glob("*.parquet")}
    assert names == {"proto.parquet", "iteration-0-synthetic.parquet"}
    assert not (tmp_path / "tspin" / "proto.parquet").exists()
    # Two samples of one policy, not one sample twice.
    proto, synthetic = (read_responses(tmp_path / "shared" / f"{name}.parquet")
                        for name in ("proto", "iteration-0-synthetic"))  # fmt: skip
    assert proto.keys() == synthetic.keys() and proto != synthetic


def test_responses_of_another_seed_or_policy_are_not_shared(tmp_path, model_folder, tiny_model, rows, tokenizer):
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(-1)
    settings = {"shared_dir": str(tmp_path / "shared"), "iterations": 1, "diagnostics": False}
    drawn = {"proto": [], "synthetic": []}
    for number, (model, seed) in enumerate(((model_folder, 3), (model_folder, 4), (tiny_model, 4))):
        trainer, _ = play(tmp_path / f"{number}", model, rows, tokenizer, seed=seed, **settings)
        for role, found in drawn.items():
            found.append([response.ids for response in read_responses(trainer.response_path(role)).values()])
    for first, other_seed, other_policy in drawn.values():
        assert first != other_seed != other_policy


def test_a_runs_responses_stay_its_own_beside_one_that_draws_otherwise(tmp_path, model_folder, rows):
    """y0 is read at every iteration: another method's, at another temperature in that folder, has its own name."""
    runs = {}
    for method, temperature in (("tspin", 1.0), ("spin", 0.0)):
        settings = {**SETTINGS, "iterations": 2, "temperature": temperature, "method": method}
        args = SelfPlayConfig(output_dir=str(tmp_path / method), shared_dir=str(tmp_path / "shared"), **settings)
        runs[method] = SelfPlayTrainer(str(model_folder), args=args, train_dataset=rows)
    started = {method: trainer.iterate() for method, trainer in runs.items()}
    for each in (*started.values(), *started.values()):  # in turn
        next(each)
    first, second = (read_json(tmp_path / "tspin" / f"iteration-{t}" / "model.stage.json")["inputs"] for t in (0, 1))
    assert first["responses"]["proto"] == second["responses"]["proto"]
    assert not (tmp_path / "tspin" / RESPONSE_NAMES).exists()
    names = read_json(tmp_path / "spin" / RESPONSE_NAMES)
    assert runs["spin"].response_path("proto") == tmp_path / "shared" / names["proto"]
    texts = {method: set(load_run(tmp_path / method).proto["text"]) for method in runs}
    for method, trainer in runs.items():  # what is looked at is each one's own
        assert texts[method] == {response.text for response in read_responses(trainer.response_path("proto")).values()}
    assert texts["spin"] != texts["tspin"]
    again = SelfPlayTrainer(str(model_folder), args=runs["spin"].args, train_dataset=rows)
    again.train()
    assert again.response_path("proto").name == names["proto"]
    assert len([*(tmp_path / "shared").glob("proto*.parquet")]) == 2


def test_responses_of_other_data_are_not_shared(tmp_path, model_folder, rows):
    settings = {"shared_dir": str(tmp_path / "shared"), "iterations": 1, "method": "spin", "diagnostics": False}
    for words in ("I say", "You say"):
        brought = [{**row, "generated": f"{words} {n}."} for n, row in enumerate(rows)]
        trainer, _ = play(tmp_path / words, model_folder, source_of(brought, generated=True), **settings)
        drawn = read_responses(trainer.response_path("synthetic"))
        assert [response.text for response in drawn.values()] == [row["generated"] for row in brought]


def test_same_seed_same_run_other_seed_other_run(tmp_path, model_folder, rows, tiny_model, tokenizer):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        play(tmp_path / name, model_folder, rows, seed=seed)
    assert_same_run(tmp_path / "a", tmp_path / "b", iterations=2)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "a", tmp_path / "c", iterations=2)
    # A model handed over as an object is the same policy as its folder.
    play(tmp_path / "object", tiny_model, rows, tokenizer=tokenizer, seed=3)
    assert_same_run(tmp_path / "a", tmp_path / "object", iterations=2)


@pytest.mark.parametrize("method", ["sft", "spin", "tspin"])
def test_layout_and_micro_batches_change_memory_and_not_the_update(tmp_path, model_folder, rows, method):
    step = {"batch_size": 4}
    runs = {
        "whole": {**step, "micro_batch_tokens": 10_000},
        "small": {**step, "micro_batch_tokens": 100},
        "padded": {**step, "micro_batch_tokens": 300, "layout": "padded"},
    }
    for name, settings in runs.items():
        play(tmp_path / name, model_folder, rows, method=method, iterations=1, **settings)
    whole, *others = (load_file(tmp_path / name / "iteration-0" / "model" / "model.safetensors") for name in runs)
    before = load_file(model_folder / "model.safetensors")
    assert any(np.abs(whole[name] - before[name]).max() > 1e-3 for name in whole)
    for other in others:
        for name in whole:
            np.testing.assert_allclose(whole[name], other[name], atol=2e-4)
    losses = [steps_of(tmp_path / name, 0)["loss"] for name in runs]
    for loss in losses[1:]:
        np.testing.assert_allclose(loss, losses[0], rtol=1e-3)


def test_a_layout_that_the_model_cannot_take_is_refused(tmp_path, tiny_model, rows, tokenizer):
    tiny_model.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"its attention \(eager\) cannot be computed by segments"):
        args = SelfPlayConfig(output_dir=str(tmp_path / "run"), **SETTINGS, layout="shared")
        SelfPlayTrainer(
            tiny_model, args=args, train_dataset=rows, processing_class=tokenizer,
            model_arguments={"attn_implementation": "eager"},
        ).train()  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "logged"),
    [({"logging_steps": 2}, [2, 3]), ({"logging_steps": 10}, [3]), ({"logging_strategy": "no"}, [3]),
     ({"logging_strategy": "epoch"}, [3])],
)  # fmt: skip
def test_the_last_step_is_logged_whatever_the_interval(tmp_path, model_folder, rows, settings, logged):
    """So that the log is of all steps: three here, of four rows each."""
    common = {"method": "spin", "iterations": 1, "batch_size": 4}
    _, (every,) = play(tmp_path / "every", model_folder, rows, **common)
    _, (result,) = play(tmp_path / "run", model_folder, rows, **common, **settings)
    all_steps, steps = steps_of(tmp_path / "every", 0), steps_of(tmp_path / "run", 0)
    assert steps["step"].tolist() == logged and all_steps["step"].tolist() == [1, 2, 3]
    assert result.training["tokens"] == every.training["tokens"] == steps["tokens"].sum() == all_steps["tokens"].sum()
    for name in ("loss", "reward/labelled", "log_likelihood/synthetic"):  # means over the steps since the last row
        first = 0
        for row, last in enumerate(logged):
            np.testing.assert_allclose(steps[name][row], all_steps[name][first:last].mean(), rtol=1e-5, err_msg=name)
            first = last
    assert all(np.array_equal(*pair) for pair in zip(*map(weights_of, (result, every)), strict=True))


def weights_of(result):
    return load_file(result.model_path / "model.safetensors").values()


class StopEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_training_that_a_callback_ends_is_logged_to_its_end(tmp_path, model_folder, rows):
    args = SelfPlayConfig(
        output_dir=str(tmp_path / "run"), **{**SETTINGS, "iterations": 1, "batch_size": 4}, logging_steps=10
    )
    (result,) = SelfPlayTrainer(str(model_folder), args=args, train_dataset=rows, callbacks=[StopEarly()]).train()
    assert steps_of(tmp_path / "run", 0)["step"].tolist() == [2] and result.training["steps"] == 2


def test_bf16_and_gradient_checkpointing_are_switches(tmp_path, model_folder, rows):
    play(tmp_path / "plain", model_folder, rows, iterations=1, method="spin")
    plain = steps_of(tmp_path / "plain", 0)["loss"]
    for name, tolerance in (("gradient_checkpointing", 1e-5), ("bf16", 2e-2)):
        play(tmp_path / name, model_folder, rows, iterations=1, method="spin", **{name: True})
        np.testing.assert_allclose(steps_of(tmp_path / name, 0)["loss"], plain, atol=tolerance)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_less_memory_gives_the_same_run_up_to_rounding(tmp_path, model_folder, rows, monkeypatch, capsys, error):
    """In passes without gradients, forwards and backwards alike; one line a pass that ran out."""
    settings = {"method": "spin", "iterations": 1, "disable_tqdm": False}
    play(tmp_path / "whole", model_folder, rows, **settings)
    original = trainer_module.logps_of

    def limited(model, batch, roles):
        if batch["sequences"]["input_ids"].numel() > 64:
            raise error
        return original(model, batch, roles)

    for module in (trainer_module, triplets):
        monkeypatch.setattr(module, "logps_of", limited)
    play(tmp_path / "short", model_folder, rows, **settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(lines) == len(set(lines)) and sum("step 1" in line for line in lines) >= 1
    runs = (tmp_path / "whole", tmp_path / "short")
    reference = [pd.read_parquet(run / "iteration-0" / "reference.parquet") for run in runs]
    pd.testing.assert_frame_equal(*reference, atol=1e-4)
    left, right = (load_file(run / "iteration-0" / "model" / "model.safetensors") for run in runs)
    assert all(np.abs(left[name] - right[name]).max() < 1e-4 for name in left)
    monkeypatch.setattr(trainer_module, "logps_of", lambda *arguments: limited_always(error))
    with pytest.raises(UserError, match=r"out of memory with a single prompt.*\(prompts "):
        play(tmp_path / "none", model_folder, rows, method="tspin", iterations=1)


def test_a_step_that_runs_out_of_memory_half_way_starts_anew(tmp_path, model_folder, rows, monkeypatch, capsys):
    """What its first micro-batch left, gradients and logged sums, is gone by then."""
    settings = {"method": "spin", "iterations": 1, "batch_size": 4, "micro_batch_tokens": 100, "diagnostics": False}
    play(tmp_path / "whole", model_folder, rows, **settings)
    original, calls = trainer_module.logps_of, itertools.count(1)

    def second_fails(*arguments):
        return limited_always(torch.OutOfMemoryError()) if next(calls) == 2 else original(*arguments)

    monkeypatch.setattr(trainer_module, "logps_of", second_fails)
    play(tmp_path / "short", model_folder, rows, **settings)
    runs = (tmp_path / "whole", tmp_path / "short")
    assert "step 1: out of memory" in capsys.readouterr().err
    pd.testing.assert_frame_equal(*(steps_of(run, 0) for run in runs), rtol=1e-3, atol=1e-3)
    left, right = (load_file(run / "iteration-0" / "model" / "model.safetensors") for run in runs)
    assert all(np.abs(left[name] - right[name]).max() < 1e-4 for name in left)


def limited_always(error):
    raise error


def test_no_model_is_held_when_an_iteration_has_ended(tmp_path, model_folder, rows):
    """What comes next, an evaluation or a launched training, needs the memory."""
    args = SelfPlayConfig(output_dir=str(tmp_path / "run"), method="spin", **SETTINGS)
    trainer = SelfPlayTrainer(str(model_folder), args=args, train_dataset=rows)
    before = {id(found) for found in gc.get_objects() if isinstance(found, PreTrainedModel)}
    for _ in trainer.iterate():
        give_back()
        held = [found for found in gc.get_objects() if isinstance(found, PreTrainedModel) and id(found) not in before]
        assert held == []


def test_responses_that_end_otherwise_are_not_shared(tmp_path, model_folder, rows):
    """The end of a turn is no setting of decoding, and responses follow from it all the same."""
    drawn, settings = [], {"shared_dir": str(tmp_path / "shared"), "iterations": 1}
    for number, end in enumerate(({}, {}, {"turn_end": "."})):
        trainer, _ = play(tmp_path / f"run-{number}", model_folder, rows, **settings, **end)
        drawn.append(trainer.response_path("proto"))
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_no_model_or_no_data_is_refused(tmp_path, model_folder, tiny_model, tokenizer, rows):
    args = SelfPlayConfig(output_dir=str(tmp_path / "run"), **SETTINGS)
    with_adapters = copy.deepcopy(tiny_model)
    wrapped = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(target_modules=["q_proj"]))
    with_adapters.add_adapter(LoraConfig(target_modules=["q_proj"]))
    for model, data, line in (
        (wrapped, rows, "model: a folder, a hub name or a model of transformers is needed, not a PeftModel: merge its"),
        (with_adapters, rows, "model: it has adapters in it: merge them"),
        (3, rows, "model: a folder, a hub name or a model of transformers is needed, not a int"),
        (str(model_folder), None, "train_dataset: rows are needed, .* not a NoneType"),
        (str(model_folder), "some/name", "train_dataset: rows are needed, .* not a str; datasets.load_dataset reads"),
        (str(model_folder), [{**rows[0], "prompt_id": 2**40}], "row 1: prompt_id 1099511627776: a whole number from 0"),
    ):
        with pytest.raises(UserError, match=line):
            SelfPlayTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)

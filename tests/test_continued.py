"""A run that was stopped, damaged or asked for otherwise: it goes on to the same end, or says why not."""

import json
import os
import signal
from shutil import rmtree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_selfplay import LORA, SETTINGS, assert_same_run, play, steps_of
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PhimoeConfig,
    Trainer,
    TrainerCallback,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tspin import SelfPlayConfig, SelfPlayTrainer
from tspin.engines.adapters import ADAPTER
from tspin.errors import UserError
from tspin.runs.signals import Stopped
from tspin.runs.stages import run_stage
from tspin.runs.unfinished import State, Unfinished


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_stopped_in_training_continues(tmp_path, model_folder, rows):
    play(tmp_path / "whole", model_folder, rows)
    args = SelfPlayConfig(output_dir=str(tmp_path / "stopped"), **SETTINGS)
    stopped = SelfPlayTrainer(model_folder, args=args, train_dataset=rows, callbacks=[StopAt(1)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert not (tmp_path / "stopped" / "iteration-0" / "model").exists()
    play(tmp_path / "stopped", model_folder, rows)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", iterations=2)


FAMILIES = {  # dropout that is a number of a layer, of a decoder, of attention alone, a module; noise in a router
    "opt": (OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.2, "layerdrop": 0.2}),
    "llama": (LlamaConfig, {"intermediate_size": 48, "attention_dropout": 0.3}),
    "gpt2": (GPT2Config, {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}),
    "phimoe": (
        PhimoeConfig,
        {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.1,
         "input_jitter_noise": 0.1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_to_chance_in_training(tmp_path, tokenizer, rows, monkeypatch, family, checkpointing):
    """SPIN's rewards are 0 and its loss is log 2 until a step has moved the policy; the config keeps its dropout."""
    kind, own = FAMILIES[family]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        kind(
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
            **sizes,
            **own,
        )
    )
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    layer = next(type(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    modes, forward = [], layer.forward

    def counted(self, *arguments, **options):
        if torch.is_grad_enabled():
            modes.append(self.training)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(layer, "forward", counted)
    settings = {"method": "spin", "iterations": 1, "batch_size": 4, "gradient_checkpointing": checkpointing}
    _, (result,) = play(tmp_path / "run", tmp_path / "model", rows, diagnostics=False, **settings)
    steps = steps_of(tmp_path / "run", 0)
    assert steps["loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(steps["reward/labelled"][0]) < 1e-6 and abs(steps["reward/synthetic"][0]) < 1e-6
    assert steps["loss"][1] < 0.68
    # Two layers in three steps of one micro-batch, each once more where it is checkpointed.
    assert modes == [False] * (12 if checkpointing else 6)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "model", result.model_path)
    )
    assert {name: before[name] for name in own} == {name: after[name] for name in own}
    assert {name for name in before if before[name] != after.get(name)} <= {"use_cache"}


class SignalAt(TrainerCallback):
    def __init__(self, step, number):
        self.step = step
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": LORA},
        {"logging_steps": 3},
        {"optim": "adamw_torch"},
        {"logging_steps": 10},
        {"logging_strategy": "no"},
    ],
)
def test_a_signal_in_training_keeps_its_steps(tmp_path, model_folder, rows, number, settings):
    """Weights, optimizer, schedule, order of the data and half a logging interval go on where they were."""
    settings = {"num_train_epochs": 3, "method": "spin", "iterations": 1, **settings}  # 6 steps
    play(tmp_path / "whole", model_folder, rows, **settings)
    for step in (3, 6):
        args = SelfPlayConfig(output_dir=str(tmp_path / "stopped"), **{**SETTINGS, **settings})
        callbacks = [SignalAt(step, number)]
        with pytest.raises(Stopped, match=signal.Signals(number).name) as stopped:
            SelfPlayTrainer(model_folder, args=args, train_dataset=rows, callbacks=callbacks).train()
        assert stopped.value.number == number and f"step {step} of 6" in stopped.value.saved
        (state,) = (tmp_path / "stopped" / "iteration-0" / "unfinished").glob("step-*[0-9]")
        assert state.name == f"step-{step}" and not list(state.rglob("training_args.bin"))
    play(tmp_path / "stopped", model_folder, rows, **settings)
    assert not (tmp_path / "stopped" / "iteration-0" / "unfinished").exists()
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", iterations=1)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682): weights are y in training, and x, which is what it returns, after eval."""

    returned: list[torch.Tensor] = []

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum, "training": False, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["training"]
            group["steps"] += 1
            share, rate, momentum = 1 / group["steps"], group["lr"], group["momentum"]
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                y.lerp_(z, share).add_(y.grad, alpha=rate * (momentum * (1 - share) - 1))
                z.sub_(y.grad, alpha=rate)

    def train(self):
        self._turn(True, lambda momentum: 1 - momentum)

    def eval(self):
        self._turn(False, lambda momentum: 1 - 1 / momentum)
        ScheduleFree.returned = [weight.detach().clone() for group in self.param_groups for weight in group["params"]]

    @torch.no_grad()
    def _turn(self, training, share):
        for group in self.param_groups:
            for weight in group["params"] if group["training"] != training else ():
                if "z" in self.state[weight]:
                    weight.lerp_(self.state[weight]["z"], share(group["momentum"]))
            group["training"] = training


@pytest.mark.parametrize("lora", [None, LORA])
def test_what_an_optimizer_returns_is_the_checkpoint(tmp_path, model_folder, rows, monkeypatch, lora):
    """Not the weights that it takes gradients at, with which a stopped training goes on."""
    monkeypatch.setattr(
        Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model=None: (ScheduleFree, {"lr": 1.0}))
    )
    settings = {"num_train_epochs": 3, "method": "sft", "lora": lora}  # 6 steps
    _, (result,) = play(tmp_path / "whole", model_folder, rows, **settings)
    folder = result.model_path if lora is None else result.model_path.parent / ADAPTER
    written = load_file(next(folder.glob("*.safetensors"))).values()
    assert ScheduleFree.returned
    for weight in ScheduleFree.returned:
        assert any(weight.shape == other.shape and torch.equal(weight, other) for other in written)
    for step in (3, 6):
        args = SelfPlayConfig(output_dir=str(tmp_path / "stopped"), **{**SETTINGS, **settings})
        with pytest.raises(Stopped):
            SelfPlayTrainer(model_folder, args, rows, callbacks=[SignalAt(step, signal.SIGTERM)]).train()
    play(tmp_path / "stopped", model_folder, rows, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", iterations=1)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return content


def test_a_kept_state_that_is_damaged_is_not_gone_on_from(tmp_path, model_folder, rows):
    settings = {"num_train_epochs": 3, "method": "spin", "iterations": 1}
    play(tmp_path / "whole", model_folder, rows, **settings)
    args = SelfPlayConfig(output_dir=str(tmp_path / "run"), **{**SETTINGS, **settings})
    with pytest.raises(Stopped):
        callbacks = [SignalAt(3, signal.SIGTERM)]
        SelfPlayTrainer(model_folder, args=args, train_dataset=rows, callbacks=callbacks).train()
    (weights,) = (tmp_path / "run" / "iteration-0" / "unfinished").glob("step-3/*/model.safetensors")
    flip_a_byte(weights)
    play(tmp_path / "run", model_folder, rows, **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "run", iterations=1)


def test_of_two_kept_states_the_newest_whole_one_is_taken(tmp_path):
    """Both are there where a process was killed before it removed the older one."""
    kept = Unfinished(tmp_path, {"seed": 3})

    def produce(target):
        target.write_text("state")
        return {"training_seconds": 1.0}

    for step in (9, 10):
        run_stage(tmp_path / f"step-{step}", kept.inputs, produce)
    assert kept.steps() == [10, 9] and kept.newest().step == 10
    flip_a_byte(tmp_path / "step-10")
    assert kept.newest().step == 9 and Unfinished(tmp_path, {"seed": 4}).newest() == State()


def test_how_often_states_are_kept_is_no_part_of_a_run(tmp_path, model_folder, rows):
    play(tmp_path / "run", model_folder, rows, iterations=1)
    play(tmp_path / "run", model_folder, rows, iterations=1, checkpoint_steps=1)
    assert "checkpoint_steps" not in SelfPlayConfig().computed()


def test_a_damaged_checkpoint_is_made_again(tmp_path, model_folder, rows, capsys):
    """When it is about to be read, and not before: here by the next iteration."""
    play(tmp_path / "whole", model_folder, rows)
    play(tmp_path / "run", model_folder, rows, iterations=1)
    weights = tmp_path / "run" / "iteration-0" / "model" / "model.safetensors"
    content = flip_a_byte(weights)
    play(tmp_path / "run", model_folder, rows)
    assert capsys.readouterr().err.count("is damaged") == 1
    assert (tmp_path / "run" / "iteration-0" / "model.damaged" / "model.safetensors").read_bytes() == content
    rmtree(tmp_path / "run" / "iteration-0" / "model.damaged")
    assert_same_run(tmp_path / "whole", tmp_path / "run", iterations=2)


def test_another_config_or_other_data_do_not_continue_it(tmp_path, model_folder, rows):
    play(tmp_path / "run", model_folder, rows, iterations=1)
    with pytest.raises(UserError, match="settings.learning_rate is 0.001 there, 0.002 here"):
        play(tmp_path / "run", model_folder, rows, iterations=1, learning_rate=2e-3)
    with pytest.raises(UserError, match="data is"):
        play(tmp_path / "run", model_folder, rows[:-1], iterations=1)
    # More iterations of the same run go on where it ended.
    first = tmp_path / "run" / "iteration-0" / "model" / "model.safetensors"
    written = first.stat().st_mtime_ns
    assert len(play(tmp_path / "run", model_folder, rows, iterations=2)[1]) == 2
    assert first.stat().st_mtime_ns == written


def test_a_loaded_model_does_not_replace_another_ones_files(tmp_path, rows, tiny_model, tokenizer):
    play(tmp_path / "run", tiny_model, rows, tokenizer=tokenizer, iterations=1)
    before = (tmp_path / "run" / "initial" / "model.safetensors").read_bytes()
    with torch.no_grad():
        tiny_model.lm_head.weight += 1
    with pytest.raises(UserError, match="holds a run of another config"):
        play(tmp_path / "run", tiny_model, rows, tokenizer=tokenizer, iterations=1)
    assert (tmp_path / "run" / "initial" / "model.safetensors").read_bytes() == before


def test_a_damaged_copy_of_a_loaded_model_is_written_anew(tmp_path, rows, tiny_model, tokenizer):
    play(tmp_path / "run", tiny_model, rows, tokenizer=tokenizer, iterations=1)
    copy = tmp_path / "run" / "initial" / "model.safetensors"
    before = copy.read_bytes()
    assert flip_a_byte(copy) != before
    play(tmp_path / "run", tiny_model, rows, tokenizer=tokenizer, iterations=1)
    assert copy.read_bytes() == before

"""On a GPU: the layouts, processes that train together, memory that comes back and runs out, a stop, the engine."""

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from typer.testing import CliRunner

from tspin import SelfPlayConfig, SelfPlayTrainer, cli
from tspin.config import REPOSITORY, Decoding, EngineSettings
from tspin.data.turns import stops, turn_end
from tspin.devices import give_back
from tspin.engines.vllm import Served, generate_tokens
from tspin.layouts import choose_layout
from tspin.logprobs import flat_logps, flat_run, pad_rows, sequence_logps
from tspin.models import POCKET_MODEL, load_model, load_tokenizer
from tspin.planning.architectures import shape_of
from tspin.planning.peaks import MicroBatch, Optimizer, Precision, training_parts
from tspin.runs.files import folder_fingerprint
from tspin.runs.signals import Stopped

SETTINGS = {
    "iterations": 1,
    "method": "tspin",
    "learning_rate": 2e-5,
    "num_train_epochs": 4.0,
    "max_new_tokens": 6,
    "batch_size": 5,
    "micro_batch_tokens": 64,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 3,
}
# Nats of a log-probability of some tokens by two ways, float32 matrix products in full precision.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


def play(folder: Path, model: Path, rows, callbacks=(), **settings) -> dict:
    args = SelfPlayConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    trainer = SelfPlayTrainer(str(model), args=args, train_dataset=rows)
    for callback in callbacks:
        trainer.add_callback(callback)
    (result,) = trainer.train()
    return result.training


def wide(layers: int = 2, **settings) -> LlamaForCausalLM:
    """A few layers of a 7B's width, as its attention heads and vocabulary are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"num_hidden_layers": layers, "vocab_size": 32000, "max_position_embeddings": 4096}
        | settings
    )
    return LlamaForCausalLM(config)


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_are_shared_as_the_plain_definition_has_it(dtype, device):
    model = wide(**(SMALL if device.type == "cpu" else {})).to(device, dtype).eval()
    assert choose_layout(model) == "shared"
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(32000, (length,), generator=generator).tolist()

    lengths = [(40, 30, 7, 1), (3, 100, 2, 64), (300, 5, 5, 200)]
    prompts = [ids(prompt) for prompt, *_ in lengths]
    roles = [[ids(responses[role]) for _, *responses in lengths] for role in range(3)]
    on = {name: tensor.to(device) for name, tensor in flat_run(prompts, roles).items()}
    rows = {name: tensor.to(device) for name, tensor in pad_rows(prompts * 3, sum(roles, []), 0).items()}
    found, wanted = flat_logps(model, **on), sequence_logps(model, **rows).view(3, -1).T
    per_token = torch.tensor([responses for _, *responses in lengths], device=device) ** 0.5
    assert float(((found - wanted).abs() / per_token).max()) < TOLERANCE[dtype]
    one, other = (torch.autograd.grad(x.sum(), model.lm_head.weight)[0].float() for x in (found, wanted))
    assert float((one - other).norm() / other.norm()) < (1e-3 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("file", ["fsdp2", "ddp"])
def test_processes_train_what_one_trains(file, gpus, device, model_folder, rows, tmp_path):
    settings = yaml.safe_load((REPOSITORY / f"experiments/accelerate/{file}.yaml").read_text())
    launcher = tmp_path / "launch.yaml"
    launcher.write_text(yaml.safe_dump({**settings, "num_processes": 2}))
    play(tmp_path / "one", model_folder, rows)
    facts = play(tmp_path / "two", model_folder, rows, launcher=str(launcher))
    assert facts["processes"] == 2
    one, two = (pd.read_parquet(tmp_path / run / "iteration-0/steps.parquet") for run in ("one", "two"))
    for column in one.columns.drop("tokens_per_second"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-3, atol=1e-4, err_msg=column)
    left, right = (load_file(tmp_path / run / "iteration-0/model/model.safetensors") for run in ("one", "two"))
    for name, weight in left.items():
        torch.testing.assert_close(right[name], weight, rtol=0, atol=1e-4, msg=name)


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_training_goes_on_bit_for_bit(device, model_folder, rows, tmp_path):
    play(tmp_path / "whole", model_folder, rows)
    with pytest.raises(Stopped):
        play(tmp_path / "run", model_folder, rows, [StopAt()])
    play(tmp_path / "run", model_folder, rows)
    left, right = (folder_fingerprint(tmp_path / run / "iteration-0/model") for run in ("whole", "run"))
    assert left == right


def test_memory_is_given_back(memory, device, model_folder, rows, tmp_path):
    module = torch.get_device_module(device)
    play(tmp_path / "run", model_folder, rows)
    give_back()
    cublas = 2**26  # its workspace on Hopper, which PyTorch counts and keeps as long as the process lives
    assert module.memory_allocated() <= cublas and module.memory_reserved() < 2 * cublas


def test_less_is_tried_where_memory_ends(memory, device, tokenizer, rows, tmp_path, capsys):
    """The GPU is made to seem small: the micro-batch that does not fit is cut, the numbers stay."""
    module = torch.get_device_module(device)
    model = wide(2, **SMALL, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    long = [{"prompt": row["prompt"] * 40, "completion": row["completion"] * 40} for row in rows]
    settings = {"method": "sft", "max_prompt_length": 2048, "max_completion_length": 2048, "batch_size": 12}
    settings |= {"gradient_checkpointing": False, "num_train_epochs": 1.0, "diagnostics": False}
    play(tmp_path / "small", tmp_path / "model", long, micro_batch_tokens=256, **settings)
    give_back()
    module.reset_peak_memory_stats()
    play(tmp_path / "large", tmp_path / "model", long, micro_batch_tokens=2**20, **settings)
    peak = module.max_memory_allocated()
    give_back()
    module.set_per_process_memory_fraction(0.7 * peak / memory)
    try:
        play(tmp_path / "cut", tmp_path / "model", long, micro_batch_tokens=2**20, **settings)
    finally:
        module.set_per_process_memory_fraction(1.0)
    assert "out of memory; micro-batches of" in capsys.readouterr().err
    left, right = (load_file(tmp_path / run / "iteration-0/model/model.safetensors") for run in ("small", "cut"))
    for name, weight in left.items():
        torch.testing.assert_close(right[name], weight, rtol=0, atol=1e-4, msg=name)


def test_the_plan_knows_the_peak(memory, device):
    """Of a training step of two layers of a 7B's width under autocast to bfloat16, within a quarter."""
    module = torch.get_device_module(device)
    model = wide().to(device)
    assert choose_layout(model) == "shared"
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-7)
    ids = torch.randint(32000, (4, 512)).tolist()
    run = {
        name: tensor.to(device) for name, tensor in flat_run([x[:256] for x in ids], [[x[256:] for x in ids]]).items()
    }
    for _ in range(2):
        module.reset_peak_memory_stats()
        with torch.autocast(device.type, torch.bfloat16):
            loss = -flat_logps(model, **run).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
    batch = MicroBatch(tokens=2048, row_tokens=512, response_tokens=1024, count=1)
    parts = training_parts(shape_of(model.config), Precision(4, 2), batch, Optimizer("rmsprop"))
    assert sum(parts.values()) == pytest.approx(module.max_memory_allocated(), rel=0.25), parts


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_the_engine_draws_what_training_scores(device):
    """Greedy texts of vLLM are those of the policy, and its log-probabilities the trainer's, in float32."""
    tokenizer, model = load_tokenizer(str(POCKET_MODEL)), load_model(str(POCKET_MODEL)).to(device).eval()
    prompts = [tokenizer(f"Sort: {text}")["input_ids"] for text in ("dog cat", "b a c", "9 3 7")]
    stop = stops(tokenizer, model.generation_config, turn_end(tokenizer))
    drawn = generate_tokens(
        Served(str(POCKET_MODEL), "float32", EngineSettings(enforce_eager=True, memory=0.3)),
        prompts,
        stop,
        decoding=Decoding(0.0, 1.0, 16, batch_size=4),
        seed=0,
        watched=range(len(prompts)),
    )
    for prompt, row in zip(prompts, drawn, strict=True):
        rows = {name: tensor.to(device) for name, tensor in pad_rows([prompt], [row["ids"]], 0).items()}
        assert sum(row["logprobs"]) == pytest.approx(float(sequence_logps(model, **rows)), abs=1e-2)


def test_the_doctor_finds_this_machine_in_order(device, tmp_path):
    done = CliRunner().invoke(cli.app, ["doctor", "--out", str(tmp_path)])
    findings = json.loads((tmp_path / "doctor.json").read_text())
    assert done.exit_code == 0, done.output
    assert findings

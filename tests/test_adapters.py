"""Adapters on frozen weights that are coarse: nothing that they learn is lost, in bfloat16 and in 4 bits."""

import json
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_continued import SignalAt
from test_selfplay import SETTINGS, assert_same_run
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tspin import SelfPlayConfig, SelfPlayTrainer, cli
from tspin.doctor.tiny import write_rows
from tspin.engines.adapters import ADAPTER, WEIGHTS, load_policy
from tspin.errors import UserError
from tspin.models import load_model
from tspin.runs.files import read_json
from tspin.runs.signals import Stopped

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'tspin[qlora]'"
)
LORA = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "down_proj"]}
NF4 = {**LORA, "quantize": "nf4"}
KINDS = [
    pytest.param(LORA, torch.bfloat16, id="bfloat16"),
    pytest.param(NF4, torch.bfloat16, id="nf4", marks=needs_bitsandbytes),
    pytest.param(NF4, torch.float32, id="nf4 and float32", marks=needs_bitsandbytes),
]


def build(folder, model, rows, dtype, callbacks=(), **settings):
    args = SelfPlayConfig(output_dir=str(folder), **{**SETTINGS, "method": "spin", **settings})
    return SelfPlayTrainer(
        str(model), args=args, train_dataset=rows, callbacks=callbacks, model_arguments={"dtype": dtype}
    )


def frozen(folder: Path, lora: dict, dtype: torch.dtype) -> torch.nn.Module:
    """What training holds below its adapters, as float32."""
    model = load_model(str(folder), {"dtype": dtype, "quantize": lora.get("quantize")})
    return (model.dequantize(dtype=torch.float32) if lora.get("quantize") else model).float()


def logps(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.randint(5, 60, (3, 20))).logits.float().log_softmax(-1)


@pytest.mark.parametrize("lora, dtype", KINDS)
def test_no_step_is_rounded_away(tmp_path, model_folder, rows, lora, dtype):
    """30 steps of 5e-7: the frozen weights' type keeps a few of them, what the next iteration starts from all."""
    settings = {"learning_rate": 5e-7, "num_train_epochs": 15, "lora": lora, "warmup_steps": 0}  # 2 steps an epoch
    results = build(tmp_path / "run", model_folder, rows, dtype, **settings).train()
    start = dict(frozen(model_folder, lora, dtype).named_parameters())
    for result in results:
        assert result.training["steps"] == 30
        policy = load_policy(result.policy, {"dtype": dtype})
        merged = load_file(result.model_path / "model.safetensors")
        assert {value.dtype for value in merged.values()} == {torch.float32}
        for name, layer in policy.named_modules():
            if hasattr(layer, "lora_A"):
                update = layer.get_delta_weight("default").detach()
                assert update.dtype == torch.float32 and update.abs().max() > 0
                kept = merged[f"{name}.weight"] - start[f"{name}.weight"]
                assert float((kept * update).sum() / update.square().sum()) == pytest.approx(1.0, abs=1e-3)
                in_bfloat16 = merged[f"{name}.weight"].bfloat16() != start[f"{name}.weight"].bfloat16()
                assert in_bfloat16.float().mean() < 0.2  # a checkpoint in that type would have lost most
        assert result.training["changed_share"] > 0.9
        canaries = read_json(result.model_path.parent / "guards.json")["canaries"]
        assert canaries["first loss"]["sound"] and canaries["sampler"]["sound"]  # scored and drawn as it is trained


@pytest.mark.parametrize("lora, dtype", KINDS)
def test_policy_adapter_and_checkpoint_are_one_model(tmp_path, model_folder, rows, lora, dtype):
    """As `PeftModel.from_pretrained` loads the adapter, as the run loads the policy, and as whole weights."""
    results = build(tmp_path / "run", model_folder, rows, dtype, lora=lora, learning_rate=1e-2).train()
    for result in results:
        whole = logps(AutoModelForCausalLM.from_pretrained(result.model_path))
        adapter = result.model_path.parent / ADAPTER
        exported = PeftModel.from_pretrained(frozen(model_folder, lora, dtype), adapter)
        torch.testing.assert_close(logps(exported), whole, atol=5e-5, rtol=0)
        trained = logps(load_policy(result.policy, {"dtype": dtype}))
        assert (trained - whole).abs().mean() < (1e-5 if dtype == torch.float32 else 0.03)
        assert (logps(frozen(model_folder, lora, dtype)) - whole).abs().max() > 0.2  # training did something
    assert "quantization_config" not in read_json(results[-1].model_path / "config.json")


class SignalIn(SignalAt):
    def __init__(self, iteration, step):
        super().__init__(step, signal.SIGTERM)
        self.folder = f"iteration-{iteration}"

    def on_step_begin(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == self.folder:
            super().on_step_begin(args, state, control, **kwargs)


@pytest.mark.parametrize("lora, dtype", KINDS)
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, model_folder, rows, lora, dtype):
    """From a state that has the adapters alone; in both iterations."""
    settings = {"lora": lora, "learning_rate": 1e-2, "num_train_epochs": 3}
    build(tmp_path / "whole", model_folder, rows, dtype, **settings).train()
    for iteration, step in ((0, 3), (1, 4)):
        callbacks = [SignalIn(iteration, step)]
        with pytest.raises(Stopped):
            build(tmp_path / "stopped", model_folder, rows, dtype, callbacks, **settings).train()
        (state,) = (tmp_path / "stopped" / f"iteration-{iteration}" / "unfinished").glob("step-*/checkpoint-*")
        assert (state / WEIGHTS).exists() and not (state / "model.safetensors").exists()
    build(tmp_path / "stopped", model_folder, rows, dtype, **settings).train()
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", iterations=2)
    for t in (0, 1):
        one, other = (load_file(tmp_path / run / f"iteration-{t}" / ADAPTER / WEIGHTS) for run in ("whole", "stopped"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_go_on_from_those_of_the_iteration_before(tmp_path, model_folder, rows):
    """An iteration at a rate of next to nothing ends where the one before it did, and its rank is no higher."""
    lora = {**LORA, "learning_rate": [1e-2, 1e-12]}
    results = build(tmp_path / "run", model_folder, rows, torch.float32, lora=lora, learning_rate=1e-3).train()
    assert [result.steps["learning_rate"].max() for result in results] == [1e-2, 1e-12]  # the adapters' own
    start, first, second = (
        load_file(folder / "model.safetensors") for folder in (model_folder, *(r.model_path for r in results))
    )
    for name in first:
        if "q_proj" in name:
            torch.testing.assert_close(first[name], second[name], atol=1e-7, rtol=0)
            values = np.linalg.svd((second[name] - start[name]).double().numpy(), compute_uv=False)
            assert values[1] > 1e-4 and values[2] < 1e-3 * values[1]


def test_merged_checkpoints_in_bfloat16_round_nothing_that_goes_on(tmp_path, model_folder, rows):
    plain, rounded = (
        build(tmp_path / dtype, model_folder, rows, torch.float32, lora={**LORA, "merged_dtype": dtype}).train()
        for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(plain, rounded, strict=True):
        assert {v.dtype for v in load_file(other.model_path / "model.safetensors").values()} == {torch.bfloat16}
        np.testing.assert_allclose(one.steps["loss"], other.steps["loss"], atol=1e-5)


def test_4_bits_need_bitsandbytes_and_no_vllm(tmp_path, model_folder, rows, monkeypatch):
    monkeypatch.setattr("tspin.engines.adapters.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^lora.quantize: bitsandbytes is not installed; pip install 'tspin\[qlora\]'"):
        build(tmp_path / "run", model_folder, rows, torch.bfloat16, lora=NF4)
    monkeypatch.setattr("tspin.engines.adapters.find_spec", lambda name: "there")
    with pytest.raises(UserError, match="lora.quantize: the first responses are the 4-bit model's"):
        build(tmp_path / "run", model_folder, rows, torch.bfloat16, lora=NF4, sampling_backend="vllm")


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head", "embed_tokens"], "model.e.*"])
def test_a_weight_of_two_layers_takes_no_adapters(tmp_path, model_folder, tiny_model, tokenizer, rows, targets):
    """In training they would act in one of both, in the merged checkpoint in both."""

    def trainer(model):
        args = SelfPlayConfig(output_dir=str(tmp_path / "run"), **SETTINGS, lora={**LORA, "target_modules": targets})
        return SelfPlayTrainer(model, args, rows, processing_class=tokenizer)

    trainer(str(model_folder))
    tiny_model.config.tie_word_embeddings = True
    tiny_model.tie_weights()
    for saved in (tiny_model, tokenizer):
        saved.save_pretrained(tmp_path / "tied")
    line = r"^lora.target_modules: the weight of \S+ is another layer's too"
    for model in (str(tmp_path / "tied"), tiny_model):
        with pytest.raises(UserError, match=line) as refused:
            trainer(model)
        assert "\n" not in str(refused.value)
    arguments = ["train", "--model", tmp_path / "tied", "--data", write_rows(tmp_path / "data.jsonl", rows)]
    arguments += ["--method", "sft", "--out", tmp_path / "m", "--set", f"lora.target_modules={json.dumps(targets)}"]
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 2 and "is another layer's too" in result.stderr
    assert not (tmp_path / "run").exists()


def test_adapters_without_a_place_are_refused_before_anything_is_drawn(tmp_path, model_folder, rows):
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="^lora.target_modules: Target modules .*c_attn"):
        build(tmp_path / "run", model_folder, rows, torch.float32, lora={**LORA, "target_modules": ["c_attn"]})
    assert torch.equal(torch.get_rng_state(), state) and not (tmp_path / "run").exists()

"""`tspin plan`: exact counts, sums that follow from them, and the first thing that does not fit."""

import json

import pytest
from typer.testing import CliRunner

from tspin.cli import app
from tspin.config import load_config
from tspin.errors import UserError
from tspin.planning.architectures import adapter_parameters, find_config, known_architectures, shape_of
from tspin.planning.plan import Data, Hardware, plan

ROWS = Data(rows=200_000)


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-v0.1", "HuggingFaceTB/SmolLM2-135M"])
def test_parameters_are_exact(name):
    assert shape_of(find_config(name)).parameters == known_architectures()[name]["parameters"]


def test_the_embedded_model_is_read_itself():
    shape = shape_of(find_config("pocket"))
    assert (shape.layers, shape.hidden, shape.heads) == (5, 192, 6) and 2.3e6 < shape.parameters < 2.5e6


def test_adapters():
    """Rank 8 on Mistral's queries and keys: 32 layers of 8 (4096 + 4096) and 8 (4096 + 1024)."""
    found = adapter_parameters(find_config("mistralai/Mistral-7B-v0.1"), 8, ["q_proj", "k_proj"])
    assert found == 32 * 8 * (4096 + 4096 + 4096 + 1024)


@pytest.mark.parametrize("name", ["zephyr-7b", "mistral-7b"])
def test_the_papers_presets_fit_its_hardware(name):
    found = plan(load_config(name), Hardware(8, "h100"), ROWS)
    assert found.problem is None and found.shape.parameters == 7_241_732_096
    parts = found.memory["training"]
    assert parts["weights"] == parts["optimizer"] == 4 * found.shape.parameters // 8  # float32, sharded
    training = next(stage for stage in found.stages if (stage.method, stage.stage) == ("tspin", "training"))
    assert training.tokens == 5 * 3 * 50_000 * (512 + 512 + 2 * 128)
    assert training.flops == 8 * found.shape.parameters * training.tokens
    assert training.hours == pytest.approx(training.flops / (8 * 989e12 * 0.4) / 3600)
    scoring = next(stage for stage in found.stages if (stage.method, stage.stage) == ("tspin", "scoring"))
    assert scoring.hours == pytest.approx(scoring.flops / (8 * 989e12 * 0.4) / 3600)  # engine.data_parallel is 8
    # 5,000 prompts after each training; y once before the first, y′ always, since vLLM drew it.
    assert scoring.tokens == 5_000 * (5 * (512 + 512 + 2 * 128) + 512 + 512 + 5 * (512 + 128))
    spin = next(stage for stage in found.stages if (stage.method, stage.stage) == ("spin", "scoring"))
    assert spin.tokens == 5 * (5_000 * (512 + 512 + 2 * 128) + 50_000 * (512 + 128 + 512))
    # Whole on each GPU, in bfloat16 as FSDP computes.
    assert found.memory["scoring"]["weights"] == 2 * found.shape.parameters
    assert found.disk == (1 + 4 * 5) * 4 * found.shape.parameters  # SFT once, four methods five times


def test_spin_as_released_fits_its_hardware():
    """Iterations 1 to 3 train on the pairs before them too, six times."""
    name, rows = "zephyr-7b-spin-released", 49_792
    found = plan(load_config(name), Hardware(8, "a100"), Data(rows=rows))
    assert found.problem is None and found.shape.parameters == 7_241_732_096
    training, scoring, sampling = found.stages
    assert training.tokens == 6 * (1 + 3 * 2) * rows * (256 + 256 + 2 * 128)
    assert scoring.tokens == 4 * (5_000 * (512 + 2 * 128) + rows * 256) + 7 * rows * (256 + 128)
    assert sampling.tokens == 4 * rows * (256 + 128)  # y′ of iterations 1 to 3, and y0: the first y′ come with the data
    assert found.disk == 4 * 4 * found.shape.parameters
    result = CliRunner().invoke(app, ["plan", name, "--gpus", "8", "--rows", str(rows)])
    assert result.exit_code == 0 and "Everything fits." in result.output, result.output


def test_what_does_not_fit_is_named():
    found = plan(load_config("mistral-7b"), Hardware(1, "rtx4090"), ROWS)
    assert found.problem and found.problem.startswith("training needs") and "weights" in found.problem
    adapters = plan(load_config("mistral-7b", ["lora={rank: 16}"]), Hardware(1), ROWS)
    assert adapters.memory["training"]["gradients"] < 1e9
    eight = plan(load_config("mistral-7b", ["lora={rank: 16}"]), Hardware(8), ROWS)
    assert eight.memory["training"]["weights"] > 4 * eight.shape.parameters  # adapters are not trained in shards
    with pytest.raises(UserError, match="--rows"):
        plan(load_config("mistral-7b"))
    with pytest.raises(UserError, match="did you mean 'h100'"):
        plan(load_config("pocket"), Hardware(gpu="h10"))


def test_the_command_prints_and_writes(tmp_path):
    result = CliRunner().invoke(app, ["plan", "pocket", "--gpus", "1", "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0 and "Everything fits." in result.output, result.output
    assert json.loads((tmp_path / "plan.json").read_text())["does_not_fit"] is None

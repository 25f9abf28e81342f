"""`tspin plan`: exact counts, sums that follow from them, and the first thing that does not fit."""

import json
import os
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from experiments.checks.plan import predicted
from tspin.cli import app
from tspin.config import load_config
from tspin.errors import UserError
from tspin.planning.architectures import adapter_parameters, find_config, known_architectures, shape_of
from tspin.planning.fitting import advice
from tspin.planning.hardware import ASSUMPTIONS, NETWORK, Hardware
from tspin.planning.peaks import cache_bytes
from tspin.planning.plan import Data, Plan, plan
from tspin.planning.work import Stage

ROOT = Path(__file__).parents[1]
ROWS = Data(rows=200_000)
PROMPT, LABELLED, DRAWN = 512, 512, 128  # half of the 7B presets' maxima
SHOWN, BY_TOKEN = 5_000, 200  # prompts that diagnostics score, and token by token


def stage_of(found: Plan, method: str, name: str) -> Stage:
    return next(stage for stage in found.stages if (stage.method, stage.stage) == (method, name))


@pytest.mark.parametrize("name", known_architectures())
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
    assert parts["gradients"] == parts["weights"]  # of the first micro-batch; full rows need two
    training, pair, three = stage_of(found, "tspin", "training"), PROMPT + LABELLED + DRAWN, 1_280
    assert training.tokens == 3 * 50_000 * (pair + 4 * three)  # y0 carries no gradient at iteration 0
    assert stage_of(found, "spin", "training").tokens == 3 * 50_000 * 5 * pair
    assert stage_of(found, "sft", "training").tokens == 2 * 200_000 * (PROMPT + LABELLED)
    assert training.flops == 8 * found.shape.parameters * training.tokens
    assert training.hours == pytest.approx(training.flops / (8 * 989e12 * 0.4) / 3600)
    scoring, looked_at = stage_of(found, "tspin", "scoring"), 2 * BY_TOKEN * three
    assert scoring.hours == pytest.approx(scoring.flops / (8 * 989e12 * 0.4) / 3600)  # engine.data_parallel is 8
    # After each training all responses; before it y and y0 at iteration 0 alone, y′ always, since vLLM drew it.
    assert scoring.tokens == 5 * (SHOWN * three + looked_at) + SHOWN * (three + 4 * (PROMPT + DRAWN))
    spin = stage_of(found, "spin", "scoring")  # its reference's pass has y and y′; y0 is new at iteration 0
    assert spin.tokens == 5 * (50_000 * pair + SHOWN * three + looked_at) + SHOWN * (PROMPT + DRAWN)
    # Whole on each GPU, in bfloat16 as FSDP computes.
    assert found.memory["scoring"]["weights"] == 2 * found.shape.parameters
    assert found.disk == (1 + 4 * 5) * 4 * found.shape.parameters  # SFT once, four methods five times
    drawn = [stage_of(found, method, "sampling").tokens for method in ("spin", "tspin")]
    assert drawn == [6 * 50_000 * (PROMPT + DRAWN), 4 * 50_000 * (PROMPT + DRAWN)]  # y0 and the first y′ are shared


def test_spin_as_released_fits_its_hardware():
    """Iterations 1 to 3 train on the pairs before them too, six times."""
    name, rows = "zephyr-7b-spin-released", 49_792
    found = plan(load_config(name), Hardware(8, "a100"), Data(rows=rows))
    assert found.problem is None and found.shape.parameters == 7_241_732_096
    training, scoring, sampling = (stage_of(found, "spin", name) for name in ("training", "scoring", "sampling"))
    pair, three = 256 + 256 + 128, 256 + 256 + 2 * 128
    assert training.tokens == 6 * (1 + 3 * 2) * rows * pair
    # y0 comes with its log-probability: the sampler's arithmetic is the one that FSDP computes in.
    assert scoring.tokens == 7 * rows * pair + 4 * (SHOWN + 2 * BY_TOKEN) * three
    assert sampling.tokens == 4 * rows * (256 + 128)  # y′ of iterations 1 to 3, and y0: the first y′ come with the data
    read = 2 * found.shape.parameters + 8 * (256 + 128) * 2 * 1024 * 2 * 32  # weights and cache, of 8 sequences
    seconds = 4 * rows * 128 / 8 * read / (2.04e12 * 0.4) + 4 * rows * 256 * 2 * found.shape.parameters / (312e12 * 0.4)
    assert sampling.hours == pytest.approx(seconds / 3600)  # on one GPU: Transformers draws in one process
    assert found.disk == 4 * 4 * found.shape.parameters


def test_adapters_need_no_gradients_of_the_base():
    config = load_config("mistral-7b", ["lora={rank: 16}"])
    found = plan(config, Hardware(1), ROWS)
    count, adapters = found.shape.parameters, adapter_parameters(find_config(config.model.path), 16, "all-linear")
    training = stage_of(found, "tspin", "training")
    assert training.flops == training.tokens * (6 * (count + adapters) + 2 * adapters)  # with checkpointing
    plain = plan(load_config("mistral-7b", ["lora={rank: 16}", "gradient_checkpointing=false"]), Hardware(1), ROWS)
    assert stage_of(plain, "tspin", "training").flops == training.tokens * (4 * count + 6 * adapters)
    parts = found.memory["training"]
    assert parts["gradients"] == parts["optimizer"] == 4 * adapters and parts["weights"] == 4 * (count + adapters)
    eight = plan(config, Hardware(8), ROWS)
    assert eight.memory["training"]["weights"] == parts["weights"]  # adapters are not trained in shards


def test_frozen_weights_of_two_bytes_and_of_half_a_byte():
    """Adapters, their gradients and optimizer stay float32; merged checkpoints are float32 whatever is below them."""
    for settings, matrix in ([], 2.0), (["lora.quantize=nf4", "sampling_backend=transformers"], 0.5159):
        config = load_config("zephyr-7b-lora", settings)
        found = plan(config, Hardware(1, "h100"), ROWS)
        assert found.problem is None
        shape, adapters = found.shape, adapter_parameters(find_config(config.model.path), 16, "all-linear")
        matrices = shape.layers * shape.layer_matrices
        weights = matrix * matrices + 2 * (shape.parameters - matrices)
        parts = found.memory["training"]
        assert parts["weights"] == pytest.approx(weights + 4 * adapters, rel=1e-4)
        assert parts["gradients"] == parts["optimizer"] == 4 * adapters
        assert found.memory["sampling"]["weights"] == pytest.approx(weights, rel=1e-4)
        assert found.disk == (1 + 4 * 5) * 4 * (shape.parameters + adapters)


@pytest.mark.parametrize(
    ("settings", "most"),  # of SFT's one checkpoint and five of each of four methods, in bytes a parameter
    [([], (1 + 4 * 5) * 4), (["keep_checkpoints=last"], (1 + 4 + 1) * 4), (["keep_checkpoints=best"], (1 + 8 + 1) * 4),
     (["keep_checkpoints=bfloat16"], (1 + 4 + 1) * 4 + 4 * 4 * 2)],
)  # fmt: skip
def test_disk_is_what_is_kept_at_most_at_once(settings, most):
    found = plan(load_config("zephyr-7b", settings), Hardware(8, "h100"), ROWS)
    assert found.disk == most * found.shape.parameters


def test_the_padded_layout_has_a_prompt_for_each_response():
    found = plan(load_config("mistral-7b", ["layout=padded"]), Hardware(8), ROWS)
    assert stage_of(found, "spin", "training").tokens == 3 * 50_000 * 5 * (2 * PROMPT + LABELLED + DRAWN)


def test_hours_are_of_everything():
    found = plan(load_config("zephyr-7b"), Hardware(8), ROWS)
    assert stage_of(found, "base", "evaluation").hours * 5 == pytest.approx(stage_of(found, "spin", "evaluation").hours)
    saving = stage_of(found, "spin", "saving, hashing")
    assert saving.hours == pytest.approx(5 * 4 * found.shape.parameters * (1 / 1e9 + 1 / 1e9) / 3600)
    assert stage_of(found, "spin", "starts, loading").hours > 0.5
    assert found.hours == pytest.approx(sum(stage.hours for stage in found.stages))
    assert found.gpu_hours == 8 * found.hours
    assert all(each.text and each.source for each in ASSUMPTIONS)


def test_adapted_modules_are_those_that_peft_takes():
    config = find_config("pocket")
    width = config.hidden_size
    every = adapter_parameters(config, 1, ["q_proj"])
    assert every == config.num_hidden_layers * 2 * width
    assert adapter_parameters(config, 1, ["self_attn.q_proj"]) == every
    assert adapter_parameters(config, 1, r".*\.q_proj") == every
    assert adapter_parameters(config, 1, r".*layers\.0\..*q_proj") == 2 * width
    assert adapter_parameters(config, 1, "q_proj") == 0  # a regular expression of the whole name


def test_transformers_samples_the_longest_rows_together():
    config = load_config("zephyr-7b", ["sampling_backend=transformers", "sampling_batch_size=16"])
    found = plan(config, Hardware(8, "h100"), ROWS)
    longest = config.training.max_prompt_length + config.training.max_new_tokens
    weight = 2 if config.training.sampling_dtype == "bfloat16" else 4
    assert found.memory["sampling"]["key-value cache"] == 16 * longest * cache_bytes(found.shape, weight)


def test_several_machines_exchange_what_fsdp_gathers_and_adds_up():
    config = load_config("llama-70b", ["methods={tspin: {}}"])
    found = plan(config, Hardware(8, "h200", nodes=2), ROWS)
    count = found.shape.parameters
    assert found.problem is None and found.memory["training"]["weights"] == 4 * count // 16
    assert found.memory["sampling"]["weights"] == 2 * count // 4 and "scoring" not in found.memory
    # 64 prompts of 1,280 tokens are two micro-batches on each of 16 GPUs; half of every byte is on the other machine.
    size = 2 * (2 * 2 + 4) * count / 2
    steps = 3 * 5 * 50_000 / 64
    assert stage_of(found, "tspin", "between machines").hours == pytest.approx(steps * size / 50e9 / 3600)
    faster = plan(config, Hardware(8, "h200", nodes=2, network=8 * NETWORK.value), ROWS)
    assert faster.hours < found.hours and "between machines" not in {stage.stage for stage in plan(
        config, Hardware(8, "h200"), ROWS).stages}  # fmt: skip


@pytest.mark.parametrize("gpu", ["h100", "l40s"])
def test_what_fits_is_proposed(gpu):
    """What is proposed fits, and the next power of two does not."""
    settings, hardware = ["lora={rank: 16}", "methods={tspin: {}}"], Hardware(1, gpu)
    told = advice(load_config("mistral-7b", settings), hardware, Data())
    tokens = int(re.search(r"--set micro_batch_tokens=(\d+) ", told)[1])
    fits, next_one = (
        plan(load_config("mistral-7b", [*settings, f"micro_batch_tokens={n}"]), hardware) for n in (tokens, 2 * tokens)
    )
    assert fits.problem is None and next_one.problem, told


@pytest.mark.parametrize(
    ("settings", "hardware", "told"),
    [
        ([], Hardware(1, "h100"), "It fits with --set lora='{rank: 16}'"),
        (["gradient_checkpointing=false", "micro_batch_tokens=32768"], Hardware(8, "h100"),
         "It fits with --set micro_batch_tokens=4096"),
        (["gradient_checkpointing=false", "max_prompt_length=2048", "max_completion_length=2048",
          "micro_batch_tokens=32768"], Hardware(8, "h100"), "It fits with --set gradient_checkpointing=true"),
        (["lora={rank: 16}"], Hardware(1, "rtx4090"), "It fits with --set model.dtype=bfloat16"),
        (["lora={rank: 16}", "max_prompt_length=60000"], Hardware(1, "rtx4090"),
         "No micro-batch, checkpointing, adapters or number of GPUs makes it fit: take GPUs with more memory"),
    ],
)  # fmt: skip
def test_the_first_remedy_is_computed(settings, hardware, told):
    config = load_config("mistral-7b", ["methods={tspin: {}}", *settings])
    assert plan(config, hardware, Data()).problem and advice(config, hardware, Data()) == told


def test_what_does_not_fit_is_named():
    found = plan(load_config("mistral-7b"), Hardware(1, "rtx4090"), ROWS)
    assert found.problem and found.problem.startswith("training needs") and "weights" in found.problem
    with pytest.raises(UserError, match="--rows"):
        plan(load_config("mistral-7b"), Hardware())
    with pytest.raises(UserError, match="did you mean 'h100'"):
        Hardware(gpu="h10")


def test_predictions_are_as_near_the_measured_peaks_as_when_they_were_measured():
    for row in pd.read_csv(ROOT / "results" / "benchmarks" / "plan" / "memory.csv").itertuples():
        now = predicted(row.model, row.micro_batch_tokens, row.gradient_checkpointing, row.bf16)
        assert abs(now / row.measured_bytes - 1) <= abs(row.predicted_bytes / row.measured_bytes - 1) + 1e-3, row


def test_the_readmes_table_is_what_the_commands_print(tmp_path):
    """TSPIN_FREEZE=1 writes the table anew."""
    path = ROOT / "experiments" / "README.md"
    text = new = path.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(tspin plan [^`]*)` \|.*\|$", text, flags=re.MULTILINE)
    assert len(rows) == 4
    for command in rows:
        file = tmp_path / "plan.json"
        result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--json", str(file)])
        assert result.exit_code == 0 and "Everything fits." in result.output, result.output
        found = json.loads(file.read_text())
        most = max(sum(parts.values()) for parts in found["memory_bytes_per_gpu"].values()) / 2**30
        hours, disk = (f"{found['hours']:.0f}", f"{found['gpu_hours']:,.0f}"), f"{found['disk_bytes'] / 1e9:,.0f}"
        line = " | ".join([f"| `{command}`", f"{most:.0f}", *hours, disk]) + " |"
        old = re.search(rf"^\| `{re.escape(command)}` \|.*$", new, flags=re.MULTILINE)
        new = new.replace(old[0], line)
    if os.environ.get("TSPIN_FREEZE"):
        path.write_text(new, encoding="utf-8")
    assert new == text, "the table is stale: TSPIN_FREEZE=1 writes it anew"


def test_the_command_prints_and_writes(tmp_path):
    result = CliRunner().invoke(app, ["plan", "pocket", "--gpus", "1", "--json", str(tmp_path / "plan.json")])
    assert result.exit_code == 0 and "Everything fits." in result.output, result.output
    assert "GPU-hours" in result.output and "--set micro_batch_tokens=" in result.output
    assert json.loads((tmp_path / "plan.json").read_text())["does_not_fit"] is None

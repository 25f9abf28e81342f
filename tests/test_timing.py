"""The benchmark: its contenders run on a tiny shape, its report says what was asked for and what came out."""

import json
import re

import pandas as pd
import pytest
import torch

from experiments.checks.benchmark.contenders import CONTENDERS
from experiments.checks.benchmark.details import attention_ways, balance_rows
from experiments.checks.benchmark.workload import TINY, build, flops, prompt_tokens, response_tokens, triplets
from tspin.schema import ROLES
from tspin_analysis.timing import COLOURS, TARGETS, ratios, report


def test_the_report_has_a_colour_for_every_contender():
    assert COLOURS.keys() == CONTENDERS.keys()


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_changes_the_weights(name):
    if name == "TRL DPO":
        pytest.importorskip("trl", reason="pip install '.[benchmark]' brings TRL")
    batch = triplets(4, 40, 0.5)
    model = build("tiny")
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    CONTENDERS[name].make(model, batch)(batch)
    assert not model.model.layers[0].mlp.up_proj.weight.equal(before)


def test_workload_has_the_lengths_and_the_operations_it_says():
    batch = triplets(2000, 100, 0.8)
    assert prompt_tokens(batch) / 2000 == pytest.approx(80, rel=0.03)
    assert response_tokens(batch) / 2000 / len(ROLES) == pytest.approx(20, rel=0.03)
    body = sum(p.numel() for p in build("tiny").model.layers.parameters() if p.dim() > 1)
    (triplet,) = triplets(1, 100, 0.5, spread=0)
    assert flops("tiny", [triplet], responses=2, prompts=1) == 6 * (body * 150 + 1024 * 32 * 100)


def test_ways_to_attend_are_the_same_attention():
    """Padded rows have each prompt once a response: their responses' rows are the same."""
    parts = [torch.randn(1, heads, 2 * 9, 8) for heads in (4, 2, 2)]
    found = {name: way() for name, way in attention_ways(parts, [[3, 2, 2, 2]] * 2).items()}
    segments, masked, padded = found.values()
    torch.testing.assert_close(masked.transpose(0, 1).flatten(1, 2)[None], segments)
    torch.testing.assert_close(padded[2:4, :, 3:], masked[:, :, 5:7])


def test_balance_is_simulated_for_all_ways():
    rows = {row["dealt"]: row["share_of_ideal"] for row in balance_rows(TINY)}
    assert rows["by tokens, flat (ours)"] > rows["by stride, flat"] > rows["by stride, padded rows"]


def test_report_of_measurements(tmp_path):
    names = list(COLOURS)
    mixes = ["prompt-heavy 4:1", "even 1:1", "response-heavy 1:4"]
    steps = pd.DataFrame([
        {"model": "m", "mix": mix, "step": name, "batch": 8, "seconds": second, "fastest": second, "slowest": second,
         "prompts_per_second": 8 / second, "response_tokens_per_second": 1.0, "share_of_matmul_rate": 0.5}
        for mix in mixes for name, second in zip(names, (2.0, 5.0, 7.0, 1.5, 3.0, 4.0, 6.0), strict=True)
    ])  # fmt: skip
    memory = pd.DataFrame({"model": "m", "step": ["tspin shared", "TRL DPO"], "peak_bytes": [7, 10]})
    growth = pd.DataFrame({"model": "m", "grows": ["batch", "length", "length"], "value": [4, 256, 4096],
                           "seconds_per_1000_tokens": [1.0, 2.0, 3.0]})  # fmt: skip
    balance = pd.DataFrame({"dealt": ["by tokens (ours)", "by stride"], "share_of_ideal": [0.97, 0.4]})
    other = pd.DataFrame({"x": ["a"], "share": [0.25]})
    tables = {"steps": steps, "memory": memory, "growth": growth, "balance": balance}
    tables |= dict.fromkeys(("attention", "heads", "sampling", "profile"), other)
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    facts = {"hardware": {"cpu": "a CPU", "threads": 2, "accelerators": []}, "matmul_flops_per_second": 8e11,
             "commit": "0" * 40, "date": "2026-01-01", "rounds": 3, "arithmetic": "float32"}  # fmt: skip
    (tmp_path / "provenance.json").write_text(json.dumps(facts))
    assert list(ratios(tables, "m")) == list(TARGETS)
    assert list(ratios(tables, "m").values()) == [2.5, 2.5, 0.5, 0.7, 1.5, 0.5, 0.97]
    written = report(tmp_path)
    assert [path.name for path in written] == ["benchmark.md", "benchmark.png", "benchmark.svg"]
    text = written[0].read_text()
    judged = re.findall(r"\| (met|missed) +\|", text)
    assert sorted(judged) == ["met"] * 5 + ["missed"] * 2 and "**2.50×**" in text

"""The benchmark: its contenders run on a tiny shape, its report says what was asked for and what came out."""

import json
import re

import pandas as pd
import pytest

from experiments.checks.benchmark.contenders import CONTENDERS
from experiments.checks.benchmark.workload import build, flops, prompt_tokens, response_tokens, triplets
from tspin.schema import ROLES
from tspin_analysis.benchmark import COLOURS, TARGETS, ratios, report


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


def test_report_of_measurements(tmp_path):
    names = list(COLOURS)
    mixes = ["prompt-heavy 4:1", "even 1:1", "response-heavy 1:4"]
    steps = pd.DataFrame([
        {"model": "m", "mix": mix, "step": name, "batch": 8, "seconds": second, "fastest": second, "slowest": second,
         "prompts_per_second": 8 / second, "response_tokens_per_second": 1.0, "share_of_matmul_rate": 0.5}
        for mix in mixes for name, second in zip(names, (2.0, 5.0, 7.0, 1.5, 3.0, 4.0, 6.0), strict=True)
    ])  # fmt: skip
    memory = pd.DataFrame({"model": "m", "step": ["tspin shared", "TRL DPO"], "peak_bytes": [7, 10]})
    growth = pd.DataFrame({"grows": ["batch", "length"], "value": [4, 512], "seconds_per_1000_tokens": [1.0, 2.0]})
    other = pd.DataFrame({"x": ["a"], "share": [0.25]})
    tables = {"steps": steps, "memory": memory, "growth": growth, "heads": other, "sampling": other, "profile": other}
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    facts = {"hardware": {"cpu": "a CPU", "threads": 2, "accelerators": []}, "matmul_flops_per_second": 8e11,
             "commit": "0" * 40, "date": "2026-01-01", "rounds": 3}  # fmt: skip
    (tmp_path / "provenance.json").write_text(json.dumps(facts))
    assert list(ratios(steps, memory, "m")) == list(TARGETS)
    assert list(ratios(steps, memory, "m").values()) == [2.5, 0.5, 0.7]
    written = report(tmp_path)
    assert [path.name for path in written] == ["benchmark.md", "benchmark.png", "benchmark.svg"]
    text = written[0].read_text()
    judged = re.findall(r"\| (met|missed) +\|", text)
    assert sorted(judged) == ["met", "met", "missed"] and "**2.50×**" in text

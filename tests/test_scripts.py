"""Every script under experiments/ runs: tiny, by its real command line, in a process and a folder of its own.

The numbers mean nothing at these sizes; what is left does, and that results come with their provenance.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from packaging.requirements import Requirement

from experiments.pocket.misconceptions import MISCONCEPTIONS, mistaken, triggered
from tspin.config import REPOSITORY
from tspin.doctor.tiny import write_rows
from tspin.pocket.tasks import pool

SCRIPTS = [path for path in (REPOSITORY / "experiments").glob("*/**/*.py") if "__main__" in path.read_text()]


def run(module: str, *arguments: object) -> str:
    """Run `python -m module arguments` as a user does. Returns what it printed."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def evidence(folder: Path, said: str, *names: str) -> list[pd.DataFrame]:
    """The tables that a check wrote, and said that it wrote; its provenance is beside them."""
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["versions"]["torch"] and facts["hardware"]["threads"] and facts["date"] and facts["seconds"] >= 0
    written = [f"{name}.csv" for name in names]
    assert {path.name for path in folder.iterdir()} == {*written, "provenance.json"}
    told = [line for line in said.splitlines() if line.startswith("wrote ") and str(folder) in line]
    assert told and all(any(name in line for line in told) for name in written)
    return [pd.read_csv(folder / name) for name in written]


def test_none_is_left_out():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    modules = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in SCRIPTS]
    assert len(modules) > 5 and [module for module in modules if f'"{module}"' not in tests] == []


def test_benchmark(tmp_path):
    from tspin_analysis.timing import COLOURS, report

    said = run("experiments.checks.benchmark.run", "--tiny", "--out", tmp_path)
    folder = next(tmp_path.iterdir())
    names = ("memory", "steps", "growth", "attention", "balance", "heads", "sampling", "profile")
    memory, steps, growth, attention, balance, heads, sampling, profile = evidence(folder, said, *names)
    contenders = set(COLOURS) if find_spec("trl") else set(COLOURS) - {"TRL DPO"}
    assert set(steps["step"]) == contenders and (steps["seconds"] > 0).all() and steps["mix"].nunique() == 3
    assert {"tspin shared"} <= set(memory["step"]) <= contenders and (memory["peak_bytes"] > 0).all()
    assert set(growth["grows"]) == {"batch", "length"}
    assert attention["attention"].nunique() == 3 and (balance["share_of_ideal"] <= 1).all()
    assert len(heads) == 3 and len(sampling) == 3 and (sampling["prompts"] == 4).all()
    assert profile.groupby("step")["share"].sum().tolist() == pytest.approx([1, 1], abs=1e-3)
    if find_spec("trl"):
        assert all(path.stat().st_size for path in report(folder))


def test_tiny_numbers_are_kept_out_of_results(monkeypatch, capsys):
    from experiments.checks.benchmark.run import main

    monkeypatch.setattr("sys.argv", ["run.py", "--tiny"])
    with pytest.raises(SystemExit):
        main()
    assert "--tiny needs --out FOLDER" in capsys.readouterr().err


def test_plan(tmp_path):
    said = run("experiments.checks.plan", "--models", "pocket", "--tokens", 256, "--out", tmp_path)
    (table,) = evidence(tmp_path, said, "memory")
    assert table["gradient_checkpointing"].tolist() == [False, True]
    assert (table["measured_bytes"] > 0).all() and (table["error_percent"].abs() < 50).all()


def test_load(tmp_path):
    said = run("experiments.checks.load", "--sizes", 16, "--steps", 1, "--runs", 25, "--out", tmp_path)
    (table,) = evidence(tmp_path, said, "load")
    assert table["what"].tolist() == [
        "the libraries' import alone", "rows: first start, encoded", "rows: next start",
        "rows: responses, triplets, 1 steps", "runs: tspin table 1", "runs: tspin figure 2", "runs: tspin figure 3",
        "runs: tspin figure 7", "runs: tspin claims", "tspin --help",
    ]  # fmt: skip
    assert set(table["size"]) == {0, 16, 25} and (table[["seconds", "memory_mb"]] > 0).all().all()


def test_engines(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed (make engines brings its CPU build)")
    said = run("experiments.checks.engines", "--prompts", 2, "--out", tmp_path)
    (table,) = evidence(tmp_path, said, "engines")
    assert (table["mean_gap"] < 0.05).all() and table["equal_texts"].notna().sum() == 2


def test_vllm_requirements():
    """Of any package: everything that it needs, but for PyTorch."""
    lines = run("experiments.checks.vllm_requirements", "accelerate").splitlines()
    assert {"numpy", "safetensors"} <= {Requirement(line).name for line in lines}
    assert not [line for line in lines if line.startswith("torch") or ";" in line]


def test_pretraining_in_two_phases(tmp_path):
    from tspin.models import load_model, load_tokenizer

    scratch, model, logs = tmp_path / "scratch", tmp_path / "model", [tmp_path / "log_1.csv", tmp_path / "log_2.csv"]
    small = ["--steps", 2, "--batch-size", 2]
    first = run("experiments.pocket.pretrain", "--out", scratch, "--log", logs[0], "--texts", 200, *small)
    kept = load_tokenizer(str(scratch))
    # The second phase with the settings that made the embedded model, and fewer steps.
    options = ["--seed", 7, "--learning-rate", 1e-3, "--noise", 0.1, "--misconceptions", 0.8]
    second = run("experiments.pocket.pretrain", "--start", scratch, "--out", model, "--log", logs[1], *small, *options)
    for said, folder, log in ((first, scratch, logs[0]), (second, model, logs[1])):
        assert f"wrote {folder}, {log} and {log.with_suffix('.json')}" in said
        assert pd.read_csv(log)["step"].tolist() == [2]
        assert json.loads(log.with_suffix(".json").read_text())["settings"]["steps"] == 2
    before, after = (load_model(str(folder)) for folder in (scratch, model))
    assert before.config.hidden_size == 192 and load_tokenizer(str(model)).get_vocab() == kept.get_vocab()
    weights = before.model.embed_tokens.weight
    assert weights.shape[0] == len(kept) and not weights.equal(after.model.embed_tokens.weight)


def test_finetune(tmp_path, model_folder, data_file):
    """From any start, on a preset's labels: other weights, as bfloat16, with what they were made by."""
    from tspin.models import load_model

    out = tmp_path / "runs" / "made"
    (tmp_path / "mine.yaml").write_text(f"data: {{path: {data_file}}}\nbatch_size: 4\n")
    said = run("experiments.pocket.finetune", "--preset", tmp_path / "mine.yaml", "--start", model_folder, "--out", out,
               "--learning-rate", 1e-3, "--set", "methods.sft.data.labels=8", "warmup_steps=0")  # fmt: skip
    assert said.splitlines()[-1] == f"wrote {out} and {out}.json"
    before, after = (load_model(str(folder), {"dtype": "auto"}) for folder in (model_folder, out))
    assert str(after.dtype) == "torch.bfloat16" and not before.lm_head.weight.bfloat16().equal(after.lm_head.weight)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["settings"]["learning_rate"] == 1e-3 and "methods.sft.data.labels=8" in record["settings"]["set"]
    assert record["versions"]["torch"] and record["seconds"] >= 0


@pytest.mark.parametrize("task", MISCONCEPTIONS)
def test_misconceptions(task):
    """A mistake on a good part of a task's questions, and mostly another answer than the right one."""
    problems = pool("validation", task, 100)
    assert 0.2 < sum(map(triggered, problems)) / len(problems) < 0.8
    assert sum(mistaken(problem) != problem.answer for problem in problems) / len(problems) > 0.6


def test_punkt(tmp_path, monkeypatch):
    import nltk
    from nltk.tokenize.punkt import PunktTokenizer

    text = "Ann has 3 apples. She gives Mr. Bell one of them. How many apples does she have now?"
    path = write_rows(tmp_path / "texts.jsonl", [{"question": text, "answer": "2"}])
    out = tmp_path / "tokenizers" / "punkt_tab"  # where NLTK looks
    said = run("experiments.smollm2.punkt", "--text", path, "--out", out)
    assert said.startswith(f"wrote {out / 'english'}, from 2 texts")
    assert list(json.loads((out / "provenance.json").read_text())["text"]) == ["texts.jsonl"]
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert PunktTokenizer("english").tokenize("She has 3. He has 2.") == ["She has 3.", "He has 2."]


def test_times(tmp_path):
    for _ in range(2):
        run("experiments.checks.times", "--clone", tmp_path, "--commands", "sleep 1", "--out", tmp_path / "times")
    table = pd.read_csv(tmp_path / "times" / "times.csv")
    assert table["command"].tolist() == ["sleep 1"] * 2 and (table["seconds"] >= 1).all() and table["cpu"].notna().all()


def test_command_times(tmp_path):
    """A refused name alone, twice: the others are minutes of imports. Rows of an earlier call stay."""
    for _ in range(2):
        run(
            "experiments.checks.command_times",
            "--rounds",
            1,
            "--commands",
            "tspin run --preset poket",
            "--out",
            tmp_path,
        )
    table = pd.read_csv(tmp_path / "commands.csv")
    assert list(table) == ["command", "seconds", "cpu_seconds", "cpu", "threads", "commit", "date"]
    assert len(table) == 2 and (table["seconds"] > 0).all() and (table["cpu_seconds"] > 0).all()


def test_breakdown(tmp_path):
    """A row per method and iteration, below those that are there. Every second is in one part."""
    (tmp_path / "pocket.csv").write_text("commit,method,iteration,total\nearlier,tspin,0,1\n")
    small = ["--set", "data.labels=4", "iterations=2", "evaluation.limit=1", "max_new_tokens=4"]
    said = run("experiments.checks.breakdown", *small, "--out", tmp_path)
    (table,) = evidence(tmp_path, said, "pocket")
    assert table["commit"][0] == "earlier" and table["commit"].notna().all()
    measured = table[1:]
    assert list(zip(measured["method"], measured["iteration"], strict=True)) == [
        ("tspin", 0), ("tspin", 1), ("spin", 0), ("spin", 1),
    ]  # fmt: skip
    parts = ["sampling", "reference", "training", "diagnostics", "evaluation", "saving", "hashing", "rest"]
    assert measured[parts].sum(axis=1).tolist() == pytest.approx(measured["total"].tolist(), rel=1e-3)
    assert (measured[parts].drop(columns="reference") > 0).all().all()
    assert (measured["reference"] > 0).tolist() == [False, False, True, True]


def test_example(tmp_path):
    run("experiments.checks.example", "--out", tmp_path)
    text = (tmp_path / "transcript.txt").read_text()
    assert text.count("$ ") == 2 and "tspin, iteration 1: 3 steps" in text and "\ncompare: tspin compare " in text
    assert json.loads((tmp_path / "provenance.json").read_text())["versions"]["torch"]

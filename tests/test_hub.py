"""Offline folders: what `tspin fetch` puts into them is all that a run reads, and what is missing is named."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.smollm2.punkt import write_punkt
from tspin.cli import app
from tspin.config import build_config, load_config
from tspin.errors import UserError
from tspin.evaluation.harness import evaluate
from tspin.evaluation.suites import load_suite
from tspin.hub import offline as hub
from tspin.hub.fetch import _remove_others, local_sources
from tspin.hub.offline import Item, lacking
from tspin.planning.needs import benchmark_data, fetch_needed, needed, needs_nltk

BENCHMARKS = Path(__file__).parents[1].parent / "shared" / "benchmarks"
real_rows = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no benchmark rows beside the repository")
MODEL = "nobody/tiny"

PRESET = """
model: {path: nobody/tiny}
data: {path: nobody/sums, columns: {prompt: question, completion: answer}, split: train}
max_completion_length: 8
max_new_tokens: 4
batch_size: 4
bf16: false
iterations: 1
methods: {tspin: {}}
evaluation: {suite: SUITE, limit: 2}
"""
SUITE = """
columns:
  - {benchmark: gsm8k, label: GSM8K, group: math, metric: "exact_match,flexible-extract", num_fewshot: 2}
"""


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """A test that goes offline leaves no trace of it."""
    monkeypatch.setenv(hub.VARIABLE, "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NLTK_DATA", "")


@pytest.fixture
def preset(tmp_path, model_folder, rows):
    """A preset whose model, data and benchmark have hub names that no hub knows, and local files for all three."""
    settings = json.loads((model_folder / "config.json").read_text())
    settings["max_position_embeddings"] = 2048  # GSM8K asks for 256 new tokens
    (model_folder / "config.json").write_text(json.dumps(settings))
    questions = [{"question": row["prompt"], "answer": f"{row['completion']} #### 1"} for row in rows]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "mine.yaml").write_text(PRESET.replace("SUITE", str(tmp_path / "suite.yaml")))
    take = [
        f"{MODEL}={model_folder}",
        f"nobody/sums::train={tmp_path / 'train.jsonl'}",
        f"openai/gsm8k:main:train={tmp_path / 'train.jsonl'}",
        f"openai/gsm8k:main:test={tmp_path / 'test.jsonl'}",
    ]
    return tmp_path / "mine.yaml", take


def test_a_run_from_an_offline_folder(preset, tmp_path):
    path, take = preset
    out, places = tmp_path / "offline", ["--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    arguments = [item for source in take for item in ("--take", source)]
    result = CliRunner().invoke(app, ["fetch", str(path), "--out", str(out), *arguments])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, ["fetch", str(path), "--out", str(out), "--check"]).exit_code == 0
    shutil.rmtree(tmp_path / "model")  # all that was taken is in the folder
    run = ["run", "--preset", path, "--offline", out, "--methods", "base,tspin", *places]
    result = CliRunner().invoke(app, list(map(str, run)))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "results" / "mine" / "evaluations.csv").is_file()


def test_what_is_missing_is_named(preset, tmp_path):
    path, take = preset
    out = tmp_path / "offline"
    result = CliRunner().invoke(app, ["fetch", str(path), "--out", str(out), "--take", take[0]])
    assert result.exit_code == 2 and "nobody/sums" in result.output and "gsm8k" in result.output
    arguments = ["run", "--preset", str(path), "--offline", str(out), "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "no data set nobody/sums" in " ".join(result.output.split())
    result = CliRunner().invoke(app, [*arguments[:4], str(tmp_path), *arguments[5:]])
    assert result.exit_code == 2 and "manifest.json" in result.output
    # What was fetched stays: only the rest is fetched by the next call.
    lines: list[str] = []
    assert not fetch_needed(load_config(str(path)), out, take[1:], lines.append)
    assert lines[0] == f"model {MODEL}: there" and "fetched" in lines[1]


def test_damage_is_found(preset, tmp_path):
    path, take = preset
    out = tmp_path / "offline"
    fetch_needed(load_config(str(path)), out, take, lambda line: None)
    victim = next((out / "datasets" / "openai").rglob("test.parquet"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert hub.verify(out) == ["datasets/openai/gsm8k/main/test.parquet: its checksum is not the one that was fetched"]
    assert CliRunner().invoke(app, ["fetch", str(path), "--out", str(out), "--check"]).exit_code == 2
    victim.write_bytes(content[:10])
    with pytest.raises(UserError, match=r"test\.parquet is incomplete"):
        hub.offline_dataset(out, "openai/gsm8k", "main")
    with pytest.raises(UserError, match="at revision|no model nobody/other"):
        hub.offline_model(out, "nobody/other", None)


@pytest.mark.parametrize(
    "take, message",
    [
        ("nobody/tiny", "write MODEL=PATH"),
        ("nobody/other=/tmp", "needs no such model"),
        ("nobody/sums::train=/no/such/file.jsonl", "no such file"),
        ("nobody/sums:a:b:c=/tmp", "write MODEL=PATH"),
    ],
)
def test_bad_sources_are_refused(take, message):
    items = [Item("model", MODEL), Item("dataset", "nobody/sums", None, "train")]
    with pytest.raises(UserError, match=message):
        local_sources([take], items)


def test_the_papers_suite_is_known_whole():
    """Ten benchmarks, 57 subjects of MMLU and 24 tasks of BBH among them, and IFEval's sentence splitter."""
    suite = load_suite("paper")
    found = benchmark_data(suite)
    assert len(found) == len(set(found)) == 97 and ("openai/gsm8k", "main") in found
    assert sum(name == "SaylorTwift/bbh" for name, _ in found) == 24
    assert sum(name == "cais/mmlu" for name, _ in found) == 57
    assert needs_nltk(suite) and not benchmark_data(load_suite("pocket"))


def test_a_preset_names_each_thing_once():
    items = needed(load_config("smollm2"))
    assert len({(item.kind, item.name, item.config) for item in items}) == len(items)
    gsm8k = next(item for item in items if item.name == "openai/gsm8k")
    assert gsm8k.split is None and gsm8k.revision == load_config("smollm2").data.revision


def test_what_y0_and_held_out_rows_come_from_is_needed_too():
    """proto_model of a method, too; a download removes what an earlier revision left."""
    more = {
        "methods": {"tspin": {"proto_model": "org/older"}},
        "evaluation": {"suite": "pocket", "held_out": "org/rows"},
    }
    items = needed(build_config({"model": {"path": "pocket"}, **more}))
    assert [(item.kind, item.name, item.split) for item in items if item.kind != "nltk"] == [
        ("model", "org/older", None), ("dataset", "org/rows", "train"),
    ]  # fmt: skip


def test_files_of_an_earlier_revision_go(tmp_path):
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", ".cache/huggingface/x", "config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    _remove_others(tmp_path, {"model-00001-of-00002.safetensors", "config.json"})
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"model-00001-of-00002.safetensors", ".cache/huggingface/x", "config.json"}


@real_rows
def test_real_rows_through_lm_evals_own_tasks(tmp_path, tiny_model, tokenizer, monkeypatch):
    """GSM8K, a task of BBH and IFEval, from local files, by a model that knows nothing: the path, not the score."""
    from tspin.evaluation.suites import Column, Suite

    names = {
        "gsm8k": "exact_match,strict-match",
        "leaderboard_bbh_navigate": "acc_norm,none",
        "leaderboard_ifeval": "prompt_level_strict_acc,none",
    }
    columns = [Column(benchmark=b, label=b, group="all", metric=m, num_fewshot=0) for b, m in names.items()]
    suite = Suite(columns=tuple(columns))
    (tmp_path / "suite.yaml").write_text(json.dumps(suite.model_dump(mode="json")))
    (tmp_path / "mine.yaml").write_text(f"evaluation: {{suite: {tmp_path / 'suite.yaml'}}}")
    write_punkt(["Ann has 3 apples. She gives Mr. Bell one of them. How many has she now?"], tmp_path / "punkt_tab")
    take = [
        f"openai/gsm8k:main:train={BENCHMARKS / 'gsm8k_train.jsonl'}",
        f"openai/gsm8k:main:test={BENCHMARKS / 'gsm8k_test.jsonl'}",
        f"SaylorTwift/bbh:*:test={BENCHMARKS / 'bbh'}/*.json",
        f"wis-k/instruction-following-eval::train={BENCHMARKS / 'ifeval.jsonl'}",
        f"punkt_tab={tmp_path / 'punkt_tab'}",
    ]
    assert fetch_needed(load_config(str(tmp_path / "mine.yaml")), tmp_path / "offline", take, lambda line: None) == []
    monkeypatch.setenv(hub.VARIABLE, str(tmp_path / "offline"))
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "offline" / "nltk_data")])
    tiny_model.config.max_position_embeddings = 4096  # IFEval asks for 1,280 new tokens
    found = evaluate(tiny_model, tokenizer, suite, batch_size=4, limit=2)
    assert set(found.scores["benchmark"]) == set(names) and (found.scores["n"] == 2).all()
    assert found.samples["doc_id"].nunique() == 2


def test_every_split_that_training_takes_is_fetched(preset, tmp_path):
    """The benchmark's data set is the training data too, and its test split alone was given."""
    path, take = preset
    path.write_text(path.read_text().replace("path: nobody/sums", "path: openai/gsm8k, name: main"))
    (item,) = (item for item in needed(load_config(str(path))) if item.kind == "dataset")
    assert item.split is None and item.trained == ("train",)
    out, lines = tmp_path / "offline", []
    (missing,) = fetch_needed(load_config(str(path)), out, [take[0], take[3]], lines.append)
    assert "split train, which training takes" in missing and "--take openai/gsm8k:main:train=FILE" in missing
    assert fetch_needed(load_config(str(path)), out, take[2:], lines.append) == []
    # Further splits are added to what is there.
    assert fetch_needed(load_config(str(path)), out, [take[3].replace(":test=", ":more=")], lines.append) == []
    assert set(hub.offline_dataset(out, "openai/gsm8k", "main")) == {"train", "test", "more"}


def test_a_split_that_a_benchmark_lacks_is_named(preset, tmp_path, model_folder, tokenizer, tiny_model):
    out = tmp_path / "offline"
    config = tmp_path / "evaluated.yaml"
    config.write_text(f"evaluation: {{suite: {tmp_path / 'suite.yaml'}}}")
    fetch_needed(load_config(str(config)), out, [preset[1][3]], lambda line: None)
    arguments = ["evaluate", "--model", str(model_folder), "--suite", str(tmp_path / "suite.yaml"), "--limit", "1"]
    result = CliRunner().invoke(app, [*arguments, "--offline", str(out)])
    assert result.exit_code == 2 and "no split train of data set openai/gsm8k" in " ".join(result.output.split())


def test_another_revision_is_fetched_anew_and_refused_until_then(preset, tmp_path):
    path, take = preset
    out = tmp_path / "offline"
    fetch_needed(load_config(str(path)), out, take, lambda line: None)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["datasets"]["nobody/sums"]["default"] |= {"revision": "a" * 40, "asked": "v1"}
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert set(hub.offline_dataset(out, "nobody/sums", None, "v1")) == {"train"}
    assert lacking(out, Item("dataset", "nobody/sums", None, "train", "a" * 40)) is None
    with pytest.raises(UserError, match="at revision aaaa.*, v2 is asked for"):
        hub.offline_dataset(out, "nobody/sums", None, "v2")
    assert "v2 is asked for" in (lacking(out, Item("dataset", "nobody/sums", None, "train", "v2")) or "")


def test_a_benchmark_that_cannot_be_loaded_is_one_line(tmp_path, model_folder, monkeypatch):
    (tmp_path / "suite.yaml").write_text(SUITE)
    result = CliRunner().invoke(
        app, ["evaluate", "--model", str(model_folder), "--suite", str(tmp_path / "suite.yaml")]
    )
    assert result.exit_code == 2 and "gsm8k: its data set cannot be loaded" in " ".join(result.output.split())

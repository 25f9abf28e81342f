"""Bad input by Hypothesis: it works, or it ends in one line with exit code 2 and leaves nothing.

`make test` draws a few examples, the same ones every time; `make fuzz` draws TSPIN_FUZZ of each kind, new ones.
"""

import io
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_cli import SMALL, assert_refused, call
from typer.testing import CliRunner

from tspin import SelfPlayConfig, cli
from tspin.config import Config, load_config
from tspin.data.encoding import encode_examples
from tspin.data.responses import RESPONSE_SCHEMA
from tspin.data.sources import source_of
from tspin.errors import UserError
from tspin.experiment.results import read_results
from tspin.names import COEFFICIENTS, SECTIONS, preset_fields
from tspin.objectives import METHODS

EXAMPLES = int(os.environ.get("TSPIN_FUZZ", 0))
QUICK = not EXAMPLES
OUTCOMES: Counter[tuple[str, str]] = Counter()
TINY = [*("--set", "max_new_tokens=2"), *("--set", "long_prompts=drop")]


def some(quick: int, part: int = 1):
    return settings(
        max_examples=quick if QUICK else max(EXAMPLES // part, 1),
        derandomize=QUICK,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if QUICK else [Phase.generate, Phase.shrink],
    )


@pytest.fixture(scope="module", autouse=True)
def outcomes():
    yield
    if not QUICK:
        for (kind, outcome), count in sorted(OUTCOMES.items()):
            print(f"{kind}: {count} {outcome}")
        print(f"{sum(OUTCOMES.values())} inputs in all")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


def holds(kind: str, place: Path, *arguments, made: Path | None = None):
    """Run a command in process: it works, or it is one line and exit code 2, with nothing new in `place`."""
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    OUTCOMES[kind, "worked" if result.exit_code == 0 else "refused"] += 1
    if result.exit_code == 0:
        if made is not None:
            made.unlink()
        return result
    assert result.exit_code == 2, (result.exception, arguments)
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("tspin: ")]
    assert lines and len(lines[-1]) < 5000, result.output
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    return result


WORDS = ["", "1 + 1 =", "<|im_start|>user\n", "</s>", "<|end|>", "<|pad|>", "{{ 7 }}", "{prompt}", "a\0b", "😀",
         "مرحبا", "\u202e", "\u2028", "\ud800", "\ue000", "\r", " ", "\ufeff"]  # fmt: skip
TEXT = st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=4).map("".join)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
SPEAKERS = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"])}, optional={"text": TEXT}))
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": TEXT | SPEAKERS, "content": TEXT | PLAIN | PARTS, "tool_calls": VALUES})
    | st.fixed_dictionaries({"from": SPEAKERS, "value": TEXT | PLAIN})
)
WHOLE = MESSAGES | VALUES
ROWS = st.fixed_dictionaries(
    {}, optional={"prompt": TEXT | WHOLE, "completion": TEXT | MESSAGES, "messages": WHOLE, "tools": TEXT | VALUES}
) | st.fixed_dictionaries({}, optional={name: WHOLE for name in ("prompt", "chosen", "real", "conversations", "image")})
LINES = (
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}).map(lambda row: json.dumps(row).encode())
    | ROWS.map(lambda row: json.dumps(row).encode())
    | ROWS.map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass"))
    | st.binary(max_size=40)
    | st.sampled_from([b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}", b"NaN", b'"', b"\0"])
)


@some(25)
@given(st.lists(LINES, max_size=3))
def test_jsonl(model, place, lines):
    path, out = place / "rows.jsonl", place / "out.parquet"
    path.write_bytes(b"\n".join(lines))
    holds("JSONL", place, "sample", "--model", model, "--data", path, "--out", out, *TINY, made=out)


def test_a_long_line(model, place):
    """Ten megabytes; in the short form less, since it is the tokenizer's time that counts."""
    size = 200_000 if QUICK else 10**7
    path, out = place / "rows.jsonl", place / "out.parquet"
    rows = [{"prompt": "1 + 1 = " * (size // 8), "completion": "2"}, {"prompt": "1 + 1 =", "completion": "2" * size}]
    path.write_text("\n".join(map(json.dumps, rows)))
    result = holds("JSONL", place, "sample", "--model", model, "--data", path, "--out", out, *TINY, made=out)
    assert result.exit_code == 0 and "1 of 2 data rows dropped" in result.stderr and "rows 1\n" in result.stderr


KEYS = st.sampled_from([*SECTIONS, *preset_fields(), "path", "alpha", "columns", "benchmark", "extends", "seed"]) | TEXT
FIELDS = {name: getattr(Config(), name) for name in ("model", "data")} | {"engine": Config().training.engine}
DRAWN = {
    name: st.dictionaries(st.sampled_from([*type(section).model_fields, "extra"]), VALUES, max_size=3)
    for name, section in FIELDS.items()
}
OWN = st.dictionaries(st.sampled_from([*preset_fields(), *COEFFICIENTS, "data", "extra"]), VALUES, max_size=3)
METHOD_TREES = st.dictionaries(st.sampled_from([*METHODS, "extra"]), OWN | VALUES, max_size=3)
TREES = st.fixed_dictionaries({}, optional={**DRAWN, "iterations": VALUES, "methods": METHOD_TREES | VALUES})
TREES |= st.dictionaries(KEYS, VALUES, max_size=3)
WRONG = ["&a [*a]", "2024-13-45", "[" * 5000, "{[]: 1}", "1: 2", "- a", "a: b: c", "\0", "!!python/object:os.system {}",
         "iterations: 1" + "0" * 400, "iterations: .inf", "learning_rate: .nan", "a: &a {b: 1}\nc: *a",
         "\n".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else '1'] * 9)}]" for n in range(9))]  # fmt: skip
YAMLS = TREES.map(lambda tree: yaml.safe_dump(tree).encode()) | st.sampled_from([w.encode() for w in WRONG])
YAMLS |= st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass"))


@some(150)
@given(YAMLS)
def test_configs(place, content):
    path = place / "config.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(load_config(str(path)), Config)
        OUTCOMES["config", "worked"] += 1
    except UserError as error:
        OUTCOMES["config", "refused"] += 1
        assert len(str(error)) < 5000
    result = CliRunner().invoke(cli.app, ["evaluate", "--model", "pocket", "--suite", str(path), "--limit", "1"])
    OUTCOMES["suite", "refused"] += 1
    assert result.exit_code == 2 and "Traceback" not in result.output, (result.exception, content)


@some(20)
@given(st.sampled_from(["top_p", "warmup_steps", "data.labels", "model.dtype", "a..b", ""]), TEXT)
def test_settings(model, place, key, value):
    path, out = place / "good.jsonl", place / "out.parquet"
    path.write_text(json.dumps({"prompt": "1", "completion": "2"}))
    own = ["--set", f"{key}={value}"]
    holds("--set", place, "sample", "--model", model, "--data", path, "--out", out, *TINY, *own, made=out)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": print}))


def misshapen(folder: Path, shape=(3, 5)) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def overwrite(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


BREAKS = [pickled, misshapen, *(overwrite("model.safetensors", c) for c in (b"", b"\xff" * 64, pickle.dumps({"a": 1})))]
BREAKS += [overwrite("config.json", c) for c in (b"", b"[]", b"{}", b"\xff", b'{"model_type": "nothing"}')]
BREAKS += [overwrite("tokenizer.json", c) for c in (b"", b"{}", b"[1]", b"\xff")]


@pytest.mark.parametrize("break_it", BREAKS)
def test_checkpoints(model, place, break_it):
    folder, path, out = place / "broken", place / "good.jsonl", place / "out.parquet"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    path.write_text(json.dumps({"prompt": "1", "completion": "2"}))
    break_it(folder)
    result = holds("checkpoint", place, "sample", "--model", folder, "--data", path, "--out", out, *TINY)
    assert result.exit_code == 2


CELLS = st.fixed_dictionaries(
    {"prompt_id": st.none() | st.integers(-1, 2), "text": st.none() | TEXT.filter(str.isprintable),
     "ids": st.none() | st.lists(st.none() | st.sampled_from([-1, 0, 1, 5, 10**6]), max_size=3),
     "finished": st.none() | st.booleans()}
)  # fmt: skip

SOUND = st.fixed_dictionaries(
    {"prompt_id": st.integers(0, 3), "text": st.just("x"), "ids": st.just([5, 1]), "finished": st.booleans()}
)


@some(25)
@given(st.lists(SOUND | CELLS, max_size=3) | st.binary(max_size=40) | st.sets(st.sampled_from(["text", "ids"])))
def test_responses(model, place, content):
    path, answers, out = place / "good.jsonl", place / "answers.parquet", place / "diagnostics.parquet"
    path.write_text(json.dumps({"prompt": "1", "completion": "2"}))
    if isinstance(content, bytes):
        answers.write_bytes(content)
    elif isinstance(content, set):
        pq.write_table(pa.table({name: ["x"] for name in sorted(content)}), answers)
    else:
        pq.write_table(pa.Table.from_pylist(content, schema=RESPONSE_SCHEMA), answers)
    own = ["--model", model, "--data", path, "--synthetic", answers, "--out", out]
    holds("responses", place, "diagnose", *own, made=out)


RESULTS = Path(__file__).parents[1] / "results" / "reference" / "pocket"
DAMAGE = st.tuples(
    st.integers(0, 30), st.sampled_from(["cell", "column", "bytes", "row twice", "cut"]), st.integers(0, 8)
)


@some(12, part=5)  # two seconds each
@given(DAMAGE, st.sampled_from(["", "x", "1e999", "-1", "nan", "tspin", '"', "\0", "99999999999999999999"]))
def test_results(tmp_path_factory, damage, value):
    where, what, column = damage
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(RESULTS, folder / "pocket", ignore=shutil.ignore_patterns("*.png", "*.svg", "studies"))
    path = folder / "pocket" / "evaluations.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    name = table.columns[column % len(table.columns)]
    if what == "cell":
        table.loc[where, name] = value
    elif what == "column":
        table = table.drop(columns=name)
    elif what == "row twice":
        table = pd.concat([table, table.iloc[[where]]])
    buffer = io.StringIO()
    table.to_csv(buffer, index=False)
    content = buffer.getvalue().encode()
    if what in ("bytes", "cut"):
        content = content[:-where] if what == "cut" else content + b"\xff" * where
    path.write_bytes(content)
    for name in ("table1.md", "table1.csv", "table1.tex"):
        (folder / "pocket" / name).unlink(missing_ok=True)
    holds("results", folder, "table", "1", "--results", folder)
    shutil.rmtree(folder)


def test_special_tokens_in_data_are_text(tokenizer):
    """Neither opens a turn, nor ends a response before its end."""
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    rows = [
        {"prompt_id": 0, "prompt": "1 + 1 =", "completion": "2"},
        {"prompt_id": 4, "prompt": f"a {end} b", "completion": f"x {pad}{end} y"},
    ]
    limits = {"max_prompt_length": 64, "max_completion_length": 64, "long_prompts": "error"}
    for template in ("chat", "paper", "Q {prompt} A", f"{pad}{{prompt}}"):
        plain, example = examples = encode_examples(
            source_of(rows).read(), tokenizer, SelfPlayConfig(template=template, **limits)
        )
        assert examples.noted == {"special_tokens": [1]}
        assert "1 of 2 data rows spell special tokens" in examples.remarks[1]
        own = [token for token in example.prompt_ids if token in special]
        assert own == [token for token in plain.prompt_ids if token in special]  # the template's and no others
        assert tokenizer.decode(example.prompt_ids, clean_up_tokenization_spaces=False) == example.prompt
        assert special.isdisjoint(example.labelled.ids[:-1]) and example.labelled.ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(example.labelled.ids[:-1]) == f"x {pad}{end} y"
    examples = encode_examples(source_of(rows).read(), tokenizer, SelfPlayConfig(template="none", **limits))
    raw = examples[1]
    assert tokenizer.eos_token_id in raw.prompt_ids and special.isdisjoint(raw.labelled.ids[:-1])
    assert "as control tokens in prompts" in examples.remarks[1]


def test_long_prompts_are_listed(tokenizer):
    rows = [{"prompt": "1 + " * (1 + 40 * (n % 2)), "completion": "2"} for n in range(4)]
    limits = {"template": "paper", "max_prompt_length": 32, "max_completion_length": 8}
    for what, word in (("drop", "dropped"), ("truncate", "truncated")):
        examples = encode_examples(source_of(rows).read(), tokenizer, SelfPlayConfig(long_prompts=what, **limits))
        _, line = examples.remarks
        assert examples.noted == {word: [1, 3]} and "2 of 4 data rows" in line and line.endswith("rows 2, 4")


def test_a_context_too_short_for_a_problem_is_one_line(model, place):
    folder = place / "short"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "max_position_embeddings": 8}))
    result = holds("context", place, "evaluate", "--model", folder, "--suite", "pocket", "--limit", 1)
    assert result.exit_code == 2 and "context" in result.stderr


@pytest.mark.parametrize("name", ["evaluations.csv", "steps.parquet", "responses.parquet", "provenance.json"])
def test_damaged_results_are_named_before_a_run_adds_to_them(tmp_path, name):
    shutil.copytree(RESULTS, tmp_path / "pocket", ignore=shutil.ignore_patterns("*.png", "*.svg", "studies"))
    assert set(read_results(tmp_path / "pocket")) >= {"evaluations", "steps", "runs"}
    path = tmp_path / "pocket" / name
    path.write_bytes(path.read_bytes()[:200] + b"\xff")
    before = {file.name: file.read_bytes() for file in (tmp_path / "pocket").iterdir()}
    with pytest.raises(UserError, match=f"{name} is (damaged|not valid JSON)"):
        read_results(tmp_path / "pocket")
    assert {file.name: file.read_bytes() for file in (tmp_path / "pocket").iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "iteration-0/guards.json", "iteration-0/diagnostics.parquet"])
def test_a_damaged_run_is_not_compared(tmp_path, name, model_folder, data_file):
    own = ["--model", model_folder, "--data", data_file, "--out", tmp_path / "run", "--method", "sft", *SMALL]
    assert call("run", *own).exit_code == 0
    path = tmp_path / "run" / "sft" / name
    path.write_bytes(path.read_bytes()[:20])
    refused = call("compare", tmp_path / "run" / "sft", f"{RESULTS}:spin:0", "--out", tmp_path / "page.html")
    assert_refused(refused, "damaged")
    assert not (tmp_path / "page.html").exists()

"""Loading, templating and encoding prompt–completion data."""

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import LlamaTokenizer

from tspin import SelfPlayConfig
from tspin.data.encoding import encode_dataset, encode_examples
from tspin.data.responses import Response, read_responses, write_responses
from tspin.data.sources import Source, load_rows, nested_subset, source_of
from tspin.errors import UserError
from tspin.pocket.tasks import LABELS_PER_TASK, table_tasks

LIMITS = {"max_prompt_length": 64, "max_completion_length": 16, "long_prompts": "error"}


def texts(source: Source) -> list[dict[str, str]]:
    """Rows of one message each, as they stand in a file."""
    return [{name: json.loads(row[name])[0]["content"] for name in ("prompt", "completion")} for row in source.read()]


def encoded(rows, tokenizer, **settings):
    return encode_examples(source_of(rows).read(), tokenizer, SelfPlayConfig(**{**LIMITS, **settings}))


def test_jsonl_and_parquet_agree(tmp_path, data_file, rows):
    parquet = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    assert texts(load_rows(str(data_file))) == texts(load_rows(str(parquet))) == rows


def test_a_text_is_one_message(tokenizer):
    conversation = {
        "prompt": [{"role": "user", "content": "1 + 1 ="}],
        "completion": [{"role": "assistant", "content": "2"}],
    }
    plain = encoded([{"prompt": "1 + 1 =", "completion": "2"}], tokenizer, template="chat")
    chat = encoded([conversation], tokenizer, template="paper")
    assert list(plain) == list(chat)
    assert plain[0].prompt == "### Instruction: 1 + 1 =\n\n### Response: "


def test_labelled_responses_end_unless_they_are_cut(tokenizer):
    rows = [{"prompt": "1 + 11 =", "completion": "The answer is 12."}]
    whole = encoded(rows, tokenizer, max_completion_length=16)[0].labelled
    assert whole.finished and whole.ids[-1] == tokenizer.eos_token_id
    cut = encoded(rows, tokenizer, max_completion_length=3)[0].labelled
    assert not cut.finished and len(cut.ids) == 3 and tokenizer.eos_token_id not in cut.ids


@pytest.mark.parametrize("what, kept", [("truncate", 2), ("drop", 1)])
def test_long_prompts(tokenizer, what, kept):
    rows = [{"prompt": "1 +", "completion": "2"}, {"prompt": "1 + " * 40, "completion": "2"}]
    examples = encoded(rows, tokenizer, template="paper", long_prompts=what)
    assert len(examples) == kept
    assert all(len(example.prompt_ids) <= 64 for example in examples)
    if what == "truncate":  # the end of a prompt is where its response follows
        assert examples[1].prompt_ids[-4:] == examples[0].prompt_ids[-4:]
    with pytest.raises(UserError, match=r"data row 2: prompt of \d+ tokens, max_prompt_length is 64"):
        encoded(rows, tokenizer, template="paper")


def test_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts(load_rows(str(path)))[0]["prompt"] == "a\u2028b"


def test_a_template_shows_the_prompt(tokenizer):
    rows = [{"prompt": "1", "completion": "2"}]
    assert encoded(rows, tokenizer, template="Q: {prompt} A:")[0].prompt == "Q: 1 A:"
    with pytest.raises(UserError, match="template 'papre'"):
        encoded(rows, tokenizer, template="papre")


def test_responses_survive_the_file(tmp_path):
    responses = [Response([5, 6, 1], "ab", True), Response([7], "c", False)]
    write_responses(tmp_path / "r.parquet", [9, 3], responses)
    found = read_responses(tmp_path / "r.parquet")
    assert list(found) == [9, 3] and list(found.of([3, 9])) == responses[::-1] and 4 not in found
    assert found == dict(zip([9, 3], responses, strict=True))


def test_subsets_are_nested(tmp_path):
    small, large = (nested_subset(50, n, seed=1) for n in (10, 30))
    assert len(small) == 10 and set(small) < set(large)
    assert small != nested_subset(50, 10, seed=2)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(i), "completion": "x"}) + "\n" for i in range(50)))
    rows = load_rows(str(path), labels=10, seed=1).read()
    assert [(row["number"], json.loads(row["prompt"])[0]["content"]) for row in rows] == [(n, str(n)) for n in small]
    with pytest.raises(UserError, match="51 labelled responses asked for, the data set has 50"):
        nested_subset(50, 51, seed=1)


def test_the_pocket_labels():
    rows = texts(load_rows("pocket"))
    assert len(rows) == LABELS_PER_TASK * len(table_tasks()) == 4000
    assert len({row["prompt"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    "text, line",
    [
        ("", "has no rows"),
        ('{"prompt": "a", "completion": null}\n', r"row 1: no response \(column 'completion'\)"),
        ('{"prompt": "a", "completion": " "}\n', "row 1: empty response"),
        ('{"prompt": "a", "completion": "b"}\n{"completion": "b"}\n', "row 2: no prompt"),
        ("[1]\n", "row 1: not an object"),
        ('{"prompt": \n', "line 1: not JSON"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=line):
        load_rows(str(path)).read()


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_rows(str(tmp_path / "none.jsonl"))
    fake = tmp_path / "fake.parquet"
    fake.write_text("no table")
    with pytest.raises(UserError, match="not a Parquet file"):
        load_rows(str(fake)).read()
    with pytest.raises(UserError, match="no file or folder of this name is here, and the hub cannot be reached"):
        load_rows("nobody/no-such-data-set")


@pytest.mark.parametrize("template", ["paper", "chat"])
def test_special_tokens_that_data_spells_are_text_and_are_listed(template, tokenizer):
    end = tokenizer.eos_token
    rows = [
        {"prompt": "1 + 1 =", "completion": "2"},
        {"prompt": f"1 {end} 1 =", "completion": f"2 {end} and more"},
    ]
    examples = encoded(rows, tokenizer, template=template)
    plain, hostile = examples
    assert tokenizer.eos_token_id not in hostile.prompt_ids
    assert hostile.labelled.ids.count(tokenizer.eos_token_id) == 1 == plain.labelled.ids.count(tokenizer.eos_token_id)
    assert hostile.labelled.ids[-1] == tokenizer.eos_token_id and len(hostile.labelled.ids) > 5
    assert end in hostile.prompt and examples.noted == {"special_tokens": [1]}
    assert "1 of 2 data rows spell special tokens" in examples.remarks[1]


def test_a_row_that_spells_special_tokens_has_the_others_tokens_where_it_is_alike():
    """Llama's tokenizer puts a space before a text's first word, and before none that follows a control token."""
    bytes_ = {f"<0x{value:02X}>": 3 + value for value in range(256)}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **bytes_, **{text: 259 + n for n, text in enumerate("▁abcdefghij")}}
    llama = LlamaTokenizer(vocab=vocabulary, merges=[], legacy=False, add_bos_token=True)
    llama.chat_template = (
        "{% for m in messages %}{{ '|' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
    )
    rows = [{"prompt": "b", "completion": "c"}, {"prompt": "b </s>", "completion": "c"}]
    plain, hostile = encoded(rows, llama, template="chat")
    ends = [llama.convert_ids_to_tokens(e.prompt_ids)[-3:] for e in (plain, hostile)]
    assert ends[0] == ends[1] == ["</s>", "<0x0A>", "a"]


def test_what_is_not_learned_whole_is_listed(tokenizer):
    whole, long = ("It is 4.", "It is 4, since two and two are four and no other number. " * 5)
    rows = [{"prompt": "2 + 2 =", "completion": completion} for completion in (whole, long)]
    examples = encoded(rows, tokenizer, template="chat")
    assert examples.noted == {"cut": [1]} and "1 of 2 data rows cut to 16 tokens" in examples.remarks[1]


def test_what_is_kept_of_a_large_file_is_of_its_subset(data_file, monkeypatch):
    monkeypatch.setattr("tspin.data.sources.LARGE", 1)
    keys = [load_rows(str(data_file), labels=4, seed=seed).key for seed in (0, 1, 0)]
    assert keys[0] == keys[2] != keys[1]


def test_prompts_are_told_apart_by_their_texts(tokenizer):
    first, same, other = (
        encoded([{"prompt": p, "completion": c}], tokenizer) for p, c in (("1", "2"), ("1", "3"), ("4", "2"))
    )
    assert first.prompts_fingerprint == same.prompts_fingerprint != other.prompts_fingerprint
    assert first.fingerprint != same.fingerprint


def test_what_is_exactly_as_long_as_it_may_be_is_whole(tokenizer):
    rows = [{"prompt": "1 + 1 =", "completion": "2 and so on"}]
    (free,) = encoded(rows, tokenizer)
    sizes = {"max_prompt_length": len(free.prompt_ids), "max_completion_length": len(free.labelled.ids)}
    assert list(encoded(rows, tokenizer, **sizes)) == [free] and free.labelled.finished
    (cut,) = encoded(rows, tokenizer, **{**sizes, "max_completion_length": len(free.labelled.ids) - 1})
    assert not cut.labelled.finished
    with pytest.raises(UserError, match="max_prompt_length is"):
        encoded(rows, tokenizer, max_prompt_length=len(free.prompt_ids) - 1)


def test_what_is_kept_of_examples_is_of_their_settings_and_their_tokenizer(tmp_path, data_file, tokenizer, monkeypatch):
    monkeypatch.setattr("tspin.data.sources.LARGE", 1)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<more>"])
    for made_by, settings in [(tokenizer, {}), (tokenizer, {"long_prompts": "drop"}), (other, {}), (tokenizer, {})]:
        args = SelfPlayConfig(**{**LIMITS, "output_dir": str(tmp_path / "run"), **settings})
        encode_dataset(load_rows(str(data_file)), made_by, args)
    assert len(list((tmp_path / "run").glob("examples-*[0-9a-f]"))) == 3

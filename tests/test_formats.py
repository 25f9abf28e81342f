"""Formats of data sets: each gives the rows that the same data gives in prompt–completion form, from every source."""

import bz2
import csv
import gzip
import json
import lzma
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from datasets.arrow_writer import ArrowWriter

from tspin.config import DataSettings, build_config
from tspin.data.files import is_local
from tspin.data.rows import ROWS
from tspin.data.sources import load_rows, source_of
from tspin.errors import UserError
from tspin.experiment.preset import load_dataset
from tspin.hub import offline
from tspin.planning.needs import needed

ASKED = ["What is 1 + 1?", 'Say "007", in\n\nRoman: é\u2028?']
SAID = ["NA", "007"]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [1, 2]}}}
TEXT_CALL = {"type": "function", "function": {"name": "echo", "arguments": '{"text": null}'}}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "echo", "parameters": {"properties": {"text": {"enum": ["x", "y"]}}}}},
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


PAIRS = [{"prompt": [user(x)], "completion": [assistant(y)]} for x, y in zip(ASKED, SAID, strict=True)]
WITH_SYSTEM = [{**row, "prompt": [SYSTEM, *row["prompt"]]} for row in PAIRS]
CALLS = [
    {"prompt": [user("Add.")], "completion": [assistant(None, tool_calls=[CALL])], "tools": TOOLS},
    {"prompt": [user("Echo.")], "completion": [assistant("I do.")], "tools": TOOLS[1:]},
    {
        "prompt": [user("Add."), assistant(None, tool_calls=[CALL]), {"role": "tool", "name": "add", "content": ""}],
        "completion": [assistant("4", reasoning_content="1, 1 and 2")],
        "tools": None,
    },
]
TEXT_CALLS = [{"completion": [assistant("", tool_calls=[TEXT_CALL])], "prompt": [user("Echo.")]}]
NAMES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def spoken(messages):
    return [{"from": NAMES[message["role"]], "value": message["content"]} for message in messages]


def pairs(prompt, response, **more):
    return [{prompt: x, response: y, **more} for x, y in zip(ASKED, SAID, strict=True)]


def whole(column, rows=PAIRS):
    return [{column: [*row["prompt"], *row["completion"]]} for row in rows]


def split_prompts(about, response):
    """The first prompt has nothing to be about, the second is in two columns."""
    instruction, rest = ASKED[1].split("\n\n")
    return [
        {"instruction": ASKED[0], about: "", response: SAID[0]},
        {"instruction": instruction, about: rest, response: SAID[1]},
    ]


REJECTED = [user("What?"), assistant("Nothing.")]
FLAT = {  # what is said of it → the rows
    "TRL's columns prompt, completion": pairs("prompt", "completion"),
    "TRL's columns prompt, completion; not used: messages": pairs("prompt", "completion", messages="no"),
    "TRL's preference columns prompt, chosen; not used: rejected": pairs("prompt", "chosen", rejected="no"),
    "Alpaca's columns instruction, input, output": split_prompts("input", "output"),
    "Dolly's columns instruction, context, response": split_prompts("context", "response"),
    "the columns prompt, response": pairs("prompt", "response"),
    "the columns question, answer": pairs("question", "answer"),
    "the columns query, response; not used: id": pairs("query", "response", id="7"),
}
CHATS = {  # what is said of it → (the rows, the same as prompt and completion)
    "TRL's column messages": (whole("messages"), PAIRS),
    "TRL's column messages; not used: source": (
        [{**row, "source": "x"} for row in whole("messages", WITH_SYSTEM)],
        WITH_SYSTEM,
    ),
    "TRL's column messages; not used: prompt, prompt_id": (
        [{"prompt": "x", "prompt_id": "f0e3", **row} for row in whole("messages")],
        PAIRS,
    ),
    "TRL's columns messages, tools": (
        [{**row, "tools": TOOLS} for row in whole("messages")],
        [{**row, "tools": TOOLS} for row in PAIRS],
    ),
    "TRL's columns prompt, completion, tools": (CALLS, CALLS),
    "TRL's columns completion, prompt": (TEXT_CALLS, TEXT_CALLS),
    "TRL's preference columns prompt, chosen; not used: rejected": (
        [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": REJECTED[1:]} for row in WITH_SYSTEM],
        WITH_SYSTEM,
    ),
    "TRL's preference columns prompt, chosen; not used: rejected, messages": (  # as UltraFeedback has it
        [
            {"prompt": x, **row, "rejected": REJECTED, "messages": row["chosen"]}
            for x, row in zip(ASKED, whole("chosen"), strict=True)
        ],
        PAIRS,
    ),
    "TRL's preference column chosen; not used: rejected": (
        [{**row, "rejected": REJECTED} for row in whole("chosen")],
        PAIRS,
    ),
    "SPIN's column real; generated is not used (data.generated=true takes it as iteration 0's y′)": (
        [{**row, "generated": REJECTED} for row in whole("real")],
        PAIRS,
    ),
    "ShareGPT's column conversations": (
        [{"conversations": spoken(row["conversations"])} for row in whole("conversations", WITH_SYSTEM)],
        WITH_SYSTEM,
    ),
    "ShareGPT's columns system, conversations": (
        [{"system": "Be brief.", "conversations": spoken(row["conversations"])} for row in whole("conversations")],
        WITH_SYSTEM,
    ),
    "ShareGPT's column conversation": (whole("conversation"), PAIRS),
}


def read(source):
    """The rows, JSON as values: in Arrow the keys of an object have an order of their own."""
    rows = source.read()
    assert rows.features == ROWS
    return [{name: json.loads(cell) if isinstance(cell, str) else cell for name, cell in row.items()} for row in rows]


def wanted(rows):
    empty = {"tools": None, "generated": None, "task": None}
    return [{"number": n, "row": n, **empty, **row} for n, row in enumerate(rows)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table_file(path, rows, delimiter):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def written(path, content):
    path.write_bytes(content)
    return path


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def in_folder(path, name, content):
    path.mkdir()
    (path / name).write_bytes(content)
    return path


def splits(rows):
    return DatasetDict(test=Dataset.from_list(rows[:1]), train=Dataset.from_list(rows))


def arrow(path, rows):
    with ArrowWriter(path=str(path), features=Dataset.from_list(rows).features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    return path


def saved(path, dataset):
    dataset.save_to_disk(path)
    return path


FILES = {
    "jsonl": lambda folder, rows: written(folder / "a.jsonl", lines(rows)),
    "json": lambda folder, rows: written(folder / "a.json", json.dumps(rows, indent=1).encode()),
    "gz": lambda folder, rows: written(folder / "a.jsonl.gz", gzip.compress(lines(rows))),
    "bz2": lambda folder, rows: written(folder / "a.json.bz2", bz2.compress(json.dumps(rows).encode())),
    "xz": lambda folder, rows: written(folder / "a.jsonl.xz", lzma.compress(lines(rows))),
    "parquet": lambda folder, rows: parquet(folder / "a.parquet", rows),
    "parquet of JSON": lambda folder, rows: json_parquet(folder / "a.parquet", rows),
    "arrow": lambda folder, rows: arrow(folder / "a.arrow", rows),
    "folder": lambda folder, rows: in_folder(folder / "set", "train-0.jsonl", lines(rows)),
    "folder of gz": lambda folder, rows: in_folder(folder / "json", "a.jsonl.gz", gzip.compress(lines(rows))),
    "folder of arrow": lambda folder, rows: arrow(folder / "a.arrow", rows).parent,
    "saved": lambda folder, rows: saved(folder / "set", Dataset.from_list(rows)),
    "saved splits": lambda folder, rows: saved(folder / "set", splits(rows)),
}
TABLES = {
    "csv": lambda folder, rows: table_file(folder / "a.csv", rows, ","),
    "tsv": lambda folder, rows: table_file(folder / "a.tsv", rows, "\t"),
    "folder of csv": lambda folder, rows: table_file(folder / "train.csv", rows, ",").parent,
}
MEMORY = {
    "list": lambda rows: rows,
    "generator": iter,
    "Dataset": Dataset.from_list,
    "Dataset of JSON": lambda rows: Dataset.from_list(rows, on_mixed_types="use_json"),
    "DatasetDict": lambda rows: splits(rows),
}


def json_parquet(path, rows):
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def no_network_and_own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("medium", ["jsonl", "parquet", "folder", "saved", *TABLES])
@pytest.mark.parametrize("said", FLAT)
def test_flat_formats_in_files(tmp_path, said, medium, capsys):
    path = (FILES | TABLES)[medium](tmp_path, FLAT[said])
    assert read(load_rows(str(path))) == wanted(PAIRS)
    assert f"note: {path}: {said}\n" in capsys.readouterr().err


@pytest.mark.parametrize("medium", FILES)
@pytest.mark.parametrize("said", CHATS)
def test_conversations_in_files(tmp_path, said, medium, capsys):
    rows, same = CHATS[said]
    path = FILES[medium](tmp_path, rows)
    assert read(load_rows(str(path))) == wanted(same) == read(source_of(same))
    assert f"note: {path}: {said}\n" in capsys.readouterr().err


@pytest.mark.parametrize("medium", MEMORY)
@pytest.mark.parametrize("said", [*FLAT, *CHATS])
def test_formats_in_memory(said, medium, capsys):
    rows, same = CHATS.get(said) or (FLAT[said], PAIRS)
    assert read(source_of(MEMORY[medium](rows))) == wanted(same)
    err = capsys.readouterr().err
    assert f"note: train_dataset: {said}\n" in err
    assert ("note: train_dataset: split train of test, train\n" in err) == (medium == "DatasetDict")


LONG = [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d"), assistant("e"), user("f")]


def rounds_of(rows, **settings):
    return [
        (row["row"], [m["content"] for m in row["prompt"]], row["completion"][0]["content"])
        for row in read(source_of(rows, **settings))
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": LONG},
        {"prompt": LONG[:2], "completion": LONG[2:]},
        {"prompt": "a", "chosen": LONG},
        {"chosen": LONG},
        {"real": LONG, "generated": LONG},
        {"conversations": spoken(LONG)},
        {"conversations": spoken(LONG[1:]), "system": "Be brief."},
    ],
)
def test_rounds(row, capsys):
    one = {**row, **{name: of[:3] for name, of in row.items() if name != "prompt" and isinstance(of, list)}}
    if "prompt" in row and "completion" in row:
        one["completion"] = LONG[2:3]
    first = [(0, ["Be brief.", "a"], "b"), (1, ["Be brief.", "a"], "b")]
    assert rounds_of([one, row]) == first
    line = "1 of 2 conversations have later rounds, which are not used: data.rounds=all makes each assistant turn an"
    assert f"note: train_dataset: {line} example of its own\n" in capsys.readouterr().err
    later = [(1, ["Be brief.", "a", "b", "c"], "d"), (1, ["Be brief.", "a", "b", "c", "d"], "e")]
    assert rounds_of([one, row], rounds="all") == first + later
    assert [r["number"] for r in source_of([row, one], rounds="all").read()] == [0, 1, 2, 3]
    assert "later rounds" not in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["completion", "chosen"])
def test_the_prompts_own_turns_are_no_responses(answer):
    rows = [{"prompt": LONG[:4], answer: LONG[4:]}]
    wanted = [(0, ["Be brief.", "a", "b", "c"], "d"), (0, ["Be brief.", "a", "b", "c", "d"], "e")]
    assert rounds_of(rows, rounds="all") == wanted and rounds_of(rows) == wanted[:1]
    assert rounds_of([{"prompt": LONG[:4], "chosen": LONG}], rounds="all") == wanted


def test_settings_reach_the_rows(tmp_path):
    path = written(tmp_path / "a.jsonl", lines([{"messages": LONG}] * 4))
    data = DataSettings(path=str(path), rounds="all", labels=5)
    rows = load_dataset(data).read()
    assert len(rows) == 5 and {*rows["row"]} <= {0, 1, 2, 3} and {*rows["number"]} <= {*range(12)}
    with pytest.raises(UserError, match="13 labelled responses asked for, the data set has 12"):
        load_dataset(data.model_copy(update={"labels": 13})).read()
    path = written(tmp_path / "b.jsonl", lines([{"real": LONG[1:3], "generated": [user("a"), assistant("x")]}]))
    (row,) = read(load_dataset(DataSettings(path=str(path), generated=True)))
    assert row["generated"] == [assistant("x")] and row["completion"] == [assistant("b")]


@pytest.mark.parametrize("drawn", ["", "x", [assistant("x")], [user("a"), assistant("")]])
def test_generated_of_any_format(drawn, capsys):
    (row,) = read(source_of([{"prompt": "a", "completion": "b", "generated": drawn}], generated=True))
    assert row["generated"] == [assistant(drawn if isinstance(drawn, str) else drawn[-1]["content"])]
    assert "TRL's columns prompt, completion, generated\n" in capsys.readouterr().err


def test_a_number_of_ones_own_is_for_one_example():
    rows = [{"prompt_id": 9, "messages": LONG}]
    assert [row["number"] for row in source_of(rows).read()] == [9]
    assert [row["number"] for row in source_of(rows, rounds="all").read()] == [0, 1, 2]


def test_own_columns_win(capsys):
    rows = [{"prompt": "no", "completion": "no", "q": "1 + 1 =", "a": [assistant("2")], "image": "x"}]
    (row,) = read(source_of(rows, columns={"prompt": "q", "completion": "a"}))
    assert (row["prompt"], row["completion"]) == ([user("1 + 1 =")], [assistant("2")])
    assert "train_dataset: the chosen columns q, a; not used: prompt, completion, image\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="no column 'b', which data.columns names; there are: prompt, completion, q, a"):
        source_of(rows, columns={"completion": "b"}).read()


def test_sharegpts_calls_of_functions():
    turns = [
        *({"from": "human", "value": "Add."}, {"from": "function_call", "value": json.dumps(CALL["function"])}),
        *({"from": "observation", "value": "2"}, {"from": "gpt", "value": "It is 2.", "weight": None}),
    ]
    rows = [{"conversations": turns, "tools": json.dumps(TOOLS)}]
    same = [
        {"prompt": [user("Add.")], "completion": [assistant(None, tool_calls=[CALL])], "tools": TOOLS},
        {
            "prompt": [user("Add."), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "2"}],
            "completion": [assistant("It is 2.")],
            "tools": [json.dumps(tool) for tool in TOOLS],
        },
    ]
    found = read(source_of(rows, rounds="all"))
    assert [{**row, "row": row["number"]} for row in found] == read(source_of(same))
    assert found[0]["tools"] == TOOLS


@pytest.mark.parametrize("given", [json.dumps([CALL]), [json.dumps(CALL)], json.dumps(CALL), CALL], ids=str)
def test_tool_calls_may_be_json(given):
    """As sets whose rows call functions of many shapes have them; `tools` may be JSON too."""
    rows = [
        {"prompt": [user("Add."), assistant("", tool_calls=given)], "completion": [assistant(None, tool_calls=given)]}
    ]
    same = [
        {"prompt": [user("Add."), assistant("", tool_calls=[CALL])], "completion": [assistant(None, tool_calls=[CALL])]}
    ]
    assert read(source_of(rows)) == read(source_of(same))


def test_parts_of_text_are_joined_and_dates_are_texts():
    parts = [{"type": "text", "text": "1 + "}, "1", {"type": "text", "text": " ="}]
    rows = [{"messages": [user(parts), {**assistant("2"), "at": datetime(2024, 5, 1)}]}]
    (row,) = read(source_of(rows))
    assert row["prompt"] == [user("1 + 1 =")]
    assert row["completion"] == [assistant("2", at="2024-05-01T00:00:00")]


def test_images_are_refused_without_a_look_at_them():
    features = Features({"prompt": Value("string"), "completion": Value("string"), "image": Image()})
    rows = {"prompt": ["a", "b"], "completion": ["c", "d"], "image": [None, {"bytes": b"no image", "path": None}]}
    with pytest.raises(UserError, match=r"1 of 2 rows have content of another kind than text \(image\)"):
        source_of(Dataset.from_dict(rows, features=features)).read()


@pytest.mark.parametrize(
    "seen, kind",
    [
        ({"messages": [user([{"type": "image"}, {"type": "text", "text": "a"}]), assistant("b")]}, "image"),
        ({"messages": [user("a"), assistant([{"type": "text", "text": "b"}, {"type": "audio"}])]}, "audio"),
        ({"messages": [user("<image>"), assistant("b")], "images": ["a.png"]}, "images"),
    ],
)
def test_rows_with_more_than_text_are_counted(seen, kind):
    plain = {"messages": [user("a"), assistant("b"), user([{"type": "image"}])], "images": []}
    line = rf"2 of 4 rows have content of another kind than text \({kind}\), the first is row 2: .*remove these rows"
    with pytest.raises(UserError, match=line):
        source_of([plain, seen, plain, seen]).read()


GOOD = {"messages": [user("a"), assistant("b")]}
BAD_ROWS = [
    ({"messages": [SYSTEM, assistant("b")]}, r"no prompt: no user's turn comes before .* \(column 'messages'\)"),
    ({"messages": [assistant("b"), user("a"), assistant("c")]}, "no prompt: no user's turn comes before the response"),
    ({"messages": [user("a")]}, r"no assistant turn \(column 'messages'\)"),
    ({"messages": []}, r"no response \(column 'messages'\)"),
    ({}, r"no response \(column 'messages'\)"),
    ({"messages": [user(" "), assistant("b")]}, "no prompt: the message before the response is empty"),
    ({"messages": [user("a"), assistant(" \n")]}, r"empty response \(column 'messages'\)"),
    ({"messages": [user("a"), assistant(None)]}, "empty response"),
    ({"messages": [user("a"), assistant(None, tool_calls=[])]}, "empty response"),
    ({"messages": [{"content": "a"}, assistant("b")]}, "a message has no role"),
    ({"messages": ["a"]}, "a message is no object with role and content"),
    ({"messages": {"role": "user"}}, "a dict where a text or a list of messages is expected"),
    ({"messages": [user(5), assistant("b")]}, "a message's content is a int: give a text"),
    ({"messages": [user("a\ud800"), assistant("b")]}, "the prompt has half of a surrogate pair"),
    ({"messages": [user("a"), assistant("b", x="\ud800")]}, "the response has half of a surrogate pair"),
    ({"messages": [user("a"), assistant("b", x={1, 2})]}, r"the response holds what is no JSON \(a set\)"),
    ({"messages": [user("a"), assistant(None, tool_calls="[1")]}, "tool_calls is no JSON"),
    ({"messages": [user("a"), assistant(None, tool_calls=[1])]}, "tool_calls: 1 is no call: {type: function"),
    ({"messages": [user("a"), assistant(None, tool_calls=[{"function": "add"}])]}, "tool_calls: .* is no call"),
    ({**GOOD, "tools": "[1"}, "column 'tools' is no JSON"),
    ({**GOOD, "tools": "1"}, "column 'tools' is no list of definitions"),
    ({**GOOD, "tools": [1]}, "column 'tools' is no list of definitions"),
    (None, "not an object with a prompt and a response"),
]  # fmt: skip


@pytest.mark.parametrize("row, line", BAD_ROWS)
def test_bad_rows_are_named(row, line):
    with pytest.raises(UserError, match=f"^train_dataset, row 2: {line}"):
        source_of([GOOD, row]).read()


@pytest.mark.parametrize(
    "row, settings, line",
    [
        ({"text": "a", "label": 1}, {}, r"the columns text, label are none of the known formats \(prompt \+ completion;"
         r".*: say which hold what: --set data.columns='{prompt: …, completion: …}' \(in Python: columns=\)$"),
        ({"prompt": "a", "completion": "b"}, {"generated": True}, "no column 'generated', which data.generated asks"),
        ({"real": LONG, "generated": "x"}, {"generated": True, "rounds": "all"}, "`generated` is one response, and"),
        ({"real": LONG, "generated": [user("a")]}, {"generated": True}, "'generated' has no assistant's turn with"),
        ({"prompt": "a", "chosen": 5}, {}, "row 1: a int where a text or a list of messages is expected"),
        ({"chosen": "a"}, {}, "row 1: no prompt"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, {}, r"a turn .* is from 'narrator' \(known: human, "),
        ({"conversations": [{"from": "function_call", "value": "a"}]}, {}, "a turn from function_call is no JSON"),
        ({"conversations": "a"}, {}, "row 1: no prompt"),
    ],
)  # fmt: skip
def test_sets_that_are_refused(row, settings, line):
    with pytest.raises(UserError, match=line):
        source_of([row], **settings).read()


def test_splits_that_are_not_there_and_files_that_are_in_none(tmp_path, capsys):
    folder = in_folder(tmp_path / "set", "train.jsonl", lines(PAIRS))
    written(folder / "test.jsonl", lines(PAIRS[:1]))
    written(folder / "more.jsonl", lines(PAIRS))
    assert read(load_rows(str(folder))) == wanted(PAIRS) and len(load_rows(str(folder), split="test").read()) == 1
    assert f"note: {folder}: its files in none of the splits train, test: more.jsonl\n" in capsys.readouterr().err
    line = "no split 'dev'; there are: (train, test|test, train)"
    for path in (folder, saved(tmp_path / "saved", splits(PAIRS))):
        with pytest.raises(UserError, match=line):
            load_rows(str(path), split="dev")
    with pytest.raises(UserError, match=line):
        source_of({"train": PAIRS, "test": PAIRS}, split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no folder of data"):
        load_rows(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("a.csv", b"prompt,completion\n1,2\n3,4,5\n", "a.csv, line 3: 3 cells, the header has 2"),
        ("a.csv", b"prompt,completion\n1,2\n\n3\n", "a.csv, line 4: 1 cells, the header has 2"),
        ("a.csv", b"prompt,prompt\n1,2\n", "two columns of its header have the same name: prompt, prompt"),
        ("a.csv", b'prompt,completion\n1,"2\n', "a.csv, line 2: no table of cells"),
        ("a.tsv", b"prompt\tcompletion\n1\t\xff\n", "not UTF-8 text"),
        ("a.csv", b"prompt;completion\n1;2\n", "the columns prompt;completion .a single one, with ';' in it: a .csv "
         "has commas between its cells, a .tsv tabs. are none of the known formats"),
        ("a.csv", b"", "has no rows"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(PAIRS))[:-9], "a.jsonl.gz: cannot be read"),
        ("a.jsonl.bz2", b"{}", "a.jsonl.bz2: cannot be read"),
        ("a.jsonl.xz", b"{}", "a.jsonl.xz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{\n", mtime=0), "a.jsonl.gz, line 1: not JSON"),
        ("a.pdf", b"x", "the columns pdf are none of the known formats"),
        ("a.xyz", b"x", "a.xyz: not data that `datasets` can read"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, content, line):
    with pytest.raises(UserError, match=line):
        load_rows(str(written(tmp_path / name, content))).read()


def test_cells_may_be_long(tmp_path):
    rows = [{"prompt": "a", "completion": "b" * 200_000}]
    (row,) = read(load_rows(str(table_file(tmp_path / "a.csv", rows, ","))))
    assert row["completion"] == [assistant("b" * 200_000)]


def test_what_is_here_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    folder = in_folder(tmp_path / "set", "data.jsonl", lines(PAIRS))
    assert all(map(is_local, [str(folder), "a.csv", "a.jsonl.gz", "a.parquet"]))
    assert not any(map(is_local, ["openai/gsm8k", "a.parquet.gz", ""]))
    assert needed(build_config({"data": {"path": str(folder)}})) == []
    monkeypatch.setenv(offline.VARIABLE, str(tmp_path / "offline"))
    assert read(load_rows(str(folder))) == wanted(PAIRS)


def test_a_column_that_names_tasks(capsys):
    rows = [{"prompt": "a", "completion": "b", "task": "sums"}, {"prompt": "c", "completion": "d", "task": 3}]
    assert [row["task"] for row in source_of(rows).read()] == ["sums", None]
    assert "columns prompt, completion, task" in capsys.readouterr().err

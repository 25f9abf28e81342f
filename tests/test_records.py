"""Tables that are larger than memory should hold: the same rows, the same runs."""

import gc
import json

import pytest
from test_selfplay import assert_same_run, play

from tspin.config import DataSettings
from tspin.data import tables as records
from tspin.data import templates as data
from tspin.data.tables import RESPONSE_SCHEMA, Responses, TableWriter, View
from tspin.errors import UserError
from tspin.experiment.preset import load_dataset
from tspin.runs.files import fingerprint, fingerprint_of


@pytest.fixture
def small_limits(monkeypatch):
    """Everything counts as large."""
    monkeypatch.setattr(records, "BATCH", 3)
    monkeypatch.setattr(records, "IN_MEMORY", 100)
    monkeypatch.setattr("tspin.data.formats.LARGE_FILE", 1)


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_tables_in_files(tmp_path, small_limits, monkeypatch, count):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = [(7 * n, f"text {n}", list(range(n)), n % 2 == 0) for n in range(count)]
    with TableWriter(RESPONSE_SCHEMA) as writer:
        for row in rows:
            writer.add(*row)
    table = writer.table()
    assert not list(tmp_path.iterdir())  # the file has no name
    names = ("prompt_id", "text", "finished")
    found = [tuple(table.value(name, n) for name in names) + (table.ids("ids", n),) for n in range(len(table))]
    assert found == [(number, text, finished, ids) for number, text, ids, finished in rows]
    if count:
        assert Responses(table)[7 * (count - 1)].text == f"text {count - 1}"
    with pytest.raises(RuntimeError), TableWriter(RESPONSE_SCHEMA) as writer:
        for row in rows:
            writer.add(*row)
        raise RuntimeError


def test_views():
    squares = View(5, lambda i: i * i)
    assert list(squares) == squares == [0, 1, 4, 9, 16] and squares[-1] == 16 and squares[1::2] == [1, 9]
    assert squares != [0, 1] and squares != 3
    with pytest.raises(IndexError):
        squares[5]


def test_fingerprints_one_item_at_a_time():
    items = [[3, [1, 2], "ü"], [], {"b": 1, "a": None}]
    assert fingerprint_of(iter(items)) == fingerprint(items) and fingerprint_of([]) == fingerprint([])


def test_a_large_data_set_trains_the_same_and_is_encoded_once(
    tmp_path, model_folder, data_file, small_limits, monkeypatch, capsys
):
    data_file.write_text(data_file.read_text() + json.dumps({"prompt": "<|end|>", "completion": "2"}) + "\n")
    large = load_dataset(DataSettings(path=str(data_file)))
    assert large.key is not None
    play(tmp_path / "large", model_folder, large, method="spin")
    assert "special tokens" in capsys.readouterr().err
    (kept,) = (tmp_path / "large").glob("examples-*.arrow")
    monkeypatch.setattr("tspin.data.formats.LARGE_FILE", 2**30)
    small = load_dataset(DataSettings(path=str(data_file)))
    assert small.key is None
    play(tmp_path / "small", model_folder, small, method="spin")
    assert_same_run(tmp_path / "large", tmp_path / "small", iterations=2)
    config = (tmp_path / "large" / "config.json").read_text()
    assert config == (tmp_path / "small" / "config.json").read_text()
    capsys.readouterr()

    def never(*_, **__):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_examples", never)
        play(tmp_path / "large", model_folder, large, method="spin")
        assert "special tokens" in capsys.readouterr().err
        with pytest.raises(AssertionError, match="encoded again"):
            play(tmp_path / "large", model_folder, large.subset(8, 0), method="spin")
    gc.collect()
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    play(tmp_path / "large", model_folder, large, method="spin")
    assert "is damaged" in capsys.readouterr().err
    assert_same_run(tmp_path / "large", tmp_path / "small", iterations=2)


def test_two_rows_of_one_number_are_refused(tmp_path, model_folder, rows):
    with pytest.raises(UserError, match="the same prompt_id"):
        play(tmp_path / "run", model_folder, [{**row, "prompt_id": 1} for row in rows])


def test_a_large_set_of_the_datasets_library_is_encoded_once(tmp_path, model_folder, rows, monkeypatch):
    import datasets

    monkeypatch.setattr("tspin.data.formats.LARGE_SET", 2)
    for _ in range(2):
        play(tmp_path / "run", model_folder, datasets.Dataset.from_list(rows), method="sft")
        assert len(list((tmp_path / "run").glob("examples-*.arrow"))) == 1
        monkeypatch.setattr(data, "encode_examples", None)

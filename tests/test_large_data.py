"""Data sets that are larger than memory should hold: the same rows, the same runs, nothing left behind."""

import gc
import json

import pyarrow as pa
import pytest
from datasets import Dataset, are_progress_bars_disabled
from test_selfplay import assert_same_run, play

from tspin.config import DataSettings
from tspin.data import encoding
from tspin.data.mapped import TypedRows, mapped, read_in, rows_at, table_of
from tspin.data.responses import RESPONSE_SCHEMA, Response, Responses
from tspin.data.rows import ROWS
from tspin.data.sources import load_rows
from tspin.errors import UserError, tell
from tspin.experiment.preset import load_dataset
from tspin.runs.files import fingerprint, fingerprint_of


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr("tspin.data.sources.LARGE", 1)


def responses_of(count: int) -> Responses:
    """Responses to the prompts 0, 7, 14, …, written three at a time."""

    def draw(batch):
        rows = [(7 * n, f"text {n}", list(range(n)), n % 2 == 0, None) for n in batch["n"]]
        return table_of(rows, RESPONSE_SCHEMA)

    return Responses(mapped(Dataset.from_dict({"n": list(range(count))}), draw, RESPONSE_SCHEMA, batch_size=3))


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_rows_in_files_without_a_name(tmp_path, monkeypatch, count):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    responses = responses_of(count)
    assert not list(tmp_path.iterdir())
    wanted = [Response(list(range(n)), f"text {n}", n % 2 == 0) for n in range(count)]
    numbers = [7 * n for n in range(count)]
    assert list(responses) == numbers and list(responses.of(numbers)) == wanted
    backwards = responses.of(numbers[::-1])
    assert list(backwards) == wanted[::-1] == backwards[:] and not list(tmp_path.iterdir())
    assert rows_at(backwards, range(count)) == wanted[::-1] == rows_at(wanted, range(count))[::-1]
    assert responses == dict(zip(numbers, wanted, strict=True)) and -1 not in responses
    with pytest.raises(KeyError, match="-1"):
        responses.of([*numbers, -1])
    if count:
        assert backwards[-1] == wanted[0] and backwards[1:3] == wanted[::-1][1:3]
        with pytest.raises(IndexError):
            backwards[count]


def test_what_goes_wrong_on_the_way_is_what_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    disabled = are_progress_bars_disabled()

    def rows():
        yield dict.fromkeys(ROWS)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        read_in(rows, ROWS)

    def stop(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped(Dataset.from_dict({"n": [1]}), stop, pa.schema([("n", pa.int64())]))
    assert not list(tmp_path.iterdir()) and are_progress_bars_disabled() == disabled


def test_typed_rows_of_cells():
    squares = TypedRows(Dataset.from_dict({"a": [1, 2, 3], "b": [1.0, 2.0, 3.0]}), lambda a, b: a * b)
    assert list(squares) == [1.0, 4.0, 9.0] and squares[-1] == 9.0 and squares[::2] == [1.0, 9.0]
    assert squares.__getitems__([2, 0]) == [9.0, 1.0] and squares[3:] == []


def test_fingerprints_one_item_at_a_time():
    items = [[3, [1, 2], "ü"], [], {"b": 1, "a": None}]
    assert fingerprint_of(iter(items)) == fingerprint(items) and fingerprint_of([]) == fingerprint([])


def test_a_large_data_set_trains_the_same_and_is_encoded_once(
    tmp_path, model_folder, data_file, all_large, monkeypatch, capsys
):
    data_file.write_text(data_file.read_text() + json.dumps({"prompt": "<|end|>", "completion": "2"}) + "\n")
    large = load_dataset(DataSettings(path=str(data_file)))
    assert large.key is not None
    play(tmp_path / "large", model_folder, large, method="spin")
    assert "special tokens" in capsys.readouterr().err
    (kept,) = (tmp_path / "large").glob("examples-*[0-9a-f]")
    assert [path.name for path in kept.iterdir()] == ["rows.arrow"]
    with monkeypatch.context() as patch:
        patch.setattr("tspin.data.sources.LARGE", 2**30)
        small = load_dataset(DataSettings(path=str(data_file)))
    assert small.key is None
    play(tmp_path / "small", model_folder, small, method="spin")
    assert_same_run(tmp_path / "large", tmp_path / "small", iterations=2)
    config = (tmp_path / "large" / "config.json").read_text()
    assert config == (tmp_path / "small" / "config.json").read_text()
    capsys.readouterr()
    tell.cache_clear()

    def never(*_, **__):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_examples", never)
        play(tmp_path / "large", model_folder, large, method="spin")
        assert "special tokens" in capsys.readouterr().err
        with pytest.raises(AssertionError, match="encoded again"):
            play(tmp_path / "large", model_folder, load_rows(str(data_file), labels=8), method="spin")
    gc.collect()
    content = bytearray((kept / "rows.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (kept / "rows.arrow").write_bytes(content)
    play(tmp_path / "large", model_folder, large, method="spin")
    assert "is damaged" in capsys.readouterr().err
    assert_same_run(tmp_path / "large", tmp_path / "small", iterations=2)


def test_two_rows_of_one_number_are_refused(tmp_path, model_folder, rows):
    with pytest.raises(UserError, match="the same prompt_id"):
        play(tmp_path / "run", model_folder, [{**row, "prompt_id": 1} for row in rows])


def test_a_large_set_of_the_datasets_library_is_encoded_once(tmp_path, model_folder, rows, all_large, monkeypatch):
    for _ in range(2):
        play(tmp_path / "run", model_folder, Dataset.from_list(rows), method="sft")
        assert len(list((tmp_path / "run").glob("examples-*[0-9a-f]"))) == 1
        monkeypatch.setattr(encoding, "encode_examples", None)


def test_nothing_is_left_in_a_cache(tmp_path, model_folder, data_file, monkeypatch):
    """Neither in the library's cache, nor in the folder for temporary files, nor in the run's folder."""
    for name in ("cache", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    play(tmp_path / "run", model_folder, load_rows(str(data_file)), iterations=1)
    assert not list((tmp_path / "cache").iterdir()) and not list((tmp_path / "temporary").glob("tspin-*"))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix == ".arrow" or "cache" in path.name]

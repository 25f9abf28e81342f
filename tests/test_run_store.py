"""Stages: whole or not there, made again only when their inputs changed."""

import subprocess
import sys

import pytest

from tspin.errors import UserError
from tspin.run_store import atomic_path, claim_folder, fingerprint, read_json, run_stage, stage_record


def produce(text):
    def write(path):
        path.write_text(text)
        return {"length": len(text)}

    return write


def test_a_stage_runs_once_per_fingerprint(tmp_path):
    output = tmp_path / "out.txt"
    first = run_stage(output, {"seed": 1}, produce("one"))
    assert first["facts"] == {"length": 3} and first["fingerprint"] == fingerprint({"seed": 1})
    assert run_stage(output, {"seed": 1}, produce("two")) == first
    assert output.read_text() == "one"
    run_stage(output, {"seed": 2}, produce("two"))
    assert output.read_text() == "two"
    assert stage_record(output, {"seed": 1}) is None


def test_a_failing_stage_leaves_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk")

    with pytest.raises(OSError):
        run_stage(tmp_path / "out.txt", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_stage_killed_before_its_record_runs_again(tmp_path):
    output = tmp_path / "out.txt"
    run_stage(output, {}, produce("one"))
    output.with_name("out.txt.stage.json").unlink()
    run_stage(output, {}, produce("two"))
    assert output.read_text() == "two"


def test_what_a_killed_process_left_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    orphan = tmp_path / f".out.txt.{process.pid}.tmp"
    orphan.mkdir()
    (orphan / "half").write_text("half")
    run_stage(tmp_path / "out.txt", {}, produce("one"))
    assert not orphan.exists()


def test_folders_are_replaced_whole(tmp_path):
    for name in ("a", "b"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_belongs_to_one_config(tmp_path):
    claim_folder(tmp_path, {"training": {"lr": 1e-5, "epochs": 1}})
    claim_folder(tmp_path, {"training": {"epochs": 1, "lr": 1e-5}})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"training.lr is 1e-05 there, 3e-05 here"):
        claim_folder(tmp_path, {"training": {"lr": 3e-5, "epochs": 1}})
    assert (tmp_path / "config.json").read_bytes() == before
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "config.json")

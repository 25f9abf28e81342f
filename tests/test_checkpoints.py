"""Which checkpoints stay, what a run does without the others, and that a crash at any moment loses nothing."""

import json
import os
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_selfplay import SETTINGS
from typer.testing import CliRunner

from tspin import SelfPlayConfig, SelfPlayTrainer, selfplay
from tspin.checkpoints import ARCHIVE
from tspin.cli import app
from tspin.errors import UserError
from tspin.runs import files, stages
from tspin.runs.files import checksums, sha256
from tspin.runs.seeds import stage_seed
from tspin.runs.stages import check_stage, give_up, run_stage

THREE = {"iterations": 3, "method": "spin"}


def build(folder, model, rows, **settings):
    held_out = rows[:4] if settings.get("best_iteration") else None
    args = SelfPlayConfig(output_dir=str(folder), **{**SETTINGS, **THREE, **settings})
    return SelfPlayTrainer(str(model), args=args, train_dataset=rows, eval_dataset=held_out)


def models(folder):
    return [(folder / f"iteration-{t}" / "model").is_dir() for t in range(3)]


def tables(folder):
    return {
        path.relative_to(folder): pd.read_parquet(path).drop(columns="tokens_per_second", errors="ignore")
        for path in sorted(folder.rglob("*.parquet"))
    }


def assert_same_tables(one, other):
    one, other = tables(one), tables(other)
    assert one.keys() == other.keys()
    for name, table in one.items():
        pd.testing.assert_frame_equal(table, other[name], check_exact=True)


@pytest.fixture
def undisturbed(tmp_path, model_folder, rows):
    build(tmp_path / "whole", model_folder, rows).train()
    return tmp_path / "whole"


@pytest.mark.parametrize("keep", ["last", "bfloat16"])
def test_earlier_checkpoints_are_given_up(tmp_path, model_folder, rows, undisturbed, keep, monkeypatch):
    run = tmp_path / "run"
    trainer, seen = build(run, model_folder, rows, keep_checkpoints=keep), []
    for result in trainer.iterate():
        seen.append(models(run))
        assert result.model_path.is_dir()  # whoever evaluates it finds it
    # The one before is there until the next is finished, and evaluated.
    assert seen == [[True, False, False], [True, True, False], [False, True, True]]
    assert models(run) == [False, False, True]
    assert_same_tables(undisturbed, run)
    for t in (0, 1):
        archive = run / f"iteration-{t}" / ARCHIVE
        assert archive.is_dir() == (keep == "bfloat16")
        if keep == "bfloat16":
            whole = load_file(undisturbed / f"iteration-{t}" / "model" / "model.safetensors")
            for name, value in load_file(archive / "model.safetensors").items():
                assert torch.equal(value, whole[name].bfloat16())
            assert (archive / "tokenizer_config.json").is_file()

    monkeypatch.setattr(
        "tspin.engines.here.train", lambda *a, **k: pytest.fail("a finished iteration is trained again")
    )
    again = build(run, model_folder, rows, keep_checkpoints=keep)
    assert [result.training["steps"] for result in again.train()] == [2, 2, 2]
    with pytest.raises(
        UserError, match=rf"iteration-1/model is gone \(keep_checkpoints={keep}.*; to have it made anew"
    ):
        again.save_model(tmp_path / "copy", which=1)
    again.save_model(tmp_path / "copy")
    # Commands on it say so, in one line.
    words = ["tokens", "--model", str(run / "iteration-0" / "model"), "--before", str(model_folder), "--data", "pocket"]
    told = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "tokens.parquet")])
    assert told.exit_code and "iteration-0/model is gone (keep_checkpoints=" in told.output


def test_more_iterations_go_on_from_the_last(tmp_path, model_folder, rows, undisturbed):
    build(tmp_path / "run", model_folder, rows, iterations=2, keep_checkpoints="last").train()
    build(tmp_path / "run", model_folder, rows, keep_checkpoints="last").train()
    assert models(tmp_path / "run") == [False, False, True]
    assert_same_tables(undisturbed, tmp_path / "run")


def test_the_best_stays_beside_the_last(tmp_path, model_folder, rows, monkeypatch):
    with pytest.raises(UserError, match="keep_checkpoints: best is by the rule best_iteration"):
        build(tmp_path / "run", model_folder, rows, keep_checkpoints="best")
    nll = iter([3.0, 1.0, 2.0] * 2)
    monkeypatch.setattr("tspin.iteration.held_out_nll", lambda *a: {"nll": next(nll), "nll_per_token": 1.0})
    trainer = build(tmp_path / "run", model_folder, rows, keep_checkpoints="best", best_iteration="held_out_nll")
    trainer.train()
    assert models(tmp_path / "run") == [False, True, True]
    trainer.save_model(tmp_path / "copy", which="best")


def test_held_out_rows_are_scored_anew_for_another_policy(tmp_path, model_folder, rows, monkeypatch):
    """Here of other responses, as another machine may draw them: the run has the same settings."""
    rule = {"iterations": 1, "best_iteration": "held_out_nll", "diagnostics": False}
    run, fresh = tmp_path / "run", tmp_path / "fresh"
    build(run, model_folder, rows, **rule).train()
    before = (run / "iteration-0" / "held_out.json").read_text()
    monkeypatch.setattr("tspin.selfplay.stage_seed", lambda seed, *stage: stage_seed(seed + 1, *stage))
    for folder in (run, fresh):
        build(folder, model_folder, rows, **rule).train()
    now, wanted = ((folder / "iteration-0" / "held_out.json").read_text() for folder in (run, fresh))
    assert now == wanted != before


def test_steps_and_epochs_are_those_of_the_whole_run(tmp_path, model_folder, rows):
    """In the run's state, and in what trackers are told."""
    settings = {"best_iteration": "held_out_nll", "num_train_epochs": 2, "diagnostics": False}
    trainer = build(tmp_path / "run", model_folder, rows, **settings)
    steps = [result.training["steps"] for result in trainer.train()]
    ends, state = [sum(steps[: t + 1]) for t in range(3)], trainer.state
    assert [entry["step"] for entry in state.log_history if "eval_nll" in entry] == ends
    assert [entry["step"] for entry in state.log_history if "loss" in entry] == list(range(1, ends[-1] + 1))
    assert (state.epoch, state.global_step, state.max_steps) == (6, ends[-1], ends[-1])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, ends[-1] + 1))


class Crash(BaseException):
    pass


class CrashBefore:
    """Raises Crash before the n-th change of the disk that giving checkpoints up makes: records, removals, copies."""

    def __init__(self, n, patch):
        self.left, self.settling = n, False
        for name in ("remove", "write_sealed", "atomic_path"):
            patch.setattr(stages, name, self.counted(getattr(stages, name)))
        patch.setattr(selfplay, "settle", self.noticed(selfplay.settle))

    def counted(self, function):
        def called(*given, **named):
            self.left -= self.settling
            if self.settling and not self.left:
                raise Crash
            return function(*given, **named)

        return called

    def noticed(self, settle):
        def called(*given):
            self.settling = True
            settle(*given)
            self.settling = False

        return called


@pytest.mark.parametrize("keep", ["last", "bfloat16"])
def test_a_crash_between_any_two_changes_loses_nothing(tmp_path, model_folder, rows, undisturbed, keep):
    run, crashes = tmp_path / "run", 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            CrashBefore(crashes + 1, patch)
            try:
                build(run, model_folder, rows, keep_checkpoints=keep).train()
                break
            except Crash:
                crashes += 1
    assert crashes > 2 and models(run) == [False, False, True]
    assert_same_tables(undisturbed, run)


def test_files_are_hashed_together_and_once(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
    hashed = []
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path) or sha256(path))
    wanted = [sha256(path) for path in paths]
    assert checksums(paths, again=False) == checksums(paths, again=False) == wanted
    assert len(hashed) == 6  # just written: a write in the same tick would not show
    hashed.clear()
    for path in paths:
        os.utime(path, (time.time() - 60,) * 2)
    assert checksums(paths) == checksums(paths, again=False) == wanted and len(hashed) == 3
    assert checksums(paths) == wanted and len(hashed) == 6  # asked for again
    before = paths[0].stat()
    paths[0].write_text("x")
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # even so: the time of change is another
    assert checksums(paths, again=False) == [sha256(paths[0]), *wanted[1:]] and len(hashed) == 7


def test_a_checkpoint_is_hashed_when_written_and_not_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", 0.0)
    hashed = []
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))

    def produce(target):
        target.mkdir()
        (target / "weights").write_text("weights")
        time.sleep(0.05)

    run_stage(tmp_path / "model", {}, produce, check=False)
    check_stage(tmp_path / "model")
    assert hashed == ["weights"]


def test_what_was_given_up_is_finished_and_read_by_nobody(tmp_path):
    def produce(target):
        target.mkdir()
        (target / "weights").write_text("weights")
        return {"steps": 3}

    stage = run_stage(tmp_path / "model", {"seed": 1}, produce)
    give_up(tmp_path / "model", "no room")
    assert not (tmp_path / "model").exists()
    assert run_stage(tmp_path / "model", {"seed": 1}, lambda target: pytest.fail("made again")) == stage
    with pytest.raises(UserError, match=r"model is gone \(no room\); .* delete model.stage.json beside it"):
        check_stage(tmp_path / "model")
    assert run_stage(tmp_path / "model", {"seed": 2}, produce).fingerprint != stage.fingerprint  # other inputs
    check_stage(tmp_path / "model")
    assert json.loads((tmp_path / "model.stage.json").read_text()).get(stages.GIVEN_UP) is None

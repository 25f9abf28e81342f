"""Pieces of an evaluation over engines, which processes without a model stand in for."""

import json
import os
import sys
from dataclasses import replace

import pytest

from tspin import SelfPlayConfig
from tspin.config import EngineSettings, load_config
from tspin.engines import serving
from tspin.engines.engine import Engine
from tspin.engines.serving import Engines
from tspin.engines.vllm import FIRST_PORT, LAST_PORT, PORTS, Served, Serving, _environment
from tspin.errors import UserError
from tspin.experiment.preset import build_trainer
from tspin.models import POCKET_MODEL, Policy, load_tokenizer
from tspin.triplets import in_parts

# Answers a number by its double; writes down what it was given at once. 13 breaks it.
FAKE = """
import json, sys
from pathlib import Path
from tspin.engines.serving import answering
from tspin.engines.workers import read_job

folder = Path(sys.argv[1])
job = read_job(folder)

def answer(task, pieces):
    assert 13 not in pieces, "no thirteen"
    with open(job["seen"], "a") as seen:
        seen.write(json.dumps([folder.name, task, pieces, len(list(folder.glob("question-*")))]) + chr(10))
    return [job["times"] * piece for piece in pieces], sum(pieces)

answering(folder, answer)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Engines of so many processes, and what these have seen."""
    monkeypatch.setattr(serving, "WINDOWS", {"score": 50, "draw": 50})
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    seen = tmp_path / "seen"
    job = {"seen": str(seen), "times": 2}

    def made(count):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return Engines([sys.executable, str(script)], [environment] * count, job)

    return made, lambda: [json.loads(line) for line in seen.read_text().splitlines()]


def test_answers_come_in_order_whoever_gave_them(fake):
    made, seen = fake
    pieces = [n for n in range(1, 41) if n != 13]
    with made(2) as engines:
        assert engines.ask("score", pieces, pieces) == [2 * piece for piece in pieces]
        assert engines.ask("draw", [60, 3], [60, 3]) == [120, 6]  # the same processes
        assert engines.ask("score", [], []) == []
        assert engines.computed == sum(pieces) + 63
    given = seen()
    assert {task for _, task, _, _ in given} == {"score", "draw"}
    assert sorted(piece for _, task, window, _ in given for piece in window if task == "score") == pieces
    loads = [sum(sum(window) for name, task, window, _ in given if name == of and task == "score") for of in "01"]
    assert abs(loads[0] - loads[1]) <= max(pieces)  # dealt by tokens
    assert all(sum(window) <= 50 or len(window) == 1 for _, _, window, _ in given)  # what an engine holds at once
    assert max(waiting for *_, waiting in given) < serving.WAITING


def test_windows_have_every_piece_once():
    sizes = [10, 45, 60, 5, 5, 30]
    assert list(in_parts([0, 1, 2, 3, 5], sizes, 50)) == [[0], [1], [2], [3, 5]]


def test_an_engine_that_fails_is_one_line_and_ends_the_others(fake):
    made, _ = fake
    with pytest.raises(UserError, match=r"^vllm: AssertionError: no thirteen \(log: "), made(2) as engines:
        engines.ask("score", [1, 2, 13], [1, 2, 13])
    assert engines._thread is not None and not engines._thread.is_alive()


def test_nothing_is_started_where_nothing_is_asked(fake):
    made, _ = fake
    with made(2) as engines:
        pass
    assert engines._thread is None


def test_engines_of_one_checkpoint_at_a_time(monkeypatch):
    """They stay while it is asked for, with room enough; another's are ended, and of what was trained anew."""
    ended = []

    class Noted:
        def __init__(self, command, environments, job):
            self.job, self.copies = job, len(environments)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            ended.append(self)

    monkeypatch.setattr("tspin.engines.vllm.Engines", Noted)
    served = Served("here", "float32", EngineSettings(data_parallel=2), fingerprint="a")
    with Serving(context=100) as serving:
        first = serving.engines(served, 60)
        assert first.copies == 2 and first.job["max_model_len"] == 100 and first.job["evaluates"] and first.job["texts"]
        assert serving.engines(served, 100, texts=True) is first and not ended
        longer = serving.engines(served, 101)
        assert ended == [first] and longer.job["max_model_len"] == 101
        others = [replace(served, fingerprint="b"), replace(served, dtype="bfloat16"), replace(served, folder="there")]
        for number, other in enumerate(others):
            serving.engines(other, 60)
            assert len(ended) == number + 2
        serving.release()
        serving.release()
        assert len(ended) == 5
        last = serving.engines(served, 60)
    assert ended[-1] is last and len(ended) == 6
    with Serving() as alone:  # of a run that is not evaluated
        job = alone.engines(served, 60).job
    assert job["max_model_len"] == 60 and not job["evaluates"] and not job["texts"]


def test_what_needs_the_memory_ends_engines(tmp_path, monkeypatch):
    """Training and scoring, and sampling by transformers, in a process that an evaluation left engines in."""
    args = SelfPlayConfig(str(tmp_path / "run"), max_new_tokens=4)
    engine = Engine(args, load_tokenizer(str(POCKET_MODEL)), {})
    policy = Policy(str(POCKET_MODEL), "")
    released = []
    monkeypatch.setattr(Serving, "release", lambda self: released.append(self))

    def stop(*_, **__):
        raise StopIteration

    monkeypatch.setattr("tspin.engines.engine.load_policy", stop)
    for step in (
        lambda: engine.sample(policy, [[1]], seed=0),
        lambda: engine._score(policy, None, "a policy", keep=False),
        lambda: engine.score_tokens(policy, None, "a policy"),
        lambda: engine.train(policy, None),
    ):
        released.clear()
        with pytest.raises(StopIteration):
            step()
        assert released == [engine.serving]


def test_every_copy_has_ports_of_its_own(monkeypatch):
    for given in (None, "30000"):
        if given:
            monkeypatch.setenv("VLLM_PORT", given)
        copies = [_environment(number, 0) for number in range(8)]
        first = [int(copy["VLLM_PORT"]) for copy in copies]
        taken = {port for start in first for port in range(start, start + PORTS)}
        assert len(taken) == 8 * PORTS and FIRST_PORT <= min(taken) and max(taken) < LAST_PORT
        assert [int(copy["MASTER_PORT"]) - start for copy, start in zip(copies, first, strict=True)] == [PORTS - 1] * 8
    assert first[0] == 30000
    monkeypatch.setenv("VLLM_PORT", "tcp://10.0.0.1:80")  # by Kubernetes, of a service that is called vllm
    assert FIRST_PORT <= int(_environment(0, 0)["VLLM_PORT"]) < LAST_PORT


def test_a_run_draws_where_its_checkpoints_are_evaluated(tmp_path):
    serving = Serving()
    settings = load_config("pocket", ["data.labels=4"]).for_method("tspin")
    trainer = build_trainer(settings, tmp_path, seed=0, serving=serving)
    assert trainer.run.engine.serving is serving

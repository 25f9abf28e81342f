"""Engines that stay and answer: processes of one vLLM engine each, over which pieces of an evaluation are dealt.

Each process has a folder, in which a question is a JSON file, its answer another. Two questions at most lie there, so
that an engine does not wait, and each is a window of pieces of so many tokens (WINDOWS): what an engine and this
process hold beside the answers does not grow with the evaluation.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from tspin.engines.workers import Worker, run_workers
from tspin.errors import UserError
from tspin.runs.files import write_text
from tspin.triplets import dealt, in_parts

# Tokens of pieces that an engine is given together, by task. Contexts stay in its cache until their choices are scored;
# of what is drawn it holds tokens alone, and the last of a window leave it room. A piece of "generate" is a folder.
WINDOWS = {"score": 131_072, "draw": 4_194_304, "generate": 1}
WAITING = 2  # windows that an engine is given before it has answered
PAUSE = 0.02  # seconds between looks


def question_path(folder: Path, number: int) -> Path:
    """Where a process finds its n-th question."""
    return folder / f"question-{number}.json"


def answer_path(folder: Path, number: int) -> Path:
    """Where it writes the answer."""
    return folder / f"answer-{number}.json"


class _Ended(Exception):
    """Nothing more is asked."""


class Engines:
    """Processes that answer `ask`, from `with` to its end. They start at the first question.

    After an error nothing more is to be asked: answers to what was asked before may still come.
    """

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]], job: dict[str, Any]):
        """environments: one for each process. job: what each is told (tspin.engines.workers.read_job)."""
        self.command, self.environments, self.job = command, environments, job
        self.computed = 0  # tokens of evaluations that went through the model: what was in a cache did not
        self._end = Event()
        self._error: BaseException | None = None
        self._thread: Thread | None = None
        self._asked = [0] * len(environments)

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="tspin-engines-", ignore_cleanup_errors=True)
        self._folders = [Path(self._temporary.name) / str(number) for number in range(len(self.environments))]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self._temporary.cleanup()

    def ask(self, task: str, pieces: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
        """One answer for each piece, in their order. task: what the processes do with them. sizes: tokens of each.

        Raises UserError, with the engine's last line, when one fails.
        """
        if not pieces:
            return []
        self._start()
        shares = dealt(sizes, len(self._folders))
        left = [list(in_parts(share, sizes, WINDOWS[task])) for share in shares]
        open_: list[dict[int, list[int]]] = [{} for _ in shares]
        answers: list[Any] = [None] * len(pieces)
        # A bar that would go from nothing to all at once tells nothing.
        with tqdm(total=len(pieces), desc=f"vLLM, {task}", disable=len(pieces) <= len(shares)) as bar:
            while any(left) or any(open_):
                moved = 0
                for folder, more, waiting, number in zip(self._folders, left, open_, range(len(shares)), strict=True):
                    while more and len(waiting) < WAITING:
                        waiting[self._asked[number]] = window = more.pop(0)
                        question = {"task": task, "pieces": [pieces[i] for i in window]}
                        write_text(question_path(folder, self._asked[number]), json.dumps(question))
                        self._asked[number] += 1
                    for asked in [asked for asked in waiting if answer_path(folder, asked).exists()]:
                        moved += self._take(answer_path(folder, asked), waiting.pop(asked), answers)
                bar.update(moved)
                if not moved:
                    self._wait()
        return answers

    def _take(self, path: Path, window: Sequence[int], answers: list[Any]) -> int:
        """Put a window's answers in their places; returns how many."""
        answer = json.loads(path.read_text())
        path.unlink()
        self.computed += answer["computed"]
        for piece, found in zip(window, answer["answers"], strict=True):
            answers[piece] = found
        return len(window)

    def _start(self) -> None:
        if self._thread is None:
            for folder in self._folders:
                folder.mkdir()
            self._thread = Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        """The processes' lives: they are ended when nothing more is asked."""
        workers = [
            Worker(folder, self.command, environment)
            for folder, environment in zip(self._folders, self.environments, strict=True)
        ]
        try:
            run_workers("vllm", workers, [self.job] * len(workers), self._watch)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error

    def _watch(self) -> None:
        if self._end.is_set():
            raise _Ended

    def _wait(self) -> None:
        assert self._thread is not None
        if not self._thread.is_alive():
            raise self._error or UserError("vllm: its engines ended before they had answered")
        time.sleep(PAUSE)


def answering(folder: Path, answer: Any) -> None:
    """A process's side: answer questions until it is ended. answer: (task, pieces) → answers, and tokens computed."""
    number = 0
    while True:
        path = question_path(folder, number)
        if not path.exists():
            time.sleep(PAUSE)
            continue
        question = json.loads(path.read_text())
        path.unlink()
        answers, computed = answer(question["task"], question["pieces"])
        write_text(answer_path(folder, number), json.dumps({"answers": answers, "computed": computed}))
        number += 1

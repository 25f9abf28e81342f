"""Fixtures: a random tiny model and a small data set, both made here. One thread per process, since several run."""

import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from tspin.cli.guard import quiet_libraries
from tspin.errors import tell

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads take longer to start than a tiny model to load
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch reads it when it is imported, and so do the processes of a test
quiet_libraries()

# Whole runs in processes of their own, half of all the time: `make test ALL=1` has them, and so has CI.
SLOW = ["test_processes", "test_scripts", "test_slurm", "test_faults", "test_stranger"]
# What takes longest comes first, so that no process is left with minutes of work when the others have ended.
LONGEST = [
    *SLOW,
    "test_grid",
    "test_reuse",
    "test_asking",
    "test_turn_ends",
    "test_selfplay",
    "test_continued",
    "test_notebooks",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests, the longest files first, all others as they are, and mark the slow ones."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over all that was imported: a training run looks for garbage several times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_flushed() -> Iterator[None]:
    """No test cuts the power: what is written need not reach the disk, a tenth of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    """Each test is told everything, as the first run of a command is."""
    tell.cache_clear()


@pytest.fixture
def much_memory(tmp_path_factory) -> Iterator[None]:
    """Hold this for a test that takes gigabytes: one at a time, whatever the number of pytest's processes."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # each worker's folder is in one of all
    with FileLock(shared / "much_memory.lock"):
        yield


@pytest.fixture
def tasks(tmp_path) -> Path:
    """lm-eval tasks, of which an evaluation's tests make suites (asking.py)."""
    from asking import make_tasks

    return make_tasks(tmp_path)


@pytest.fixture
def results(tmp_path) -> Callable[..., Path]:
    """Writes results whose verdicts are known in advance (judging.py)."""
    from judging import write_results

    return partial(write_results, tmp_path)


@pytest.fixture(scope="session")
def tokenizer():
    from tspin.models import POCKET_MODEL, load_tokenizer

    return load_tokenizer(str(POCKET_MODEL))


@pytest.fixture
def tiny_model(tokenizer):
    """A random Llama of two layers, the same one for every test."""
    from tspin.doctor.tiny import tiny_model

    return tiny_model(tokenizer)


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    from tspin.doctor.tiny import tiny_rows

    return tiny_rows()


@pytest.fixture
def data_file(tmp_path: Path, rows) -> Path:
    from tspin.doctor.tiny import write_rows

    return write_rows(tmp_path / "data.jsonl", rows)


@pytest.fixture
def model_folder(tmp_path: Path, tiny_model, tokenizer) -> Path:
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

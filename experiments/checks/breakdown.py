"""Where an iteration's time goes: `make breakdown`, with nothing else at work.

    python -m experiments.checks.breakdown [--preset smollm2 --offline FOLDER] [--set key=value …]

T-SPIN and SPIN with a preset's settings, fewer iterations and problems (SIZES), each run from nothing. Adds a row per
method and iteration to results/benchmarks/breakdown/<preset>.csv: commit, method, iteration, and seconds of

sampling     y′, and at iteration 0 y0 too
reference    log π of the reference, and loading it
training     loading the policy (where no reference was loaded), and the optimizer's steps
diagnostics  log π of the responses, loading the policies, and the measures of degeneration
evaluation   the reduced benchmarks
saving       writing checkpoints, and flushing every file to the disk
hashing      checksums and fingerprints of files
rest         everything else
total        their sum

Each second counts once: what is saved or hashed within a step is no part of the step. To compare with another commit,
run this file with that commit's checkout in PYTHONPATH: `PYTHONPATH=FOLDER python experiments/checks/breakdown.py`.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

from experiments.checks.evidence import write_evidence
from tspin.hub.offline import use_offline
from tspin.runs.provenance import provenance

METHODS = ("tspin", "spin")
SIZES = {  # of a preset: what makes it minutes
    "pocket": ["iterations=3", "evaluation.limit=20"],
    "smollm2": ["iterations=2", "data.labels=32", "evaluation.limit=4"],
}
STEPS = {  # of tspin.selfplay: which part their seconds are
    "sample": "sampling",
    "score_reference": "reference",
    "train": "training",
    "diagnose": "diagnostics",
    "measure": "diagnostics",
}
PARTS = ("sampling", "reference", "training", "diagnostics", "evaluation", "saving", "hashing", "rest")


class Clock:
    """Seconds by part, each counted for the innermost part that is at work."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._at_work = ["rest"]
        self._since = time.perf_counter()

    def pop(self) -> dict[str, float]:
        """The seconds of every part until now; starts anew."""
        self._count()
        found = {part: self.seconds[part] for part in PARTS}
        self.seconds.clear()
        return found

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`function`, whose seconds are the part's."""

        def counted(*arguments: Any, **options: Any) -> Any:
            with self._working(part):
                return function(*arguments, **options)

        return counted

    @contextmanager
    def _working(self, part: str) -> Iterator[None]:
        self._count()
        self._at_work.append(part)
        try:
            yield
        finally:
            self._count()
            self._at_work.pop()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds[self._at_work[-1]] += now - self._since
        self._since = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pocket")
    parser.add_argument("--offline", type=Path, help="a folder of `tspin fetch` for the preset")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings than the preset's")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/breakdown"))
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.offline:
        use_offline(arguments.offline)
    name = Path(arguments.preset).stem
    sizes = [*SIZES.get(name, []), *arguments.set]
    commit = provenance()["commit"]
    rows = [{"commit": commit, **row} for method in METHODS for row in breakdown(arguments.preset, sizes, method)]
    print(pd.DataFrame(rows).to_string(index=False))
    path = arguments.out / f"{name}.csv"
    before = [pd.read_csv(path)] if path.exists() else []
    table = pd.concat([*before, pd.DataFrame(rows)], ignore_index=True)
    write_evidence(arguments.out, {name: table}, start, settings=sizes)


def breakdown(preset: str, sizes: Sequence[str], method: str) -> list[dict[str, Any]]:
    """A run of a method, a row per iteration: method, iteration, seconds of each of PARTS, total."""
    # Not before the offline folder is in use: the hub's libraries ask once whether there is a network.
    from transformers import PreTrainedModel

    from tspin import selfplay
    from tspin.config import load_config
    from tspin.evaluation.suites import load_suite
    from tspin.experiment.preset import Evaluator, build_trainer

    config = load_config(preset, sizes)
    assert config.evaluation is not None
    functions = [
        *((selfplay, name, part) for name, part in STEPS.items()),
        (Evaluator, "scores", "evaluation"),
        (PreTrainedModel, "save_pretrained", "saving"),
        (os, "fsync", "saving"),
        (hashlib, "file_digest", "hashing"),
    ]
    clock, rows = Clock(), []
    with tempfile.TemporaryDirectory(prefix="tspin-breakdown-") as folder, ExitStack() as patches:
        trainer = build_trainer(config.for_method(method), Path(folder), seed=0)
        evaluator = Evaluator(config, load_suite(config.evaluation.suite))
        for owner, name, part in functions:
            patches.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name), part)))
        clock.pop()
        for result in trainer.iterate():
            evaluator.scores(result.policy, result.model_path.parent / "evaluation", method)
            seconds = clock.pop()
            rows.append({"method": method, "iteration": result.iteration, **seconds, "total": sum(seconds.values())})
    return rows


if __name__ == "__main__":
    main()

"""Small studies for tests: written, loaded and run."""

from pathlib import Path

import yaml

from tspin.experiment.grid import load_sweep
from tspin.experiment.jobs import run_sweep

TINY = ["data.labels=8", "methods.sft.data.labels=8", "evaluation.limit=1", "batch_size=8"]


def write_study(path: Path, **changes) -> Path:
    study = {"preset": "pocket", "methods": ["sft"], "seeds": [0], "overrides": TINY, **changes}
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def load(tmp_path: Path, profile: Path | None = None, **changes):
    path = write_study(tmp_path / "tiny.yaml", **changes)
    return load_sweep(path, profile, tmp_path / "runs", tmp_path / "results")


def run(sweep, executor: str = "local", jobs: int = 1, retry: bool = False, wait: bool = True):
    """How many cells are in which state, and all that was shown."""
    shown: list[str] = []
    cells = run_sweep(sweep, executor, jobs, retry, wait, lambda thing: shown.append(str(thing)))
    return {state: len(there) for state, there in cells.items() if there}, "\n".join(shown)

"""Run a study: every setting of a grid, for some methods and seeds, evaluated at every iteration.

    python experiments/study.py experiments/studies/grid.yaml

Writes results/<preset>/studies/<name>.csv (a row per setting, method, seed and iteration) and its provenance. A study
that was stopped goes on where it was: each setting is an ordinary experiment in runs/<preset>-studies/<name>/, or, with
`runs: runs` in the YAML, in the preset's own folder, so that what the main experiment has trained is not trained again.
"""

import argparse
import io
import itertools
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import yaml

from tspin.config import load_config
from tspin.evaluation.suites import load_suite, tabulated
from tspin.experiment.preset import run_experiment
from tspin.runs.files import fingerprint, write_json, write_text
from tspin.runs.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    study, cells = load(arguments.study)
    name, start = arguments.study.stem, time.monotonic()
    prepare(study)
    tables = []
    for number, cell in enumerate(cells, start=1):
        print(f"{name}, setting {number} of {len(cells)}: {cell}", flush=True)
        tables.append(run_cell(study, cell, arguments.runs / f"{study['preset']}-studies" / name))
    folder = arguments.results / study["preset"] / "studies"
    buffer = io.StringIO()
    pd.concat(tables).to_csv(buffer, index=False, float_format="%.6g", lineterminator="\n")
    write_text(folder / f"{name}.csv", buffer.getvalue())
    facts = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "seconds": round(time.monotonic() - start)}
    write_json(folder / f"{name}_provenance.json", {**provenance(), **facts})
    print(f"wrote {folder / name}.csv, {facts['seconds']} s")


def load(path: Path) -> tuple[dict, list[dict]]:
    """The study and its settings, one dict each from the grid's key to a value."""
    study = yaml.safe_load(path.read_text())
    keys, values = study["grid"].keys(), itertools.product(*study["grid"].values())
    return study, [dict(zip(keys, cell, strict=True)) for cell in values]


def prepare(study: dict) -> None:
    """Run the commands that make folders which are missing, with this Python."""
    for folder, command in study.get("prepare", {}).items():
        if not Path(folder, "config.json").is_file():
            print(f"making {folder}: {command}", flush=True)
            subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)


def overrides(study: dict, cell: dict) -> list[str]:
    """`key=value` for every setting. A key may name several, separated by commas: they take the same value."""
    return [*study.get("overrides", []), *(f"{key}={value}" for keys, value in cell.items() for key in keys.split(","))]


def run_cell(study: dict, cell: dict, runs: Path) -> pd.DataFrame:
    """The cell's settings (by the last part of their names), method, seed, iteration, avg and avg_se in percent."""
    config = load_config(study["preset"], overrides(study, cell))
    assert config.evaluation is not None
    suite, folder = load_suite(config.evaluation.suite), runs / fingerprint(cell)
    own = Path(study["runs"]) if "runs" in study else folder
    results = run_experiment(study["preset"], config, study["methods"], study["seeds"], own, folder / "results")
    scores = pd.read_csv(results / "evaluations.csv")
    keys = ["method", "seed", "iteration"]
    rows = []
    for key, own in scores.groupby(keys, dropna=False):
        columns = tabulated(own, suite)
        error = (columns["stderr"] ** 2).sum() ** 0.5 / len(columns)
        rows.append({**dict(zip(keys, key, strict=True)), "avg": columns["value"].mean(), "avg_se": error})
    return pd.DataFrame(rows).assign(**{keys.rsplit(".", 1)[-1]: value for keys, value in cell.items()})


if __name__ == "__main__":
    main()

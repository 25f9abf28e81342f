"""Sweeps by submitit's real executors: this machine's, and Slurm's with a queue of one machine in its place."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tspin.config import REPOSITORY
from tspin.errors import UserError
from tspin.experiment.grid import load_sweep, run_sweep

TINY = ["data.labels=8", "methods.sft.data.labels=8", "evaluation.limit=2", "batch_size=8"]


def write_sweep(path: Path, **changes) -> Path:
    sweep = {"preset": "pocket", "methods": ["sft"], "seeds": [0], "overrides": TINY, **changes}
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def load(tmp_path: Path, profile: Path | None = None, **changes):
    path = write_sweep(tmp_path / "tiny.yaml", **changes)
    return load_sweep(path, profile, tmp_path / "runs", tmp_path / "results")


def counts(cells) -> dict[str, int]:
    return {state: len(own) for state, own in cells.items() if own}


def test_cells_are_methods_by_seeds_by_settings(tmp_path):
    grid = {"methods.spin.lam": [0.1, 1.0], "iterations": [2]}
    sweep = load(tmp_path, methods=["base", "spin"], seeds=[0, 1], grid=grid)
    runs = ("base seed 0", "spin seed 0", "spin seed 1")
    titles = [f"{title} lam={lam} iterations=2" for lam in (0.1, 1.0) for title in runs]
    assert [cell.title for cell in sweep.cells] == titles
    assert len({cell.folder for cell in sweep.cells}) == 6
    # Another setting of the preset makes other cells; the same one, the same.
    again, changed = (
        load(tmp_path, overrides=[*TINY, *more]).cells[0].folder for more in ([], ["methods.sft.num_train_epochs=7"])
    )
    assert again == load(tmp_path).cells[0].folder != changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["sft"]}, "unknown key"),
        ({"methods": ["spinn"]}, "spinn"),
        ({"grid": {"iterations": 3}}, "each key has a list"),
        ({"grid": ["iterations"]}, "a mapping is expected"),
        ({"seeds": 0}, "seeds: a list"),
        ({"seeds": [-1]}, "seeds: whole numbers"),
        ({"methods": []}, "methods is empty"),
        ({"methods": "spin"}, "methods: a list"),
        ({"overrides": ["iteration=3"]}, "iteration"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_before_anything_runs(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(tmp_path, **changes)
    assert not (tmp_path / "runs").exists()


def test_finished_cells_are_skipped_and_failed_ones_retried_on_demand(tmp_path, data_file):
    late = tmp_path / "late.jsonl"
    sweep = load(tmp_path, grid={"data.path": [str(data_file), str(late)]})
    shown: list = []
    assert counts(run_sweep(sweep, "local", 2, False, True, shown.append)) == {"finished": 1, "failed": 1}
    assert "late.jsonl" in shown[-1] and "_log.err" in shown[-1]
    finished = next(cell for cell in sweep.cells if (Path(cell.folder) / "finished.json").exists())
    logs = sorted((tmp_path / "runs").rglob("*_log.err"))
    assert len(pd.read_csv(Path(finished.results) / "pocket" / "evaluations.csv")) > 0
    # Called again: nothing runs, and the failure is told again.
    assert counts(run_sweep(sweep, "local", 2, False, True, shown.append)) == {"finished": 1, "failed": 1}
    assert sorted((tmp_path / "runs").rglob("*_log.err")) == logs
    late.write_text(data_file.read_text())
    assert counts(run_sweep(sweep, "local", 2, True, True, shown.append)) == {"finished": 2}
    assert len(sorted((tmp_path / "runs").rglob("*_log.err"))) == len(logs) + 1


def test_an_interrupted_sweep_ends_its_cells_and_goes_on(tmp_path, data_file):
    path = write_sweep(tmp_path / "tiny.yaml", overrides=[*TINY, f"data.path={data_file}", "num_train_epochs=3"])
    command = [sys.executable, "-c", "from tspin.cli import main; main()", "sweep", str(path), "--runs", "runs"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob("*_log.err")):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in errors
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs").exists()


# What Slurm's commands do for one machine: a job is a process, its state is in a file.
FAKE = {
    "sbatch": """#!/bin/bash
echo $(( $(cat $QUEUE/count 2>/dev/null || echo 100) + 1 )) > $QUEUE/count
id=$(cat $QUEUE/count)
cp "${@: -1}" $QUEUE/$id.sh
echo PENDING > $QUEUE/$id.state
( while [ -e $QUEUE/closed ]; do sleep 0.1; done
  echo RUNNING > $QUEUE/$id.state
  export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
  export SLURM_JOB_NODELIST=here
  if bash $QUEUE/$id.sh; then echo COMPLETED; else echo FAILED; fi > $QUEUE/$id.state ) >$QUEUE/$id.out 2>&1 &
echo "Submitted batch job $id"
""",
    "srun": """#!/bin/bash
while [[ $1 == -* ]]; do
  case $1 in --output|--error) name=${1#--}; declare $name="$2"; shift;; esac
  shift
done
output=${output//%j/$SLURM_JOB_ID}; error=${error//%j/$SLURM_JOB_ID}
exec "$@" >${output//%t/0} 2>${error//%t/0}
""",
    "sacct": """#!/bin/bash
echo "JobID|State|NodeList"
for state in $QUEUE/*.state; do echo "$(basename $state .state)|$(cat $state)|here"; done
""",
    "scontrol": "#!/bin/bash\necho here\n",
    "scancel": "#!/bin/bash\n",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    tools, queue = tmp_path / "tools", tmp_path / "queue"
    tools.mkdir()
    queue.mkdir()
    for name, text in FAKE.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(queue))
    return queue


def test_slurm_runs_what_is_missing_and_nothing_twice(slurm, tmp_path, data_file):
    profile = tmp_path / "machines.yaml"
    profile.write_text(yaml.safe_dump({"submitit": {"slurm_partition": "gpu", "timeout_min": 90, "mem_gb": 8}}))
    sweep = load(tmp_path, profile, overrides=[*TINY, f"data.path={data_file}"])
    (slurm / "closed").touch()
    assert counts(run_sweep(sweep, "slurm", 1, False, False, print)) == {"queued": 1}
    script = (slurm / "101.sh").read_text()
    assert "#SBATCH --partition=gpu" in script and "#SBATCH --mem=8GB" in script and "#SBATCH --time=90" in script
    # The same command while it waits, and until it has ended: the one job.
    assert counts(run_sweep(sweep, "slurm", 1, False, False, print)) == {"queued": 1}
    (slurm / "closed").unlink()
    assert counts(run_sweep(sweep, "slurm", 1, False, True, print)) == {"finished": 1}
    assert [path.name for path in slurm.glob("*.sh")] == ["101.sh"]
    assert json.loads(next((tmp_path / "runs").rglob("finished.json")).read_text())["method"] == "sft"


def test_without_slurm_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no srun on this machine"):
        run_sweep(load(tmp_path), "slurm", 1, False, True, print)


def test_the_profile_is_checked(tmp_path):
    profile = tmp_path / "machines.yaml"
    profile.write_text("gpus: 8\n")
    with pytest.raises(UserError, match="unknown key"):
        load(tmp_path, profile)


def test_the_committed_sweep_is_the_papers_table():
    folder = REPOSITORY / "experiments" / "slurm"
    sweep = load_sweep(folder / "zephyr-7b.yaml", folder / "h100.yaml", Path("runs"), Path("results"))
    assert len(sweep.cells) == 1 + 3 * 3
    assert sweep.cells[0].launcher == "experiments/accelerate/fsdp2.yaml"
    assert (REPOSITORY / str(sweep.cells[0].launcher)).exists()

"""Cells of a study as Slurm's jobs: queued once, stopped by their time's end or by preemption, and gone on with."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from sweeps import TINY, load, run

from tspin.config import REPOSITORY
from tspin.doctor.tiny import tiny_model, write_rows
from tspin.errors import UserError
from tspin.experiment.grid import Cell, load_sweep
from tspin.experiment.jobs import Fleet, slurm_parameters
from tspin.runs.files import read_json
from tspin.runs.signals import Stopped
from tspin.yaml_files import find_yaml

# What Slurm's commands do for one machine: a job is a process, its state is in a file. One that is requeued starts
# again when its process has ended, whichever way.
FAKE = {
    "sbatch": """#!/bin/bash
echo $(( $(cat $QUEUE/count 2>/dev/null || echo 100) + 1 )) > $QUEUE/count
id=$(cat $QUEUE/count)
cp "${@: -1}" $QUEUE/$id.sh
echo PENDING > $QUEUE/$id.state
( while [ -e $QUEUE/closed ]; do sleep 0.1; done
  export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
  export SLURM_JOB_NODELIST=here
  touch $QUEUE/$id.again
  while [ -e $QUEUE/$id.again ]; do
    rm $QUEUE/$id.again
    echo RUNNING > $QUEUE/$id.state
    bash $QUEUE/$id.sh
    code=$?
  done
  if [ $code = 0 ]; then echo COMPLETED; else echo FAILED; fi > $QUEUE/$id.state ) >$QUEUE/$id.out 2>&1 &
echo "Submitted batch job $id"
""",
    "srun": """#!/bin/bash
echo "$@" > $QUEUE/$SLURM_JOB_ID.srun
while [[ $1 == -* ]]; do
  case $1 in --output|--error) name=${1#--}; declare $name="$2"; shift;; esac
  shift
done
output=${output//%j/$SLURM_JOB_ID}; error=${error//%j/$SLURM_JOB_ID}
echo $$ >> $QUEUE/$SLURM_JOB_ID.pids
exec "$@" >>${output//%t/0} 2>>${error//%t/0}
""",
    "sacct": """#!/bin/bash
echo "JobID|State|NodeList"
for state in $QUEUE/*.state; do echo "$(basename $state .state)|$(cat $state)|here"; done
""",
    "scontrol": """#!/bin/bash
if [ $1 = requeue ]; then touch $QUEUE/$2.again; else echo here; fi
""",
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
    assert run(sweep, "slurm", wait=False)[0] == {"queued": 1}
    script = (slurm / "101.sh").read_text()
    assert "#SBATCH --partition=gpu" in script and "#SBATCH --mem=8GB" in script and "#SBATCH --time=90" in script
    # The same command while it waits, and until it has ended: the one job.
    assert run(sweep, "slurm", wait=False)[0] == {"queued": 1}
    (slurm / "closed").unlink()
    assert run(sweep, "slurm")[0] == {"finished": 1}
    assert [path.name for path in slurm.glob("*.sh")] == ["101.sh"]
    assert json.loads(next((tmp_path / "runs").rglob("finished.json")).read_text())["method"] == "sft"


LONG = [
    "data.labels=8",
    "methods.sft.data.labels=8",
    "evaluation.limit=1",
    "batch_size=1",
    "methods.sft.num_train_epochs=25",
]
STATES = "sft/iteration-0/unfinished"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer, rows):
    """A cell of 200 steps that ran undisturbed, in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for saved in (tiny_model(tokenizer), tokenizer):
        saved.save_pretrained(folder / "model")
    given = [f"model.path={folder / 'model'}", f"data.path={write_rows(folder / 'data.jsonl', rows)}"]
    sweep = load(folder, overrides=[*LONG, *given])
    assert run(sweep)[0] == {"finished": 1}
    return sweep


@pytest.fixture
def sent(tmp_path, slurm, whole):
    """The same cell, sent to Slurm."""
    profile = tmp_path / "machines.yaml"
    profile.write_text(yaml.safe_dump({"submitit": {"timeout_min": 90, "cpus_per_task": 2}}))
    sweep = load(tmp_path, profile, overrides=list(whole.cells[0].overrides))
    run(sweep, "slurm", wait=False)
    return sweep


def wait_for(there) -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_training(slurm: Path, sweep) -> int:
    """The job's process, once it trains."""
    wait_for(lambda: list(Path(sweep.cells[0].runs).rglob("sft/iteration-0/first_step.json")))
    return int((slurm / "101.pids").read_text())


def assert_same_run(one, two) -> None:
    """Weights and step log of two cells' runs are equal, bit for bit."""
    found = []
    for sweep in (one, two):
        (folder,) = Path(sweep.cells[0].runs).rglob("sft/iteration-0")
        steps = pd.read_parquet(folder / "steps.parquet").drop(columns="tokens_per_second")
        found.append((steps, (folder / "model" / "model.safetensors").read_bytes()))
    (steps, weights), (other_steps, other_weights) = found
    assert len(steps) == 200 and weights == other_weights
    pd.testing.assert_frame_equal(steps, other_steps, check_exact=True)


def test_a_cell_whose_time_is_up_keeps_its_state_and_is_queued_again(slurm, whole, sent):
    os.kill(in_training(slurm, sent), signal.SIGUSR2)
    wait_for(lambda: (slurm / "101.pids").read_text().count("\n") == 2)
    kept = [path.name for path in Path(sent.cells[0].runs).rglob(f"{STATES}/step-*.stage.json")]
    assert len(kept) == 1 and kept != ["step-200.stage.json"]
    assert run(sent, "slurm")[0] == {"finished": 1}
    assert [path.name for path in slurm.glob("*.sh")] == ["101.sh"]
    assert_same_run(whole, sent)
    script, told = (slurm / "101.sh").read_text(), (slurm / "101.srun").read_text()
    assert "#SBATCH --signal=USR2@300" in script and "--cpus-per-task=2" in told
    log = Path(read_json(Path(sent.cells[0].folder, "job.json"))["log"]).with_suffix(".out").read_text()
    assert "Caught signal SIGUSR2" in log and "Requeued job 101" in log


def test_a_preempted_cell_keeps_its_state_and_waits_for_slurm(slurm, whole, sent):
    """It cannot know whether it is preempted or cancelled: it does not queue itself, nor end as if it had failed."""
    process = in_training(slurm, sent)
    os.kill(process, signal.SIGTERM)
    wait_for(lambda: list(Path(sent.cells[0].runs).rglob(f"{STATES}/step-*.stage.json")))
    time.sleep(1)
    assert not (slurm / "101.again").exists() and (slurm / "101.state").read_text() == "RUNNING\n"
    (slurm / "101.again").touch()  # what Slurm does: the end of the grace time, and the queue
    os.kill(process, signal.SIGKILL)
    assert run(sent, "slurm")[0] == {"finished": 1}
    assert_same_run(whole, sent)


def test_outside_a_training_sigusr2_stops_at_once(tmp_path, monkeypatch):
    """And submitit's handler, which was there before, has its turn then."""
    cell = load(tmp_path).cells[0]
    monkeypatch.setattr("tspin.experiment.grid.run_cell", lambda cell: (signal.raise_signal(signal.SIGUSR2), 1 / 0))
    monkeypatch.setattr(sys, "argv", [])
    handled = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: handled.append(number))
    try:
        with pytest.raises(Stopped) as stopped:
            cell()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert stopped.value.number == signal.SIGUSR2 and handled == [signal.SIGUSR2]
    assert not Path(cell.folder, "failed.json").exists()


def test_what_a_profile_does_not_say(capsys):
    assert slurm_parameters({"timeout_min": 60}) == {"timeout_min": 60, "slurm_signal_delay_s": 300}
    given = {"timeout_min": 60, "cpus_per_task": 8, "slurm_signal_delay_s": 900, "slurm_srun_args": ["--mpi=none"]}
    assert slurm_parameters(given) == {**given, "slurm_srun_args": ["--cpus-per-task=8", "--mpi=none"]}
    given["slurm_srun_args"] = ["-c", "4"]
    assert slurm_parameters(given) == given and not capsys.readouterr().err
    assert slurm_parameters({"timeout_min": 60, "slurm_signal_delay_s": 30})["slurm_signal_delay_s"] == 30
    assert "tspin: profile: slurm_signal_delay_s is 30: what a training's step" in capsys.readouterr().err
    slurm_parameters({"timeout_min": 60, "slurm_use_srun": False})
    assert "tspin: profile: slurm_use_srun is false" in capsys.readouterr().err
    for few in ({}, {"timeout_min": 5}, {"slurm_time": 10, "slurm_signal_delay_s": 600}):
        with pytest.raises(UserError, match=r"a job of (5|10) minutes .* as soon as it starts: raise timeout_min"):
            slurm_parameters(few)


def test_how_often_a_cells_time_may_be_up_is_submitits_own(slurm, tmp_path):
    profile = tmp_path / "machines.yaml"
    profile.write_text(yaml.safe_dump({"submitit": {"timeout_min": 90, "slurm_max_num_timeout": 9}}))
    assert Fleet(load(tmp_path, profile), "slurm", 1)._slurm()._executor.max_num_timeout == 9


def test_of_several_machines_the_first_has_the_cell(tmp_path, monkeypatch):
    """Slurm starts a cell on each; the others wait for what its trainings start there."""
    ran = []
    monkeypatch.setattr(Cell, "run", lambda cell: ran.append(os.environ["SLURM_PROCID"]))
    cell = Cell("study.yaml", "pocket", "sft", 0, (), (), *(str(tmp_path),) * 3)
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", task)
        cell()
    assert ran == ["0"]


def test_without_slurm_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no srun on this machine"):
        run(load(tmp_path), "slurm")


def test_the_profile_is_checked(tmp_path):
    profile = tmp_path / "machines.yaml"
    profile.write_text("gpus: 8\n")
    with pytest.raises(UserError, match="unknown key"):
        load(tmp_path, profile)


def test_the_committed_sweep_is_the_papers_table():
    profile = REPOSITORY / "experiments" / "slurm" / "h100.yaml"
    sweep = load_sweep(Path("zephyr-7b"), profile, Path("my-runs"), Path("my-results"))
    assert len(sweep.cells) == 1 + 3 * 3
    assert {(cell.runs, cell.results, cell.shared) for cell in sweep.cells} == {("my-runs", "my-results", None)}
    assert find_yaml(str(sweep.cells[0].launcher), "experiments/accelerate", "launch file").is_file()

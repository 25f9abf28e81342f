"""Training in several processes: `accelerate launch` on tspin.engines.training_worker, one training at a time.

Everything between trainings stays in one process, so that sampling and evaluation have the GPUs to themselves: the
launched processes end with the training, and give their memory back.

A signal that comes to this process is left in a file, which the first of them reads between two steps; one that comes
to them they note themselves. Either way all agree upon it in a step, keep their state at its end, and stop.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any

import yaml
from tqdm.auto import tqdm

from tspin.config import SelfPlayConfig
from tspin.devices import accelerators
from tspin.engines.here import Training
from tspin.engines.machines import check_machines, workers_of
from tspin.engines.workers import FAILURE, JOB, Worker, run_workers
from tspin.errors import UserError
from tspin.models import dtype_name
from tspin.runs.files import write_text
from tspin.runs.signals import Stopped, stopping_when_asked
from tspin.runs.unfinished import Unfinished
from tspin.triplets import Triplets

TRIPLETS, TOKENIZER, PROGRESS, FACTS = "triplets", "tokenizer", "progress.json", "facts.json"
STOP = "stop"  # the number of a signal that came to the process that waits
STOPPED = "stopped.json"  # [number, what was kept in words]: they have stopped at a signal
MEMORY = "memory.json"  # [step, max_tokens]: one ran out of memory, and would take micro-batches of so many tokens
STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
KEEPS_STATE = ("FSDP", "MULTI_GPU", "MULTI_CPU", "NO")  # kinds of launch whose trainings keep states


def check_launcher(path: Path, args: SelfPlayConfig) -> None:
    """Raise UserError where an Accelerate file cannot serve a run with these settings."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no Accelerate file can be read here ({str(error).splitlines()[0]})") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise UserError(f"{path}: no Accelerate file: it names no distributed_type; see experiments/accelerate/")
    kind = settings["distributed_type"]
    machines = int(settings.get("num_machines", 1))
    processes, there = int(settings.get("num_processes", 1)), accelerators()
    check_machines(path, machines, processes, args.hosts)
    if processes // machines > (there or os.cpu_count() or 1):
        have = f"{there} GPUs" if there else f"{os.cpu_count()} CPU cores and no GPU"
        where = f" on {machines} machines" if machines > 1 else ""
        raise UserError(
            f"{path}: num_processes is {processes}{where}, and this machine has {have}: write a lower one "
            "into a copy of the file and give it as --launcher-config"
        )
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise UserError(f"{path}: DeepSpeed is not installed; pip install deepspeed, or use fsdp2.yaml beside it")
    if args.checkpoint_steps is not None and kind not in KEEPS_STATE:
        raise UserError(
            f"checkpoint_steps: no states are kept under {kind}, where a training that is stopped starts again at its "
            "first step; use experiments/accelerate/fsdp2.yaml"
        )
    if args.lora and kind in {"DEEPSPEED", "FSDP"}:
        raise UserError(
            f"lora: adapters are merged from whole weights, {path} cuts them into shards; use "
            "experiments/accelerate/ddp.yaml"
        )
    fsdp = settings.get("fsdp_config") or {}
    if kind == "FSDP" and int(fsdp.get("fsdp_version", 1)) != 2:
        raise UserError(f"{path}: fsdp_version must be 2")
    if kind == "FSDP" and fsdp.get("fsdp_state_dict_type") not in STATE_DICTS:
        raise UserError(
            f"{path}: fsdp_state_dict_type must be {' or '.join(STATE_DICTS)}: of a stopped training; checkpoints are "
            "whole models either way"
        )


def trains_in_bfloat16(args: SelfPlayConfig) -> bool:
    """Whether launched trainings compute with weights cut to bfloat16, as FSDP does, and not by autocast."""
    if args.launcher is None or not args.bf16:
        return False
    kind: str = yaml.safe_load(Path(args.launcher).read_text())["distributed_type"]
    return kind in ("FSDP", "DEEPSPEED")


def launch_training(
    policy: str, loading: Mapping[str, Any], training: Training, unfinished: Unfinished | None = None
) -> dict[str, Any]:
    """tspin.engines.here.train of the policy in the folder `policy`, in the processes of args.launcher.

    A step has the same triplets, and its loss is the same mean over them, whatever the number of processes. Where one
    runs out of memory all are started again, with smaller micro-batches, from the state that was kept last. Returns
    train's facts and "processes". Raises UserError, with the processes' own line, when one of them fails, and Stopped.
    """
    args = training.args
    assert args.launcher is not None
    settings = yaml.safe_load(Path(args.launcher).read_text())
    training.log_folder.mkdir(parents=True, exist_ok=True)
    with _job_folder(training.log_folder, shared=int(settings.get("num_machines", 1)) > 1) as folder:
        assert isinstance(training.triplets, Triplets)
        training.triplets.save(folder / TRIPLETS)
        training.tokenizer.save_pretrained(folder / TOKENIZER)
        keeps = unfinished if settings["distributed_type"] in KEEPS_STATE else None
        job: dict[str, Any] = {
            "policy": policy,
            "loading": {**loading, "dtype": dtype_name(dict(loading))},
            "arguments": plain_arguments(args),
            "iteration": training.iteration,
            "checkpoint": str(training.checkpoint.resolve()),
            "log_folder": str(training.log_folder.resolve()),
            "unfinished": keeps and {"folder": str(keeps.folder.resolve()), "inputs": keeps.inputs},
            "tracked": training.tracked
            and {**asdict(training.tracked), "folder": str(training.tracked.folder.resolve())},
        }
        # The settings decide, not the file: scores of this process and the record have the same arithmetic.
        arguments = ["--config_file", str(Path(args.launcher).resolve())]
        arguments += ["--mixed_precision", "bf16" if args.bf16 else "no"]
        while True:
            (folder / JOB).write_text(json.dumps(job, default=str))
            _run(workers_of(settings, arguments, args.hosts, folder), folder, training, keeps is not None)
            if (folder / FACTS).exists():
                facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
                return facts
            step, tokens = json.loads((folder / MEMORY).read_text())
            (folder / MEMORY).unlink()
            before = job["arguments"]["micro_batch_tokens"]
            sys.stderr.write(
                f"tspin: step {step}: out of memory; its processes are started again with micro-batches of {tokens} "
                f"tokens ({before} before), the same prompts a step\n"
            )
            job["arguments"]["micro_batch_tokens"] = tokens


@contextmanager
def _job_folder(beside: Path, shared: bool) -> Iterator[Path]:
    """A temporary folder for what processes are told and tell; shared: on the run's file system, for other machines."""
    prefix = "tspin-training-"
    if shared:
        for orphan in beside.glob(f".{prefix}*"):  # of a command that was killed: the run's folder is this one's now
            rmtree(orphan)
    with tempfile.TemporaryDirectory(prefix=f".{prefix}" if shared else prefix, dir=beside if shared else None) as name:
        yield Path(name).resolve()


def _run(
    work: tuple[Sequence[Worker], Sequence[Mapping[str, Any]]], folder: Path, training: Training, keeps: bool
) -> None:
    """Run a training's processes to their end. keeps: whether they heed STOP.

    Raises UserError when they fail by anything but memory, and Stopped.
    """
    description = f"training, iteration {training.iteration}"
    progress = Progress(folder / PROGRESS, description, disable=bool(training.args.disable_tqdm))
    with stopping_when_asked() as asked:

        def watch() -> None:
            progress.show()
            if asked.number is not None and not keeps:
                raise Stopped(asked.number)
            if asked.number is not None and not (folder / STOP).exists():
                write_text(folder / STOP, str(asked.number))

        try:
            run_workers("training", *work, watch)
        except UserError:
            if asked.number is not None and not (folder / FAILURE).exists():
                raise Stopped(asked.number) from None  # it came to them before they were ready for it
            if (folder / FAILURE).exists():
                raise UserError(f"training: {(folder / FAILURE).read_text()}") from None
            if not (folder / MEMORY).exists():
                raise
        finally:
            progress.close()
        if (folder / STOPPED).exists():
            raise Stopped(*json.loads((folder / STOPPED).read_text()))


def plain_arguments(args: SelfPlayConfig) -> dict[str, Any]:
    """What SelfPlayConfig is made from again, as JSON values."""
    given = args.to_dict()
    for name in ("hub_token", "push_to_hub_token", "accelerator_config", "launcher", "hosts"):
        given.pop(name, None)  # tokens are masked by to_dict; the others are the launched process's own
    return given


class Progress:
    """The launched training's progress bar, drawn here from what its first process writes to `path`."""

    def __init__(self, path: Path, description: str, disable: bool):
        self.path = path
        self.bar = tqdm(desc=description, unit="step", disable=disable)

    def show(self) -> None:
        try:
            step, steps, loss = json.loads(self.path.read_text())
        except (OSError, ValueError):  # not there yet
            return
        self.bar.total = steps
        if loss is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        self.show()
        self.bar.close()

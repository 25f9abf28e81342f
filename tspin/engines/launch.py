"""Training in several processes: `accelerate launch` on tspin.engines.training_worker, one training at a time.

Everything between trainings stays in one process, so that sampling and evaluation have the GPUs to themselves: the
launched processes end with the training, and give their memory back.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from tspin.config import SelfPlayConfig
from tspin.devices import accelerators
from tspin.engines.here import Training
from tspin.engines.workers import Worker, run_workers
from tspin.errors import UserError
from tspin.models import Policy, dtype_name
from tspin.triplets import Triplets

TRIPLETS, TOKENIZER, PROGRESS, FACTS = "triplets", "tokenizer", "progress.json", "facts.json"


def check_launcher(path: Path, args: SelfPlayConfig) -> None:
    """Raise UserError where an Accelerate file cannot serve a run with these settings."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no Accelerate file can be read here ({str(error).splitlines()[0]})") from error
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise UserError(f"{path}: no Accelerate file: it names no distributed_type; see experiments/accelerate/")
    kind = settings["distributed_type"]
    if settings.get("num_machines", 1) != 1:
        raise UserError(f"{path}: num_machines must be 1; a sweep (`tspin sweep`) gives each machine a run of its own")
    processes, there = int(settings.get("num_processes", 1)), accelerators()
    if processes > (there or os.cpu_count() or 1):
        have = f"{there} GPUs" if there else f"{os.cpu_count()} CPU cores and no GPU"
        raise UserError(
            f"{path}: num_processes is {processes}, and this machine has {have}: write a lower one into a copy of the "
            "file and give it as --launcher-config"
        )
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise UserError(f"{path}: DeepSpeed is not installed; pip install deepspeed, or use fsdp2.yaml beside it")
    for name, off in {"checkpoint_steps": None, "save_strategy": "no"}.items():
        if getattr(args, name) != off:
            raise UserError(
                f"{name}: states are kept by trainings of one process; with --launcher a training that "
                "is stopped starts again at its first step"
            )
    if args.lora and kind in {"DEEPSPEED", "FSDP"}:
        raise UserError(
            f"lora: adapters are merged from whole weights, {path} cuts them into shards; use "
            "experiments/accelerate/ddp.yaml"
        )
    fsdp = settings.get("fsdp_config") or {}
    if kind == "FSDP" and int(fsdp.get("fsdp_version", 1)) != 2:
        raise UserError(f"{path}: fsdp_version must be 2")
    if kind == "FSDP" and fsdp.get("fsdp_state_dict_type") != "FULL_STATE_DICT":
        raise UserError(f"{path}: fsdp_state_dict_type must be FULL_STATE_DICT: checkpoints are whole models")


def trains_in_bfloat16(args: SelfPlayConfig) -> bool:
    """Whether launched trainings compute with weights cut to bfloat16, as FSDP does, and not by autocast."""
    if args.launcher is None or not args.bf16:
        return False
    kind: str = yaml.safe_load(Path(args.launcher).read_text())["distributed_type"]
    return kind in ("FSDP", "DEEPSPEED")


def launch_training(policy: Policy, loading: Mapping[str, Any], training: Training) -> dict[str, Any]:
    """tspin.engines.here.train of a policy, in the processes of args.launcher.

    A step has the same triplets, and its loss is the same mean over them, whatever the number of processes. Returns
    train's facts and "processes". Raises UserError, with the processes' own line, when one of them fails.
    """
    args = training.args
    assert args.launcher is not None
    training.log_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tspin-training-") as temporary:
        folder = Path(temporary)
        assert isinstance(training.triplets, Triplets)
        training.triplets.save(folder / TRIPLETS)
        training.tokenizer.save_pretrained(folder / TOKENIZER)
        job = {
            "policy": asdict(policy),
            "loading": {**loading, "dtype": dtype_name(dict(loading))},
            "arguments": plain_arguments(args),
            "iteration": training.iteration,
            "checkpoint": str(training.checkpoint.resolve()),
            "log_folder": str(training.log_folder.resolve()),
            "tracked": training.tracked
            and {**asdict(training.tracked), "folder": str(training.tracked.folder.resolve())},
        }
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", args.launcher]
        # The settings decide, not the file: scores of this process and the record have the same arithmetic.
        command += ["--mixed_precision", "bf16" if args.bf16 else "no", "-m", "tspin.engines.training_worker"]
        # Each process is given its part of the cores: on a CPU they would otherwise all use every one.
        environment = {"TOKENIZERS_PARALLELISM": "false", **os.environ}
        description = f"training, iteration {training.iteration}"
        progress = Progress(folder / PROGRESS, description, disable=bool(args.disable_tqdm))
        try:
            run_workers("training", [Worker(folder, command, environment)], [job], progress.show)
        finally:
            progress.close()
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    return facts


def plain_arguments(args: SelfPlayConfig) -> dict[str, Any]:
    """What SelfPlayConfig is made from again, as JSON values."""
    given = args.to_dict()
    for name in ("hub_token", "push_to_hub_token", "accelerator_config", "launcher"):
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

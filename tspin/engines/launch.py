"""Training and scoring in several processes: `accelerate launch` on workers of ours, one job at a time.

Everything between trainings stays in one process, so that sampling and evaluation have the GPUs to themselves: the
launched processes end with the job, and give their memory back.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from tspin.config import SelfPlayConfig
from tspin.devices import accelerator_bytes, accelerators
from tspin.engines.here import Scoring, Training
from tspin.engines.machines import check_machines
from tspin.engines.processes import Work, job_folder, launch_settings, run_job
from tspin.errors import UserError
from tspin.models import Policy, dtype_name, load_shape
from tspin.options import OF_SEVERAL, is_given
from tspin.runs.unfinished import Unfinished
from tspin.triplets import Triplets

TRIPLETS, TOKENIZER, FACTS, LOGPS = "triplets", "tokenizer", "facts.json", "logps-*.parquet"
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
    machines, processes = (_count(path, settings, name) for name in ("num_machines", "num_processes"))
    there = accelerators()
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
    if args.scoring == "sharded" and kind != "FSDP":
        raise UserError(f"scoring=sharded: {path} cuts no model into shards; use experiments/accelerate/fsdp2.yaml")
    if args.checkpoint_steps is not None and kind not in KEEPS_STATE:
        raise UserError(
            f"checkpoint_steps: no states are kept under {kind}, where a training that is stopped starts again at its "
            "first step; use experiments/accelerate/fsdp2.yaml"
        )
    if args.gradient_signal and kind == "DEEPSPEED":
        raise UserError(
            f"gradient_signal: DeepSpeed leaves no gradients to look at, as {path} has it: set it to false, or use "
            "experiments/accelerate/fsdp2.yaml"
        )
    for name in OF_SEVERAL:
        if kind in {"DEEPSPEED", "FSDP"} and is_given(args, name):
            raise UserError(f"{name}: does nothing under {kind}, as {path} has it; use experiments/accelerate/ddp.yaml")
    if args.lora and kind in {"DEEPSPEED", "FSDP"}:
        raise UserError(
            f"lora: adapters are merged from whole weights, {path} cuts them into shards; use "
            "experiments/accelerate/ddp.yaml"
        )
    fsdp = settings.get("fsdp_config") or {}
    if not isinstance(fsdp, dict):
        raise UserError(f"{path}: fsdp_config: a mapping is needed")
    if kind == "FSDP" and str(fsdp.get("fsdp_version", 1)) != "2":
        raise UserError(f"{path}: fsdp_version must be 2")
    if kind == "FSDP" and fsdp.get("fsdp_state_dict_type") not in STATE_DICTS:
        raise UserError(
            f"{path}: fsdp_state_dict_type must be {' or '.join(STATE_DICTS)}: of a stopped training; checkpoints are "
            "whole models either way"
        )


def _count(path: Path, settings: dict[str, Any], name: str) -> int:
    """A number of machines or processes in a launch file; 1 where it says none. Raises UserError."""
    value = settings.get(name, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {name} is {value!r}: a whole number from 1 on is needed")
    return value


def trains_in_bfloat16(args: SelfPlayConfig) -> bool:
    """Whether launched trainings compute with weights cut to bfloat16, as FSDP does, and not by autocast."""
    return bool(args.launcher and args.bf16) and launch_settings(args)["distributed_type"] in ("FSDP", "DEEPSPEED")


def scores_in_shards(args: SelfPlayConfig, policy: str, loading: Mapping[str, Any]) -> bool:
    """Whether log-probabilities of the policy in the folder `policy` are computed where it is trained: by FSDP.

    As args.scoring says, or where one GPU's memory is no more than its weights and a quarter for what else is needed.
    """
    if args.launcher is None or launch_settings(args)["distributed_type"] != "FSDP":
        return False
    memory = accelerator_bytes()
    if args.scoring != "auto" or memory is None:
        return args.scoring == "sharded"
    shape = load_shape(policy, dict(loading))
    size = getattr(torch, dtype_name(dict(loading))).itemsize
    return 1.25 * size * sum(weight.numel() for weight in shape.parameters()) > memory


def launch_training(
    policy: Policy, loading: Mapping[str, Any], training: Training, unfinished: Unfinished | None = None
) -> dict[str, Any]:
    """tspin.engines.here.train of a policy, in the processes of args.launcher.

    A step has the same triplets, and its loss is the same mean over them, whatever the number of processes. Returns
    train's facts and "processes". Raises UserError, with the processes' own line, when one of them fails, and Stopped.
    """
    args, triplets = training.args, training.triplets
    training.log_folder.mkdir(parents=True, exist_ok=True)
    keeps = unfinished if launch_settings(args)["distributed_type"] in KEEPS_STATE else None
    with job_folder(args, training.log_folder) as folder:
        assert isinstance(triplets, Triplets)
        triplets.save(folder / TRIPLETS)
        training.tokenizer.save_pretrained(folder / TOKENIZER)
        job = {
            "policy": asdict(policy),
            "loading": {**loading, "dtype": dtype_name(dict(loading))},
            "arguments": plain_arguments(args),
            "iteration": training.iteration,
            "checkpoint": str(training.checkpoint.resolve()),
            "log_folder": str(training.log_folder.resolve()),
            "unfinished": keeps and {"folder": str(keeps.folder.resolve()), "inputs": keeps.inputs},
            "tracked": training.tracked
            and {**asdict(training.tracked), "folder": str(training.tracked.folder.resolve())},
        }
        work = Work("training", "tspin.engines.training_worker", f"training, iteration {training.iteration}", "step")
        run_job(work, args, job, folder, keeps is not None)
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    return facts


def launch_scoring(
    policy: Policy,
    loading: Mapping[str, Any],
    triplets: Triplets,
    scoring: Scoring,
    beside: Path,
    by_token: bool = False,
) -> dict[str, list[Any]]:
    """tspin.engines.here.score of a policy, cut into shards in the processes of args.launcher.

    beside: a folder that all machines see. Raises UserError, with the processes' own line, when one of them fails.
    """
    args = scoring.args
    with job_folder(args, beside) as folder:
        triplets.save(folder / TRIPLETS)
        scoring.tokenizer.save_pretrained(folder / TOKENIZER)
        job = {
            "policy": asdict(policy),
            "loading": {**loading, "dtype": dtype_name(dict(loading))},
            "arguments": {**plain_arguments(args), "report_to": []},
            "of": scoring.of,
            "by_token": by_token,
        }
        of = f"log-probabilities of {scoring.of}"
        run_job(Work("scoring", "tspin.engines.sharded_worker", of, "prompt"), args, job, folder, keeps=False)
        table = pd.concat([pd.read_parquet(path) for path in folder.glob(LOGPS)]).set_index("place").sort_index()
    return {str(role): values.tolist() for role, values in table.items()}


def plain_arguments(args: SelfPlayConfig) -> dict[str, Any]:
    """What SelfPlayConfig is made from again, as JSON values."""
    given = args.to_dict()
    for name in ("hub_token", "push_to_hub_token", "hosts", "scoring"):
        given.pop(name, None)  # tokens are masked by to_dict; the others are the launched process's own
    return given

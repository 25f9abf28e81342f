"""Log-probabilities of every response on several GPUs: a process each (scoring_worker), with its share."""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from tspin.config import EngineSettings, SelfPlayConfig
from tspin.devices import accelerators
from tspin.engines.here import Scoring
from tspin.engines.launch import TOKENIZER, TRIPLETS, plain_arguments
from tspin.engines.workers import Worker, gpu_environment, run_workers
from tspin.errors import UserError
from tspin.models import Policy, dtype_name
from tspin.triplets import Triplets, dealt, tokens_of

LOGPS = "logps.parquet"


def check_gpus(engine: EngineSettings) -> None:
    """Raise UserError where the settings ask for more GPUs than this machine has."""
    asked, there = engine.data_parallel * engine.tensor_parallel, accelerators()
    if asked > max(there, 1):
        have = f"{there} GPUs" if there else "no GPU"
        raise UserError(
            f"engine.data_parallel={engine.data_parallel}, engine.tensor_parallel={engine.tensor_parallel}: {asked} "
            f"GPUs are asked for, and this machine has {have}: set both so that they make {max(there, 1)}, such as "
            f"--set engine.data_parallel={max(there, 1)} --set engine.tensor_parallel=1"
        )


def scoring_processes(args: SelfPlayConfig) -> int:
    """As many as engine.data_parallel says, and as there are GPUs; 1 without."""
    return max(min(args.engine.data_parallel, accelerators()), 1)


def score_in_processes(
    processes: int, policy: Policy, loading: Mapping[str, Any], triplets: Triplets, scoring: Scoring
) -> dict[str, list[float]]:
    """tspin.engines.here.score of a policy: role → nats, in the triplets' order.

    Raises UserError, with a process's own line, when one fails.
    """
    processes = min(processes, len(triplets))
    shares = dealt(list(map(tokens_of, triplets)), processes)
    job = {
        "policy": asdict(policy),
        "loading": {**loading, "dtype": dtype_name(dict(loading))},
        "arguments": {**plain_arguments(scoring.args), "report_to": [], "engine": {}},
        "of": scoring.of,
        "autocast": scoring.autocast,
    }
    command = [sys.executable, "-m", "tspin.engines.scoring_worker"]
    with tempfile.TemporaryDirectory(prefix="tspin-scoring-") as temporary:
        workers = []
        for number, share in enumerate(shares):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            triplets.select(share).save(folder / TRIPLETS)
            scoring.tokenizer.save_pretrained(folder / TOKENIZER)
            workers.append(Worker(folder, command, gpu_environment(number, 1)))
        run_workers("scoring", workers, [job] * processes)
        tables = [pd.read_parquet(worker.folder / LOGPS) for worker in workers]
    found = {str(role): [0.0] * len(triplets) for role in tables[0]}
    for share, table in zip(shares, tables, strict=True):
        for role, values in found.items():
            for i, value in zip(share, table[role].tolist(), strict=True):
                values[i] = value
    return found

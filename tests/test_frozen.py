"""What users see and what runs compute, frozen: help texts, the results' schemas, the exact numbers of a tiny run.

A change that moves one of these on purpose writes them anew (TSPIN_FREEZE=1 python -m pytest tests/test_frozen.py) and
says in its commit which ones moved and why. Numbers are compared to the bit on the kind of CPU that wrote them; other
kinds add up in another order, and there they are compared to four digits at iteration 0, to two after it: RMSprop takes
steps of one size however small a gradient is, and so makes much of the last digit (seen: 0.002 of a weights' sum).
"""

import json
import os
import platform
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tspin import SelfPlayConfig, SelfPlayTrainer, cli
from tspin.objectives import METHODS

FROZEN = Path(__file__).parent / "frozen"
FREEZE = bool(os.environ.get("TSPIN_FREEZE"))
COMMANDS = [
    *("claims", "compare", "diagnose", "doctor", "evaluate", "fetch", "figure", "inspect", "plan"),
    *("report", "rerun", "run", "sample", "settings", "sweep", "table", "tokens", "train"),
]
TIMES = ["tokens_per_second"]
RUN = {
    "iterations": 2,
    "learning_rate": 1e-3,
    "max_new_tokens": 6,
    "batch_size": 4,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
    "monitor_proto": True,
}
BETA = 0.5  # of the methods that have it
PRESET = [
    *("--preset", "pocket", "--methods", "base,sft,tspin", "--set", "data.labels=16", "--set", "iterations=2"),
    *("--set", "methods.sft.data.labels=16", "--set", "evaluation.limit=1", "--set", "bf16=false"),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def assert_frozen(name: str, found: dict) -> None:
    """`found` equals tests/frozen/<name>.json: to the bit on the CPU that wrote it, about that elsewhere."""
    path = FROZEN / f"{name}.json"
    found = json.loads(json.dumps(found))
    if FREEZE:
        path.write_text(json.dumps({"processor": processor(), **found}, indent=0, sort_keys=True) + "\n")
    kept = json.loads(path.read_text())
    exact = kept.pop("processor") == processor()
    assert kept.keys() == found.keys()
    for key, value in kept.items():
        rel, abs_ = (1e-2, 3e-3) if key.startswith("1/") else (1e-4, 1e-5)
        wanted = value if exact or not isinstance(value, list | float) else pytest.approx(value, rel=rel, abs=abs_)
        assert found[key] == wanted, key


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    result = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    text = "\n".join(line.rstrip() for line in result.output.splitlines()) + "\n"
    path = FROZEN / "help" / f"{command}.txt"
    if FREEZE:
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_every_method(tmp_path, model_folder, rows, method):
    beta = {"beta": BETA} if "beta" in METHODS[method].resolve({}) else {}
    args = SelfPlayConfig(output_dir=str(tmp_path / "run"), method=method, **RUN, **beta)
    found = {}
    for result in SelfPlayTrainer(str(model_folder), args=args, train_dataset=rows).iterate():
        folder, t = result.model_path.parent, result.iteration
        steps = pd.read_parquet(folder / "steps.parquet").drop(columns=TIMES)
        found |= {f"{t}/steps/{name}": steps[name].tolist() for name in steps}
        table = pd.read_parquet(folder / "diagnostics.parquet").astype({"reward_after": float})
        found |= {
            f"{t}/diagnostics/{name}": table[name].fillna(0).tolist() for name in ("before", "after", "reward_after")
        }
        weights = load_file(result.model_path / "model.safetensors")
        found |= {f"{t}/weights": [float(weights[name].double().sum()) for name in sorted(weights)]}
        drawn = folder / "synthetic.parquet" if t else tmp_path / "run" / "iteration-0-synthetic.parquet"
        if METHODS[method].self_play:
            found[f"{t}/synthetic"] = str(pd.read_parquet(drawn)["ids"].map(list).tolist())
        found[f"{t}/warnings"] = str(sorted(result.warnings))
    assert_frozen(f"numbers-{method}", found)


def test_a_preset_and_the_schemas_of_its_results(tmp_path):
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    result = CliRunner().invoke(cli.app, ["run", *PRESET, *places])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "results" / "pocket"
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        schema = pq.read_schema(path)
        found[f"schema/{path.name}"] = str([(field.name, str(field.type)) for field in schema])
    scores = pd.read_csv(folder / "evaluations.csv")
    found["schema/evaluations.csv"] = str(list(scores))
    found |= {f"evaluations/{name}": scores[name].fillna(-1).tolist() for name in ("value", "stderr", "n")}
    found["evaluations/rows"] = str(scores[["method", "seed", "iteration", "benchmark", "metric"]].values.tolist())
    steps = pd.read_parquet(folder / "steps.parquet")
    found["steps/loss"] = steps["loss"].tolist()
    provenance = json.loads((folder / "provenance.json").read_text())
    found["schema/provenance.json"] = str([sorted(provenance), *(sorted(run) for run in provenance["runs"])])
    found["schema/suite.json"] = str(sorted(json.loads((folder / "suite.json").read_text())))
    found["files"] = str(sorted(path.name for path in folder.iterdir()))
    run = tmp_path / "runs" / "pocket" / "seed-0" / "tspin" / "iteration-1"
    for name in ("steps", "diagnostics", "synthetic"):
        found[f"schema/run/{name}"] = str([(f.name, str(f.type)) for f in pq.read_schema(run / f"{name}.parquet")])
    assert_frozen("preset", found)

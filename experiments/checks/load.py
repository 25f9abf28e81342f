"""Load: a data set of a million rows, a results folder of ten thousand runs. How long, and how much memory?

    make load        # about 15 minutes on two cores → results/benchmarks/load/load.csv

Every line of the table is a process of its own. Its memory is what only it holds (anonymous pages, at their highest;
Linux): pages of memory-mapped files, which the system may take back at any time, are left out.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.checks.evidence import write_evidence

LIBRARIES = "import datasets, peft; from transformers import AutoModelForCausalLM, Trainer"  # what every start imports
COMMAND = [sys.executable, "-c", "from tspin.cli import main; main()"]
ITERATIONS = 5  # of every run
WORDS = "the of and a to in is you that it he was for on are as with his they I at be this have from or".split()
METHODS = ("spin", "tspin", "tspin_no_history", "tspin_reference", "space")


def measured(command: list[str]) -> tuple[float, float]:
    """The seconds and the highest anonymous memory in MB of a process. Raises RuntimeError when it fails."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, text=True)
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {errors.read()[-2000:]}")
        return seconds, peak / 1e3


def _anonymous(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def write_many_rows(path: Path, count: int) -> None:
    """Prompts of about 40 words and responses of about 60, all different."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            prompt = f"{number}: " + " ".join(draw.choices(WORDS, k=40))
            file.write(json.dumps({"prompt": prompt, "completion": " ".join(draw.choices(WORDS, k=60))}) + "\n")


def sample_and_train(folder: Path, rows: int, steps: int) -> None:
    """Write responses, read them, make triplets of them and train that many steps."""
    from tspin.data.responses import read_responses, response_rows, response_statistics, write_responses
    from tspin.engines.here import Training, train
    from tspin.models import load_model
    from tspin.schema import PROTO, SYNTHETIC
    from tspin.triplets import make_triplets

    trainer = start_trainer(folder, rows)
    labelled = trainer.examples.labelled
    # Another prompt's label stands for a response: sampling a million takes hours, and is no matter of memory.
    other = response_rows(labelled.dataset.select([*range(1, rows), 0]))
    path = folder / "responses.parquet"
    write_responses(path, trainer.examples.prompt_ids.tolist(), other)
    response_statistics(other, labelled)
    responses = read_responses(path)
    triplets = make_triplets(trainer.examples, {SYNTHETIC: responses, PROTO: responses})
    trainer.args.max_steps = steps
    engine = trainer.run.engine
    training = Training(triplets, engine.tokenizer, trainer.args, 0, folder / "model", folder / "log")
    train(load_model(trainer.source, engine.loading), training)


def start_trainer(folder: Path, rows: int):
    """What a run makes before its first stage: settings, model, data."""
    from tspin.config import build_config
    from tspin.experiment.preset import build_trainer

    tree = {"model": {"path": "pocket"}, "data": {"path": str(folder / "rows.jsonl")}, "max_completion_length": 400}
    settings = build_config(tree, ["batch_size=8"]).for_method("tspin")
    trainer = build_trainer(settings, folder / "run", seed=0)
    assert len(trainer.examples) == rows
    return trainer


def write_results(folder: Path, count: int) -> None:
    """results/pocket/ of `count` iterations: seeds of five methods, ITERATIONS each."""
    target = folder / "pocket"
    target.mkdir(parents=True)
    columns = [{"benchmark": f"b{n}", "label": f"B{n}", "group": f"g{n}", "metric": "em"} for n in range(5)]
    (target / "suite.json").write_text(json.dumps({"preset": "pocket", "columns": columns}))
    draw = np.random.default_rng(0)
    seeds = range(count // len(METHODS) // ITERATIONS)
    runs = pd.MultiIndex.from_product([METHODS, seeds, range(ITERATIONS)], names=["method", "seed", "iteration"])
    scores = runs.to_frame(index=False).merge(pd.DataFrame(columns)[["benchmark", "metric"]], how="cross")
    base = pd.DataFrame(columns)[["benchmark", "metric"]].assign(method="base", seed=0, iteration=pd.NA)
    scores = pd.concat([base, scores], ignore_index=True).astype({"iteration": "Int64"})
    problems = scores.merge(pd.DataFrame({"doc_id": range(100)}), how="cross").drop(columns="metric")
    problems["value"] = 100.0 * (draw.random(len(problems)) < 0.4)
    keys = ["method", "seed", "iteration", "benchmark"]
    means = problems.groupby(keys, dropna=False)["value"].mean().rename("value").reset_index()
    scores = scores.merge(means, on=keys).assign(preset="pocket", stderr=4.9, n=100)
    scores.to_csv(target / "evaluations.csv", index=False)
    problems.astype({"seed": "int16", "iteration": "Int8"}).to_parquet(target / "problems.parquet", index=False)
    steps = runs.to_frame(index=False).merge(pd.DataFrame({"step": range(1, 21)}), how="cross")
    for kind in ("reward", "log_likelihood"):
        for role in ("labelled", "synthetic"):
            steps[f"{kind}/{role}"] = draw.normal(size=len(steps))
    steps.astype({"iteration": "Int8"}).to_parquet(target / "steps.parquet", index=False)
    roles = pd.DataFrame({"role": ["labelled", "synthetic"]})
    samples = runs.to_frame(index=False).merge(pd.DataFrame({"prompt_id": range(20)}), how="cross")
    samples = samples.merge(roles, how="cross")
    samples = samples.assign(**{name: draw.normal(size=len(samples)) for name in ("after", "reward_after")})
    samples["tokens"] = draw.integers(5, 12, size=len(samples))
    samples.astype({"iteration": "Int8"}).to_parquet(target / "diagnostics.parquet", index=False)
    facts = {"training_seconds": 10.0, "sampling_seconds": 5.0, "peak_memory_bytes": 1000}
    costs = [{"method": m, "seed": s, "iteration": t, **facts} for m, s, t in runs]
    (target / "provenance.json").write_text(json.dumps({"runs": costs}))


def cases(folder: Path, sizes: list[int], steps: int, runs: int) -> Iterator[tuple[str, int, list[str]]]:
    """What is measured, at which size, and its command; its files are written just before."""
    yield "the libraries' import alone", 0, [sys.executable, "-c", LIBRARIES]
    for rows in sizes:
        place = folder / str(rows)
        place.mkdir()
        write_many_rows(place / "rows.jsonl", rows)
        start = [sys.executable, "-m", __spec__.name, "--folder", str(place), "--sizes", str(rows), "--steps"]
        yield "rows: first start, encoded", rows, [*start, "0"]
        yield "rows: next start", rows, [*start, "0"]
        yield f"rows: responses, triplets, {steps} steps", rows, [*start, str(steps)]
    write_results(folder / "results", runs)
    for name in ("table 1", "figure 2", "figure 3", "figure 7", "claims"):
        yield f"runs: tspin {name}", runs, [*COMMAND, *name.split(), "--results", str(folder / "results")]
    yield "tspin --help", 0, [*COMMAND, "--help"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="rows")
    parser.add_argument("--steps", type=int, default=20, help="of training on each of them")
    parser.add_argument("--runs", type=int, default=10_000, help="iterations in the results folder")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/load"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the process that is measured
    arguments = parser.parse_args()
    if arguments.folder and arguments.steps:
        sample_and_train(arguments.folder, arguments.sizes[0], arguments.steps)
    elif arguments.folder:
        start_trainer(arguments.folder, arguments.sizes[0])
    if arguments.folder:
        return
    table, start = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tspin-load-") as folder:
        for what, size, command in cases(Path(folder), arguments.sizes, arguments.steps, arguments.runs):
            seconds, peak = measured(command)
            table.append({"what": what, "size": size, "seconds": round(seconds, 1), "memory_mb": round(peak)})
            print(f"{what}, {size}: {seconds:.1f} s, {peak:.0f} MB", flush=True)
    write_evidence(arguments.out, {"load": pd.DataFrame(table)}, start)


if __name__ == "__main__":
    main()

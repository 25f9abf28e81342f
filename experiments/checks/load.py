"""Load: a data set of a million rows, a results folder of ten thousand runs. How long, and how much memory?

    make load        # about 15 minutes on two cores → results/benchmarks/load/load.csv

Every line of the table is a process of its own. Its memory is what it holds itself (anonymous pages, at their highest;
Linux): pages of memory-mapped files, which the system may take back at any time, are left out.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from tspin.runs.stages import provenance, write_json, write_text

OUT = Path("results/benchmarks/load")
SIZES = (10_000, 100_000, 1_000_000)
LIBRARIES = "import datasets, peft; from transformers import AutoModelForCausalLM, Trainer"  # what every start imports
RUNS = 10_000  # 5 methods × 400 seeds × 5 iterations
STEPS = 20  # of training on the large data set
WORDS = "the of and a to in is you that it he was for on are as with his they I at be this have from or".split()
METHODS = ("spin", "tspin", "tspin_no_history", "tspin_reference", "space")


def measured(command: list[str]) -> tuple[float, float, str]:
    """(seconds, highest anonymous memory in MB, stdout) of a process. Raises RuntimeError when it fails."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, text=True)
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {errors.read()[-2000:]}")
        return seconds, peak / 1e3, out.read()


def _anonymous(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def write_rows(path: Path, count: int) -> None:
    """Prompts of about 40 words and responses of about 60, all different."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            prompt = f"{number}: " + " ".join(draw.choices(WORDS, k=40))
            file.write(json.dumps({"prompt": prompt, "completion": " ".join(draw.choices(WORDS, k=60))}) + "\n")


def start_trainer(folder: Path, rows: int) -> None:
    """What a run does before its first stage: settings, model, data."""
    _trainer(folder, rows)


def sample_and_train(folder: Path, rows: int) -> None:
    """Responses written, read and made triplets, and STEPS steps on them; the log-probabilities of a few."""
    from tspin.data.responses import read_responses, response_rows, response_statistics, write_responses
    from tspin.engines.here import train_iteration
    from tspin.models import load_model
    from tspin.objectives import PROTO, SYNTHETIC
    from tspin.triplets import make_triplets

    trainer = _trainer(folder, rows)
    labelled = trainer.examples.labelled
    # Another prompt's label stands for a response: sampling a million takes hours, and is no matter of memory.
    other = response_rows(labelled.dataset.select([*range(1, rows), 0]))
    path = folder / "responses.parquet"
    write_responses(path, trainer.examples.prompt_ids.tolist(), other)
    response_statistics(other, labelled)
    responses = read_responses(path)
    triplets = make_triplets(trainer.examples, {SYNTHETIC: responses, PROTO: responses})
    trainer.args.max_steps = STEPS
    model = load_model(trainer.source, trainer.model_arguments)
    train_iteration(
        model, triplets, trainer.tokenizer, trainer.args, 0, checkpoint=folder / "model", log_folder=folder / "log"
    )


def _trainer(folder: Path, rows: int):
    from tspin.config import build_config
    from tspin.experiment.preset import build_trainer

    tree = {"model": {"path": "pocket"}, "data": {"path": str(folder / "rows.jsonl"), "max_response_tokens": 400}}
    settings = build_config(tree, ["training.batch_size=8"]).for_method("tspin")
    trainer = build_trainer(settings, folder / "run", seed=0)
    assert len(trainer.examples) == rows
    return trainer


def write_results(folder: Path) -> None:
    """results/pocket/ of RUNS runs: 400 seeds of five methods, five iterations each."""
    target = folder / "pocket"
    target.mkdir()
    columns = [{"benchmark": f"b{n}", "label": f"B{n}", "group": f"g{n}", "metric": "em"} for n in range(5)]
    (target / "suite.json").write_text(json.dumps({"preset": "pocket", "columns": columns}))
    draw = np.random.default_rng(0)
    runs = pd.MultiIndex.from_product([METHODS, range(RUNS // 25), range(5)], names=["method", "seed", "iteration"])
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
    samples.astype({"iteration": "Int8"}).to_parquet(target / "diagnostics.parquet", index=False)
    facts = {"training_seconds": 10.0, "sampling_seconds": 5.0, "peak_memory_bytes": 1000}
    costs = [{"method": m, "seed": s, "iteration": t, **facts} for m, s, t in runs]
    (target / "provenance.json").write_text(json.dumps({"runs": costs}))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--step", choices=["start_trainer", "sample_and_train"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        globals()[arguments.step](arguments.folder, arguments.sizes[0])
        return
    table: list[dict] = []

    def measure(what: str, size: int, command: list[str]) -> None:
        seconds, peak, _ = measured(command)
        table.append({"what": what, "size": size, "seconds": round(seconds, 1), "memory_mb": round(peak)})
        sys.stderr.write(f"{what}, {size}: {seconds:.1f} s, {peak:.0f} MB\n")

    python, tspin = sys.executable, [sys.executable, "-c", "from tspin.cli import main; main()"]
    measure("the libraries' import alone", 0, [python, "-c", LIBRARIES])
    with tempfile.TemporaryDirectory(prefix="tspin-load-") as temporary:
        for rows in arguments.sizes:
            folder = Path(temporary) / str(rows)
            folder.mkdir()
            write_rows(folder / "rows.jsonl", rows)
            own = [python, __file__, "--folder", str(folder), "--sizes", str(rows), "--step"]
            measure("rows: first start, encoded", rows, [*own, "start_trainer"])
            measure("rows: next start", rows, [*own, "start_trainer"])
            measure(f"rows: responses, triplets, {STEPS} steps", rows, [*own, "sample_and_train"])
        results = Path(temporary) / "results"
        results.mkdir()
        write_results(results)
        for name in (["table", "1"], ["figure", "2"], ["figure", "3"], ["figure", "7"], ["claims"]):
            measure(f"runs: tspin {' '.join(name)}", RUNS, [*tspin, *name, "--results", str(results)])
    measure("tspin --help", 0, [*tspin, "--help"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "load.csv", pd.DataFrame(table).to_csv(index=False))
    write_json(arguments.out / "provenance.json", {**provenance(), "date": time.strftime("%Y-%m-%d", time.gmtime())})


if __name__ == "__main__":
    main()

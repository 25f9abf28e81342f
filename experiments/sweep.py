"""Run a sweep file: every setting of every method's grid, scored on a validation suite.

    python experiments/sweep.py experiments/pocket/sweep.yaml

Writes results/<preset>/sweep.csv (a row per setting and iteration) and sweep.md. A sweep that was
stopped goes on where it was: each setting is an ordinary run in runs/<preset>-sweep/.
"""

import argparse
import io
import itertools
from pathlib import Path

import pandas as pd
import yaml
from rich.console import Console

from tspin.config import load_config
from tspin.evaluation.suites import load_suite, tabulated
from tspin.experiment.preset import build_trainer, evaluate_checkpoint, model_source, quiet_libraries
from tspin.runs.stages import fingerprint, read_json, write_json, write_text

DECODING = {"temperature", "top_p", "max_new_tokens", "sampling_batch_size", "sampling_backend", "sampling_dtype"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    sweep = yaml.safe_load(arguments.sweep.read_text())
    quiet_libraries()
    console = Console(stderr=True)
    rows = []
    settings = [
        (method, dict(zip(grid, values, strict=True)))
        for method, grid in sweep["grids"].items()
        for values in itertools.product(*grid.values())
    ]
    for number, (method, setting) in enumerate(settings, start=1):
        console.print(f"[bold]setting {number} of {len(settings)}[/bold]: {method}, {setting}")
        rows += run_setting(sweep, method, setting, arguments.runs / f"{sweep['preset']}-sweep")
    table = pd.DataFrame(rows)
    folder = arguments.results / sweep["preset"]
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, float_format="%.6g", lineterminator="\n")
    write_text(folder / "sweep.csv", buffer.getvalue())
    write_text(folder / "sweep.md", report(table, sweep))
    write_json(folder / "sweep_provenance.json", provenance_of(arguments.runs / f"{sweep['preset']}-sweep"))
    console.print(report(table, sweep), markup=False)


def run_setting(sweep: dict, method: str, setting: dict, runs: Path) -> list[dict]:
    """A row per iteration: the setting, the validation average and its standard error, in percent."""
    overrides = [*sweep["overrides"], f"evaluation.suite={sweep['suite']}"]
    config = load_config(sweep["preset"], [*overrides, *(f"{key}={value}" for key, value in setting.items())])
    suite = load_suite(sweep["suite"])
    # One folder a setting; what is sampled from the initial policy is shared by equal decodings.
    settings = config.for_method(method)
    sampled = fingerprint(settings.training.model_dump(include=DECODING))
    trainer = build_trainer(settings, runs / sampled / fingerprint(setting), sweep["seed"])
    trainer.shared = runs / sampled / "shared"
    rows = []
    for result in trainer.iterate():
        folder = result.model_path.parent / "evaluation"
        arguments = model_source(config.model)[1]
        scores = evaluate_checkpoint(str(result.model_path), result.fingerprint, folder, suite, config, arguments)
        columns = tabulated(scores, suite)
        rows.append(
            {
                "method": method,
                "temperature": settings.training.temperature,
                "epochs": settings.training.num_train_epochs,
                "learning_rate": settings.training.learning_rate,
                "iteration": result.iteration,
                "validation_avg": columns["value"].mean(),
                "stderr": (columns["stderr"] ** 2).sum() ** 0.5 / len(columns),
                "mean_tokens": result.synthetic.get("mean_tokens"),
                "end_token_share": result.synthetic.get("end_token_share"),
            }
        )
    return rows


def provenance_of(runs: Path) -> list[dict]:
    """The distinct provenances of the sweep's stages, with how many stages and seconds each covers."""
    found: dict[str, dict] = {}
    for path in sorted(runs.rglob("*.stage.json")):
        record = read_json(path)
        entry = found.setdefault(fingerprint(record["provenance"]), {**record["provenance"], "stages": 0, "seconds": 0})
        entry["stages"] += 1
        entry["seconds"] = round(entry["seconds"] + record["seconds"])
    return list(found.values())


def report(table: pd.DataFrame, sweep: dict) -> str:
    """sweep.md: the score of every setting, the best of each method in bold."""
    keys = ["method", "temperature", "epochs", "learning_rate"]
    last = table[table["iteration"] == table.groupby(keys)["iteration"].transform("max")]
    lines = [
        "# The sweep",
        "",
        f"Validation average in percent (± standard error) after the last swept iteration, suite `{sweep['suite']}`, "
        f"seed {sweep['seed']}. The rule of choice is in `experiments/{sweep['preset']}/sweep.yaml`.",
        "",
        "| method | temperature | epochs | learning rate | average by iteration | score |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for _, row in last.iterrows():
        same = table[(table[keys] == row[keys]).all(axis=1)].sort_values("iteration")
        path = " → ".join(f"{value:.1f}" for value in same["validation_avg"])
        score = f"{row['validation_avg']:.1f} ± {row['stderr']:.1f}"
        peers = last[(last["method"] == row["method"])]
        score = f"**{score}**" if row["validation_avg"] == peers["validation_avg"].max() else score
        temperature = "–" if row["method"] == "sft" else f"{row['temperature']:g}"
        cells = [row["method"], temperature, f"{row['epochs']:g}", f"{row['learning_rate']:g}", path, score]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

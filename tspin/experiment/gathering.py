"""What a study's finished cells have measured, in results/<preset>/studies/.

<name>.csv              a row per cell and iteration: the settings, by the last part of their keys; method, seed,
                        iteration (empty for base and sft); avg and avg_se: average over the suite's columns, its
                        standard error over problems; mean_tokens and end_token_share of the y′ trained on
<name>_provenance.json  date, seconds, finished and missing cells; the distinct provenances of the stages behind the
                        numbers, with how many stages and seconds each covers
<name>.md               where there is a rule of choice: every setting's score, and what the rule chooses
"""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tspin.experiment.grid import Cell, Choice, Study, Sweep
from tspin.experiment.results import read_results
from tspin.runs.files import fingerprint, read_json, write_json, write_text
from tspin.schema import BASE, RUN, STUDY_MEASURES


def gather(sweep: Sweep, finished: Sequence[Cell]) -> str:
    """Write what is finished of a study; returns a line that says what was written and which cells are missing."""
    if not finished:
        return "no cell has finished: there is nothing to gather"
    missing = [cell.title for cell in sweep.cells if cell not in finished]
    table = pd.concat([measures_of(cell) for cell in finished], ignore_index=True)
    settings = dict.fromkeys(name for cell in sweep.cells for name, _ in cell.setting)
    buffer = io.StringIO()
    table = table.reindex(columns=[*settings, *RUN, *STUDY_MEASURES])
    table.to_csv(buffer, index=False, float_format="%.6g", lineterminator="\n")
    path = sweep.target.with_suffix(".csv")
    write_text(path, buffer.getvalue())
    made = provenances_of(finished)
    facts = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "seconds": sum(entry["seconds"] for entry in made)}
    cells = {"finished": len(finished), "missing": missing}
    write_json(path.with_name(f"{path.stem}_provenance.json"), {**facts, "cells": cells, "provenance": made})
    if sweep.study.choose is not None:
        write_text(path.with_suffix(".md"), report(sweep.study, path, complete=not missing))
    return f"wrote {path}" + (f"; missing: {', '.join(missing)}" if missing else "")


def measures_of(cell: Cell) -> pd.DataFrame:
    """A row per iteration of a cell, from its results: its setting, RUN, STUDY_MEASURES."""
    results = read_results(cell.results_folder)
    columns = pd.DataFrame(read_json(cell.results_folder / "suite.json")["columns"])[["benchmark", "metric"]]
    scores = results["evaluations"]
    scores = columns.merge(scores[(scores["method"] == cell.method) & (scores["seed"] == cell.seed)])
    rows = []
    for iteration, part in scores.groupby("iteration", dropna=False):
        sampled = results["runs"].get((cell.method, cell.seed, iteration), {}).get("synthetic", {})
        measures = {
            "avg": part["value"].mean(),
            "avg_se": (part["stderr"] ** 2).sum() ** 0.5 / len(part),
            "mean_tokens": sampled.get("mean_tokens"),
            "end_token_share": sampled.get("end_token_share"),
        }
        rows.append(
            {**dict(cell.setting), "method": cell.method, "seed": cell.seed, "iteration": iteration, **measures}
        )
    return pd.DataFrame(rows)


def provenances_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The distinct provenances of the stages behind some cells, with how many stages and seconds each covers."""
    folders = set()
    for cell in cells:
        runs = Path(cell.runs, Path(cell.preset).stem)
        seed = runs / f"seed-{cell.seed}"
        folders |= {runs / BASE} if cell.method == BASE else {seed / cell.method, Path(cell.shared or seed / "shared")}
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*.stage.json")):
        record = read_json(path)
        first = {**record["provenance"], "stages": 0, "seconds": 0.0}
        entry = entries.setdefault(fingerprint(record["provenance"]), first)
        entry["stages"] += 1
        entry["seconds"] += record["seconds"]
    return [{**entry, "seconds": round(entry["seconds"])} for entry in entries.values()]


def report(study: Study, path: Path, complete: bool) -> str:
    """Markdown of a gathered CSV: each method's number of settings, every setting's score, the chosen ones in bold."""
    choice = study.choose or Choice()
    table = pd.read_csv(path, dtype={"iteration": "Int64"})
    settings = [str(name) for name in table if name not in (*RUN, *STUDY_MEASURES)]
    scores = scores_of(table, settings)
    marks = chosen(scores, choice) & complete
    counts = [f"{method} {len(study.settings(method))}" for method in study.methods if method != BASE]
    shown = scores[["method", *settings]].map(lambda value: f"{value:g}" if isinstance(value, float) else str(value))
    shown = shown.replace("nan", "–")
    shown["average by iteration"] = scores["path"]
    shown["score"] = [f"**{score}**" if mark else score for score, mark in zip(scores["shown"], marks, strict=True)]
    suite = f"the suite `{study.suite}`" if study.suite else "the preset's suite"
    lines = [
        f"# {path.stem}",
        f"Average (shares in percent, ± standard error over problems) after the last iteration, on {suite}, seeds "
        f"{', '.join(map(str, study.seeds))}. Settings per method: {', '.join(counts)}.",
        f"{study.rule.strip()} (`choose`: {choice.model_dump_json()})",
        "Bold: chosen by this rule." if complete else "Cells are missing: nothing is chosen yet.",
        shown.to_markdown(index=False, disable_numparse=True),
    ]
    return "\n\n".join(lines) + "\n"


def scores_of(table: pd.DataFrame, settings: Sequence[str]) -> pd.DataFrame:
    """A row per method and setting: score (after the last iteration), shown (with its error), path (of averages).

    Means over seeds. Seeds answer the same problems, so the standard error is that of one.
    """
    rows = []
    for key, part in table.groupby(["method", *settings], dropna=False, sort=False):
        means = part.groupby("iteration", dropna=False)[["avg", "avg_se"]].mean()
        score, error = means.iloc[-1]
        texts = {"path": " → ".join(f"{avg:.1f}" for avg in means["avg"]), "shown": f"{score:.1f} ± {error:.1f}"}
        rows.append({**dict(zip(["method", *settings], key, strict=True)), "score": score, **texts})
    return pd.DataFrame(rows)


def chosen(scores: pd.DataFrame, choice: Choice) -> pd.Series:
    """Whether the rule chooses a row of scores_of; of a method's settings that are level, all are chosen."""
    allowed = scores["method"] != BASE
    if choice.common:
        deciding = scores[scores["method"].isin(choice.over)]
        best = deciding.groupby([*choice.common, "method"], sort=False)["score"].max()
        means = best.groupby(choice.common, sort=False).mean()
        values = means.reset_index().iloc[means.argmax()]
        for name in choice.common:
            allowed &= scores[name].isna() | (scores[name] == values[name])
    best_of_method = scores["score"].where(allowed).groupby(scores["method"]).transform("max")
    return allowed & (scores["score"] == best_of_method)

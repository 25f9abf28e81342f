"""What a study's finished cells have measured, in results/<preset>/studies/.

<name>.csv               a row per cell and iteration: cell (its name), the settings, by the last part of their keys;
                         method, seed, iteration (empty for base and sft); STUDY_MEASURES: avg and avg_se, the average
                         over the suite's columns (tspin.schema.averaged) and its standard error over problems, then
                         those of tspin.experiment.measures
<name>_problems.parquet  cell, iteration, benchmark, doc_id, value: the tabulated metric of each problem
<name>_provenance.json   date, seconds, finished and missing cells; the distinct provenances of the stages behind the
                         numbers; by cell, which of them, the seconds of its own stages, and the initial policy: its
                         path (start) and the fingerprint of its weights (policy)
<name>.md                where there is a rule of choice: every setting's score, and what the rule chooses

A cell that is in these files is not read or run again, wherever it was run: they can be moved to another machine, which
then runs what is missing, and what several machines have gathered is joined. Delete <name>.csv to start anew. A study
that was changed has other cells: files with cells that it no longer names are kept as <name>.old-1.csv and so on.
"""

import io
import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tspin.errors import UserError
from tspin.experiment.grid import Cell, Choice, Study, Sweep
from tspin.experiment.measures import average, measures_of_iteration
from tspin.experiment.results import read_results, write_problems
from tspin.runs.files import fingerprint, read_json, write_json, write_text
from tspin.runs.locks import owned
from tspin.schema import BASE, CELL, HELD_OUT, RUN, STUDY_MEASURES, averaged

KINDS = {"iteration": "Int64"}
FEW = 6  # cells that a line names


class Gathered(NamedTuple):
    """What the files hold: a row per cell and iteration, its problems, and by cell what made it."""

    measures: pd.DataFrame
    problems: pd.DataFrame
    made: dict[str, Any]  # cell → {"seconds", "provenance": keys of the next, "start", "policy"}
    provenance: dict[str, Any]


def gathered(sweep: Sweep, target: Path | None = None) -> Gathered:
    """What was gathered of a study's cells, by this machine or another one; those of other settings are left out.

    target: of the files, without suffix; None: the sweep's own.
    """
    target = target or sweep.target
    path = target.with_suffix(".csv")
    if not path.exists():
        return Gathered(pd.DataFrame(columns=[CELL]), pd.DataFrame(columns=[CELL]), {}, {})
    measures = pd.read_csv(path, dtype=KINDS)
    problems = pd.read_parquet(_beside(target, "_problems.parquet")).astype(KINDS)
    record = read_json(_beside(target, "_provenance.json"))
    names = {cell.name for cell in sweep.cells} & set(measures[CELL])
    made = {name: what for name, what in record["made"].items() if name in names}
    kept = {key: record["provenance"][key] for what in made.values() for key in what["provenance"]}
    return Gathered(measures[measures[CELL].isin(names)], problems[problems[CELL].isin(names)], made, kept)


def gather(sweep: Sweep, finished: Sequence[Cell]) -> str:
    """Add what has finished of a study; returns a line that says what was written and which cells are missing."""
    if not finished and not gathered(sweep).made:
        return "no cell has finished: there is nothing to gather"
    with owned(sweep.target.parent, wait=True):  # another sweep of the study may write too
        return _gather(sweep, finished)


def _gather(sweep: Sweep, finished: Sequence[Cell]) -> str:
    known = gathered(sweep)
    new = [cell for cell in finished if cell.name not in known.made]
    made: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    for cell in new:
        seconds, entries = made_by(cell)
        provenance |= {fingerprint(entry)[:12]: entry for entry in entries}
        keys = [fingerprint(entry)[:12] for entry in entries]
        made[cell.name] = {"seconds": seconds, "provenance": keys, **initial_policy(cell)}
    measures, problems = ([of(cell) for cell in new] for of in (measures_of, problems_of_cell))
    written = _write(sweep, [known, Gathered(_together(measures), _together(problems), made, provenance)])
    unlike = other_weights(known.made | made)
    return f"{written}; {unlike}: differences between such cells are not the methods'" if unlike else written


def join(sweep: Sweep, results: Path) -> str:
    """Add what another machine has gathered of a study, in its own results folder; returns a line as `gather` does.

    Of a cell that both have, this machine's numbers stay. Raises UserError where the folder has none of the cells, or
    cells from other weights.
    """
    target = results / sweep.target.relative_to(sweep.results)
    theirs = gathered(sweep, target)
    if not theirs.made:
        raise UserError(f"--join {results}: none of the study's cells is in {target.with_suffix('.csv')}")
    with owned(sweep.target.parent, wait=True):
        return _join(sweep, results, theirs)


def _join(sweep: Sweep, results: Path, theirs: Gathered) -> str:
    known = gathered(sweep)
    made = {name: what for name, what in theirs.made.items() if name not in known.made}
    if unlike := other_weights(known.made | made):
        raise UserError(f"--join {results}: {unlike}; join what was run from the same")
    measures, problems = (table[table[CELL].isin(set(made))] for table in (theirs.measures, theirs.problems))
    used = {key: theirs.provenance[key] for what in made.values() for key in what["provenance"]}
    written = _write(sweep, [known, Gathered(measures, problems, made, used)])
    return f"{len(made)} of {len(theirs.made)} cells are new; {written}"


def initial_policy(cell: Cell) -> dict[str, str]:
    """The path and the fingerprint of the weights that a cell started from."""
    recorded = read_json(cell.results_folder / "config.json")
    return {"start": recorded["config"]["model"]["path"], "policy": recorded["policy"]}


def other_weights(made: Mapping[str, Any]) -> str:
    """Which start had not the same weights in all cells, in words; nothing where none, or where it was not recorded."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, what in made.items():
        if "policy" in what:
            found.setdefault(what["start"], {}).setdefault(what["policy"], []).append(name)
    words = []
    for start, cells in found.items():
        if len(cells) > 1:
            weights = ", ".join(f"{policy} in {names[0]}" for policy, names in cells.items())
            words.append(f"{start} had other weights in some cells than in others ({weights})")
    return "; ".join(words)


def _set_aside(sweep: Sweep) -> str:
    """Keep a copy of files that hold cells which the study no longer names; returns what was kept, in words."""
    path = sweep.target.with_suffix(".csv")
    if not path.exists():
        return ""
    gone = set(pd.read_csv(path)[CELL]) - {cell.name for cell in sweep.cells}
    if not gone:
        return ""
    old = next(f".old-{n}" for n in count(1) if not _beside(sweep.target, f".old-{n}.csv").exists())
    for ending in ("_problems.parquet", "_provenance.json", ".csv"):
        shutil.copy2(_beside(sweep.target, ending), _beside(sweep.target, f"{old}{ending}"))
    kept = _beside(sweep.target, f"{old}.csv")
    return f"; {len(gone)} cells that the study no longer names are kept in {kept}"


def _write(sweep: Sweep, parts: Sequence[Gathered]) -> str:
    """Replace the files by these cells, in the study's order."""
    kept = _set_aside(sweep)
    made = {name: what for part in parts for name, what in part.made.items()}
    provenance = {key: entry for part in parts for key, entry in part.provenance.items()}
    order = [cell.name for cell in sweep.cells]
    problems = _in_order(_together([part.problems for part in parts]), order)
    measures = _in_order(_together([part.measures for part in parts]), order)
    settings = dict.fromkeys(name for cell in sweep.cells for name, _ in cell.setting)
    measures = measures.reindex(columns=[CELL, *settings, *RUN, *STUDY_MEASURES])
    missing = [cell.title for cell in sweep.cells if cell.name not in made]
    cells = {"finished": len(made), "missing": missing}
    facts = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "seconds": sum(w["seconds"] for w in made.values())}
    write_problems(_beside(sweep.target, "_problems.parquet"), problems)
    record = {**facts, "cells": cells, "provenance": provenance, "made": made}
    write_json(_beside(sweep.target, "_provenance.json"), record)
    path = sweep.target.with_suffix(".csv")
    write_text(path, _text_of(measures))  # last: what it lists is there
    if sweep.study.choose is not None:
        write_text(path.with_suffix(".md"), report(sweep.study, path, complete=not missing))
    more = [f"and {len(missing) - FEW} more"] if len(missing) > FEW else []  # the record has all
    return f"wrote {path}" + (f"; missing: {', '.join([*missing[:FEW], *more])}" if missing else "") + kept


def _text_of(measures: pd.DataFrame) -> str:
    """As CSV, the same when it is read and written again: settings are text in new cells, numbers in others."""
    read = pd.read_csv(io.StringIO(measures.to_csv(index=False)), dtype=KINDS)
    return str(read.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def _together(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Their rows; those without any, whose columns have no types, are left out."""
    full = [table for table in tables if len(table)]
    return pd.concat(full, ignore_index=True) if full else pd.DataFrame(columns=[CELL])


def measures_of(cell: Cell) -> pd.DataFrame:
    """A row per iteration of a cell, from its results: its name, its setting, RUN, STUDY_MEASURES."""
    results = read_results(cell.results_folder)
    columns = pd.DataFrame(read_json(cell.results_folder / "suite.json")["columns"])[["benchmark", "metric", "label"]]
    labels = averaged(columns.itertuples(index=False, name=None), set(results["problems"]["benchmark"]))
    columns = columns[columns["label"].isin(labels)].drop(columns="label")
    scores = _of_run(results["evaluations"], cell)
    held_out = scores[scores["benchmark"] == HELD_OUT]
    scores = columns.merge(scores)
    diagnostics = _of_run(results["diagnostics"], cell) if "diagnostics" in results else pd.DataFrame({"iteration": []})
    rows = []
    for iteration, part in scores.groupby("iteration", dropna=False):
        facts = results["runs"].get((cell.method, cell.seed, 0 if pd.isna(iteration) else iteration), {})
        measured = measures_of_iteration(_at(diagnostics, iteration), facts, _at(held_out, iteration))
        run = {"method": cell.method, "seed": cell.seed, "iteration": iteration}
        rows.append({CELL: cell.name, **dict(cell.setting), **run, **average(part), **measured})
    return pd.DataFrame(rows).astype(KINDS)


def problems_of_cell(cell: Cell) -> pd.DataFrame:
    """Its problems, from its results."""
    table = _of_run(read_results(cell.results_folder)["problems"], cell)
    return table[["iteration", "benchmark", "doc_id", "value"]].assign(**{CELL: cell.name})


def made_by(cell: Cell) -> tuple[int, list[dict[str, Any]]]:
    """Seconds of a cell's own stages; the distinct provenances of all stages behind it."""
    runs = Path(cell.runs, Path(cell.preset).stem)
    seed = runs / f"seed-{cell.seed}"
    own = runs / BASE if cell.method == BASE else seed / cell.method
    shared = [] if cell.method == BASE else [Path(cell.shared or seed / "shared")]
    entries: dict[str, dict[str, Any]] = {}
    seconds = 0.0
    for folder in [own, *shared]:
        for path in sorted(folder.rglob("*.stage.json")):
            record = read_json(path)
            entries.setdefault(fingerprint(record["provenance"]), record["provenance"])
            seconds += record["seconds"] if folder == own else 0
    return round(seconds), list(entries.values())


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(f"{target.name}{ending}")


def _of_run(table: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    return table[(table["method"] == cell.method) & (table["seed"] == cell.seed)]


def _at(table: pd.DataFrame, iteration: Any) -> pd.DataFrame:
    """The rows of an iteration; those of NA, which base and sft have."""
    here = table["iteration"].isna() if pd.isna(iteration) else (table["iteration"] == iteration).fillna(False)
    return table[here.astype(bool)]


def _in_order(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Its rows in the order of the study's cells."""
    return table.sort_values(CELL, key=lambda cells: cells.map({n: i for i, n in enumerate(names)}), kind="stable")


def report(study: Study, path: Path, complete: bool) -> str:
    """Markdown of a gathered CSV: each method's number of settings, every setting's score, the chosen ones in bold."""
    choice = study.choose or Choice()
    table = pd.read_csv(path, dtype={"iteration": "Int64"})
    settings = [str(name) for name in table if name not in (CELL, *RUN, *STUDY_MEASURES)]
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

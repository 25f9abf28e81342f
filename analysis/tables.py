"""The paper's tables, from `results/<preset>/`."""

from pathlib import Path
from typing import Any

import pandas as pd

from analysis import load
from analysis.style import METHODS, MISSING

ITERATIONS = range(5)
Key = tuple[str, int | None]
ROWS: list[Key] = [("base", None), ("sft", None), *((m, t) for m in ("spin", "tspin") for t in ITERATIONS)]


def table1(preset: str, results: Path = Path("results")) -> pd.DataFrame:
    """Table 1 in percent: base, SFT, SPIN and T-SPIN by iteration; a row is there, of NAs, if it was not run.

    After the benchmarks (named by label) come `avg`, its standard error `avg_se`, `avg_change` over the previous
    iteration (at iteration 0: over base), and the paper's `paper_avg` and `paper_change`. A score is the mean over the
    row's `seeds`. A seed that lacks a benchmark is left out of a row that has complete seeds; a row without any shows
    what there is and has no `avg`. `avg_change` is NA where the two iterations rest on different seeds.
    Raises `UserError` if a file of the preset is missing or malformed.
    """
    labels = [column.label for column in load.suite(preset, results)]
    scores = load.tabulated(preset, results)
    rows = {key: _row(scores, labels, key) for key in ROWS}
    paper = {
        (row["method"], None if pd.isna(row["iteration"]) else row["iteration"]): row["Avg"]
        for row in load.records(load.published("table1_zephyr"))
    }
    for (method, iteration), row in rows.items():
        row["avg_change"] = row["paper_change"] = float("nan")
        row["paper_avg"] = paper[method, iteration]
        if iteration is None:
            continue
        before: Key = (method, iteration - 1) if iteration > 0 else ("base", None)
        row["paper_change"] = row["paper_avg"] - paper[before]
        # The base model is the same for every seed, so it may have been evaluated with one.
        if iteration == 0 or row["seeds"] == rows[before]["seeds"]:
            row["avg_change"] = row["avg"] - rows[before]["avg"]
    order = ["method", "iteration", "seeds", *labels, "avg", "avg_se", "avg_change", "paper_avg", "paper_change"]
    return pd.DataFrame(list(rows.values()))[order].astype({"iteration": "Int64"})


def _row(scores: pd.DataFrame, labels: list[str], key: Key) -> dict[str, Any]:
    method, iteration = key
    at = scores["iteration"].isna() if iteration is None else scores["iteration"].eq(iteration).fillna(False)
    own = scores[(scores["method"] == method) & at.astype(bool)]
    values = own.pivot(index="seed", columns="label", values="value").reindex(columns=labels)
    stderrs = own.pivot(index="seed", columns="label", values="stderr").reindex(columns=labels)
    complete = values.dropna()
    if method == "base":  # one model, evaluated once: its seeds are copies, with no spread to report
        values, complete = values.iloc[:1], complete.iloc[:1]
    averages = complete.mean(axis=1)
    if len(complete) > 1:
        error = averages.sem(ddof=1)
    elif len(complete) == 1:
        # The benchmarks are independent samples; a stderr that lm-eval does not give leaves the whole unknown.
        error = (stderrs.loc[complete.index[0]] ** 2).sum(skipna=False) ** 0.5 / len(labels)
    else:
        error = float("nan")
    shown = values if complete.empty else complete
    return {
        "method": method,
        "iteration": iteration,
        "seeds": " ".join(str(seed) for seed in sorted(shown.index)),
        **dict(zip(labels, shown.mean(), strict=True)),
        "avg": averages.mean(),
        "avg_se": error,
    }


def table1_caption(preset: str, results: Path = Path("results")) -> str:
    """What a reader must know to read Table 1: preset, seeds, problems, metrics, the error, and the paper's column."""
    columns = load.suite(preset, results)
    table, scores = table1(preset, results), load.tabulated(preset, results)
    ran = [row for row in load.records(table) if row["seeds"]]
    every = " ".join(str(seed) for seed in sorted({int(seed) for row in ran for seed in row["seeds"].split()}))
    sentences = [f"Table 1 ({preset}): scores in percent, {_seeds(every)}."]
    if other := [f"{_name(row)} ({_seeds(row['seeds'])})" for row in ran if row["seeds"] != every]:
        sentences.append(f"Rows with fewer seeds: {', '.join(other)}.")
    sentences.append(_problems(columns, scores))
    counts = {len(row["seeds"].split()) for row in ran if pd.notna(row["avg"])}
    errors = ["over seeds (ddof = 1)"] if max(counts, default=0) > 1 else []
    if 1 in counts:
        errors.append(("in rows with one seed " if errors else "") + "from lm-eval's standard errors over problems")
    if errors:
        sentences.append(f"Avg is the mean of the columns, ± its standard error, {'; '.join(errors)}.")
    sentences.append("In brackets: change over the previous iteration, at iteration 0 over base.")
    same = [column.label for column in columns] == list(load.published("table1_zephyr").columns[2:-1])
    sentences.append(
        "The paper's Avg (its Table 1) is Zephyr-7B's on "
        + ("the same ten benchmarks." if same else "other benchmarks (its ten): compare shapes, not levels.")
    )
    if table.drop(columns=["iteration", "avg_change", "paper_change"]).isna().to_numpy().any():
        sentences.append(f"{MISSING}: not there yet.")
    return " ".join(sentences)


def _seeds(seeds: str) -> str:
    return f"seed{'s' if ' ' in seeds else ''} {seeds.replace(' ', ', ')}"


def _problems(columns: list[load.Column], scores: pd.DataFrame) -> str:
    counts = {}
    for column in columns:
        n = scores.loc[scores["label"] == column.label, "n"].dropna()
        low, high = (n.min(), n.max()) if len(n) else (MISSING, MISSING)
        counts[column.label] = f"{low}" if low == high else f"{low} to {high}"
    # lm-eval names a metric "acc,none" where no filter took the answer out of the response.
    names = {column.label: column.metric.removesuffix(",none") for column in columns}
    metrics = set(names.values())
    metric = f"metric: {metrics.pop()}" if len(metrics) == 1 else ""
    if metric and len(set(counts.values())) == 1:
        return f"Problems per benchmark: {counts[columns[0].label]}; {metric}."
    each = ", ".join(f"{c.label} {counts[c.label]}" + ("" if metric else f" ({names[c.label]})") for c in columns)
    return f"Problems per benchmark: {each}; {metric}." if metric else f"Problems (metric) per benchmark: {each}."


def _name(row: dict[str, Any]) -> str:
    label = METHODS[row["method"]].label
    return label if pd.isna(row["iteration"]) else f"{label} {row['iteration']}"


def number(value: float, form: str = ".2f") -> str:
    """`value` as text, or the sign for missing."""
    # Adding 0.0 turns the -0.0 of a rounded small loss into 0.0, which prints as +0.00.
    return MISSING if pd.isna(value) else format(round(value, 2) + 0.0, form)


def table1_cells(table: pd.DataFrame) -> pd.DataFrame:
    """`table1` as text, two decimals: the row's name, the benchmarks, "Avg" and "Paper's Avg" with their changes."""
    names = list(table.columns)
    labels = names[names.index("seeds") + 1 : names.index("avg")]
    cells = []
    for row in load.records(table):
        ours, paper = MISSING, number(row["paper_avg"])
        if pd.notna(row["avg"]):
            ours = f"{number(row['avg'])} ± {number(row['avg_se'])}"
        if pd.notna(row["iteration"]):
            paper += f" ({number(row['paper_change'], '+.2f')})"
            if pd.notna(row["avg"]):
                ours += f" ({number(row['avg_change'], '+.2f')})"
        named = {label: number(row[label]) for label in labels}
        cells.append({"Method": _name(row), **named, "Avg": ours, "Paper's Avg": paper})
    return pd.DataFrame(cells)


def write_table1(preset: str, results: Path = Path("results")) -> list[Path]:
    """Write `results/<preset>/table1.csv` (four decimals, missing cells empty) and `table1.md`; return their paths.

    Raises `UserError` as `table1` does.
    """
    table, folder = table1(preset, results), results / preset
    cells = table1_cells(table)
    lines = [list(cells.columns), ["---"] + ["---:"] * (len(cells.columns) - 1), *cells.to_numpy().tolist()]
    grid = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    csv = table.to_csv(index=False, float_format="%.4f", lineterminator="\n")
    return [
        load.write_atomically(folder / "table1.csv", csv.encode()),
        load.write_atomically(folder / "table1.md", f"{grid}\n\n{table1_caption(preset, results)}\n".encode()),
    ]

"""The paper's tables of scores, 1, 2 and 4, from `results/<preset>/`."""

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pandas as pd

from tspin.schema import BASE, ONCE, averaged, unit

from .intervals import POWER, of_errors
from .reading import Column, read_paper, read_scores, read_suite
from .scores import Policy, Scores, scores_of
from .style import MISSING, look
from .writing import number

ITERATIONS = 5  # of the paper's tables
NAN = float("nan")
SUITE = ["GSM8K", "MATH", "MuSR", "MMLU", "MMLU-Pro", "GPQA", "HellaSwag", "WinoGrande", "BBH", "IFEval"]


class Layout(NamedTuple):
    """A table of scores: its number in the paper, the model there, and the methods of its rows."""

    number: int
    model: str
    methods: tuple[str, ...]

    def rows(self, ran: Iterable[Policy] = ()) -> list[Policy]:
        """(method, iteration) of every row; base and SFT have no iteration. ran: policies that are there."""
        iterations = iterations_of(policy for policy in ran if policy[0] in self.methods)
        return [(m, t) for m in self.methods for t in ([None] if m in ONCE else iterations)]


def iterations_of(ran: Iterable[Policy]) -> range:
    """The paper's iterations, and what some policies have beyond them."""
    return range(max([ITERATIONS, *(t + 1 for _, t in ran if t is not None)]))


LAYOUTS = {
    "1": Layout(1, "Zephyr-7B", ("base", "sft", "spin", "tspin")),
    "2": Layout(2, "Zephyr-7B", ("tspin_no_history", "tspin")),
    "4": Layout(4, "Mistral-7B", ("base", "sft", "spin", "tspin")),
}


def score_table(folder: Path, layout: Layout = LAYOUTS["1"], scores: pd.DataFrame | None = None) -> pd.DataFrame:
    """A table of scores, a row per method and iteration; of the paper's a row is there, of NAs, if it was not run.

    After method, iteration, seeds and the benchmarks (named by label) come

    avg, avg_se, avg_low, avg_high: the mean of `averaged_labels`, its standard error and its 95 % interval
    avg_change: over the previous iteration, at iteration 0 over base; NA where the two rest on different seeds
    paper_avg, paper_change: the same in the paper

    A score is the mean over the row's `seeds`. A seed that lacks a benchmark is left out of a row that has complete
    seeds; a row without any shows what there is and has no `avg`. scores: `read_scores(folder)`, where it is read.
    Raises `UserError` if a file of the preset is missing or malformed.
    """
    labels, of = [column.label for column in read_suite(folder)], averaged_labels(folder)
    scores, paper = read_scores(folder) if scores is None else scores, read_paper(layout.model)
    outcomes = scores_of(folder) if (folder / "problems.parquet").is_file() else None
    iterations = [None if pd.isna(t) else t for t in paper["iteration"]]
    printed = dict(zip(zip(paper["method"], iterations, strict=True), paper["Avg"], strict=True))
    rows: dict[Policy, dict[str, Any]] = {}
    ran = scores[["method", "iteration"]].drop_duplicates().dropna()
    policies = layout.rows(zip(ran["method"], ran["iteration"].astype(int).tolist(), strict=True))
    for policy in dict.fromkeys([(BASE, None), *policies]):
        method, iteration = policy
        row = _row(scores, labels, of, policy, outcomes)
        row |= {"avg_change": NAN, "paper_avg": printed.get(policy, NAN), "paper_change": NAN}
        if iteration is not None:
            before: Policy = (method, iteration - 1) if iteration > 0 else (BASE, None)
            row["paper_change"] = row["paper_avg"] - printed.get(before, NAN)
            # The base model is the same for every seed, so it may have been evaluated with one.
            if iteration == 0 or row["seeds"] == rows[before]["seeds"]:
                row["avg_change"] = row["avg"] - rows[before]["avg"]
        rows[policy] = row
    return pd.DataFrame([rows[policy] for policy in policies]).astype({"iteration": "Int64"})


def averaged_labels(folder: Path) -> list[str]:
    """The columns that Avg is of: shares of problems (all columns where none is), of which single ones are known."""
    if (folder / "problems.parquet").is_file():
        return scores_of(folder).labels
    return averaged(column.named for column in read_suite(folder))


def _row(
    scores: pd.DataFrame, labels: list[str], of: list[str], policy: Policy, outcomes: Scores | None
) -> dict[str, Any]:
    """A row but for what compares it with others. of: the columns averaged."""
    method, iteration = policy
    at = scores["iteration"].isna() if iteration is None else scores["iteration"].eq(iteration).fillna(False)
    runs = scores[(scores["method"] == method) & at.astype(bool)]
    values = runs.pivot(index="seed", columns="label", values="value").reindex(columns=labels)
    stderrs = runs.pivot(index="seed", columns="label", values="stderr").reindex(columns=labels)
    complete = values.dropna()
    if method == BASE:  # one model, evaluated once: its seeds are copies, with no spread to report
        values, complete = values.iloc[:1], complete.iloc[:1]
    seeds = list(complete.index)
    if seeds and outcomes is not None and seeds == outcomes.seeds(policy):
        found = outcomes.mean(policy)
    elif seeds:
        # The benchmarks are independent samples; a stderr that lm-eval does not give leaves the whole unknown.
        errors = (stderrs.loc[seeds, of] ** 2).sum(axis=1, skipna=False) ** 0.5 / len(of)
        found = of_errors(complete[of].mean(axis=1), errors)
    else:
        found = of_errors([NAN], [NAN])
    shown = values if complete.empty else complete
    return {
        "method": method,
        "iteration": iteration,
        "seeds": " ".join(str(seed) for seed in sorted(shown.index)),
        **dict(zip(labels, shown.mean(), strict=True)),
        "avg": complete[of].mean(axis=1).mean(),
        "avg_se": found.error,
        "avg_low": found.low,
        "avg_high": found.high,
    }


def score_cells(table: pd.DataFrame) -> pd.DataFrame:
    """`score_table` as text: the row's name, the benchmarks, "Avg" and "Paper's Avg" with their changes.

    Between the two, of a table that `agreement.beside` completed, the committed Avg and whether ours agrees with it.
    """
    names = list(table.columns)
    labels = names[names.index("seeds") + 1 : names.index("avg")]
    cells = []
    for row in table.to_dict("records"):
        ours, paper = _interval(row, "avg"), number(row["paper_avg"])
        if pd.notna(row["iteration"]):
            if pd.notna(row["paper_avg"]):
                paper += f" ({number(row['paper_change'], '+.2f')})"
            if pd.notna(row["avg"]):
                ours += f" ({number(row['avg_change'], '+.2f')})"
        scores = {label: number(row[label]) for label in labels}
        cells.append({"Method": _name(row), **scores, "Avg": ours, **_committed(row), "Paper's Avg": paper})
    return pd.DataFrame(cells)


def _committed(row: dict[Any, Any]) -> dict[str, str]:
    """The texts of what `agreement.beside` put beside a row; none where it put nothing."""
    if "agrees" not in row:
        return {}
    agrees = MISSING if pd.isna(row["agrees"]) else "yes" if row["agrees"] else "no"
    return {"Committed": _interval(row, "committed"), "Agrees": agrees}


def _interval(row: dict[Any, Any], name: str) -> str:
    if pd.isna(row[name]):
        return MISSING
    return f"{number(row[name])} [{number(row[f'{name}_low'], '.1f')}, {number(row[f'{name}_high'], '.1f')}]"


def score_caption(
    table: pd.DataFrame, folder: Path, layout: Layout = LAYOUTS["1"], scores: pd.DataFrame | None = None
) -> str:
    """What a reader must know to read the table: preset, seeds, problems, metrics, the error, the paper's column.

    scores: as for `score_table`.
    """
    columns = read_suite(folder)
    names = [column.named for column in columns]
    ran = [row for row in table.to_dict("records") if row["seeds"]]
    every = " ".join(str(seed) for seed in sorted({int(seed) for row in ran for seed in row["seeds"].split()}))
    sentences = [f"Table {layout.number} ({folder.name}): scores in {unit(names)}, {_seeds(every)}."]
    if others := [f"{_name(row)} ({_seeds(row['seeds'])})" for row in ran if row["seeds"] != every]:
        sentences.append(f"Rows with fewer seeds: {', '.join(others)}.")
    sentences.append(_problems(columns, read_scores(folder) if scores is None else scores))
    complete, known = [row for row in ran if pd.notna(row["avg"])], (folder / "problems.parquet").is_file()
    if complete:
        how = "seeds and problems crossed" if known else "by seeds, and problems' errors as if all seeds shared them"
        left = [column.label for column in columns if column.label not in averaged_labels(folder)]
        of = (
            f"the columns but {', '.join(left)} (no share of problems, or no number for each)"
            if left
            else "the columns"
        )
        sentences.append(f"Avg is the mean of {of}, in square brackets its 95 % interval, {how}.")
    if any(" " not in row["seeds"] and row["method"] != BASE for row in complete):
        sentences.append("In rows with one seed it is that of the problems: nothing is known of the seeds' spread.")
    if known:
        policies = [(row["method"], None if pd.isna(row["iteration"]) else row["iteration"]) for row in complete]
        sentences += what_rows_tell(scores_of(folder), policies)
    sentences.append("In round brackets: change over the previous iteration, at iteration 0 over base.")
    same = [column.label for column in columns] == SUITE
    sentences.append(
        f"The paper's Avg (its Table {layout.number}) is {layout.model}'s on "
        + ("the same ten benchmarks." if same else "other benchmarks (its ten): compare shapes, not levels.")
    )
    if table.drop(columns=["iteration", "avg_change", "paper_change"]).isna().to_numpy().any():
        sentences.append(f"{MISSING}: not there yet.")
    return " ".join(sentences)


def what_rows_tell(scores: Scores, policies: list[Policy]) -> list[str]:
    """Which difference between two rows can be told from none, and which columns cannot tell the rows apart."""
    ran = [policy for policy in policies if scores.has(policy)]
    pairs = [pair for pair in combinations(ran, 2) if len(scores.common_seeds(pair)) > 1]
    found = [each for each in (scores.difference(*pair) for pair in pairs) if each.error > 0]  # not of two equal rows
    sentences = []
    if found:
        counts = " or ".join(map(str, sorted({each.seeds for each in found})))
        sizes = sorted(each.detectable for each in found)
        sentences.append(
            f"With {counts} seeds a difference between two rows below {median(sizes):.1f} points (median of all pairs "
            f"of rows; {sizes[0]:.1f} to {sizes[-1]:.1f}) cannot be told from none (two-sided 5 %, {100 * POWER:.0f} % "
            "power)."
        )
    if len(ran) > 1 and (still := scores.still(ran)):
        marks = ", ".join(f"{label} ({why})" for label, why in still.items())
        sentences.append(f"Columns that cannot tell these rows apart: {marks}.")
    return sentences


def _seeds(seeds: str) -> str:
    return f"seed{'s' if ' ' in seeds else ''} {seeds.replace(' ', ', ')}"


def _problems(columns: list[Column], scores: pd.DataFrame) -> str:
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


def _name(row: dict[Any, Any]) -> str:
    label = look(row["method"]).label
    return label if pd.isna(row["iteration"]) else f"{label} {row['iteration']}"

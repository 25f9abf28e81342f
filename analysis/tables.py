"""The paper's tables, from `results/<preset>/`."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from . import reading as load
from .scores import scores_of
from .style import METHODS, MISSING

ITERATIONS = range(5)
Key = tuple[str, int | None]
SUITE = ["GSM8K", "MATH", "MuSR", "MMLU", "MMLU-Pro", "GPQA", "HellaSwag", "WinoGrande", "BBH", "IFEval"]


class Layout(NamedTuple):
    """A table of scores: its number in the paper, the model there, the methods of its rows, the published files."""

    number: int
    model: str
    methods: tuple[str, ...]
    published: tuple[str, ...]

    @property
    def rows(self) -> list[Key]:
        """(method, iteration) of every row; base and SFT have no iteration."""
        once = [(m, None) for m in self.methods if m in ("base", "sft")]
        return [*once, *((m, t) for m in self.methods if m not in ("base", "sft") for t in ITERATIONS)]


LAYOUTS = {
    1: Layout(1, "Zephyr-7B", ("base", "sft", "spin", "tspin"), ("table1_zephyr",)),
    2: Layout(2, "Zephyr-7B", ("tspin_no_history", "tspin"), ("table1_zephyr", "table2_without_historical_advantage")),
    4: Layout(4, "Mistral-7B", ("base", "sft", "spin", "tspin"), ("table4_mistral",)),
}
TABLE1 = LAYOUTS[1]


def table1(preset: str, results: Path = Path("results"), layout: Layout = TABLE1) -> pd.DataFrame:
    """A table of scores in percent, a row a method and iteration; a row is there, of NAs, if it was not run.

    Table 1 has base, SFT, SPIN and T-SPIN by iteration; other layouts have other methods.
    After the benchmarks (named by label) come `avg`, its standard error `avg_se`, its 95 % interval
    `avg_low` to `avg_high`, `avg_change` over the previous
    iteration (at iteration 0: over base), and the paper's `paper_avg` and `paper_change`. A score is the mean over the
    row's `seeds`. A seed that lacks a benchmark is left out of a row that has complete seeds; a row without any shows
    what there is and has no `avg`. `avg_change` is NA where the two iterations rest on different seeds.
    Raises `UserError` if a file of the preset is missing or malformed.
    """
    labels = [column.label for column in load.suite(preset, results)]
    scores = load.tabulated(preset, results)
    rows = {key: _row(scores, labels, key) for key in {("base", None): 0, **dict.fromkeys(layout.rows)}}
    paper = {
        (row["method"], None if pd.isna(row["iteration"]) else row["iteration"]): row["Avg"]
        for name in layout.published
        for row in load.records(load.published(name))
    }
    for (method, iteration), row in rows.items():
        row["avg_change"] = row["paper_change"] = float("nan")
        row["paper_avg"] = paper.get((method, iteration), float("nan"))
        if iteration is None:
            continue
        before: Key = (method, iteration - 1) if iteration > 0 else ("base", None)
        row["paper_change"] = row["paper_avg"] - paper[before]
        # The base model is the same for every seed, so it may have been evaluated with one.
        if iteration == 0 or row["seeds"] == rows[before]["seeds"]:
            row["avg_change"] = row["avg"] - rows[before]["avg"]
    _add_intervals(rows, preset, results)
    order = ["method", "iteration", "seeds", *labels, "avg", "avg_se", "avg_low", "avg_high", "avg_change", "paper_avg"]
    order.append("paper_change")
    return pd.DataFrame([rows[key] for key in layout.rows])[order].astype({"iteration": "Int64"})


def _add_intervals(rows: dict[Key, dict[str, Any]], preset: str, results: Path) -> None:
    """Put `avg_low` and `avg_high` into rows: 95 % intervals from the problems' scores, or from the standard error."""
    has_problems = (results / preset / "problems.parquet").is_file()
    scores = scores_of(preset, results) if has_problems else None
    for key, row in rows.items():
        half = 1.96 * row["avg_se"]
        row["avg_low"], row["avg_high"] = row["avg"] - half, row["avg"] + half
        if scores is not None and row["seeds"] == " ".join(map(str, scores.seeds(key))) and row["seeds"]:
            found = scores.mean(key)
            row["avg_low"], row["avg_high"] = found.low, found.high


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


def table1_caption(preset: str, results: Path = Path("results"), layout: Layout = TABLE1) -> str:
    """What a reader must know to read the table: preset, seeds, problems, metrics, the error, the paper's column."""
    columns = load.suite(preset, results)
    table, scores = table1(preset, results, layout), load.tabulated(preset, results)
    ran = [row for row in load.records(table) if row["seeds"]]
    every = " ".join(str(seed) for seed in sorted({int(seed) for row in ran for seed in row["seeds"].split()}))
    sentences = [f"Table {layout.number} ({preset}): scores in percent, {_seeds(every)}."]
    if other := [f"{_name(row)} ({_seeds(row['seeds'])})" for row in ran if row["seeds"] != every]:
        sentences.append(f"Rows with fewer seeds: {', '.join(other)}.")
    sentences.append(_problems(columns, scores))
    counts = {len(row["seeds"].split()) for row in ran if pd.notna(row["avg"])}
    if (results / preset / "problems.parquet").is_file():
        errors = ["by bootstrap over seeds and, within a seed, problems"] if max(counts, default=0) > 1 else []
        if 1 in counts:
            errors.append(("in rows with one seed " if errors else "") + "over problems alone")
    else:
        errors = ["1.96 standard errors"]
    if counts:
        sentences.append(f"Avg is the mean of the columns, in square brackets its 95 % interval, {'; '.join(errors)}.")
    sentences.append("In round brackets: change over the previous iteration, at iteration 0 over base.")
    same = [column.label for column in columns] == SUITE
    sentences.append(
        f"The paper's Avg (its Table {layout.number}) is {layout.model}'s on "
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
            ours = f"{number(row['avg'])} [{number(row['avg_low'], '.1f')}, {number(row['avg_high'], '.1f')}]"
        if pd.notna(row["iteration"]):
            paper += f" ({number(row['paper_change'], '+.2f')})"
            if pd.notna(row["avg"]):
                ours += f" ({number(row['avg_change'], '+.2f')})"
        named = {label: number(row[label]) for label in labels}
        cells.append({"Method": _name(row), **named, "Avg": ours, "Paper's Avg": paper})
    return pd.DataFrame(cells)


def write_table1(preset: str, results: Path = Path("results"), layout: Layout = TABLE1) -> list[Path]:
    """Write `results/<preset>/table<number>.csv` (four decimals, missing cells empty), `.md` and `.tex`.

    Returns their paths. Raises `UserError` as `table1` does.
    """
    table = table1(preset, results, layout)
    cells, caption = table1_cells(table), table1_caption(preset, results, layout)
    csv = table.to_csv(index=False, float_format="%.4f", lineterminator="\n")
    stem = results / preset / f"table{layout.number}"
    return [
        load.write_atomically(stem.with_suffix(".csv"), csv.encode()),
        load.write_atomically(stem.with_suffix(".md"), f"{grid(cells)}\n\n{caption}\n".encode()),
        load.write_atomically(stem.with_suffix(".tex"), latex(cells, caption).encode()),
    ]


def grid(cells: pd.DataFrame) -> str:
    """A table of texts as Markdown, all columns but the first aligned to the right; labels may hold any character."""
    rows = [[_markdown(str(cell)) for cell in row] for row in (cells.columns, *cells.to_numpy())]
    lines = [rows[0], ["---"] + ["---:"] * (len(cells.columns) - 1), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(cells: pd.DataFrame, caption: str) -> str:
    """A table of texts as a LaTeX table (needs booktabs)."""
    escaped = cells.rename(columns=_tex).map(_tex)
    align = "l" + "r" * (len(cells.columns) - 1)
    body = escaped.style.hide(axis="index").to_latex(hrules=True, column_format=align)
    return f"\\begin{{table}}\n\\centering\n{body}\\caption{{{_tex(caption)}}}\n\\end{{table}}\n"


def _markdown(text: str) -> str:
    return re.sub("<(?=[A-Za-z/!])", "&lt;", " ".join(text.replace("|", r"\|").split()))


def _tex(text: str) -> str:
    special = {sign: "\\" + sign for sign in "&%$#_{}"} | {"\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$"}
    return "".join({**special, MISSING: "--"}.get(sign, sign) for sign in text)

"""`tspin compare` and `tspin inspect`: one HTML page to look at one or two runs in, down to the token.

The page is one file that opens from disk. It holds the data, compressed, Plotly, which draws, and inspector.js, which
does the rest; its Content-Security-Policy lets no other script run and nothing be fetched.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from tspin.schema import LABELLED, ONCE, ROLES

from .compare import LETTERS, facts_table, sign
from .intervals import Estimate, estimate
from .runs import Run
from .samples import by_iteration, spread_over
from .style import MISSING
from .writing import number

COLOURS = ("#B34E00", "#0072B2")  # A and B, whatever their methods: dark enough for text
PROMPTS = 1_000  # prompts on a page, evenly spread over those that there are
TOKENS = 400_000  # tokens on a page, and characters of responses: prompts are left out, evenly, until there are no more
CHARACTERS = 20_000_000
NAT = 100  # numbers of nats are rounded to hundredths
REWARD = 10_000  # SPIN's rewards are small: λ times a difference of two policies
AVG = "Avg"


def page(runs: Sequence[Run]) -> str:
    """The HTML page of one run or of two; everything that comes from data is escaped, or text that a script sets."""
    runs = paired(runs)
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined
    )
    scripts = [plotly(), (here / "inspector.js").read_text(encoding="utf-8")]
    return environment.get_template("inspector.html.j2").render(
        runs=list(zip(LETTERS, runs, COLOURS, strict=False)),
        scripts=[Markup(script) for script in scripts],
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
        style=Markup((here / "inspector.css").read_text(encoding="utf-8")),
        data=packed(payload(runs)),
        facts=facts_table(runs).to_numpy().tolist(),
        settings=differing_settings(runs),
        sign=sign(*runs),
        scores=benchmarks(runs),
        iterations=scored_iterations(runs),
        missing=MISSING,
    )


def paired(runs: Sequence[Run]) -> list[Run]:
    """The runs with their prompts' numbers and seeds such that equal ones belong together.

    Two runs of one seed each are held side by side whatever their seeds. Where their prompts are not the same, those of
    the second get numbers after the first's, and keep theirs in `number`: nothing is paired then but the benchmarks.
    """
    if len(runs) < 2:
        return list(runs)
    first, second = runs
    seeds = [set(run.diagnostics["seed"]) if len(run.diagnostics) else set() for run in runs]
    if len(seeds[0]) == len(seeds[1]) == 1 and seeds[0] != seeds[1]:
        first, second = (_with(run, lambda table: table.assign(seed=0), "seed") for run in (first, second))
    if not same_prompts(first, second):
        start = 1 + max((int(first.prompts["prompt_id"].max()), *first.diagnostics.get("prompt_id", [0])))
        second = replace(second, prompts=second.prompts.assign(number=second.prompts["prompt_id"]))
        second = _with(second, lambda table: table.assign(prompt_id=table["prompt_id"] + start), "prompt_id")
    return [first, second]


def same_prompts(first: Run, second: Run) -> bool:
    """Whether prompts that two runs have by the same number are the same; where texts were not kept, taken to be."""
    if first.prompts.empty or second.prompts.empty:
        return True
    both = first.prompts.merge(second.prompts, on="prompt_id", suffixes=("", "_second"))
    return bool((both["prompt"] == both["prompt_second"]).all())


def _with(run: Run, change: Callable[[pd.DataFrame], pd.DataFrame], column: str) -> Run:
    """The run, its tables that have the column changed."""
    names = ("diagnostics", "responses", "token_logps", "outcomes", "prompts", "proto")
    changed: dict[str, Any] = {name: change(table) for name in names if column in (table := getattr(run, name))}
    return replace(run, **changed)


def plotly() -> str:
    """Plotly's script, as its package has it."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def packed(data: Any) -> str:
    """JSON, compressed, as text: a page of ten thousand samples stays below ten megabytes."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


# Benchmarks and settings, which need no script.


def scored_iterations(runs: Sequence[Run]) -> list[int]:
    """Iterations that any of the runs was evaluated at."""
    return sorted({int(t) for run in runs if len(run.scores) for t in run.scores["iteration"]})


def benchmarks(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row per benchmark, Avg first: label, and by iteration the scores of each run and B − A with its interval.

    Intervals, 95 %, are of the problems that both answered and of the seeds that both have.
    """
    labels = list(dict.fromkeys(str(label) for run in runs if len(run.scores) for label in run.scores["label"]))
    return [
        {"label": label, "cells": [cell(runs, label, t) for t in scored_iterations(runs)]} for label in [AVG, *labels]
    ]


def cell(runs: Sequence[Run], label: str, iteration: int) -> dict[str, Any]:
    """One benchmark at one iteration: texts `scores`, one a run, `main` and `interval`, and whether it is `sure`.

    main is B − A of two runs, with the interval of the difference; of one run its score and interval.
    """
    scores = [score(run, label, iteration) for run in runs]
    tables = [outcomes(run, label, iteration) for run in runs]
    if len(runs) > 1:
        tables = shared(*tables)
    found = difference(*tables) if len(runs) > 1 else whole(tables[0])
    if found is not None and len(runs) > 1:  # the scores of what is compared, and of nothing else
        scores = [estimate(stacked(table)).mean for table in tables]
    there = [value for value in scores if value is not None]
    main = found.mean if found is not None else None
    if found is None and len(there) == len(runs):  # no problems were kept
        main = there[1] - there[0] if len(runs) > 1 else there[0]
    sure = found is not None and len(runs) > 1 and not found.low <= 0 <= found.high
    interval = "" if found is None or not np.isfinite(found.low) else f"[{number(found.low)}, {number(found.high)}]"
    if found is not None and len(runs) > 1 and found.low == found.high:
        interval = "same answers"
    form = "+.2f" if len(runs) > 1 else ".2f"
    return {
        "scores": [number(value) for value in scores],
        "main": number(main, form),
        "interval": interval,
        "sure": bool(sure),
    }


def score(run: Run, label: str, iteration: int) -> float | None:
    """A run's score, the mean over its seeds; None where there is none."""
    if run.scores.empty:
        return None
    rows = _at(run, run.scores, iteration)
    rows = run.of_average(rows) if label == AVG else rows[rows["label"] == label]
    return float(rows["value"].mean()) if len(rows) else None


def outcomes(run: Run, label: str, iteration: int) -> pd.DataFrame:
    """Values by (seed, benchmark, problem), a column each seed; empty where no problems were kept."""
    table = run.outcomes
    if table.empty:
        return pd.DataFrame()
    table = _at(run, table, iteration)
    table = run.of_average(table) if label == AVG else table[table["label"] == label]
    return table.pivot_table(index=["label", "doc_id"], columns="seed", values="value", observed=True)


def _at(run: Run, table: pd.DataFrame, iteration: int) -> pd.DataFrame:
    """The rows of an iteration; of a method that is evaluated once, the rows that it has."""
    return table if run.method in ONCE else table[table["iteration"] == iteration]


def whole(table: pd.DataFrame) -> Estimate | None:
    """The mean of one run's problems, in percent."""
    return estimate(stacked(table)) if len(table) else None


def shared(first: pd.DataFrame, second: pd.DataFrame) -> list[pd.DataFrame]:
    """What two tables by `outcomes` are compared by: the problems of both, and the seeds of both where there are any.

    Of unlike seeds the means, in a column 0: problems alone are paired.
    """
    rows = first.index.intersection(second.index)
    first, second = first.loc[rows], second.loc[rows]
    seeds = first.columns.intersection(second.columns)
    if len(seeds):
        return [first[seeds], second[seeds]]
    return [table.mean(axis=1).rename(0).to_frame() for table in (first, second)]


def difference(first: pd.DataFrame, second: pd.DataFrame) -> Estimate | None:
    """second − first of tables by `shared`; None where they share no problem."""
    return estimate(stacked(second - first)) if len(first) else None


def stacked(table: pd.DataFrame) -> np.ndarray:
    """(seeds, benchmarks, problems) in percent of a table by `outcomes`, NaN where a benchmark has fewer problems."""
    parts = [part.to_numpy(float).T for _, part in table.groupby(level=0, observed=True)]
    most = max(part.shape[1] for part in parts)
    padded = [np.pad(part, ((0, 0), (0, most - part.shape[1])), constant_values=np.nan) for part in parts]
    return np.stack(padded, axis=1)


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(name, A's value, B's value) of the settings that two runs do not share; none of one run."""
    if len(runs) < 2:
        return []
    first, second = (run.settings for run in runs)
    return [
        (name, shown(first, name), shown(second, name))
        for name in sorted({*first, *second})
        if first.get(name, MISSING) != second.get(name, MISSING)
    ]


def shown(settings: Any, name: str) -> str:
    """A setting's value as YAML has it."""
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else MISSING


# What the script gets.


def payload(runs: Sequence[Run]) -> dict[str, Any]:
    """All that the script shows: see `prompts_of`, `samples_of` and `tokens_of`, a list by run each."""
    there = [run.samples() for run in runs]
    numbers = numbers_of(runs, there)
    places = {number: place for place, number in enumerate(numbers[spread_over(len(numbers), bound(runs, numbers))])}
    with_tokens = kept_tokens(runs, places)
    return {
        "runs": [
            {
                "letter": letter,
                "method": run.method,
                "name": run.name,
                "colour": colour,
                "samples": samples_of(rows, places),
                "responses": responses_of(run, places),
                "proto": proto_of(run, places),
                "tokens": tokens_of(run, places, with_tokens),
                "curves": curves_of(run),
            }
            for letter, colour, run, rows in zip(LETTERS, COLOURS, runs, there, strict=False)
        ],
        "prompts": prompts_of(runs, places),
        "paired": not all(map(len, there)) or bool(set.intersection(*(set(rows["prompt_id"]) for rows in there))),
        "iterations": sorted({t for run in runs for t in run.iterations}),
        "count": len(numbers),
        "nat": NAT,
        "reward": REWARD,
    }


def numbers_of(runs: Sequence[Run], samples: Sequence[pd.DataFrame]) -> np.ndarray:
    """The prompts that anything is known of, in order: those of samples or, where no run has any, of texts."""
    tables = [*samples] if any(len(rows) for rows in samples) else []
    tables = tables or [of for run in runs for of in (run.prompts, run.responses, run.token_logps) if len(of)]
    return np.unique(np.concatenate([table["prompt_id"].to_numpy(int) for table in tables] or [np.empty(0, int)]))


def bound(runs: Sequence[Run], numbers: np.ndarray) -> int:
    """How many prompts a page can have: PROMPTS, or as many as have CHARACTERS of responses."""
    size = sum(int(run.responses["text"].str.len().sum()) for run in runs if len(run.responses))
    return min(PROMPTS, len(numbers) * CHARACTERS // max(size, CHARACTERS) or 1)


def prompts_of(runs: Sequence[Run], places: dict[int, int]) -> dict[str, list[Any]]:
    """By column, a list with a cell for each prompt of the page: id (its own run's number), task, prompt, labelled."""
    columns = ["task", "prompt", "labelled"]
    known = [run.prompts for run in runs if len(run.prompts)]
    rows = pd.concat(known).drop_duplicates("prompt_id").set_index("prompt_id") if known else pd.DataFrame()
    rows = rows.reindex(index=list(places), columns=[*columns, "number"])
    own = rows["number"].fillna(rows.index.to_series()).astype(int)
    return {"id": own.tolist(), **{name: [*map(text_or_none, rows[name])] for name in columns}}


def text_or_none(value: Any) -> str | None:
    """A text, or None in the place of one that was not kept."""
    return value if isinstance(value, str) else None


def samples_of(rows: pd.DataFrame, places: dict[int, int]) -> list[dict[str, Any]]:
    """Of each seed and iteration, by column, a list with a cell for each sample: see tspin_analysis.samples.

    Gaps are whole numbers of 1 / NAT and 1 / REWARD. place: the prompt's among those of the page.
    """
    return [
        {
            "seed": seed,
            "iteration": t,
            "place": [places[number] for number in part["prompt_id"].tolist()],
            "reward": rounded(part["reward"], REWARD),
            "likelihood": rounded(part["log_likelihood"]),
            "tokens": part["tokens"].astype(int).tolist(),
            "drawn": part["tokens_synthetic"].astype(int).tolist(),
            **{name: part[name].astype(int).tolist() for name in ("misaligned", "finished", "equal")},
        }
        for seed, t, part in by_iteration(rows[rows["prompt_id"].isin(list(places))])
    ]


def responses_of(run: Run, places: dict[int, int]) -> list[dict[str, Any]]:
    """Of each seed and iteration the y′ that it trained on; after the last, those of the policy that it ended with."""
    if run.responses.empty:
        return []
    rows = run.responses[run.responses["prompt_id"].isin(list(places))]
    return [
        {
            "seed": seed,
            "iteration": t,
            "place": [places[number] for number in part["prompt_id"].tolist()],
            "text": part["text"].tolist(),
        }
        for seed, t, part in by_iteration(rows)
    ]


def proto_of(run: Run, places: dict[int, int]) -> list[dict[str, Any]]:
    """Of each seed y0, as `responses_of` has y′."""
    if run.proto.empty:
        return []
    rows = run.proto[run.proto["prompt_id"].isin(list(places))]
    return [
        {"seed": seed, "place": [places[n] for n in part["prompt_id"].tolist()], "text": part["text"].tolist()}
        for seed, _, part in by_iteration(rows.assign(iteration=0))
    ]


def kept_tokens(runs: Sequence[Run], places: dict[int, int]) -> set[int]:
    """The prompts whose tokens are on the page: those that were kept, or as many of them as TOKENS lets in."""
    tables = [run.token_logps for run in runs if len(run.token_logps)]
    if not tables:
        return set()
    rows = pd.concat([table[["prompt_id", "ids"]] for table in tables])
    rows = rows[rows["prompt_id"].isin(list(places))]
    sizes = rows["ids"].map(len).groupby(rows["prompt_id"]).sum().sort_index()
    most = len(sizes) if sizes.sum() <= TOKENS else int(len(sizes) * TOKENS / sizes.sum())
    return set(sizes.index[spread_over(len(sizes), max(most, 1))].tolist())


def tokens_of(run: Run, places: dict[int, int], kept: set[int]) -> list[list[Any]]:
    """[seed, iteration, place, role, pieces, before, after] of each response; log π in parts of a nat, NAT to one."""
    if run.token_logps.empty:
        return []
    rows = run.token_logps[run.token_logps["prompt_id"].isin(kept)]
    return [
        [int(row["seed"]), int(row["iteration"]), places[row["prompt_id"]], ROLES.index(row["role"]),
         list(row["pieces"]), rounded(row["before"]), rounded(row["after"])]
        for row in rows.to_dict("records")
    ]  # fmt: skip


def curves_of(run: Run) -> dict[str, dict[str, list[Any]]]:
    """Title → iterations and values of what is drawn over iterations."""
    curves = {
        "Average over benchmarks": run.average(),
        "Misaligned, % of prompts": 100 * run.misaligned(),
        "Entropy: −log π(y′), nats": run.entropy(),
        "log π(y) − log π(y′), nats": run.likelihood_gap(),
        "Length of y′, tokens": run.length(),
        "Length of y, tokens": run.length(LABELLED),
        "y′ that end, %": 100 * run.finished(),
    }
    return {
        title: {"t": [int(t) for t in values.index], "value": [round(float(value), 4) for value in values]}
        for title, values in curves.items()
        if len(values) and np.isfinite(values).all()
    }


def rounded(values: Any, parts: int = NAT) -> list[int | None]:
    """How many parts of 1 each number is; None where there is no number."""
    numbers = np.asarray(values, dtype=float)
    return [int(value) if np.isfinite(value) else None for value in np.round(numbers * parts)]

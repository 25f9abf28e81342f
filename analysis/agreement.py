"""Yours beside the committed results: whether each row of a table is what as many new seeds would give."""

from collections.abc import Sequence
from math import nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tspin.runs.claims import first_difference
from tspin.runs.files import read_json
from tspin.schema import BASE

from .intervals import LEVEL
from .reading import is_committed, read_scores, reference_of
from .tables import Layout, averaged_labels, score_cells, score_table

ROUNDING = 1e-9  # of sums: rows that are equal agree


def beside(table: pd.DataFrame, folder: Path, layout: Layout) -> tuple[pd.DataFrame, str]:
    """`score_table(folder, layout)` with the committed results in columns of their own, and a line on how they agree:

    committed, committed_low, committed_high, committed_seeds: avg, its 95 % interval and seeds of the committed row
    expected_low, expected_high: where 95 % of runs like the committed ones have their avg, see `expected`
    agrees: whether yours is there; NA where a side lacks the row, or one committed seed tells no spread

    Without anything to hold yours against, the table stays as it is and the line says why; the committed results
    themselves get no line. Raises UserError where a committed file is missing or malformed.
    """
    if is_committed(folder):
        return table, ""
    reference = reference_of(folder)
    if reference is None:
        return table, f"No committed results of {folder.name} are here to hold these against."
    if why := difference(folder, reference):
        return table, f"{reference} is not held against these: {why}."
    scores = read_scores(reference)
    committed = score_table(reference, layout, scores)
    scores = scores[scores["label"].isin(averaged_labels(reference))]
    if committed["avg"].isna().all():
        return table, f"{reference} is not held against these: it has none of the rows."
    names = {"avg": "committed", "avg_low": "committed_low", "avg_high": "committed_high", "seeds": "committed_seeds"}
    rows = zip(committed.to_dict("records"), table["seeds"], strict=True)
    ends = [_ends(row, scores, more=len(seeds.split())) for row, seeds in rows]
    limits = pd.DataFrame(ends, columns=["expected_low", "expected_high"])
    joined = pd.concat([table, committed[list(names)].rename(columns=names), limits], axis=1)
    inside = joined["avg"].between(joined["expected_low"] - ROUNDING, joined["expected_high"] + ROUNDING)
    known = joined[["avg", "expected_low", "expected_high"]].notna().all(axis=1)
    joined["agrees"] = inside.astype("boolean").where(known)
    return joined, _line(joined, reference)


def difference(folder: Path, reference: Path) -> str:
    """What differs in the configs of two folders of results, in words; nothing where their numbers may be compared."""
    paths = [place / "config.json" for place in (reference, folder)]
    if absent := [path for path in paths if not path.is_file()]:
        return f"{absent[0]} is missing"
    there, here = ({**read_json(path), "checksum": None} for path in paths)  # what claim_folder compares
    if there == here:
        return ""
    key, old, new = first_difference(there, here)
    return f"another config ({key} is {old!r} there, {new!r} here)"


def expected(means: Sequence[float], more: int = 1) -> tuple[float, float]:
    """Where the mean of `more` new seeds lies with 95 %, from the `means` of n seeds: a prediction interval,

    mean ± t(n − 1) · s · √(1 / more + 1 / n), s the seeds' standard deviation. NaN for fewer than two.
    """
    from scipy.special import stdtrit  # Student's t; scipy.stats takes seconds to import

    n = len(means)
    if n < 2 or more < 1:
        return nan, nan
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(means, ddof=1) * sqrt(1 / more + 1 / n))
    mean = float(np.mean(means))
    return mean - half, mean + half


def _ends(row: dict[Any, Any], scores: pd.DataFrame, more: int) -> tuple[float, float]:
    """`expected` of a committed row; of the base, one policy that is decoded greedily, its interval over problems."""
    if row["method"] == BASE:
        return row["avg_low"], row["avg_high"]
    runs = scores[(scores["method"] == row["method"]) & scores["seed"].isin([int(s) for s in row["seeds"].split()])]
    runs = runs[runs["iteration"].isna() if pd.isna(row["iteration"]) else runs["iteration"] == row["iteration"]]
    return expected(runs.groupby("seed")["value"].mean().tolist() if pd.notna(row["avg"]) else [], more)


def _line(table: pd.DataFrame, reference: Path) -> str:
    """How many rows agree and by which measure, which do not, and which cannot be judged."""
    names, agrees = score_cells(table)["Method"], table["agrees"]
    seeds = sorted({int(seed) for text in table["committed_seeds"] for seed in text.split()})
    sentences = [f"Committed: Avg in {reference}, seeds {', '.join(map(str, seeds))}, and its 95 % interval."]
    if agrees.notna().any():
        more = "as many more seeds" if table["seeds"].str.contains(" ").any() else "one more seed"
        outside = names[agrees.eq(False).fillna(False)]
        sentences.append(
            f"Agrees: {agrees.sum()} of {agrees.count()} rows within what {more} would give, 95 % prediction intervals "
            f"from the spread of {len(seeds)} seeds (base: over problems; by chance one row in twenty is outside)"
            + (f"; not: {', '.join(outside)}." if len(outside) else ".")
        )
    if len(alone := names[agrees.isna() & table["avg"].notna() & table["committed"].notna()]):
        sentences.append(f"One committed seed tells no spread, so these are not judged: {', '.join(alone)}.")
    return " ".join(sentences)

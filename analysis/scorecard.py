"""A scorecard as Markdown: the verdicts, the rules and when they were fixed, and what the rules can decide."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from .verdicts import CONTRADICTED, REPLICATED, UNDECIDED, Part
from .writing import markdown

HEAD = """# The paper's claims on the {preset} preset

Differences are points of the average over the benchmarks, paired by seed and problem. Intervals are 95 %: seeds and \
problems crossed, because all seeds answer the same problems (`analysis/intervals.py`). p-values are corrected for the \
number of comparisons in their part (Holm). {decoding} Written by `tspin claims`."""
RULES = """## The rules

"Surely above x": the 95 % interval lies above x. "Needs n seeds": so many would make the interval narrow enough, with \
the means and variances seen here; "more problems": no number of seeds would. Fewer than three seeds decide nothing. \
"Benchmarks drawn too": the interval if these benchmarks are a sample of the tasks there are. All intervals of \
averages got a least spread between seeds on 2026-11-26, after pocket's seeds 10 to 12 had been seen, because two \
seeds that agree by chance had an interval without width; and two seeds had been enough until then. Neither changed a \
verdict of those three seeds. Pocket's seeds 13 and 14 were added after the first three had been judged, and \
smollm2-tuned's problems and seeds had been run before, at 1e-5: no interval or p-value accounts for either."""
CHANCES = """## What the rules can decide

How often each rule comes to which verdict, simulated with the variances and the number of seeds of these results, if \
nothing changes, if the paper's averages are the truth, and if SPIN's and T-SPIN's are exchanged."""
STILL = "Benchmarks that cannot tell the policies of a claim apart: {marks}."


def scorecard_text(rows: Sequence[dict[str, Any]], preset: str, decoding: str) -> str:
    """The Markdown of `claims.scorecard`. decoding: a sentence on how y′ was decoded."""
    blocks = [HEAD.format(preset=preset, decoding=decoding), _table([_verdict(row) for row in rows])]
    if marks := [f"{row['claim']}: {', '.join(_marks(row['still']))}" for row in rows if row.get("still")]:
        blocks.append(STILL.format(marks="; ".join(marks)))
    blocks += [RULES, _table([_rule(row) for row in rows])]
    if chances := chance_rows(rows):
        blocks += [CHANCES, _table(chances)]
    return "\n\n".join(blocks) + "\n"


def chance_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """What each rule can decide, as texts: claim (""), part, if, and a column per verdict."""
    return [_chance(row["claim"], chance) for row in rows for chance in row.get("chances", [])]


def _verdict(row: dict[str, Any]) -> dict[str, str]:
    parts = [Part(*fields) for fields in zip(row["ours"], row["parts"], row["why"], strict=True)]
    return {
        "": row["claim"],
        "the paper says": f"{row['statement']} ({row['where']})",
        "its numbers": row["paper"],
        "ours": "\n".join(f"{part.text} → {part}" for part in parts),
        "verdict": f"**{row['verdict']}**",
    }


def _marks(still: dict[str, str]) -> list[str]:
    return [f"{label} ({why})" for label, why in still.items()]


def _rule(row: dict[str, Any]) -> dict[str, str]:
    return {"": row["claim"], "rule": row["rule"], "fixed": row["fixed"], "what had been seen": row["seen"]}


def _chance(claim: str, chance: dict[str, Any]) -> dict[str, str]:
    shares = {verdict: f"{chance.get(verdict, 0.0):.0%}" for verdict in (REPLICATED, CONTRADICTED, UNDECIDED)}
    return {"": claim, "part": chance["words"], "if": chance["truth"], **shares}


def _table(rows: list[dict[str, str]]) -> str:
    return markdown(pd.DataFrame(rows), align="left")

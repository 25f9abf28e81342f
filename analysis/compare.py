"""Runs in a few numbers, side by side: what to know of them first."""

from collections.abc import Sequence

import pandas as pd

from .runs import Run
from .style import MISSING
from .writing import number

GIB = 2**30
LETTERS = "AB"


def facts_table(runs: Sequence[Run]) -> pd.DataFrame:
    """What to know first, as texts: a column "" of names, and one a run, A and B."""
    columns = [{"method": run.method, **facts(run, sign(*runs))} for run in runs]
    letters = LETTERS[: len(runs)]
    return pd.DataFrame(
        [{"": name, **{x: column[name] for x, column in zip(letters, columns, strict=True)}} for name in columns[0]]
    )


def sign(*runs: Run) -> str:
    """What averages are in."""
    return "%" if all(run.unit == "percent" for run in runs) else "of unlike units"


def facts(run: Run, sign: str = "%") -> dict[str, str]:
    """A run in a few texts, by the names that `facts_table` shows. sign: the average's unit."""
    average, gap, costs = run.average(), run.likelihood_gap(), run.costs
    peak = costs["peak_bytes"].max()
    changes = average.diff().dropna()
    seeds = run.scores["seed"].nunique() if len(run.scores) else 1
    together = f" ({seeds} seeds together)" if seeds > 1 else ""
    drops = changes[changes < 0]
    return {
        f"Avg after the last iteration, {sign}": number(average.iloc[-1] if len(average) else None),
        "drops between iterations": f"{len(drops)} of {len(changes)}" if len(changes) else MISSING,
        "worst drop, points": number(drops.min()),
        "variance of the change, points²": number(changes.var()),
        "misaligned after iteration 1": number(run.misaligned().get(1), ".1%"),
        "log-likelihood gap at the end, nats": number(gap.iloc[-1] if len(gap) else None, "+.2f"),
        "warnings (after iteration)": _warned(run),
        "time, s": number(costs["seconds"].sum(), ".0f") + together,
        "training tokens": number(costs["tokens"].sum(), ",.0f") + together,
        "peak memory, GiB": number(peak / GIB if pd.notna(peak) else None),
    }


def _warned(run: Run) -> str:
    if run.warnings is None:
        return MISSING
    by_name = run.warnings.sort_values("iteration").groupby("name", sort=False)["iteration"]
    return "; ".join(f"{name} ({', '.join(map(str, numbers.unique()))})" for name, numbers in by_name) or "none"

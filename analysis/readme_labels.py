"""What README files say of self-play and SFT on the same labels: `readme` fills it in."""

from pathlib import Path

import pandas as pd

from tspin.schema import BASE

from .intervals import estimate
from .map import points
from .studies import Study
from .style import MISSING, look
from .writing import pipes

METHODS = ("sft", "spin", "tspin")


def by_labels(folder: Path) -> str:
    """The study `data`: Avg after the last iteration, a row per method, a column per number of labels.

    95 % intervals; T-SPIN − SFT below, of the seeds that have both.
    """
    study = Study(folder, "data")
    last = study.last
    numbers = sorted(int(number) for number in last["labels"].unique())
    cells = {key: rows.set_index("seed") for key, rows in last.groupby(["method", "labels"])}
    rows = [
        [look(method).label, *(_average(study, cells.get((method, number))) for number in numbers)]
        for method in ("sft", "tspin")
    ]
    difference = [_difference(study, cells.get(("tspin", number)), cells.get(("sft", number))) for number in numbers]
    return pipes(["labels", *(f"{n:,}" for n in numbers)], [*rows, ["T-SPIN − SFT", *difference]])


def own_labels(folder: Path) -> str:
    """The study `own-labels`: Avg at the end, what was gained, and self-play − SFT, a row per method."""
    study = Study(folder, "own-labels")
    cells = {str(method): rows.set_index("seed") for method, rows in study.last.groupby("method")}
    start = study.values(cells[BASE].iloc[:1])
    rows = []
    for method in METHODS:
        if (of := cells.get(method)) is not None:
            over = MISSING if method == "sft" else _difference(study, of, cells.get("sft"))
            gain = points(estimate(study.values(of) - start))
            rows.append([look(method).label, str(len(of)), _average(study, of), gain, over])
    return pipes(["method", "seeds", "Avg", "above the start", "above SFT"], rows)


def own_average(folder: Path, method: str) -> str:
    """A method's average at the end of the study `own-labels`, with its interval."""
    study = Study(folder, "own-labels")
    return _average(study, study.last[study.last["method"] == method])


def own_lead(folder: Path, method: str, other: str, iteration: int | None = None) -> str:
    """method − other in the study `own-labels`, after an iteration or at the end; SFT, which has none, at its end."""
    study = Study(folder, "own-labels")
    table = study.last if iteration is None else study.table
    first, second = (
        rows[rows["iteration"].isna() | (iteration is None) | (rows["iteration"] == iteration)].set_index("seed")
        for rows in (table[table["method"] == name] for name in (method, other))
    )
    return _difference(study, first, second)


def _average(study: Study, cells: pd.DataFrame | None) -> str:
    if cells is None:
        return MISSING
    mean = estimate(study.values(cells))
    return f"{mean.mean:.1f} [{mean.low:.1f}, {mean.high:.1f}]"


def _difference(study: Study, first: pd.DataFrame | None, second: pd.DataFrame | None) -> str:
    """first − second of the seeds that both have; cells by seed."""
    if first is None or second is None or not len(seeds := first.index.intersection(second.index)):
        return MISSING
    return points(estimate(study.values(first.loc[seeds]) - study.values(second.loc[seeds])))

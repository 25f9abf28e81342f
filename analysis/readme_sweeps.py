"""What README files say of the sweeps: `readme` fills it in."""

from pathlib import Path

import pandas as pd

from tspin.schema import BASE

from .intervals import estimate
from .studies import Study
from .style import MISSING, look
from .writing import pipes


def tuned(folder: Path) -> str:
    """The sweep of rates and epochs: its last average, the mean over seeds, of every setting, as a table."""
    cells = _swept(folder, "sweep-rate", ["method", "num_train_epochs"]).loc[["spin", "tspin", "sft"]]
    return _by_rate("method, epochs", [f"{look(method).label}, {epochs:g}" for method, epochs in cells.index], cells)


def tuned_starts(folder: Path) -> str:
    """The sweeps of the rate from other starts than the preset's, one epoch an iteration, as a table."""
    of = {start: _swept(folder, f"sweep-{start}", ["method"]) for start in ("half", "cold")}
    labels = [f"{look(method).label}, {start}" for start, cells in of.items() for method in cells.index]
    return _by_rate("method, start", labels, pd.concat(of.values()).sort_index(axis="columns"))


def tuned_labels(folder: Path) -> str:
    """The sweep of SFT on as many labels as self-play has, the mean over seeds, as a table."""
    cells = _swept(folder, "sweep-labels", ["num_train_epochs"])
    return _by_rate("epochs", [f"{epochs:g}" for epochs in cells.index], cells)


def tuned_real(folder: Path) -> str:
    """The sweep of SmolLM2's rates, one seed, as a table."""
    cells = _swept(folder, "smollm2-rate", ["method"]).loc[["spin", "tspin", "sft"]]
    return _by_rate("method", [look(method).label for method in cells.index], cells)


def tuned_base(folder: Path, sweep: str) -> str:
    """The start's average on a sweep's problems."""
    table = pd.read_csv(folder / "studies" / f"{sweep}.csv")
    base = table.loc[table["method"] == BASE, "avg"]
    return f"{base.iloc[0]:.2f}" if len(base) else MISSING


def tuned_gain(folder: Path, sweep: str, method: str) -> str:
    """The best of a method's settings − the start on a sweep's problems, in points; of one seed the problems' noise."""
    study = Study(folder, sweep)
    table = study.last
    settings = dict(list(table[table["method"] == method].groupby(study.settings, dropna=False)))
    best = max(settings.values(), key=lambda rows: float(rows["avg"].mean()))
    start = study.values(table[table["method"] == BASE])
    return f"{estimate(study.values(best) - start):+.1f}".replace("-", "−")


def tuned_lead(folder: Path) -> str:
    """T-SPIN − SPIN in the sweep of SmolLM2's rates, each at its best, in points; one seed: the problems' noise."""
    study = Study(folder, "smollm2-rate")
    last = study.table[study.table["iteration"] == study.table["iteration"].max()]
    best = last.loc[last.groupby("method")["avg"].idxmax()].set_index("method")
    tspin, spin = (study.values(best.loc[[method]]) for method in ("tspin", "spin"))
    return f"{estimate(tspin - spin):+.1f}".replace("-", "−")


def _swept(folder: Path, sweep: str, rows: list[str]) -> pd.DataFrame:
    """The last average of a sweep's settings, the mean over seeds: a column per rate."""
    table = pd.read_csv(folder / "studies" / f"{sweep}.csv", dtype={"iteration": "Int64"})
    last = table[table["iteration"].isna() | (table["iteration"] == table["iteration"].max())]
    return last[last["method"] != BASE].pivot_table("avg", rows, "learning_rate")


def _by_rate(title: str, labels: list[str], cells: pd.DataFrame) -> str:
    rates = [f"{rate:.0e}".replace("e-0", "e-") for rate in cells]
    texts = [[MISSING if pd.isna(avg) else f"{avg:.2f}" for avg in row] for row in cells.to_numpy()]
    return pipes([title, *rates], [[label, *row] for label, row in zip(labels, texts, strict=True)])

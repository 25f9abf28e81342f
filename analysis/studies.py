"""Figures of studies: results/<preset>/studies/<name>.csv, each made by `make study STUDY=<name>`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tspin.errors import UserError
from tspin.schema import BASE, RUN, STUDY_MEASURES

from .drawing import BASE_X, beside, draw_means, draw_paper, label_iterations, new_figure, put_legend
from .intervals import estimate
from .reading import PAPER
from .scores import outcomes
from .style import Look, in_order, look
from .writing import markdown

NO_SETTINGS = {*RUN, *STUDY_MEASURES, "cell"}  # every other column of a study is a setting
NEEDED = {*RUN, "cell"}
# Settings in their order: dark to light, apart without colour too.
SETTINGS = [("#440154", "o"), ("#31688E", "s"), ("#35B779", "v"), ("#B5DE2B", "^")]


class Panels(NamedTuple):
    """A study by iteration: a panel per method and a line per setting, or without setting a line per method."""

    setting: str | None = None
    legend: str | None = None
    names: dict[Any, str] = {}


STUDIES = {
    "base": Panels("path", "Initial policy", {"runs/pocket-bases/weak": "weak", "pocket": "as shipped",
                                              "runs/pocket-bases/strong": "strong"}),
    "decoding": Panels("temperature", "Decoding of y′ and y0", {0.0: "greedy", 0.7: "temperature 0.7",
                                                                1.0: "temperature 1"}),
    "neighbours": Panels(),
    "scale": Panels("alpha", "Scale of the reward: λ of SPIN, α of T-SPIN", {0.1: "0.1", 1.0: "1"}),
    "ten": Panels(),
}  # fmt: skip


class Study:
    """A study's results: `table` (cell, settings, RUN and STUDY_MEASURES of tspin.schema) and its cells' outcomes.

    Raises UserError where a file is missing, or lacks a column or a cell.
    """

    def __init__(self, folder: Path, name: str):
        self.path = folder / "studies" / f"{name}.csv"
        self.again = f"make it with: make study STUDY={name}"
        if not self.path.is_file():
            raise UserError(f"{self.path}: not run; {self.again}")
        self.table = pd.read_csv(self.path)
        self.problems = self.path.with_name(f"{name}_problems.parquet")
        if absent := NEEDED - set(self.table):
            raise UserError(f"{self.path}: lacks the columns {', '.join(sorted(absent))}; {self.again}")
        if not self.problems.is_file():
            raise UserError(f"{self.problems}: no such file, and no interval without it; {self.again}")
        rows = pd.read_parquet(self.problems)
        self._outcomes = outcomes(rows.assign(benchmark=pd.factorize(rows["benchmark"])[0]), ["cell", "iteration"])

    def values(self, rows: pd.DataFrame) -> np.ndarray:
        """(seeds, benchmarks, problems) in percent of some rows of `table`, each of another seed."""
        keys = [(cell, None if pd.isna(t) else int(t)) for cell, t in zip(rows["cell"], rows["iteration"], strict=True)]
        if absent := [key for key in keys if key not in self._outcomes]:
            raise UserError(f"{self.problems}: lacks {absent[0][0]}; {self.again}")
        return np.stack([self._outcomes[key] for key in keys])

    def averaged(self, keys: list[str], rows: pd.DataFrame | None = None) -> pd.DataFrame:
        """Over the seeds of each setting, of some rows or all: keys, avg, half (of the 95 % interval), seeds."""
        averages = []
        for key, group in (self.table if rows is None else rows).groupby(keys, dropna=False):
            mean = estimate(self.values(group))
            named = dict(zip(keys, key, strict=True))
            averages.append({**named, "avg": mean.mean, "half": mean.half, "seeds": mean.seeds})
        return pd.DataFrame(averages)

    @property
    def seeds(self) -> str:
        """How many seeds there are, in words."""
        count = self.table["seed"].nunique()
        return f"{count} seeds" if count > 1 else "1 seed, its spread unknown"


def figure4a(folder: Path) -> Figure:
    """Avg against the number of labels, T-SPIN after its last iteration and SFT; the paper's points below."""
    study = Study(folder, "data")
    table, last = study.table, int(study.table["iteration"].max())
    means = study.averaged(["method", "labels"], table[table["iteration"].isna() | (table["iteration"] == last)])
    with new_figure(1, 3.6) as figure:
        ours, paper = figure.subplots(2, 1, height_ratios=[3, 2])
        for method, rows in _by_method(means):
            draw_means(ours, rows["labels"], rows["avg"], rows["half"], look(method))
        for method, rows in _by_method(pd.read_csv(PAPER / "figure4a_data_efficiency.csv")):
            draw_paper(paper, rows["labels"], rows["avg"], look(method))
        ours.set_title(f"Ours ({folder.name}): T-SPIN after iteration {last}, {study.seeds}", loc="left")
        paper.set_title("The paper's (Zephyr-7B; the points it states)", loc="left")
        for axes in (ours, paper):
            axes.set(xscale="log", ylabel="Avg (%)")
            axes.minorticks_off()
        labels = sorted(means["labels"].unique())
        ours.set_xticks(labels, [f"{count:,}" for count in labels])
        paper.set_xticks([50_000, 200_000], ["50k", "200k"])
        paper.set_xlabel("Labels")
        ours.legend(frameon=False)
        return figure


def figure4c(folder: Path) -> Figure:
    """The α × β grid of T-SPIN: Avg at iteration 1, the mean over seeds."""
    import seaborn  # seconds, which other figures do without

    study = Study(folder, "grid")
    means = study.averaged(["alpha", "beta"], study.table[study.table["iteration"] == 1])
    cells = means.pivot(index="alpha", columns="beta", values="avg").sort_index(ascending=False)
    with new_figure(1, 2.7) as figure:
        axes = figure.subplots()
        seaborn.heatmap(cells, ax=axes, annot=True, fmt=".1f", cmap="viridis", linewidths=1,
                        cbar_kws={"label": "Avg at iteration 1 (%)"})  # fmt: skip
        half = means["half"].mean()
        axes.set_title(f"T-SPIN ({folder.name}), {study.seeds}; ± {half:.1f} per cell", loc="left")
        axes.set(xlabel="β", ylabel="α")
        return figure


def by_iteration(name: str, folder: Path) -> Figure:
    """A study of STUDIES: Avg against the iteration, with 95 % intervals (`intervals`)."""
    study, panels = Study(folder, name), STUDIES[name]
    means = study.averaged(["method", "iteration", *([panels.setting] if panels.setting else [])])
    base, means = means[means["method"] == BASE].assign(iteration=BASE_X), means[means["method"] != BASE]
    methods = _by_method(means)
    columns, height = (0.9 * len(methods), 2.8) if panels.setting else (1, 2.7)
    with new_figure(columns, height) as figure:
        grid = figure.subplots(1, len(methods) if panels.setting else 1, sharey=True, squeeze=False)[0]
        if panels.setting is None:
            _draw_lines(grid[0], [(rows, look(method)) for method, rows in methods])
            grid[0].set_title(f"{folder.name}, {study.seeds}", loc="left")
        else:
            for axes, (method, rows) in zip(grid, methods, strict=True):
                _draw_lines(axes, _by_setting(pd.concat([base, rows]), rows[panels.setting], panels))
                axes.set_title(f"{look(method).label} ({folder.name}), {study.seeds}", loc="left")
        count = len(grid[0].get_legend_handles_labels()[1])
        put_legend(figure, [grid[0]], columns=min(3, count), title=panels.legend)
        for axes in grid:
            axes.set_xlabel("Iteration")
            label_iterations(axes, range(int(means["iteration"].max()) + 1), base=len(base) > 0)
        grid[0].set_ylabel("Avg (%)")
        return figure


def study_text(name: str, folder: Path) -> str:
    """A study as Markdown: a row per method and setting, a column per iteration, mean ± half of a 95 % interval."""
    study = Study(folder, name)
    settings = [str(column) for column in study.table if column not in NO_SETTINGS]
    means = study.averaged(["method", *settings, "iteration"])
    means["cell"] = [f"{avg:.1f} ± {half:.1f}" for avg, half in zip(means["avg"], means["half"], strict=True)]
    means["iteration"] = ["after" if pd.isna(t) else f"iteration {int(t)}" for t in means["iteration"]]
    order = sorted(means["iteration"].unique(), key=lambda text: (text != "after", len(text), text))
    wide = means.pivot(index=["method", *settings], columns="iteration", values="cell")[order].fillna("").reset_index()
    wide["method"] = [look(str(method)).label for method in wide["method"]]
    return f"Avg (%), {study.seeds}, 95 % intervals, seeds and problems crossed.\n\n{markdown(wide.astype(str))}\n"


def _by_method(means: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(method, means[means["method"] == method]) for method in in_order(means["method"])]


def _by_setting(rows: pd.DataFrame, values: pd.Series, panels: Panels) -> list[tuple[pd.DataFrame, Look]]:
    """The rows of each setting among `values`, and how they are drawn: named settings first, in their order."""
    present = set(values)
    order = [value for value in panels.names if value in present] + sorted(present - set(panels.names))
    return [
        (rows[rows[panels.setting] == value], Look(panels.names.get(value, str(value)), *style))
        for value, style in zip(order, SETTINGS, strict=False)
    ]


def _draw_lines(axes: Axes, lines: list[tuple[pd.DataFrame, Look]]) -> None:
    for (rows, style), shift in zip(lines, beside(len(lines)), strict=True):
        draw_means(axes, rows["iteration"] + shift, rows["avg"], rows["half"], style)


# What `tspin figure` draws from here: the figure's name → the study, and how it is drawn.
STUDY_OF = {"4a": "data", "4c": "grid", **{name: name for name in STUDIES}}
FIGURES: dict[str, Callable[[Path], Figure]] = {
    "4a": figure4a,
    "4c": figure4c,
    **{name: partial(by_iteration, name) for name in STUDIES},
}

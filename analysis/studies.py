"""Figures of studies: results/<preset>/studies/<name>.csv, each made by `make study STUDY=<name>`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tspin.errors import UserError
from tspin.schema import BASE, RUN, STUDY_MEASURES

from .drawing import (
    beside,
    contrast_texts,
    draw_band,
    draw_level,
    draw_means,
    draw_paper,
    label_iterations,
    new_figure,
    put_legend,
    put_note,
)
from .grid import cells_of
from .intervals import estimate
from .reading import PAPER, labels_of, read_suite
from .scores import outcomes
from .style import MISSING, in_order, look
from .writing import markdown, seeds_in_words

NO_SETTINGS = {*RUN, *STUDY_MEASURES, "cell"}  # every other column of a study is a setting
NEEDED = {*RUN, "cell"}
INTERVALS = "95 % intervals, seeds and problems crossed"


class Study:
    """A study's results: `table` (cell, settings, RUN and STUDY_MEASURES of tspin.schema) and its cells' outcomes.

    benchmarks, labels: their names in the order of the outcomes, and what tables call them.
    beside: studies whose cells are added, where they were run. Raises UserError where a file is missing, or lacks a
    column or a cell.
    """

    def __init__(self, folder: Path, name: str, beside: Sequence[str] = ()):
        self.path = folder / "studies" / f"{name}.csv"
        self.again = f"make it with: make study STUDY={name}"
        more = [path for path in (self.path.with_stem(other) for other in beside) if path.is_file()]
        read = [_read(path) for path in (self.path, *more)]
        self.table, rows = (pd.concat(tables, ignore_index=True) for tables in zip(*read, strict=True))
        numbers, names = pd.factorize(rows["benchmark"])
        self.benchmarks = [str(name) for name in names]
        columns = read_suite(folder) if (folder / "suite.json").is_file() else []  # a study alone leaves none
        called = {column.benchmark: column.label for column in columns}
        self.labels = [called.get(name, name) for name in self.benchmarks]
        self._outcomes = outcomes(rows.assign(benchmark=numbers), ["cell", "iteration"])

    def values(self, rows: pd.DataFrame) -> np.ndarray:
        """(seeds, benchmarks, problems) in percent of some rows of `table`, each of another seed."""
        keys = [(cell, None if pd.isna(t) else int(t)) for cell, t in zip(rows["cell"], rows["iteration"], strict=True)]
        if absent := [key for key in keys if key not in self._outcomes]:
            raise UserError(f"{_problems(self.path)}: lacks {absent[0][0]}; {self.again}")
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
    def last(self) -> pd.DataFrame:
        """The rows of methods without iterations, and of the last iteration of the others."""
        numbers = self.table["iteration"]
        return self.table[numbers.isna() | (numbers == numbers.max())]

    @property
    def settings(self) -> list[str]:
        """The columns that the study sets."""
        return [str(column) for column in self.table if column not in NO_SETTINGS]

    @property
    def size(self) -> str:
        """How many problems an average is over, in words."""
        values = self.values(self.table.iloc[:1])[0]
        return f"{int((~np.isnan(values)).sum()):,} problems of {len(values)} benchmarks"

    def seeds(self, rows: pd.DataFrame | None = None) -> str:
        """How many seeds its settings have, or those of some rows, in words."""
        rows = self.table if rows is None else rows
        keys = ["method", *self.settings]
        words = seeds_in_words(rows[rows["method"] != BASE].groupby(keys, dropna=False)["seed"].nunique())
        return "1 seed, its spread unknown" if words == "1 seed" else words


def _read(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of a study, by its path, and its problems."""
    again = f"make it with: make study STUDY={path.stem}"
    if not path.is_file():
        raise UserError(f"{path}: not run; {again}")
    table = pd.read_csv(path)
    if absent := NEEDED - set(table):
        raise UserError(f"{path}: lacks the columns {', '.join(sorted(absent))}; {again}")
    if not _problems(path).is_file():
        raise UserError(f"{_problems(path)}: no such file, and no interval without it; {again}")
    return table, pd.read_parquet(_problems(path))


def _problems(path: Path) -> Path:
    return path.with_name(f"{path.stem}_problems.parquet")


def figure4a(folder: Path) -> Figure:
    """Avg against the share of all labels, T-SPIN after its last iteration and SFT; the paper's points below.

    All labels are those of the preset's SFT, where it says how many. Raises UserError where no T-SPIN has finished.
    """
    study = Study(folder, "data")
    last = study.table["iteration"].max()
    if pd.isna(last):
        raise UserError(f"{study.path}: no cell of T-SPIN has finished yet; {study.again}")
    means = study.averaged(["method", "labels"], study.last)
    printed = pd.read_csv(PAPER / "figure4a_data_efficiency.csv")
    everything = [labels_of(folder, "sft") or int(means["labels"].max()), int(printed["labels"].max())]
    with new_figure(1, 3.8) as figure:
        ours, paper = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        for method, rows in _by_method(means):
            draw_means(ours, rows["labels"] / everything[0], rows["avg"], rows["half"], look(method))
        for method, rows in _by_method(printed):
            draw_paper(paper, rows["labels"] / everything[1], rows["avg"], look(method))
        ours.set_title(f"Ours ({folder.name}), of {everything[0]:,} labels", loc="left")
        paper.set_title(f"The paper's (Zephyr-7B), of {everything[1]:,} labels", loc="left")
        for axes in (ours, paper):
            axes.set(xscale="log", ylabel="Avg (%)")
        shares = sorted({*(means["labels"] / everything[0]), *(printed["labels"] / everything[1])})
        paper.set_xticks(shares, [f"{100 * share:.3g} %" for share in shares])
        paper.minorticks_off()
        paper.set_xlabel("Share of all labels")
        figure.align_ylabels()
        put_legend(figure, [ours])
        put_note(figure, f"Ours: T-SPIN after iteration {int(last)}, {study.seeds()}, {study.size}; {INTERVALS}. The "
                         "paper's: the points that it states, T-SPIN after two iterations.")  # fmt: skip
        return figure


def figure4c(folder: Path) -> Figure:
    """The α × β grid of T-SPIN: Avg at iteration 1, the mean over seeds. Raises UserError where it has no such cell."""
    import seaborn  # seconds, which other figures do without

    study = Study(folder, "grid")
    try:
        rows = cells_of(study.table)
    except ValueError as error:
        raise UserError(f"{study.path}: {error}; {study.again}") from error
    means = study.averaged(["alpha", "beta"], rows)
    cells = means.pivot(index="alpha", columns="beta", values="avg").sort_index(ascending=False)
    low, high = means["avg"].min(), means["avg"].max()
    with new_figure(1, 2.9) as figure:
        axes = figure.subplots()
        seaborn.heatmap(cells, ax=axes, annot=True, fmt=".1f", cmap="Blues", linewidths=1, vmax=high,
                        vmin=low - (high - low) / 4, cbar_kws={"label": "Avg at iteration 1 (%)"})  # fmt: skip
        contrast_texts(axes)
        axes.set_title(f"T-SPIN ({folder.name})", loc="left")
        axes.set(xlabel="β", ylabel="α")
        half = means["half"].mean()
        put_note(figure, f"{study.seeds(rows)}, {study.size}; ± {half:.1f} per cell, {INTERVALS}.")
        return figure


def course(folder: Path, name: str) -> Figure:
    """A study without settings: Avg against the iteration, a line per method, with 95 % intervals (`intervals`).

    SFT, which has no iterations, is a line across with its interval as a band, and the start a line.
    """
    study = Study(folder, name)
    means = study.averaged(["method", "iteration"])
    methods = _by_method(means[means["iteration"].notna()])
    with new_figure(1, 2.9) as figure:
        axes = figure.subplots()
        for (method, rows), shift in zip(methods, beside(len(methods)), strict=True):
            draw_means(axes, rows["iteration"] + shift, rows["avg"], rows["half"], look(method))
        for method, rows in _by_method(means[means["iteration"].isna()]):
            avg, half = rows[["avg", "half"]].to_numpy()[0]
            draw_level(axes, method, avg)
            if method != BASE:
                draw_band(axes, method, avg - half, avg + half)
        label_iterations(axes, range(int(means["iteration"].max()) + 1), base=False)
        axes.set(xlabel="Iteration", ylabel="Avg (%)")
        put_legend(figure, [axes])
        put_note(figure, f"{folder.name}, {study.seeds()}, {study.size}; {INTERVALS}.")
        return figure


def study_text(name: str, folder: Path) -> str:
    """A study as Markdown: a row per method and setting, a column per iteration, mean ± half of a 95 % interval."""
    study = Study(folder, name)
    settings = study.settings
    means = study.averaged(["method", *settings, "iteration"])
    seeds = means.groupby(["method", *settings], dropna=False)["seeds"].max().rename("seeds")
    means["cell"] = [f"{avg:.1f} ± {half:.1f}" for avg, half in zip(means["avg"], means["half"], strict=True)]
    means["iteration"] = ["after" if pd.isna(t) else f"iteration {int(t)}" for t in means["iteration"]]
    order = sorted(means["iteration"].unique(), key=lambda text: (text != "after", len(text), text))
    wide = means.pivot(index=["method", *settings], columns="iteration", values="cell")[order].fillna("").reset_index()
    if seeds[seeds.index.get_level_values("method") != BASE].nunique() > 1:  # then it is said of each
        wide = wide.merge(seeds.reset_index())
    wide["method"] = [look(str(method)).label for method in wide["method"]]
    for name in settings:  # of some methods alone
        wide[name] = [MISSING if pd.isna(value) else f"{value:g}" if isinstance(value, float) else value
                      for value in wide[name].astype(object)]  # fmt: skip
    return f"Avg (%), {study.seeds()}, 95 % intervals, seeds and problems crossed.\n\n{markdown(wide.astype(str))}\n"


def _by_method(means: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(method, means[means["method"] == method]) for method in in_order(means["method"])]


# The figure's name → its study, and how it is drawn.
STUDY_OF = {"4a": "data", "4c": "grid", "ten": "ten", "own-labels": "own-labels"}
FIGURES: dict[str, Callable[[Path], Figure]] = {
    "4a": figure4a,
    "4c": figure4c,
    **{name: partial(course, name=name) for name in ("ten", "own-labels")},
}

"""Figures of studies: results/<preset>/studies/<name>.csv, each made by `make study STUDY=<name>`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tspin.errors import UserError

from . import reading as load
from .curves import SPREAD
from .figures import BASE_X
from .style import COLUMN_WIDTH, METHODS, RC
from .tables import grid

KEYS = {"method", "seed", "iteration", "avg", "avg_se"}
SEQUENCE = ["#440154", "#31688E", "#35B779", "#B5DE2B"]  # settings in order: dark to light, apart without colour too
MARKERS = "osv^"


class Panels(NamedTuple):
    """A study drawn by iteration: a panel a method and a line a setting, or (no setting) one panel, a line a method."""

    setting: str | None
    legend: str
    names: dict[Any, str] = {}


STUDIES = {
    "base": Panels("path", "Initial policy", {"runs/pocket-bases/weak": "weak", "pocket": "as shipped",
                                              "runs/pocket-bases/strong": "strong"}),
    "decoding": Panels("temperature", "Decoding of y′ and y0", {0.0: "greedy", 0.7: "temperature 0.7",
                                                                1.0: "temperature 1"}),
    "neighbours": Panels(None, ""),
    "scale": Panels("alpha", "Scale of the reward: λ of SPIN, α of T-SPIN", {0.1: "0.1", 1.0: "1"}),
    "ten": Panels(None, ""),
}  # fmt: skip


def study(name: str, preset: str, results: Path = Path("results")) -> pd.DataFrame:
    """A study's table: its settings' columns, then method, seed, iteration, avg, avg_se (percent). Raises UserError."""
    path = results / preset / "studies" / f"{name}.csv"
    if not path.is_file():
        raise UserError(f"{path}: not run; make it with: make study STUDY={name}")
    table = pd.read_csv(path)
    if absent := KEYS - set(table):
        raise UserError(f"{path}: lacks the columns {', '.join(sorted(absent))}; make it with: make study STUDY={name}")
    return table


def averaged(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Over seeds: keys, avg, half (half of a 95 % interval, percent), seeds.

    The seeds answer the same problems, so the problems' standard error does not shrink with their number; the spread
    between seeds, where there are several, comes on top.
    """
    found = table.groupby(keys, dropna=False).agg(
        avg=("avg", "mean"), problems=("avg_se", "mean"), spread=("avg", "var"), seeds=("seed", "nunique")
    )
    variance = found["problems"] ** 2 + found["spread"].fillna(0) / found["seeds"]
    return found.assign(half=1.96 * variance**0.5)[["avg", "half", "seeds"]].reset_index()


def figure4a(preset: str, results: Path = Path("results")) -> Figure:
    """Avg against the number of labels, T-SPIN after its last iteration and SFT; the paper's points below."""
    table = study("data", preset, results)
    own = table[table["iteration"].isna() | (table["iteration"] == table["iteration"].max())]
    means, last = averaged(own, ["method", "labels"]), int(table["iteration"].max())
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(COLUMN_WIDTH, 3.6), layout="constrained")
        ours, paper = figure.subplots(2, 1, height_ratios=[3, 2])
        for method, rows in _by_method(means):
            look = METHODS[method]
            _line(ours, rows["labels"], rows, look.label, look.colour, look.marker)
        for method, rows in _by_method(pd.read_csv(load.PAPER / "figure4a_data_efficiency.csv")):
            look = METHODS[method]
            paper.plot(rows["labels"], rows["avg"], "--", color=look.colour, marker=look.marker, linewidth=0.9)
        ours.set_title(f"Ours ({preset}): T-SPIN after iteration {last}, {_seeds(table)}", loc="left")
        paper.set_title("The paper's (Zephyr-7B; the points it states)", loc="left")
        for axes in (ours, paper):
            axes.set(xscale="log", ylabel="Avg (%)")
            axes.minorticks_off()
        ours.set_xticks(sorted(means["labels"].unique()), [f"{n:,}" for n in sorted(means["labels"].unique())])
        paper.set_xticks([50_000, 200_000], ["50k", "200k"])
        paper.set_xlabel("Labels")
        ours.legend(frameon=False)
        return figure


def figure4c(preset: str, results: Path = Path("results")) -> Figure:
    """The α × β grid of T-SPIN: Avg at iteration 1, the mean over seeds."""
    table = study("grid", preset, results)
    table = table[table["iteration"] == 1]
    cells = table.pivot_table(index="alpha", columns="beta", values="avg").sort_index(ascending=False)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(COLUMN_WIDTH, 2.7), layout="constrained")
        axes = figure.subplots()
        seaborn.heatmap(cells, ax=axes, annot=True, fmt=".1f", cmap="viridis", linewidths=1,
                        cbar_kws={"label": "Avg at iteration 1 (%)"})  # fmt: skip
        axes.set_title(f"T-SPIN ({preset}), {_seeds(table)}; ± {1.96 * table['avg_se'].mean():.1f} a cell", loc="left")
        axes.set(xlabel="β", ylabel="α")
        return figure


def by_iteration(name: str, preset: str, results: Path = Path("results")) -> Figure:
    """A study of STUDIES: Avg against the iteration, with 95 % intervals over problems and seeds."""
    table, panels = study(name, preset, results), STUDIES[name]
    means = averaged(table, ["method", "iteration", *([panels.setting] if panels.setting else [])])
    base, means = means[means["method"] == "base"].assign(iteration=BASE_X), means[means["method"] != "base"]
    with matplotlib.rc_context(RC):
        if panels.setting is None:
            figure = Figure(figsize=(COLUMN_WIDTH, 2.7), layout="constrained")
            axes = figure.subplots()
            found = _by_method(means)
            for (method, rows), shift in zip(found, _dodge(len(found)), strict=True):
                look = METHODS[method]
                _line(axes, rows["iteration"] + shift, rows, look.label, look.colour, look.marker)
            axes.set_title(f"{preset}, {_seeds(table)}", loc="left")
            first, all_axes = axes, [axes]
        else:
            methods = _by_method(means)
            figure = Figure(figsize=(COLUMN_WIDTH * len(methods) * 0.9, 2.8), layout="constrained")
            all_axes = list(figure.subplots(1, len(methods), sharey=True, squeeze=False)[0])
            for axes, (method, rows) in zip(all_axes, methods, strict=True):
                settings = _settings(rows, panels)
                looks = zip(settings, SEQUENCE, MARKERS, _dodge(len(settings)), strict=False)
                for (value, label), colour, marker, shift in looks:
                    both = pd.concat([base, rows])
                    own = both[both[panels.setting] == value]
                    _line(axes, own["iteration"] + shift, own, label, colour, marker)
                axes.set_title(f"{METHODS[method].label} ({preset}), {_seeds(table)}", loc="left")
            first = all_axes[0]
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, title=panels.legend or None, loc="outside upper center",
                      ncols=min(3, len(labels)), frameon=False)  # fmt: skip
        for axes in all_axes:
            axes.set_xlabel("Iteration")
            shown = list(range(int(means["iteration"].max()) + 1))
            axes.set_xticks([BASE_X] * bool(len(base)) + shown, ["base"] * bool(len(base)) + list(map(str, shown)))
        first.set_ylabel("Avg (%)")
        return figure


def markdown(name: str, preset: str, results: Path = Path("results")) -> str:
    """A study as Markdown: a row a method and setting, a column an iteration, mean ± half of a 95 % interval."""
    table = study(name, preset, results)
    settings = [str(column) for column in table if column not in KEYS]
    means = averaged(table, ["method", *settings, "iteration"])
    means["cell"] = [f"{row['avg']:.1f} ± {row['half']:.1f}" for row in load.records(means)]
    means["iteration"] = ["after" if pd.isna(t) else f"iteration {int(t)}" for t in means["iteration"]]
    order = sorted(means["iteration"].unique(), key=lambda text: (text != "after", len(text), text))
    wide = means.pivot(index=["method", *settings], columns="iteration", values="cell")[order]
    rows = wide.fillna("").reset_index()
    rows["method"] = [METHODS[str(method)].label for method in rows["method"]]
    return f"Avg (%), {_seeds(table)}, 95 % intervals over problems and seeds.\n\n{grid(rows.astype(str))}\n"


def _by_method(means: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    present = [method for method in METHODS if method in set(means["method"])]
    return [(method, means[means["method"] == method]) for method in present]


def _settings(rows: pd.DataFrame, panels: Panels) -> list[tuple[Any, str]]:
    found = set(rows[panels.setting or ""])
    named = [(value, name) for value, name in panels.names.items() if value in found]
    return named + [(value, str(value)) for value in sorted(found - set(panels.names))]


def _dodge(count: int) -> list[float]:
    """Steps aside, so that lines of the same iteration do not hide each other's intervals."""
    return [(position - (count - 1) / 2) * SPREAD for position in range(count)]


def _line(axes: Axes, x: pd.Series, rows: pd.DataFrame, label: str, colour: str, marker: str) -> None:
    axes.errorbar(x.astype(float), rows["avg"], rows["half"], label=label, color=colour, marker=marker, elinewidth=0.9,
                  capsize=2)  # fmt: skip


def _seeds(table: pd.DataFrame) -> str:
    count = table["seed"].nunique()
    return f"{count} seed{'s' * (count > 1)}"


# What `tspin figure` draws from here: the figure's name → (the study, how it is drawn).
Draw = Callable[[str, Path], Figure]
FIGURES: dict[str, tuple[str, Draw]] = {
    "4a": ("data", figure4a),
    "4c": ("grid", figure4c),
    **{name: (name, partial(by_iteration, name)) for name in STUDIES},
}

"""Figures 3 and 7: rewards and log-likelihoods of y and y′ during training, and where the two disagree."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tspin.errors import UserError
from tspin.schema import LABELLED, RUN, SYNTHETIC, gaps

from .drawing import contrast_texts, new_figure, put_legend, put_note
from .intervals import none_of, of_seeds
from .reading import read_table
from .style import look
from .writing import counted, seeds_in_words

PAIR = ("spin", "tspin")
ROLES = {LABELLED: ("y (labelled)", "-"), SYNTHETIC: ("y′ (synthetic)", "--")}
SIGNS = {1.0: "> 0", 0.0: "= 0", -1.0: "< 0"}
SMOOTHED = 5  # steps in a running mean: each step sees a batch of its own


def read_steps(folder: Path) -> pd.DataFrame:
    """`steps.parquet` of SPIN and T-SPIN, each curve a running mean, with the gap of log π(y) over log π(y′).

    Raises UserError if it is missing, or holds neither method.
    """
    table = read_table(folder, "steps")
    table = table[table["method"].isin(PAIR)].sort_values([*RUN, "step"])
    if table.empty:
        methods = ",".join(PAIR)
        raise UserError(f"no steps of {' or '.join(PAIR)}: tspin run --preset {folder.name} --methods {methods}")
    curves = [f"{kind}/{role}" for kind in ("reward", "log_likelihood") for role in ROLES]
    table[curves] = running_means(table, curves, RUN)
    return with_gap(table)


def running_means(table: pd.DataFrame, columns: list[str], keys: list[str]) -> pd.DataFrame:
    """Running means over SMOOTHED steps of a step log's columns, those of each run (`keys`) by themselves."""
    return table.groupby(keys)[columns].transform(lambda curve: curve.rolling(SMOOTHED, 1, center=True).mean())


def with_gap(steps: pd.DataFrame) -> pd.DataFrame:
    """A step log with `gap`, log π(y) − log π(y′) in nats."""
    return steps.assign(gap=steps[f"log_likelihood/{LABELLED}"] - steps[f"log_likelihood/{SYNTHETIC}"])


def sign_shares(folder: Path, iteration: int = 1) -> pd.DataFrame:
    """Share of the prompts by sign of both gaps after an iteration.

    Columns: method, reward, log_likelihood (±1, 0), share (the mean over seeds), prompts (those of a seed).

    Raises UserError where the diagnostics are missing, or neither method has that iteration.
    """
    table = read_table(folder, "diagnostics")
    table = gaps(table[table["method"].isin(PAIR) & (table["iteration"] == iteration)])
    if table.empty:
        raise UserError(f"no samples of iteration {iteration} in {folder}; figure 3 is drawn there")
    signs = table.assign(reward=np.sign(table["reward"]), log_likelihood=np.sign(table["log_likelihood"]))
    counts = signs.groupby(["method", "seed"])[["reward", "log_likelihood"]].value_counts(normalize=True)
    seeds = signs.groupby("method")["seed"].nunique()
    shares = counts.groupby(["method", "reward", "log_likelihood"]).sum().rename("share").reset_index()
    prompts = signs.groupby(["method", "seed"]).size().groupby("method").min()
    return shares.assign(share=shares["share"] / shares["method"].map(seeds), prompts=shares["method"].map(prompts))


def figure3(folder: Path, iteration: int = 1) -> Figure:
    """Figure 3 at an iteration: a column per method; log-likelihoods, rewards, joint signs.

    A method without that iteration has a column that says so. Raises UserError where neither has it.
    """
    table, shares = read_steps(folder), sign_shares(folder, iteration)
    table = table[table["iteration"] == iteration]
    if table.empty:
        raise UserError(f"no steps of iteration {iteration} in {folder}; figure 3 is drawn there")
    with new_figure(1.15, 5.9) as figure:
        panels = figure.subplots(3, 2, height_ratios=[1, 1, 1.1])
        panels[0, 0].sharey(panels[0, 1])  # the same quantity; rewards are not
        for column, method in zip(panels.T, PAIR, strict=True):
            steps, name = table[table["method"] == method], look(method).label
            if steps.empty:
                _say_absent(column, method, iteration)
                continue
            _draw_roles(column[0], steps, "log_likelihood", method)
            _draw_roles(column[1], steps, "reward", method)
            _draw_signs(column[2], shares[shares["method"] == method])
            for axes, title in zip(column, ("log π, nats", "reward", "share of prompts"), strict=True):
                axes.set_title(f"{name}: {title}", loc="left")
            column[1].set_xlabel(f"Step of iteration {iteration}")
        put_legend(figure, panels.flat)
        prompts = counted(shares["prompts"])
        put_note(figure, f"{folder.name}. {_smoothing(table)} Shares: of {prompts} prompts a seed after training, "
                         "means over seeds; of none the upper end of Wilson's 95 % interval. T-SPIN's reward is "
                         "α log π: its signs agree by definition.")  # fmt: skip
        return figure


def figure7(folder: Path, iterations: tuple[int, ...] = (0, 1, 2)) -> Figure:
    """Figure 7: log-likelihoods of y and y′ by step, and their gap; a column per iteration.

    Where a method lacks an iteration, its panel says so.
    """
    table = read_steps(folder)
    with new_figure(1.4, 5.4) as figure:
        panels = figure.subplots(3, len(iterations), sharey="row", squeeze=False)
        panels[0, 0].sharey(panels[1, 0])
        for column, iteration in zip(panels.T, iterations, strict=True):
            steps = {method: table[(table["iteration"] == iteration) & (table["method"] == method)] for method in PAIR}
            for axes, method in zip(column, PAIR, strict=False):
                if steps[method].empty:
                    _say_absent([axes], method, iteration)
                    continue
                _draw_roles(axes, steps[method], "log_likelihood", method)
                axes.set_title(f"{look(method).label}, iteration {iteration}", loc="left", fontsize=7.5)
            for method in PAIR:
                if len(steps[method]):
                    _draw_band(column[2], steps[method], "gap", look(method).colour, "-", look(method).label)
            column[2].axhline(0, color="black", linewidth=0.6)
            column[2].set_title(f"gap, iteration {iteration}", loc="left", fontsize=7.5)
            column[2].set_xlabel("Step")
        for axes, label in zip(panels[:, 0], ("log π (nats)", "log π (nats)", "log π(y) − log π(y′)"), strict=True):
            axes.set_ylabel(label)
        put_legend(figure, panels.flat)
        put_note(figure, f"{folder.name}. {_smoothing(table)}")
        return figure


def _smoothing(steps: pd.DataFrame) -> str:
    """How curves over steps are made, in words."""
    count = seeds_in_words(steps.groupby("method")["seed"].nunique())
    seeds = f"means and 95 % t intervals over {count}" if count != "1 seed" else "1 seed, its spread unknown"
    return f"Curves: running mean of {SMOOTHED} steps, {seeds}."


def _say_absent(row: Iterable[Axes], method: str, iteration: int) -> None:
    for axes in row:
        axes.set_axis_off()
        text = f"{look(method).label}:\niteration {iteration} was not run"
        axes.text(0.5, 0.5, text, ha="center", va="center", color="#666666", transform=axes.transAxes)


def _draw_roles(axes: Axes, steps: pd.DataFrame, kind: str, method: str) -> None:
    for role, (label, line) in ROLES.items():
        _draw_band(axes, steps, f"{kind}/{role}", look(method).colour, line, None)
        axes.plot([], [], color="#444444", linestyle=line, linewidth=1.2, label=label)  # the legend's, of no method


def _draw_band(axes: Axes, steps: pd.DataFrame, column: str, colour: str, line: str, label: str | None) -> None:
    """The mean over seeds and its 95 % interval (Student's t over seeds; of one seed, none)."""
    by_step = steps.groupby("step")[column]
    axes.plot(by_step.mean(), color=colour, linestyle=line, label=label, linewidth=1.2)
    if steps["seed"].nunique() > 1:
        found = by_step.agg(of_seeds)
        axes.fill_between(found.index, [mean.low for mean in found], [mean.high for mean in found], color=colour,
                          alpha=0.2, linewidth=0)  # fmt: skip
    axes.set(xlabel="", ylabel="")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _draw_signs(axes: Axes, shares: pd.DataFrame) -> None:
    """A heat map of shares: reward gap against log-likelihood gap, each below, at or above zero."""
    import seaborn

    table = shares.pivot(index="log_likelihood", columns="reward", values="share")
    table = table.reindex(index=list(SIGNS), columns=list(reversed(SIGNS))).fillna(0.0)
    most = none_of(int(shares["prompts"].min()))
    texts = table.map(lambda share: f"{share:.1%}" if share else f"0%\n(< {most:.1%})")
    names = list(SIGNS.values())
    seaborn.heatmap(table, ax=axes, annot=texts, fmt="", cmap="Blues", cbar=False, vmin=0, vmax=1, linewidths=1,
                    xticklabels=names[::-1], yticklabels=names, annot_kws={"fontsize": 6.5})  # fmt: skip
    contrast_texts(axes)
    axes.set(xlabel="Reward gap", ylabel="Log-likelihood gap")
    axes.tick_params(length=0)


FIGURES: dict[str, Callable[[Path], Figure]] = {"3": figure3, "7": figure7}

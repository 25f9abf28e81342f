"""Figures 3 and 7: rewards and log-likelihoods of y and y′ during training, and where the two disagree."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tspin.errors import UserError

from . import reading as load
from .style import COLUMN_WIDTH, METHODS, RC

PAIR = ("spin", "tspin")
ROLES = {"labelled": ("y (labelled)", "-"), "synthetic": ("y′ (synthetic)", "--")}
SMOOTHED = 5  # steps in a running mean: each step sees a batch of its own


def steps(preset: str, results: Path = Path("results")) -> pd.DataFrame:
    """steps.parquet of SPIN and T-SPIN, each curve a running mean over SMOOTHED steps, with the gap of y over y′.

    Raises UserError if it is missing, or holds neither method.
    """
    table = load.parquet("steps", preset, results)
    table = table[table["method"].isin(PAIR)].sort_values(["method", "seed", "iteration", "step"])
    if table.empty:
        raise UserError(f"no steps of {' or '.join(PAIR)}: tspin run --preset {preset} --methods {','.join(PAIR)}")
    kinds = [f"{kind}/{role}" for kind in ("reward", "log_likelihood") for role in ROLES]
    runs = table.groupby(["method", "seed", "iteration"])[kinds]
    table[kinds] = runs.transform(lambda curve: curve.rolling(SMOOTHED, min_periods=1, center=True).mean())
    table["gap"] = table["log_likelihood/labelled"] - table["log_likelihood/synthetic"]
    return table


def sign_shares(preset: str, results: Path = Path("results"), iteration: int = 1) -> pd.DataFrame:
    """Share of the prompts by sign of both gaps after an iteration: method, reward, log_likelihood (±1, 0), share.

    The mean over seeds. Raises UserError where the diagnostics are missing, or neither method has that iteration.
    """
    table = load.parquet("diagnostics", preset, results)
    table = table[table["method"].isin(PAIR) & (table["iteration"] == iteration)]
    if table.empty:
        raise UserError(f"no samples of iteration {iteration} in {results / preset}; figure 3 is drawn there")
    wide = table.pivot(index=["method", "seed", "prompt_id"], columns="role", values=["reward_after", "after"])
    signs = pd.DataFrame(
        {
            "reward": np.sign(wide["reward_after", "labelled"] - wide["reward_after", "synthetic"]),
            "log_likelihood": np.sign(wide["after", "labelled"] - wide["after", "synthetic"]),
        }
    ).reset_index()
    counts = signs.groupby(["method", "seed"])[["reward", "log_likelihood"]].value_counts(normalize=True)
    seeds = signs.groupby("method")["seed"].nunique()
    shares = counts.groupby(["method", "reward", "log_likelihood"]).sum().rename("share").reset_index()
    return shares.assign(share=shares["share"] / shares["method"].map(seeds))


def figure3(preset: str, results: Path = Path("results"), iteration: int = 1) -> Figure:
    """Figure 3 at an iteration: a row a method; rewards, log-likelihoods, joint signs.

    A method without that iteration has a row that says so. Raises UserError where neither has it.
    """
    table, shares = steps(preset, results), sign_shares(preset, results, iteration)
    table = table[table["iteration"] == iteration]
    if table.empty:
        raise UserError(f"no steps of iteration {iteration} in {results / preset}; figure 3 is drawn there")
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(2 * COLUMN_WIDTH, 3.9), layout="constrained")
        panels = figure.subplots(2, 3, width_ratios=[1.2, 1.2, 1])
        for row, method in zip(panels, PAIR, strict=True):
            own = table[table["method"] == method]
            if own.empty:
                _absent(row, method, iteration)
                continue
            _roles(row[0], own, "reward", method)
            row[0].set_ylabel("Reward")
            _roles(row[1], own, "log_likelihood", method)
            row[1].set_ylabel("Log-likelihood (nats)")
            _signs(row[2], shares[shares["method"] == method])
            row[0].set_title(f"{METHODS[method].label}: rewards", loc="left")
            row[1].set_title("log-likelihoods", loc="left")
            row[2].set_title("share of prompts", loc="left")
        drawn = [row for row, method in zip(panels, PAIR, strict=True) if method in set(table["method"])]
        drawn[0][0].legend(frameon=False)
        for axes in drawn[-1][:2]:
            axes.set_xlabel(f"Step of iteration {iteration}")
        return figure


def figure7(preset: str, results: Path = Path("results"), iterations: tuple[int, ...] = (0, 1, 2)) -> Figure:
    """Figure 7: log-likelihoods of y and y′ by step, and their gap; a column an iteration.

    Where a method lacks an iteration, its panel says so.
    """
    table = steps(preset, results)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(2 * COLUMN_WIDTH, 4.8), layout="constrained")
        panels = figure.subplots(3, len(iterations), sharey="row", squeeze=False)
        for column, iteration in zip(panels.T, iterations, strict=True):
            now = table[table["iteration"] == iteration]
            for axes, method in zip(column, PAIR, strict=False):
                own = now[now["method"] == method]
                if own.empty:
                    _absent([axes], method, iteration)
                    continue
                _roles(axes, own, "log_likelihood", method)
                axes.set_title(f"{METHODS[method].label}, iteration {iteration}", loc="left")
            for name, own in now.groupby("method"):
                style = METHODS[str(name)]
                _band(column[2], own, "gap", style.colour, "-", style.label)
            column[2].axhline(0, color="black", linewidth=0.6)
            column[2].set_title(f"gap, iteration {iteration}", loc="left")
            column[2].set_xlabel("Step")
        for axes, label in zip(panels[:, 0], ("log π (nats)", "log π (nats)", "log π(y) − log π(y′)"), strict=True):
            axes.set_ylabel(label)
        for axes in (panels[0, 0], panels[2, 0]):
            if axes.lines:
                axes.legend(frameon=False)
        return figure


def _absent(row: Iterable[Axes], method: str, iteration: int) -> None:
    for axes in row:
        axes.set_axis_off()
        text = f"{METHODS[method].label}:\niteration {iteration} was not run"
        axes.text(0.5, 0.5, text, ha="center", va="center", color="#666666", transform=axes.transAxes)


def _roles(axes: Axes, table: pd.DataFrame, kind: str, method: str) -> None:
    for role, (label, line) in ROLES.items():
        _band(axes, table, f"{kind}/{role}", METHODS[method].colour, line, label)


def _band(axes: Axes, table: pd.DataFrame, column: str, colour: str, line: str, label: str) -> None:
    """The mean over seeds and its 95 % interval (bootstrap over seeds, seaborn's)."""
    many = table["seed"].nunique() > 1
    seaborn.lineplot(table, x="step", y=column, ax=axes, color=colour, linestyle=line, label=label, legend=False,
                     errorbar=("ci", 95) if many else None, seed=0, linewidth=1.2)  # fmt: skip
    axes.set(xlabel="", ylabel="")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _signs(axes: Axes, shares: pd.DataFrame) -> None:
    """A heat map of shares: reward gap against log-likelihood gap, each below, at or above zero."""
    signs = [1.0, 0.0, -1.0]
    table = shares.pivot(index="log_likelihood", columns="reward", values="share")
    table = table.reindex(index=signs, columns=signs[::-1]).fillna(0.0)
    names: dict[Any, str] = {1.0: "> 0", 0.0: "= 0", -1.0: "< 0"}
    seaborn.heatmap(table, ax=axes, annot=True, fmt=".0%", cmap="Blues", cbar=False, vmin=0, vmax=1, linewidths=1,
                    xticklabels=[names[s] for s in table.columns], yticklabels=[names[s] for s in table.index],
                    annot_kws={"fontsize": 8})  # fmt: skip
    axes.set(xlabel="Reward gap", ylabel="Log-likelihood gap")
    axes.tick_params(length=0)

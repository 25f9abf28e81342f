"""The entropy curve: how many nats y′ have under the policy that they were drawn from, by iteration."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from tspin.errors import UserError
from tspin.schema import RUN, SYNTHETIC

from .drawing import beside, draw_means, label_iterations, new_figure, put_legend, put_note
from .evidence import decoding
from .intervals import Estimate, of_seeds
from .reading import read_settings, read_table
from .style import in_order, look
from .writing import counted, seeds_in_words

UNITS = {"nats": "nats a response", "nats_per_token": "nats a token"}


def nats(diagnostics: pd.DataFrame) -> pd.DataFrame:
    """−log π_θt(y′) by run and iteration: nats (the mean over prompts), nats_per_token (all over all tokens), prompts.

    Of y′ drawn at temperature 1 (top-p 1) it is the policy's entropy, by Monte Carlo. diagnostics: tspin.schema's, with
    those columns of RUN that tell its runs apart.
    """
    keys = [name for name in RUN if name in diagnostics]
    drawn = diagnostics[(diagnostics["role"] == SYNTHETIC) & diagnostics["iteration"].notna()]
    drawn = drawn.assign(tokens=drawn["tokens"].clip(lower=1).astype(int), before=drawn["before"].astype(float))
    sums = drawn.groupby(keys)[["before", "tokens"]].sum().assign(prompts=drawn.groupby(keys).size())
    sums = sums.assign(nats=-sums["before"] / sums["prompts"], nats_per_token=-sums["before"] / sums["tokens"])
    return sums[["nats", "nats_per_token", "prompts"]].reset_index()


def by_iteration(rows: pd.DataFrame, column: str) -> dict[int, Estimate]:
    """The mean over seeds of a column at each iteration, with its t interval."""
    there = rows.dropna(subset=["iteration", column])
    iterations = sorted(there["iteration"].astype(int).unique().tolist())
    return {t: of_seeds(there.loc[there["iteration"] == t, column]) for t in iterations}


def figure(folder: Path) -> Figure:
    """Per response and per token, methods by colour, with t intervals over seeds. Raises UserError without any y′."""
    table = nats(read_table(folder, "diagnostics"))
    if table.empty:
        raise UserError(f"no responses of self-play in {folder}: tspin run --preset {folder.name}")
    methods = in_order(table["method"])
    with new_figure(1, 3.9) as drawing:
        panels = drawing.subplots(2, 1, sharex=True)
        for axes, (column, unit) in zip(panels, UNITS.items(), strict=True):
            for method, shift in zip(methods, beside(len(methods), 0.06), strict=True):
                found = by_iteration(table[table["method"] == method], column)
                bars = [each.half if each.seeds > 1 else 0 for each in found.values()]
                draw_means(axes, [t + shift for t in found], [each.mean for each in found.values()], bars, look(method))
            axes.set_ylabel(unit)
        label_iterations(panels[-1], range(int(table["iteration"].max()) + 1), base=False)
        panels[-1].set_xlabel("Iteration that y′ was drawn for")
        put_legend(drawing, panels, columns=2)
        seeds = seeds_in_words(table.groupby("method")["seed"].nunique())
        intervals = f"{seeds}, 95 % t intervals over them" if seeds != "1 seed" else "1 seed, its spread unknown"
        prompts = counted(table["prompts"])
        put_note(drawing, f"Mean −log π(y′) under the policy that y′ is from ({folder.name}): {prompts} prompts, "
                          f"{intervals}. {decoding(read_settings(folder))}")  # fmt: skip
        return drawing


FIGURES: dict[str, Callable[[Path], Figure]] = {"entropy": figure}

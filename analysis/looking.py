"""Pictures of runs for notebooks: of any tspin_analysis.runs.Run, whatever it is from."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tspin.errors import UserError

from .dynamics import SMOOTHED, running_means
from .inspector import COLOURS, benchmarks, scored_iterations
from .runs import Run
from .samples import spread_over
from .style import look

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as Interactive

FULL = {"before": 8.0, "after": 8.0, "change": 1.0}  # nats at which a token has the full colour
FALL, RISE = "213, 94, 0", "0, 114, 178"
DOTS = 400
SHOWN = ["prompt_id", "prompt", "labelled", "synthetic", "reward", "log_likelihood", "length_difference", "misaligned"]


def gap_figure(run: Run) -> "Interactive":
    """Reward gap against log-likelihood gap, a dot a prompt, with a slider for the iteration (Plotly).

    In the shaded corner y has the higher reward and y′ the higher likelihood. Colour: tokens of y minus those of y′. Of
    many prompts DOTS are drawn, evenly spread: a notebook keeps them all in its file.
    """
    from plotly import express

    numbers = np.sort(run.samples()["prompt_id"].unique())
    drawn = numbers[spread_over(len(numbers), DOTS)]
    rows = run.samples().query("prompt_id in @drawn")
    rows = rows.assign(start=rows["prompt"].fillna("").astype(str).str.strip().str[:50].map(escape))
    ends = {
        name: (low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
        for name in ("log_likelihood", "reward")
        for low, high in [(min(rows[name].min(), 0), max(rows[name].max(), 0))]
    }
    figure = express.scatter(
        rows.round({"log_likelihood": 3, "reward": 5}), x="log_likelihood", y="reward", color="length_difference",
        animation_frame="iteration", hover_name="start", range_x=ends["log_likelihood"], range_y=ends["reward"],
        color_continuous_scale=["#2166ac", "#9a9a9a", "#b2182b"], color_continuous_midpoint=0,
        labels={"log_likelihood": "log π(y) − log π(y′), nats", "reward": "reward of y minus that of y′",
                "length_difference": "tokens<br>y − y′"},
    )  # fmt: skip
    figure.add_shape(type="rect", x0=ends["log_likelihood"][0], x1=0, y0=0, y1=ends["reward"][1], line_width=0,
                     fillcolor=f"rgba({FALL}, 0.12)", layer="below")  # fmt: skip
    figure.update_layout(modebar_remove=["sendChartToCloud", "sendDataToCloud"])  # its texts are nobody else's
    figure.update_layout(height=480, title=f"{run.method}: rewards against likelihoods, {len(drawn)} prompts")
    return figure


def step_figure(run: Run) -> "Figure":
    """log π of y and of y′ by training step, all iterations in a row; running means, over the seeds."""
    from matplotlib.figure import Figure

    if run.steps.empty:
        raise UserError(f"{run.name}: no steps were logged, there is nothing to draw over them")
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    names = {"log_likelihood/labelled": "y", "log_likelihood/synthetic": "y′"}
    columns = [name for name in names if name in run.steps]
    keys = [name for name in ("seed", "iteration") if name in run.steps]
    steps = run.steps.sort_values([*keys, "step"])
    steps[columns] = running_means(steps, columns, keys)
    means = steps.groupby(["iteration", "step"])[columns].mean().reset_index()
    for name, line in zip(columns, ("-", "--"), strict=False):
        axes.plot(means.index, means[name], line, color=look(run.method).colour, label=names[name])
    for start in means.index[means["iteration"].diff() > 0]:
        axes.axvline(start - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.set(xlabel="step (lines: iterations)", ylabel="log π, nats",
             title=f"{run.method}: running mean of {SMOOTHED} steps")  # fmt: skip
    axes.legend(frameon=False)
    return figure


def course_figure(runs: Sequence[Run]) -> "Figure":
    """Averages, misaligned share, entropy and length of y′ by iteration, a line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    curves = {
        "average over benchmarks": Run.average,
        "misaligned, share of prompts": Run.misaligned,
        "entropy: −log π(y′), nats": Run.entropy,
        "length of y′, tokens": Run.length,
    }
    alike = len({run.method for run in runs}) < len(runs)
    for axes, (title, curve) in zip(figure.subplots(2, 2).flat, curves.items(), strict=True):
        for number, run in enumerate(runs):
            values = curve(run)
            colour = COLOURS[number % len(COLOURS)] if alike else look(run.method).colour
            axes.plot(values.index.to_numpy(), values.to_numpy(float), color=colour,
                      marker=look(run.method).marker, label=run.name if alike else run.method)  # fmt: skip
        axes.set(title=title, xlabel="iteration")
        axes.locator_params(axis="x", integer=True)
    figure.axes[0].legend(frameon=False)
    return figure


def benchmark_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A row per benchmark, a column per iteration: of two runs B − A with its 95 % interval, of one its score."""
    rows = benchmarks(runs)
    return pd.DataFrame(
        {t: [f"{row['cells'][i]['main']} {row['cells'][i]['interval']}".strip() for row in rows]
         for i, t in enumerate(scored_iterations(runs))},
        index=[row["label"] for row in rows],
    )  # fmt: skip


def samples_table(run: Run, iteration: int, rows: int = 15) -> pd.DataFrame:
    """Samples to read: misaligned ones first, y′ furthest ahead of y at the top."""
    table = run.samples(iteration).sort_values(["misaligned", "log_likelihood"], ascending=[False, True])
    return table[SHOWN].head(rows).set_index("prompt_id")


def tokens_html(run: Run, prompt_id: int, iteration: int | None = None, colour: str = "change") -> str:
    """A prompt's responses as HTML, each token coloured: by `change`, or log π `before` or `after` training.

    Blue rose, orange fell; of log π itself, orange is unlikely. For IPython.display.HTML. Raises UserError where the
    run kept no tokens of this prompt.
    """
    lines = []
    table = run.tokens(prompt_id, iteration)
    for (t, role), tokens in table.groupby(["iteration", "role"], sort=False):
        spans = "".join(
            f'<span style="background: {shade(value, FULL[colour])}" title="{value:+.2f} nats">{escape(token)}</span>'
            for token, value in zip(tokens["token"], tokens[colour], strict=True)
        )
        lines.append(
            f"<tr><td>{t}</td><td>{role}</td><td style='text-align: left; white-space: pre-wrap'>{spans}</td></tr>"
        )
    return f"<table><tr><th>iteration</th><th></th><th>{escape(colour)}, nats</th></tr>{''.join(lines)}</table>"


def shade(value: float, full: float) -> str:
    """A CSS colour, the stronger the further a number of nats is from 0."""
    return f"rgba({FALL if value < 0 else RISE}, {min(abs(value) / full, 1) * 0.75:.2f})"

"""`tspin compare`: two runs side by side, as one self-contained HTML page and a terminal table."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .dynamics import running_means, with_gap
from .runs import Run
from .style import MISSING, RC
from .writing import number

COLOURS = ("#D55E00", "#0072B2")  # A and B, whatever their methods
PROMPTS = 10
GIB = 2**30


def summary(first: Run, second: Run) -> pd.DataFrame:
    """What to know first, as texts: columns "", A and B."""
    columns = [{"method": run.method, **facts(run, sign(first, second))} for run in (first, second)]
    return pd.DataFrame([{"": name, "A": columns[0][name], "B": columns[1][name]} for name in columns[0]])


def sign(first: Run, second: Run) -> str:
    """What averages are in."""
    return "%" if first.unit == second.unit == "percent" else "of unlike units"


def facts(run: Run, sign: str = "%") -> dict[str, str]:
    """A run in a few texts, by the names that `summary` shows. sign: the average's unit."""
    average, gap, costs = run.average(), run.likelihood_gap(), run.costs
    peak = costs["peak_bytes"].max()
    changes = average.diff().dropna()
    drops = changes[changes < 0]
    return {
        f"Avg after the last iteration, {sign}": number(average.iloc[-1] if len(average) else None),
        "drops between iterations": f"{len(drops)} of {len(changes)}" if len(changes) else MISSING,
        "worst drop, points": number(drops.min()),
        "variance of the change, points²": number(changes.var()),
        "misaligned after iteration 1": number(run.misaligned().get(1), ".1%"),
        "log-likelihood gap at the end, nats": number(gap.iloc[-1] if len(gap) else None, "+.2f"),
        "warnings (after iteration)": _warned(run),
        "time, s": number(costs["seconds"].sum(), ".0f"),
        "training tokens": number(costs["tokens"].sum(), ",.0f"),
        "peak memory, GiB": number(peak / GIB if pd.notna(peak) else None),
    }


def _warned(run: Run) -> str:
    if run.warnings is None:
        return MISSING
    by_name = run.warnings.sort_values("iteration").groupby("name", sort=False)["iteration"]
    return "; ".join(f"{name} ({', '.join(map(str, numbers))})" for name, numbers in by_name) or "none"


def by_iteration(first: Run, second: Run) -> pd.DataFrame:
    """Scores as texts: a row per iteration and benchmark (Avg first), columns A, B and their difference."""
    scores = [
        {(int(t), "Avg"): average for t, average in zip(run.average().index, run.average(), strict=True)}
        | {(int(row["iteration"]), str(row["label"])): row["value"] for row in run.scores.to_dict("records")}
        for run in (first, second)
    ]
    rows = []
    for t, label in sorted(dict.fromkeys([*scores[0], *scores[1]]), key=lambda cell: cell[0]):
        a, b = (values.get((t, label)) for values in scores)
        change = None if a is None or b is None else b - a
        rows.append((t, label, number(a), number(b), number(change, "+.2f")))
    return pd.DataFrame(rows, columns=["iteration", "benchmark", "A", "B", "B − A"])


def prompts(first: Run, second: Run) -> list[dict[str, Any]]:
    """PROMPTS prompts with both runs' responses at every iteration, those that both have at the most iterations."""
    texts = first.prompts if len(first.prompts) else second.prompts
    if texts.empty or first.responses.empty or second.responses.empty:
        return []
    counts = [run.responses.groupby("prompt_id")["iteration"].nunique() for run in (first, second)]
    both = pd.concat(counts, axis=1, join="inner").min(axis=1)
    chosen = sorted(both[both == both.max()].index)
    chosen = chosen[:: max(len(chosen) // PROMPTS, 1)][:PROMPTS]
    responses = [run.responses.set_index(["prompt_id", "iteration"])["text"].sort_index() for run in (first, second)]
    shown: list[dict[str, Any]] = []
    for prompt in texts[texts["prompt_id"].isin(chosen)].sort_values("prompt_id").to_dict("records"):
        a, b = (drawn.loc[prompt["prompt_id"]] for drawn in responses)
        iterations = sorted({int(t) for t in [*a.index, *b.index] if t >= 0})
        rows = [(t, a.get(t, MISSING), b.get(t, MISSING)) for t in iterations]
        shown.append({**{str(name): value for name, value in prompt.items()}, "rows": rows})
    return shown


def picture(first: Run, second: Run) -> Figure:
    """Avg by iteration, the log-likelihood gap of y over y′ by step, misaligned share and entropy by iteration."""
    figure = Figure(figsize=(4.6, 9.4), layout="constrained")
    average, gap, share, entropy = figure.subplots(4, 1)
    for run, colour, name in zip((first, second), COLOURS, "AB", strict=True):
        label = f"{name}: {run.method}"
        _draw(average, run.average(), colour, label, marker="o")
        if {"log_likelihood/labelled", "log_likelihood/synthetic"} <= set(run.steps):
            steps = with_gap(run.steps.sort_values(["iteration", "step"]))
            _draw(gap, running_means(steps, ["gap"], ["iteration"])["gap"].reset_index(drop=True), colour, label)
        _draw(share, 100 * run.misaligned(), colour, label, marker="o")
        _draw(entropy, run.entropy(), colour, label, marker="o")
    average.set(title="Average over benchmarks", ylabel=sign(first, second), xlabel="Iteration")
    gap.set(title="log π(y) − log π(y′), running mean of 5 steps", ylabel="nats", xlabel="Step, all iterations")
    gap.axhline(0, color="black", linewidth=0.6)
    share.set(title="Misaligned: y has the higher reward, the lower likelihood", ylabel="% of prompts",
              xlabel="Iteration")  # fmt: skip
    entropy.set(title="Entropy: mean −log π(y′) as y′ was drawn", ylabel="nats a response", xlabel="Iteration")
    for axes in (average, share, entropy):
        axes.locator_params(axis="x", integer=True)
    if average.lines:
        average.legend(frameon=False)
    return figure


def page(first: Run, second: Run) -> str:
    """The HTML page; everything that comes from data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    with matplotlib.rc_context({**RC, "svg.fonttype": "path"}):
        drawing = io.StringIO()
        picture(first, second).savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    encoded = base64.b64encode(drawing.getvalue().encode()).decode()
    return environment.get_template("compare.html.j2").render(
        first=first,
        second=second,
        colours=COLOURS,
        picture=f"data:image/svg+xml;base64,{encoded}",
        summary=summary(first, second).to_numpy().tolist(),
        unit=" / ".join(dict.fromkeys((first.unit, second.unit))),
        scores=by_iteration(first, second).to_dict("records"),
        prompts=prompts(first, second),
    )


def _draw(axes: Axes, values: pd.Series, colour: str, label: str, marker: str | None = None) -> None:
    if len(values):
        axes.plot(values.index.to_numpy(), values.to_numpy(float), color=colour, label=label, marker=marker)

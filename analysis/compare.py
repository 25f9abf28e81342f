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

from . import reading as load
from .runs import Run
from .style import MISSING, RC

COLOURS = ("#D55E00", "#0072B2")  # A and B, whatever their methods
PROMPTS = 10
GIB = 2**30


def summary(first: Run, second: Run) -> pd.DataFrame:
    """What to know first, as texts: columns "", A and B."""
    rows = {"method": [first.method, second.method]}
    found = [facts(run) for run in (first, second)]
    rows |= {name: [one[name] for one in found] for name in found[0]}
    return pd.DataFrame([{"": name, "A": a, "B": b} for name, (a, b) in rows.items()])


def facts(run: Run) -> dict[str, str]:
    """A run in a few texts, by the names that `summary` shows."""
    average = run.average()
    changes = average.diff().dropna()
    drops = changes[changes < 0]
    misaligned, costs = run.misaligned(), run.costs
    gap = run.samples.groupby("iteration")["log_likelihood"].mean() if len(run.samples) else pd.Series(dtype=float)
    peak = costs["peak_bytes"].max()
    return {
        "Avg after the last iteration, %": _text(average.iloc[-1] if len(average) else None, ".2f"),
        "drops between iterations": f"{len(drops)} of {len(changes)}" if len(changes) else MISSING,
        "worst drop, points": _text(drops.min() if len(drops) else None, ".2f"),
        "variance of the change, points²": _text(changes.var() if len(changes) > 1 else None, ".2f"),
        "misaligned after iteration 1": _text(misaligned.get(1), ".1%"),
        "log-likelihood gap at the end, nats": _text(gap.iloc[-1] if len(gap) else None, "+.2f"),
        "warnings (after iteration)": _warned(run),
        "time, s": _text(costs["seconds"].sum(), ".0f"),
        "training tokens": _text(costs["tokens"].sum(), ",.0f"),
        "peak memory, GiB": _text(peak / GIB if pd.notna(peak) else None, ".2f"),
    }


def _warned(run: Run) -> str:
    if run.warnings is None:
        return MISSING
    by_name = run.warnings.sort_values("iteration").groupby("name", sort=False)["iteration"]
    return "; ".join(f"{name} ({', '.join(map(str, numbers))})" for name, numbers in by_name) or "none"


def by_iteration(first: Run, second: Run) -> pd.DataFrame:
    """Scores as texts: a row an iteration and benchmark (Avg first), columns A, B and their difference."""
    rows = []
    tables = [run.scores for run in (first, second)]
    for t in sorted({int(t) for run in (first, second) for t in run.average().index}):
        averages = [run.average().get(t) for run in (first, second)]
        rows.append(_row(t, "Avg", *averages))
        own = [table[table["iteration"] == t].set_index("label")["value"] for table in tables if len(table)]
        labels = list(dict.fromkeys(str(label) for one in own for label in one.index))
        rows += [_row(t, label, *(one.get(label) for one in own)) for label in labels if len(own) == 2]
    return pd.DataFrame(rows, columns=["iteration", "benchmark", "A", "B", "B − A"])


def prompts(first: Run, second: Run) -> list[dict[str, Any]]:
    """PROMPTS prompts with both runs' responses at every iteration, those that both have at the most iterations."""
    texts = first.prompts if len(first.prompts) else second.prompts
    if texts.empty or first.responses.empty or second.responses.empty:
        return []
    counts = [run.responses.groupby("prompt_id")["iteration"].nunique() for run in (first, second)]
    both = pd.concat(counts, axis=1).min(axis=1).dropna()
    chosen = sorted(both[both == both.max()].index)
    chosen = chosen[:: max(len(chosen) // PROMPTS, 1)][:PROMPTS]
    shown = []
    for prompt_id in chosen:
        known = texts[texts["prompt_id"] == prompt_id]
        if known.empty:
            continue
        answers = [
            run.responses[run.responses["prompt_id"] == prompt_id].set_index("iteration")["text"]
            for run in (first, second)
        ]
        iterations = sorted({int(t) for one in answers for t in one.index if t >= 0})
        rows = [(t, *(one.get(t, MISSING) for one in answers)) for t in iterations]
        shown.append({**known.iloc[0].to_dict(), "rows": rows})
    return shown


def picture(first: Run, second: Run) -> Figure:
    """Avg by iteration, the log-likelihood gap of y over y′ by step, the misaligned share by iteration."""
    figure = Figure(figsize=(4.6, 7.2), layout="constrained")
    average, gap, share = figure.subplots(3, 1)
    for run, colour, name in zip((first, second), COLOURS, "AB", strict=True):
        label = f"{name}: {run.method}"
        _line(average, run.average(), colour, label, marker="o")
        if {"log_likelihood/labelled", "log_likelihood/synthetic"} <= set(run.steps):
            table = run.steps.sort_values(["iteration", "step"])
            value = table["log_likelihood/labelled"] - table["log_likelihood/synthetic"]
            smooth = value.groupby(table["iteration"]).transform(lambda v: v.rolling(5, 1, center=True).mean())
            _line(gap, smooth.reset_index(drop=True), colour, label)
        _line(share, 100 * run.misaligned(), colour, label, marker="o")
    average.set(title="Average over benchmarks", ylabel="%", xlabel="Iteration")
    gap.set(title="log π(y) − log π(y′), running mean of 5 steps", ylabel="nats", xlabel="Step, all iterations")
    gap.axhline(0, color="black", linewidth=0.6)
    share.set(title="Misaligned: y has the higher reward, the lower likelihood", ylabel="% of prompts",
              xlabel="Iteration")  # fmt: skip
    for axes in (average, share):
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
        scores=by_iteration(first, second).to_dict("records"),
        prompts=prompts(first, second),
    )


def write_page(first: Run, second: Run, out: Path) -> Path:
    """Write the page atomically."""
    return load.write_atomically(out, page(first, second).encode())


def _line(axes: Axes, values: pd.Series, colour: str, label: str, marker: str | None = None) -> None:
    if len(values):
        axes.plot(values.index.to_numpy(), values.to_numpy(float), color=colour, label=label, marker=marker)


def _row(iteration: int, label: str, a: float | None, b: float | None) -> dict[str, Any]:
    difference = None if a is None or b is None else b - a
    return {"iteration": iteration, "benchmark": label, "A": _text(a, ".2f"), "B": _text(b, ".2f"),
            "B − A": _text(difference, "+.2f")}  # fmt: skip


def _text(value: float | None, form: str) -> str:
    return MISSING if value is None or pd.isna(value) else format(value, form)

"""`python -m tspin_analysis.timing`: the table and the picture of results/benchmarks/<device>/, by `make benchmark`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tspin.runs.files import write_text

from .drawing import new_figure
from .writing import markdown, write_figure

REFERENCE = "TRL DPO"
COLOURS = {
    "tspin shared": "#0072B2",
    "tspin padded": "#56B4E9",
    "tspin concatenated": "#009E73",
    "spin shared": "#D55E00",
    "spin padded": "#E69F00",
    "TRL DPO": "#999999",
    "SPIN, live reference": "#000000",
}
# What was asked for before anything was measured: (what, least or most, limit).
TARGETS = {
    "T-SPIN, shared over padded, triplets per second, even mix": ("at least", 1.5),
    "T-SPIN, shared over padded, triplets per second, prompt-heavy mix": ("at least", 2.2),
    "T-SPIN over TRL DPO, time per prompt, even mix": ("at most", 0.3),
    "T-SPIN over TRL DPO, peak memory, same batch": ("at most", 0.6),
    "T-SPIN, time of a token, examples of 4,096 tokens over those of 256": ("at most", 1.8),
    "T-SPIN, rate of its matrix products over the machine's own, even mix": ("at least", 0.5),
    "Eight processes over the ideal (simulated)": ("at least", 0.95),
}
DETAILS = {
    "growth": "Growth of T-SPIN's step (shared prompts)",
    "attention": "Attention of one layer by itself, forward and backward",
    "balance": "A step's triplets over processes, simulated: tokens of the mean process over those of the most loaded",
    "heads": "Log-probabilities of response tokens from hidden states, forward and backward",
    "sampling": "Decoding, pocket model, greedy",
    "profile": "Where a T-SPIN step's processor time goes",
}


def ratios(tables: Mapping[str, pd.DataFrame], model: str) -> dict[str, float]:
    """The ratios of TARGETS, by name; those that were not measured are left out. tables: by their files' names."""
    steps, memory = tables["steps"], tables["memory"]
    of_mix = {mix: rows.set_index("step") for mix, rows in steps[steps["model"] == model].groupby("mix")}
    even, heavy = of_mix["even 1:1"], of_mix["prompt-heavy 4:1"]["seconds"]
    time = even["seconds"]
    peak = memory[memory["model"] == model].set_index("step")["peak_bytes"]
    measured: list[float | None] = [
        time["tspin padded"] / time["tspin shared"],
        heavy["tspin padded"] / heavy["tspin shared"],
        time["tspin shared"] / time[REFERENCE] if REFERENCE in time else None,
        peak["tspin shared"] / peak[REFERENCE] if {"tspin shared", REFERENCE} <= set(peak.index) else None,
        _growth(tables["growth"], model),
        even["share_of_matmul_rate"]["tspin shared"],
        _balance(tables["balance"]) if "balance" in tables else None,
    ]
    return {name: value for name, value in zip(TARGETS, measured, strict=True) if value is not None}


def _growth(growth: pd.DataFrame, model: str) -> float | None:
    lengths = growth[(growth["model"] == model) & (growth["grows"] == "length")].set_index("value")
    seconds = lengths["seconds_per_1000_tokens"]
    return seconds[4096] / seconds[256] if {256, 4096} <= set(lengths.index) else None


def _balance(balance: pd.DataFrame) -> float:
    return float(balance.loc[balance["dealt"].str.contains("ours"), "share_of_ideal"].iloc[0])


def report(folder: Path) -> list[Path]:
    """Write benchmark.md, .png and .svg into a folder of measurements. Returns the paths."""
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    write_text(folder / "benchmark.md", "\n\n".join(_sections(tables, facts)) + "\n")
    return [folder / "benchmark.md", *write_figure(picture(tables["steps"], tables["growth"]), folder / "benchmark")]


def picture(steps: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """Prompts per second by length mix, and the time of a thousand tokens as batch and sequences grow."""
    with new_figure(2, 2.6) as figure:
        bars, lines = figure.subplots(1, 2, width_ratios=[3, 2])
        _draw_speed(bars, steps[steps["model"] == steps["model"].iloc[0]])
        for what, label, marker in (("batch", "triplets in the batch", "o"), ("length", "length, same tokens", "s")):
            rows = growth[growth["grows"] == what]
            lines.plot(rows["value"], rows["seconds_per_1000_tokens"], marker=marker, label=label)
        lines.set_xscale("log", base=2)
        ticks = [4**power for power in range(7)]
        lines.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        lines.set_ylim(bottom=0)
        lines.set_xlabel("Triplets in the batch, or tokens in an example")
        lines.set_ylabel("Seconds per 1,000 tokens")
        lines.set_title("Growth, T-SPIN", loc="left")
        lines.legend(frameon=False)
        return figure


def _draw_speed(axes: Axes, steps: pd.DataFrame) -> None:
    mixes = list(dict.fromkeys(steps["mix"]))
    for position, (name, colour) in enumerate(COLOURS.items()):
        rows = steps[steps["step"] == name].set_index("mix").reindex(mixes)  # some are measured on one mix alone
        x = [mix + (position - 3) * 0.12 for mix in range(len(mixes))]
        axes.bar(x, rows["prompts_per_second"], 0.11, color=colour, label=name)
    axes.set_xticks(range(len(mixes)), [mix.replace(" ", "\n") for mix in mixes])
    axes.set_ylabel("Prompts per second")
    axes.set_title(f"A training step, {steps['model'].iloc[0]}", loc="left")
    axes.legend(frameon=False, ncols=2, fontsize=6.5, handlelength=1)
    axes.set_ylim(top=1.45 * steps["prompts_per_second"].max())


def _sections(tables: dict[str, pd.DataFrame], facts: dict[str, Any]) -> list[str]:
    hardware, steps, memory = facts["hardware"], tables["steps"], tables["memory"]
    on = ", ".join(hardware["accelerators"]) or f"{hardware['cpu']}, {hardware['threads']} threads"
    rate = facts["matmul_flops_per_second"] / 1e12
    sections = [
        "# A training step, timed",
        f"On {on}; {facts.get('arithmetic', 'bfloat16')} throughout, matrix product {rate:.2f} TFLOP/s; commit "
        f"`{facts['commit'][:10]}`, {facts['date']}. Medians of {facts['rounds']} rounds, contenders taking turns on "
        "the same triplets. Seconds are this "
        "machine's; compare ratios. Written by `make benchmark`.",
    ]
    for model in dict.fromkeys(steps["model"]):
        sections += [f"## Ratios, {model}", markdown(_judged(ratios(tables, model)), "left")]
    times = steps[["model", "mix", "step"]].assign(batch=steps["batch"].astype(str))
    spread = zip(steps["seconds"], steps["fastest"], steps["slowest"], strict=True)
    times["time, s (fastest–slowest)"] = [f"{median:.2f} ({low:.2f}–{high:.2f})" for median, low, high in spread]
    times["prompts/s"] = steps["prompts_per_second"].map("{:.2f}".format)
    times["response tokens/s"] = steps["response_tokens_per_second"].map("{:.0f}".format)
    times["of the matmul rate"] = steps["share_of_matmul_rate"].map("{:.0%}".format)
    peaks = memory.assign(**{"peak, GiB": (memory["peak_bytes"] / 2**30).map("{:.2f}".format)})
    sections += ["## Time", markdown(times, "left"), "## Peak memory"]
    sections.append(markdown(peaks.drop(columns="peak_bytes").astype(str), "left"))
    for name, title in DETAILS.items():
        if name not in tables:
            continue
        rounded = tables[name].map(lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
        sections += [f"## {title}", markdown(rounded, "left")]
    return sections


def _judged(ratios: dict[str, float]) -> pd.DataFrame:
    """Each ratio beside what was asked for, as text."""
    rows = []
    for name, value in ratios.items():
        word, limit = TARGETS[name]
        met = value >= limit if word == "at least" else value <= limit
        rows.append((name, f"{word} {limit}×", f"**{value:.2f}×**", "met" if met else "missed"))
    return pd.DataFrame(rows, columns=["what", "asked", "measured", ""])


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "results/benchmarks")
    for path in sorted(root.glob("*/steps.csv")):
        print("Wrote " + ", ".join(map(str, report(path.parent))))

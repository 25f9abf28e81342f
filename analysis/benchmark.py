"""`python -m tspin_analysis.benchmark`: the table and the picture of results/benchmarks/<device>/."""

import json
import sys
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from . import reading as load
from .figures import save
from .style import COLUMN_WIDTH, RC

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
    "T-SPIN, shared over padded, triplets per second, even mix": ("at least", 2.0),
    "T-SPIN over TRL DPO, time per prompt, even mix": ("at most", 0.8),
    "T-SPIN over TRL DPO, peak memory, same batch": ("at most", 0.6),
}


def ratios(steps: pd.DataFrame, memory: pd.DataFrame, model: str) -> dict[str, float]:
    """The ratios of TARGETS, by name; those that were not measured are left out."""
    even = steps[(steps["model"] == model) & (steps["mix"] == "even 1:1")].set_index("step")["seconds"]
    peak = memory[memory["model"] == model].set_index("step")["peak_bytes"]
    speed, price, space = TARGETS
    found = {speed: even["tspin padded"] / even["tspin shared"], price: even["tspin shared"] / even[REFERENCE]}
    if {"tspin shared", REFERENCE} <= set(peak.index):
        found[space] = peak["tspin shared"] / peak[REFERENCE]
    return found


def report(folder: Path) -> list[Path]:
    """Write benchmark.md, .png and .svg into a folder of measurements. Returns the paths."""
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    text = "\n\n".join(_sections(tables, facts)) + "\n"
    written = [load.write_atomically(folder / "benchmark.md", text.encode())]
    with matplotlib.rc_context(RC):
        written += save(picture(tables), folder / "benchmark")
    return written


def picture(tables: dict[str, pd.DataFrame]) -> Figure:
    """Prompts per second by length mix, and the time of a thousand tokens as batch and sequences grow."""
    steps, growth = tables["steps"], tables["growth"]
    steps = steps[steps["model"] == steps["model"].iloc[0]]
    figure = Figure(figsize=(2 * COLUMN_WIDTH, 2.6), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=[3, 2])
    mixes = list(dict.fromkeys(steps["mix"]))
    for position, (name, colour) in enumerate(COLOURS.items()):
        rows = steps[steps["step"] == name].set_index("mix").loc[mixes]
        x = [mix + (position - 3) * 0.12 for mix in range(len(mixes))]
        bars.bar(x, rows["prompts_per_second"], 0.11, color=colour, label=name)
    bars.set_xticks(range(len(mixes)), [mix.replace(" ", "\n") for mix in mixes])
    bars.set_ylabel("Prompts per second")
    bars.set_title(f"A training step, {steps['model'].iloc[0]}", loc="left")
    bars.legend(frameon=False, ncols=2, fontsize=6.5, handlelength=1)
    bars.set_ylim(top=1.45 * steps["prompts_per_second"].max())
    for what, label, marker in (("batch", "batch, 1 to 64 triplets", "o"), ("length", "length, same tokens", "s")):
        rows = growth[growth["grows"] == what]
        lines.plot(rows["value"], rows["seconds_per_1000_tokens"], marker=marker, label=label)
    lines.set_xscale("log", base=2)
    lines.set_ylim(bottom=0)
    lines.set_xlabel("Triplets in the batch, or tokens in an example")
    lines.set_ylabel("Seconds per 1,000 tokens")
    lines.set_title("Growth, T-SPIN", loc="left")
    lines.legend(frameon=False)
    return figure


def _sections(tables: dict[str, pd.DataFrame], facts: dict) -> list[str]:
    hardware = facts["hardware"]
    on = ", ".join(hardware["accelerators"]) or f"{hardware['cpu']}, {hardware['threads']} threads"
    rate = facts["matmul_flops_per_second"] / 1e12
    sections = [
        f"# A training step, timed\n\nOn {on}; bfloat16 matrix product {rate:.2f} TFLOP/s; commit "
        f"`{facts['commit'][:10]}`, {facts['date']}. Medians of {facts['rounds']} rounds, contenders taking turns on "
        "the same triplets. Seconds are this machine's; compare ratios. Written by `make benchmark`.",
    ]
    steps, memory = tables["steps"], tables["memory"]
    for model in dict.fromkeys(steps["model"]):
        lines = [f"## Ratios, {model}", "", "| what | asked | measured | |", "| --- | --- | --- | --- |"]
        for name, value in ratios(steps, memory, model).items():
            word, limit = TARGETS[name]
            met = value >= limit if word == "at least" else value <= limit
            lines.append(f"| {name} | {word} {limit}× | **{value:.2f}×** | {'met' if met else 'missed'} |")
        sections.append("\n".join(lines))
    shown = steps[["model", "mix", "step", "batch"]].copy()
    spread = zip(steps["seconds"], steps["fastest"], steps["slowest"], strict=True)
    shown["time, s (fastest–slowest)"] = [f"{median:.2f} ({low:.2f}–{high:.2f})" for median, low, high in spread]
    shown["prompts/s"] = steps["prompts_per_second"].map("{:.2f}".format)
    shown["response tokens/s"] = steps["response_tokens_per_second"].map("{:.0f}".format)
    shown["of the matmul rate"] = steps["share_of_matmul_rate"].map("{:.0%}".format)
    sections += ["## Time", _markdown(shown), "## Peak memory"]
    gib = memory.assign(**{"peak, GiB": (memory["peak_bytes"] / 2**30).map("{:.2f}".format)})
    sections.append(_markdown(gib.drop(columns="peak_bytes")))
    titles = {
        "growth": "Growth of T-SPIN's step (shared prompts)",
        "heads": "Log-probabilities of response tokens from hidden states, forward and backward",
        "sampling": "Decoding, pocket model, greedy",
        "profile": "Where a T-SPIN step's processor time goes",
    }
    for name, title in titles.items():
        rounded = tables[name].map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)
        sections += [f"## {title}", _markdown(rounded)]
    return sections


def _markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(map(str, table)) + " |", "|" + " --- |" * table.shape[1]]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.to_numpy().tolist()]
    return "\n".join(lines)


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "results/benchmarks")
    for found in sorted(root.glob("*/provenance.json")):
        print("Wrote " + ", ".join(map(str, report(found.parent))))

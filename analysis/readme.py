"""The numbers in README files, from results/: `make readme` fills the places that are marked

    <!-- fill NAME -->…<!-- end -->

and a test fails when one of them is stale. A place that stands on lines of its own is filled with lines of its own.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from .map import Place
from .readme_labels import by_labels, own_average, own_labels, own_lead
from .readme_map import NOT_RUN, contrast, differences, ends, entropy, leads
from .readme_sweeps import tuned, tuned_base, tuned_gain, tuned_labels, tuned_lead, tuned_real, tuned_starts
from .scores import Scores
from .verdicts import VERDICTS
from .writing import counted, pipes

PAGES = ("README", "map", "tuning", "smollm2", "benchmarks/README")
FILES = ("README.md", *(f"results/{page}.md" for page in PAGES))
PLACE = re.compile(r"<!-- fill (\w+) -->(.*?)<!-- end -->", re.DOTALL)
PRESETS = ("pocket", "pocket-greedy", "smollm2-tuned", "smollm2-short", "smollm2-long")
POCKET, MODES, REAL, UNTUNED, LONG = (Path("reference", preset) for preset in PRESETS)  # the committed results
SMOLLM2 = {"real": REAL, "untuned": UNTUNED, "long": LONG}
ENDS = {"base": None, "sft": None, "spin": 2, "tspin": 2, "tspin_reference": 2}  # SmolLM2's last iterations
FLOAT32 = "cpu-float32"  # a benchmark's folder


def average(results: Path, method: str, iteration: int | None = None, preset: Path = POCKET) -> str:
    """The average of a method at an iteration with its interval, such as 40.8 [39.7, 41.9]."""
    table = pd.read_csv(results / preset / "intervals.csv", dtype={"iteration": "Int64"})
    table = table[(table["benchmark"] == "Avg") & (table["method"] == method)]
    table = table[table["iteration"].isna() if iteration is None else table["iteration"] == iteration]
    if table.empty:
        return NOT_RUN
    row = table.iloc[0]
    return f"{row['mean']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"


def averages(results: Path) -> str:
    """SPIN and T-SPIN by iteration, as a table."""
    rows = {
        label: [average(results, method, iteration) for iteration in range(5)]
        for label, method in (("SPIN", "spin"), ("T-SPIN", "tspin"))
    }
    return pipes(["iteration", *map(str, range(5))], [[label, *cells] for label, cells in rows.items()])


def seeds(results: Path) -> str:
    """How many seeds of T-SPIN the averages are over."""
    table = pd.read_csv(results / POCKET / "intervals.csv")
    return str(table.loc[table["method"] == "tspin", "seeds"].max())


def difference(results: Path) -> str:
    """Final T-SPIN − final SPIN with its interval, in points."""
    claims = pd.read_json(results / POCKET / "claims.json")["claims"]
    ours = next(claim["ours"][0] for claim in claims if claim["claim"] == "C2")
    found = re.search(r": ([+−-][\d.]+ \[.*?\])", ours)
    assert found is not None, ours
    return found[1].replace("-", "−")


def lead(results: Path, iteration: int) -> str:
    """T-SPIN − SPIN after an iteration with its interval, in points."""
    scores = Scores(results / POCKET)
    return f"{scores.difference(('tspin', iteration), ('spin', iteration)):+.2f}".replace("-", "−")


def verdicts(results: Path, preset: Path = POCKET) -> str:
    """How many parts of the claims have which verdict, in words."""
    claims = pd.read_json(results / preset / "claims.json")["claims"]
    parts = [part for claim in claims for part in claim["parts"] if part in VERDICTS]
    counts = ", ".join(f"{parts.count(verdict)} {verdict}" for verdict in VERDICTS)
    return f"of {len(parts)} parts {counts}"


def misaligned_spin(results: Path, preset: Path = POCKET) -> str:
    """The share of SPIN's samples at iteration 1 that have the higher reward and the lower likelihood."""
    claims = pd.read_json(results / preset / "claims.json")["claims"]
    ours = next(claim["ours"][0] for claim in claims if claim["claim"] == "C3")
    share = re.search(r"share: ([\d.]+)% \[([\d.]+)%?, ([\d.]+)%?\]", ours)
    assert share is not None, ours
    return f"{share[1]} % [{share[2]}, {share[3]}]"


def steps(results: Path, step: str, over: str = "tspin shared", machine: str = "cpu") -> float:
    """Seconds of a training step of the benchmark's even mix, as a multiple of another's."""
    table = pd.read_csv(results / "benchmarks" / machine / "steps.csv")
    seconds = table[table["mix"] == "even 1:1"].set_index("step")["seconds"]
    return float(seconds[step] / seconds[over])


def memory_ratio(results: Path, machine: str = "cpu") -> str:
    """T-SPIN's peak memory over that of TRL's trainer."""
    peak = pd.read_csv(results / "benchmarks" / machine / "memory.csv").set_index("step")["peak_bytes"]
    return f"{peak['tspin shared'] / peak['TRL DPO']:.2f}"


def faults(results: Path) -> str:
    """How many faults were injected. Raises ValueError where a number was lost: the sentence would be untrue."""
    table = pd.read_csv(results / "faults" / "summary.csv")
    if table["numbers_lost"].any() or (table["survived"] < table["injected"]).any():
        raise ValueError("a fault was not survived: the README says that all were")
    return str(table.loc[table["fault"] != "none", "injected"].sum())


def times(results: Path) -> str:
    """How long the README's commands take on two kinds of CPU, as a table."""
    table = pd.read_csv(results / "benchmarks" / "times" / "times.csv")
    kinds = {True: "bfloat16 in hardware", False: "without"}
    rows = []
    for command, group in table.groupby("command", sort=False):
        measured = {kind: group.loc[group["bfloat16"] == kind, "seconds"] for kind in kinds}
        rows.append([f"`{command}`", *(_minutes(seconds) for seconds in measured.values())])
    return pipes(["command", *kinds.values()], rows)


def example(results: Path) -> str:
    """The worked example: its commands and what they printed."""
    return f"```console\n{(results / 'example' / 'transcript.txt').read_text(encoding='utf-8').rstrip()}\n```"


def _of(preset: Path, told: Callable[..., str], **asked: object) -> Callable[[Path], str]:
    """`told`, of a preset's results."""
    return lambda results: told(results / preset, **asked)


CONTRASTS_TOLD = {  # one by one; all of them stand in `differences`
    "papers": "T-SPIN − SPIN, the papers' scales: α 1, λ 0.1",
    "low": "T-SPIN − SPIN, both scales 0.1",
    "history": "T-SPIN − T-SPIN w/o H-A, α 1",
    "reference": "T-SPIN_ref − T-SPIN, α 1",
}
CHOSEN, COLD = Place("pocket", 1.0), Place("pocket-cold at 3e-05", 1.0)
COLUMNS = {
    "chosen": (CHOSEN, POCKET),
    "cold": (COLD, POCKET),
    "real": (CHOSEN, REAL),
    "untuned": (CHOSEN, UNTUNED),
    "long": (CHOSEN, LONG),
}
PLACES: dict[str, Callable[[Path], str]] = {
    "times": times,
    "base": lambda results: average(results, "base").split()[0],
    "sft": lambda results: average(results, "sft"),
    "averages": averages,
    "seeds": seeds,
    "difference": difference,
    **{f"lead_{iteration}": partial(lead, iteration=iteration) for iteration in (1, 2, 3)},
    "verdicts": verdicts,
    "misaligned_spin": misaligned_spin,
    "misaligned_greedy": partial(misaligned_spin, preset=MODES),
    "greedy_verdicts": partial(verdicts, preset=MODES),
    "example": example,
    "step_ratio": lambda results: f"{steps(results, 'tspin shared', 'TRL DPO'):.2f}",
    "memory_ratio": memory_ratio,
    "over_padded": lambda results: f"{steps(results, 'tspin padded'):.2f}",
    "over_concatenated": lambda results: f"{steps(results, 'tspin concatenated'):.1f}",
    "over_live": lambda results: f"{steps(results, 'tspin shared', 'SPIN, live reference'):.2f}",
    "step_ratio_float32": lambda results: f"{steps(results, 'tspin shared', 'TRL DPO', FLOAT32):.2f}",
    "memory_ratio_float32": lambda results: memory_ratio(results, FLOAT32),
    "over_padded_float32": lambda results: f"{steps(results, 'tspin padded', machine=FLOAT32):.2f}",
    "over_concatenated_float32": lambda results: f"{steps(results, 'tspin concatenated', machine=FLOAT32):.1f}",
    "over_live_float32": lambda results: f"{steps(results, 'tspin shared', 'SPIN, live reference', FLOAT32):.2f}",
    "faults": faults,
    "tuned": _of(POCKET, tuned),
    "tuned_starts": _of(POCKET, tuned_starts),
    "tuned_real": _of(UNTUNED, tuned_real),
    **{
        f"base_{name}": _of(preset, tuned_base, sweep=sweep)
        for name, preset, sweep in (
            ("rate", POCKET, "sweep-rate"),
            ("half", POCKET, "sweep-half"),
            ("cold", POCKET, "sweep-cold"),
            ("smollm2", UNTUNED, "smollm2-rate"),
        )
    },
    **{
        f"gain_{name}_{method}": _of(preset, tuned_gain, sweep=sweep, method=method)
        for name, preset, sweep in (("rate", POCKET, "sweep-rate"), ("smollm2", UNTUNED, "smollm2-rate"))
        for method in ("spin", "tspin", "sft")
    },
    "gain_labels_sft": _of(POCKET, tuned_gain, sweep="sweep-labels", method="sft"),
    "tuned_lead": _of(UNTUNED, tuned_lead),
    "by_labels": _of(POCKET, by_labels),
    "own_labels": _of(POCKET, own_labels),
    "own_lead": _of(POCKET, own_lead, method="tspin", other="spin"),
    "own_early": _of(POCKET, own_lead, method="tspin", other="sft", iteration=1),
    "own_sft": _of(POCKET, own_average, method="sft"),
    "tuned_labels": _of(POCKET, tuned_labels),
    "entropy_tspin": _of(POCKET, entropy, method="tspin", iteration=4, other=("tspin", 0)),
    "entropy_spin": _of(POCKET, entropy, method="spin", iteration=4, other=("spin", 0)),
    "entropy_lead": _of(POCKET, entropy, method="tspin", iteration=4, other=("spin", 4)),
    "ends": _of(POCKET, ends),
    "differences": _of(POCKET, differences),
    "leads": _of(POCKET, leads),
    **{
        f"{column}_{name}": _of(preset, contrast, words=words, place=place)
        for name, words in CONTRASTS_TOLD.items()
        for column, (place, preset) in COLUMNS.items()
    },
    **{
        f"{column}_{method}": partial(average, method=method, iteration=iteration, preset=preset)
        for column, preset in SMOLLM2.items()
        for method, iteration in ENDS.items()
    },
    **{f"{column}_verdicts": partial(verdicts, preset=preset) for column, preset in SMOLLM2.items()},
}


def filled(text: str, results: Path) -> str:
    """`text` with every place filled from `results`. Raises KeyError for a place that no function fills."""

    def fill(place: re.Match[str]) -> str:
        content = PLACES[place[1]](results)
        if place[2].startswith("\n"):
            content = f"\n{content}\n"
        return f"<!-- fill {place[1]} -->{content}<!-- end -->"

    return PLACE.sub(fill, text)


def _minutes(seconds: pd.Series) -> str:
    return f"{counted(round(each / 60) for each in seconds)} min" if len(seconds) else "not measured"


def main() -> None:
    """Fill the places of every file below the current folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    for name in FILES:
        text = Path(name).read_text(encoding="utf-8")
        Path(name).write_text(filled(text, arguments.results), encoding="utf-8")
        print(f"filled {len(PLACE.findall(text))} places of {name}")


if __name__ == "__main__":
    main()

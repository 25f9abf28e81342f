"""The numbers in README files, from results/: `make readme` fills the places that are marked

    <!-- fill NAME -->…<!-- end -->

and a test fails when one of them is stale. A place that stands on lines of its own is filled with lines of its own.
"""

import argparse
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import pandas as pd

from .entropy import nats
from .intervals import ENOUGH, Estimate, estimate, of_seeds
from .map import SPIN, TSPIN, Found, Place, map_of
from .reading import read_table
from .scores import Scores
from .studies import Study
from .style import look
from .verdicts import VERDICTS

FILES = ("README.md", "results/README.md", "results/benchmarks/README.md")
PLACE = re.compile(r"<!-- fill (\w+) -->(.*?)<!-- end -->", re.DOTALL)
PRESETS = ("pocket", "pocket-greedy", "smollm2-short", "smollm2-long")
POCKET, MODES, REAL, LONG = (Path("reference", preset) for preset in PRESETS)  # the committed results
LAST = 2  # iteration of SmolLM2's presets
SURE = 0.05  # corrected p below which a difference is set in bold
FLOAT32 = "cpu-float32"  # a benchmark's folder


def average(results: Path, method: str, iteration: int | None = None, preset: Path = POCKET) -> str:
    """The average of a method at an iteration with its interval, such as 40.8 [39.7, 41.9]."""
    table = pd.read_csv(results / preset / "intervals.csv", dtype={"iteration": "Int64"})
    table = table[(table["benchmark"] == "Avg") & (table["method"] == method)]
    row = table[table["iteration"].isna() if iteration is None else table["iteration"] == iteration].iloc[0]
    return f"{row['mean']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"


def averages(results: Path) -> str:
    """SPIN and T-SPIN by iteration, as a table."""
    rows = {
        label: [average(results, method, iteration) for iteration in range(5)]
        for label, method in (("SPIN, 1,000 labels", "spin"), ("T-SPIN, 1,000 labels", "tspin"))
    }
    return _table(["iteration", *map(str, range(5))], [[label, *cells] for label, cells in rows.items()])


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
    share = re.search(r"share: ([\d.]+)%", ours)
    assert share is not None, ours
    return f"{share[1]} %"


def contrast(results: Path, words: str, place: Place, preset: Path = POCKET) -> str:
    """A contrast of the map after the last iteration; with its interval where the seeds are ENOUGH."""
    contrasts = map_of(results / preset).contrasts
    found = next((each.difference for each in contrasts if (each.contrast.words, each.place) == (words, place)), None)
    if found is None:
        return "not run"
    return f"{_points(found)} (n={found.seeds})"


def differences(results: Path) -> str:
    """Every contrast of pocket's map wherever it ran, as a table; bold where its corrected p is below 0.05."""
    known = map_of(results / POCKET)
    found = {(each.contrast.words, each.place): each for each in known.contrasts}
    places = [place for place in known.places if any(place == there for _, there in found)]

    def cell(each: Found | None) -> str:
        if each is None:
            return "–"
        text = f"{_points(each.difference)}, {each.difference.seeds}"
        return f"**{text}**" if each.corrected < SURE else text

    rows = [
        [words, *(cell(found.get((words, place))) for place in places)]
        for words in dict.fromkeys(words for words, _ in found)
    ]
    return _table(["", *map(str, places)], rows)


def tuned(results: Path) -> str:
    """The sweep of rates and epochs: its last average, the mean over seeds, of every setting, as a table."""
    cells = _swept(results, "sweep-rate", ["method", "num_train_epochs"]).loc[["spin", "tspin", "sft"]]
    return _by_rate("method, epochs", [f"{look(method).label}, {epochs:g}" for method, epochs in cells.index], cells)


def tuned_starts(results: Path) -> str:
    """The sweeps of the rate from other starts than the preset's, one epoch an iteration, as a table."""
    of = {start: _swept(results, f"sweep-{start}", ["method"]) for start in ("half", "cold")}
    labels = [f"{look(method).label}, {start}" for start, cells in of.items() for method in cells.index]
    return _by_rate("method, start", labels, pd.concat(of.values()).sort_index(axis="columns"))


def tuned_real(results: Path) -> str:
    """The sweep of SmolLM2's rates, one seed, as a table."""
    cells = _swept(results, "smollm2-rate", ["method"], REAL).loc[["spin", "tspin", "sft"]]
    return _by_rate("method", [look(method).label for method in cells.index], cells)


def tuned_lead(results: Path) -> str:
    """T-SPIN − SPIN in the sweep of SmolLM2's rates, each at its best, in points; one seed: the problems' noise."""
    study = Study(results / REAL, "smollm2-rate")
    last = study.table[study.table["iteration"] == study.table["iteration"].max()]
    best = last.loc[last.groupby("method")["avg"].idxmax()].set_index("method")
    tspin, spin = (study.values(best.loc[[method]]) for method in ("tspin", "spin"))
    return f"{estimate(tspin - spin):+.1f}".replace("-", "−")


def entropy(results: Path, method: str, iteration: int, other: tuple[str, int]) -> str:
    """How many nats more y′ have, by mean −log π(y′), than another method's or iteration's: t interval over seeds."""
    table = _nats(results / POCKET).set_index(["method", "iteration", "seed"])["nats"].sort_index()
    return f"{of_seeds((table[method, iteration] - table[other]).dropna()):+.2f}".replace("-", "−")


@lru_cache(maxsize=1)
def _nats(folder: Path) -> pd.DataFrame:
    return nats(read_table(folder, "diagnostics"))


def _swept(results: Path, sweep: str, rows: list[str], preset: Path = POCKET) -> pd.DataFrame:
    """The last average of a sweep's settings, the mean over seeds: a column per rate."""
    table = pd.read_csv(results / preset / "studies" / f"{sweep}.csv", dtype={"iteration": "Int64"})
    last = table[table["iteration"].isna() | (table["iteration"] == table["iteration"].max())]
    return last.pivot_table("avg", rows, "learning_rate")


def _by_rate(title: str, labels: list[str], cells: pd.DataFrame) -> str:
    rates = [f"{rate:.0e}".replace("e-0", "e-") for rate in cells]
    texts = [["–" if pd.isna(avg) else f"{avg:.2f}" for avg in row] for row in cells.to_numpy()]
    return _table([title, *rates], [[label, *row] for label, row in zip(labels, texts, strict=True)])


def leads(results: Path) -> str:
    """T-SPIN − SPIN at the papers' scales by iteration, wherever both ran on pocket, as a table."""
    known = map_of(results / POCKET)
    rows = []
    for place in known.places:
        found = [known.difference(TSPIN, SPIN, place, iteration) for iteration in range(5)]
        if found[-1]:
            texts = [f"{each:+.2f}".replace("-", "−") if each else "–" for each in found]
            rows.append([f"{place}, n={found[-1].seeds}", *texts])
    return _table(["iteration", *map(str, range(5))], rows)


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
        seconds = group.groupby("bfloat16")["seconds"].last()
        rows.append([f"`{command}`", *(_minutes(seconds.get(kind)) for kind in kinds)])
    return _table(["command", *kinds.values()], rows)


def example(results: Path) -> str:
    """The worked example: its commands and what they printed."""
    return f"```console\n{(results / 'example' / 'transcript.txt').read_text(encoding='utf-8').rstrip()}\n```"


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
    "tuned": tuned,
    "tuned_starts": tuned_starts,
    "tuned_real": tuned_real,
    "tuned_lead": tuned_lead,
    "entropy_tspin": partial(entropy, method="tspin", iteration=4, other=("tspin", 0)),
    "entropy_spin": partial(entropy, method="spin", iteration=4, other=("spin", 0)),
    "entropy_lead": partial(entropy, method="tspin", iteration=4, other=("spin", 4)),
    "differences": differences,
    "leads": leads,
    **{
        f"{column}_{name}": partial(contrast, words=words, place=place, preset=preset)
        for name, words in CONTRASTS_TOLD.items()
        for column, (place, preset) in COLUMNS.items()
    },
    **{
        f"{column}_{method}": partial(average, method=method, iteration=iteration, preset=preset)
        for column, preset in (("real", REAL), ("long", LONG))
        for method, iteration in (("base", None), ("sft", None), ("spin", LAST), ("tspin", LAST))
    },
    "real_tspin_reference": partial(average, method="tspin_reference", iteration=LAST, preset=REAL),
    "real_verdicts": partial(verdicts, preset=REAL),
    "long_verdicts": partial(verdicts, preset=LONG),
}


def filled(text: str, results: Path) -> str:
    """`text` with every place filled from `results`. Raises KeyError for a place that no function fills."""

    def fill(place: re.Match[str]) -> str:
        content = PLACES[place[1]](results)
        if place[2].startswith("\n"):
            content = f"\n{content}\n"
        return f"<!-- fill {place[1]} -->{content}<!-- end -->"

    return PLACE.sub(fill, text)


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def _points(found: Estimate) -> str:
    """In points; with its interval where the seeds are ENOUGH."""
    return (f"{found:+.1f}" if found.seeds >= ENOUGH else f"{found.mean:+.1f}").replace("-", "−")


def _minutes(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


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

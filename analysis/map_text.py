"""The study `map` as Markdown: every arm by start and decoding, and every contrast with its p-values."""

from pathlib import Path

import numpy as np
import pandas as pd

from .map import CONTRASTS, SFT, START, Map, Paired, Place, map_of
from .style import MISSING, Arm, arm_look
from .writing import markdown, number

# Of STUDY_MEASURES: the column, its name in the table, and how it is written.
SHOWN = {
    "nats": ("entropy, nats", ".1f"),
    "equal_share": ("y′ = y", ".0%"),
    "weight_ess": ("ESS", ".0%"),
    "gradient_signal": ("signal", ".2f"),
    "misaligned": ("misaligned", ".1%"),
}
EXPLAINED = (
    "Avg in percent, brackets 95 % intervals (seeds and problems crossed), change paired by seed and problem. Arrows: "
    "first → last iteration, means over seeds. Entropy: −log π(y′) of a response, the policy's entropy where y′ is "
    "sampled at temperature 1, else its mode's. ESS: effective sample size as a share of the pairs. Signal: norm of "
    "the mean gradient over the noise of a step's. Misaligned: y has the higher reward and the lower likelihood."
)

COMPARED = (
    "Paired by seed and problem. Corrected: for the differences that answer the same question (Holm). Fewer than three "
    "seeds say too little of the spread between seeds: they have no p, and of one seed the interval is that of its "
    "problems alone. Largest part: the benchmark whose difference is largest; the rest: the average of the others."
)


def map_text(folder: Path) -> str:
    """Both tables. Raises UserError where the study is missing."""
    known = map_of(folder)
    first = {place.start: place for place in reversed(known.places)}  # SFT has one row a start, whatever the decoding
    places = [(arm, place) for place in known.places for arm in (SFT, *known.arms)]
    arms = [_arm_row(known, arm, place) for arm, place in places if arm != SFT or first[place.start] == place]
    courses = pd.DataFrame([row for row in arms if row])
    contrasts = pd.DataFrame([
        {
            "question": each.contrast.question,
            "contrast": each.contrast.words,
            "start": each.place.start_name,
            "decoding": each.place.decoding,
            "seeds": str(each.difference.seeds),
            "difference, points": f"{each.difference:+.2f}",
            "by seed": " ".join(number(seed, "+.1f") for seed in each.difference.by_seed),
            "largest part; the rest": _largest(known, each.difference),
            "p": number(each.p, ".2g"),
            "p, corrected": number(each.corrected, ".2g"),
        }
        for each in known.contrasts
    ])  # fmt: skip
    compared = [arm for contrast in CONTRASTS for arm in (contrast.first, contrast.second)]
    absent = known.absent([SFT, *known.arms, *compared])
    sections = [f"# Where T-SPIN helps ({folder.name}; {known.study.size})", EXPLAINED, markdown(courses)]
    if absent:
        sections.append(absent)
    if len(contrasts):
        sections += [
            "## After the last iteration, one against another",
            COMPARED,
            markdown(contrasts, "left"),
        ]
    return "\n\n".join(sections) + "\n"


def _arm_row(known: Map, arm: Arm, place: Place) -> dict[str, str]:
    """An arm at a place as texts; empty where it was not run."""
    rows, end = known.rows(arm, place), known.last(arm, place)
    if end.empty:
        return {}
    start, change = known.last(START, place), known.difference(arm, START, place)
    cells = {
        "arm": arm_look(arm).label,
        "start": place.start_name,
        "decoding": MISSING if arm == SFT else place.decoding,
        "seeds": str(end["seed"].nunique()),
        "Avg at start": _avg(known, start),
        "at the end": _avg(known, end),
        "change": f"{change:+.1f}" if change else MISSING,
    }
    return cells | {name: _course(rows, column, form) for column, (name, form) in SHOWN.items()}


def _largest(known: Map, found: Paired) -> str:
    """The benchmark that differs most, its difference, and the mean of the others, in points."""
    parts = np.array(found.by_benchmark)
    if len(parts) < 2:
        return MISSING
    k = int(np.abs(parts).argmax())
    return f"{known.study.labels[k]} {parts[k]:+.1f}; {np.delete(parts, k).mean():+.1f}"


def _avg(known: Map, rows: pd.DataFrame) -> str:
    if rows.empty:
        return MISSING
    mean = known.study.averaged(["method"], rows).iloc[0]
    low, high = max(mean["avg"] - mean["half"], 0), min(mean["avg"] + mean["half"], 100)  # of shares, in percent
    return f"{mean['avg']:.1f} [{low:.1f}, {high:.1f}]"


def _course(rows: pd.DataFrame, column: str, form: str) -> str:
    """A measure's mean over seeds at the first and at the last iteration."""
    means = rows.groupby("iteration")[column].mean().dropna() if column in rows else pd.Series(dtype=float)
    ends = means.iloc[[0, -1]] if len(means) > 1 else means
    return " → ".join(number(value, form) for value in ends) or MISSING

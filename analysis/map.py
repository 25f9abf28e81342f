"""When T-SPIN helps, and which part of it: the study `map`, arms (a method at a setting) by start and decoding.

Its table, results/<preset>/studies/map.csv, has the settings path (the start: the initial policy), temperature, lam,
history and alpha; where an arm leaves one empty, the preset's own holds. Beside it stand, where they were run,
the studies `proto` (proto_model: y0 of another model), `rate` (learning_rate) and `epochs` (num_train_epochs): another
rate or number of epochs is a start of its own here.
Of another preset the study of its own name is its map (`smollm2-short`): of one start and decoding, its preset's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tspin.errors import UserError
from tspin.schema import BASE, ONCE

from .intervals import ENOUGH, Estimate, corrected, estimate, fields_of
from .reading import read_settings
from .studies import NO_SETTINGS, Study
from .style import METHODS, Arm, arm_look, look, scale_of

BESIDE = ("proto", "rate", "epochs")
FAST = "pocket at 3e-05"  # the start `pocket`, trained at ten times the preset's rate
LONGER = "pocket, 3 epochs"  # the start `pocket`, trained for three epochs an iteration in place of one
STARTS = {"pocket": "fine-tuned", LONGER: "3 epochs", FAST: "rate × 10", "runs/pocket-starts/half": "half fine-tuned",
          "pocket-cold": "cold"}  # fmt: skip
DECODINGS = {1.0: "temperature 1", 0.0: "greedy"}
# Of a preset that does not say: pocket's. A start that was fine-tuned on the labels goes by the name of pocket's.
OWN: dict[str, Any] = {"path": "pocket", "temperature": 1.0, "lam": 0.1, "history": 0.0, "alpha": 1.0,
                       "proto_model": ""}  # fmt: skip
TRAINED = {"learning_rate": " at {:g}", "num_train_epochs": ", {:g} epochs"}  # what it adds to a start
SCALE = {"λ": "lam", "α": "alpha"}  # the column that holds a method's scale

SFT, START = Arm("sft"), Arm(BASE)
SPIN, SPIN_AT_1, RELEASED = Arm("spin", 0.1), Arm("spin", 1.0), Arm("spin", 0.1, history=True)
TSPIN, TSPIN_AT_01 = Arm("tspin", 1.0), Arm("tspin", 0.1)
COLD_TSPIN = Arm("tspin", 1.0, proto="cold")


def known_start(start: str) -> str:
    """That of STARTS which a start is, or is trained in another way from; itself where it is neither."""
    of = [known for known in STARTS if start.startswith((f"{known} at ", f"{known}, "))]
    return start if start in STARTS else max(of, key=len, default=start)


class Place(NamedTuple):
    """Where an arm ran: a start (a path of STARTS, or another) and the temperature of y′ and y0."""

    start: str
    temperature: float

    @property
    def start_name(self) -> str:
        """The start in words."""
        known = known_start(self.start)
        return STARTS.get(known, known) + self.start.removeprefix(known)

    @property
    def decoding(self) -> str:
        """The decoding in words."""
        return DECODINGS.get(self.temperature, f"temperature {self.temperature:g}")

    def __str__(self) -> str:
        return f"{self.start_name}, {self.decoding}"


class Contrast(NamedTuple):
    """first − second after their last iteration, and what it says."""

    question: str
    words: str
    first: Arm
    second: Arm


def _contrast(question: str, first: Arm, second: Arm, setting: str) -> Contrast:
    return Contrast(question, f"{look(first.method).label} − {look(second.method).label}, {setting}", first, second)


HISTORY, REFERENCE, SCALE_ALONE = "What the history adds", "What a reference adds", "What the scale does"
OTHER_Y0 = "With y0 of the cold base"
CONTRASTS = [
    _contrast("T-SPIN − SPIN", TSPIN, SPIN, "the papers' scales: α 1, λ 0.1"),
    _contrast("T-SPIN − SPIN", TSPIN_AT_01, SPIN, "both scales 0.1"),
    _contrast("T-SPIN − SPIN", TSPIN, SPIN_AT_1, "both scales 1"),
    _contrast("T-SPIN − SPIN", TSPIN, RELEASED, "SPIN as released"),
    _contrast(HISTORY, TSPIN, Arm("tspin_no_history", 1.0), "α 1"),
    _contrast(HISTORY, TSPIN_AT_01, Arm("tspin_no_history", 0.1), "α 0.1"),
    _contrast(HISTORY, Arm("tspin_reference", 1.0), SPIN_AT_1, "both scales 1"),  # SPIN is T-SPIN_ref with β = 0
    _contrast(REFERENCE, Arm("tspin_reference", 1.0), TSPIN, "α 1"),
    _contrast(REFERENCE, Arm("tspin_reference", 0.1), TSPIN_AT_01, "α 0.1"),
    Contrast(SCALE_ALONE, "T-SPIN, α 1 − α 0.1", TSPIN, TSPIN_AT_01),
    Contrast(SCALE_ALONE, "SPIN, λ 1 − λ 0.1", SPIN_AT_1, SPIN),
    Contrast(OTHER_Y0, "T-SPIN, y0 of the cold base − of its own start", COLD_TSPIN, TSPIN),
]


@dataclass(frozen=True)
class Paired(Estimate):
    """A mean difference, and that of each seed and of each benchmark, in their order, in points."""

    by_seed: tuple[float, ...] = ()
    by_benchmark: tuple[float, ...] = ()


class Found(NamedTuple):
    """A contrast at a place: its paired difference in points, its p, and that corrected for those of the same question.

    Of fewer seeds than ENOUGH there is no p (NaN): they say too little of the spread between seeds.
    """

    contrast: Contrast
    place: Place
    difference: Paired
    p: float
    corrected: float


def study_of(folder: Path) -> Path:
    """The study that is the map of a preset's results, whether it was run or not."""
    own = folder / "studies" / f"{folder.name}.csv"
    return own if own.is_file() else own.with_stem("map")


class Map:
    """The study `map` of a preset's results. Raises UserError where it is missing, is empty or sets what is unknown."""

    def __init__(self, folder: Path):
        self.study = Study(folder, study_of(folder).stem, BESIDE)
        table = self.study.table
        if unknown := {str(name) for name in table} - NO_SETTINGS - {*OWN, *TRAINED}:
            raise UserError(f"{self.study.path}: sets {', '.join(sorted(unknown))}, which the map does not know")
        table = _completed(table, read_settings(folder))
        table["model"] = table["path"]
        for name in [name for name in TRAINED if name in table]:
            added = [TRAINED[name].format(value) if value > 0 else "" for value in table[name]]
            table["path"] = table["path"] + pd.Series(added, dtype=str)
        self._model = dict(zip(table["path"], table["model"], strict=True))  # of each start
        self.table = table.assign(arm=pd.Series([_arm_of(row) for row in table.to_dict("records")], dtype=object))
        self._last = self.table.groupby("cell")["iteration"].transform("max")
        self._rows = self._by_place()
        if not self.arms:
            raise UserError(f"{self.study.path}: no arm of self-play was run yet; {self.study.again}")

    @cached_property
    def starts(self) -> list[str]:
        """The starts of self-play, in the order of STARTS and then by name."""
        order = {start: number for number, start in enumerate(STARTS)}
        there = set(self.table.loc[~self.table["method"].isin(ONCE), "path"])
        return sorted(there, key=lambda start: (order.get(known_start(start), len(order)), start))

    @cached_property
    def temperatures(self) -> list[float]:
        """How y′ was drawn, sampled before greedy."""
        return sorted(set(self.table.loc[~self.table["method"].isin(ONCE), "temperature"]), reverse=True)

    @cached_property
    def places(self) -> list[Place]:
        """Every start with every decoding, whether anything ran there or not."""
        return [Place(start, temperature) for start in self.starts for temperature in self.temperatures]

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms of self-play that ran anywhere; at the papers' settings before others."""
        found = {arm for arm in self.table["arm"] if arm.method not in ONCE}
        return sorted(
            found, key=lambda arm: (_order(arm.method), arm.proto, arm.history, arm != papers(arm.method), arm)
        )

    def rows(self, arm: Arm, place: Place) -> pd.DataFrame:
        """Every iteration of an arm at a place. How self-play decodes and trains is nothing to the start and to SFT."""
        once = arm.method in ONCE
        start = self._model.get(place.start) if once else place.start
        return self._rows.get((arm, start, None if once else place.temperature), self.table.iloc[:0])

    def _by_place(self) -> dict[tuple[Arm, str | None, float | None], pd.DataFrame]:
        """The table's rows by arm, start and, but for ONCE, temperature; of cells that are there twice, the first."""
        of: dict[tuple[Arm, str | None, float | None], list[int]] = {}
        columns = (self.table[name] for name in ("arm", "path", "temperature"))
        for number, (arm, start, temperature) in enumerate(zip(*columns, strict=True)):
            of.setdefault((arm, start, None if arm.method in ONCE else temperature), []).append(number)
        return {key: self.table.iloc[rows].drop_duplicates(["seed", "iteration"]) for key, rows in of.items()}

    def ran(self, place: Place) -> bool:
        """Whether any arm of self-play ran at a place."""
        return any(len(self.rows(arm, place)) for arm in self.arms)

    def last(self, arm: Arm, place: Place) -> pd.DataFrame:
        """The rows after an arm's last iteration, one a seed, in their order; none where it was not run."""
        rows = self.rows(arm, place)
        ends = rows["iteration"].isna() | (rows["iteration"] == self._last[rows.index])
        return rows[ends].sort_values("seed")

    def _at(self, arm: Arm, place: Place, iteration: int | None) -> pd.DataFrame:
        if iteration is None:
            return self.last(arm, place)
        rows = self.rows(arm, place)
        return rows[rows["iteration"] == iteration].sort_values("seed")

    def values(self, first: Arm, second: Arm, place: Place, iteration: int | None = None) -> np.ndarray | None:
        """(seeds, benchmarks, problems), in percent: first − second; None where they share no seed.

        iteration: of both; the last of each when left out. The start is one policy, whatever the seed.
        """
        one, other = (self._at(arm, place, iteration) for arm in (first, second))
        if second == START and len(other):
            return self.study.values(one) - self.study.values(other)[:1] if len(one) else None
        one, other = one[one["seed"].isin(other["seed"])], other[other["seed"].isin(one["seed"])]
        return self.study.values(one) - self.study.values(other) if len(one) else None

    def difference(self, first: Arm, second: Arm, place: Place, iteration: int | None = None) -> Paired | None:
        """The mean of `values`, paired by seed and problem; None where there are none."""
        values = self.values(first, second, place, iteration)
        return None if values is None else _paired(values)

    @cached_property
    def contrasts(self) -> list[Found]:
        """Every contrast of CONTRASTS wherever both of its arms ran; p corrected (Holm) within each question."""
        results = []
        for question in dict.fromkeys(contrast.question for contrast in CONTRASTS):
            asked = [contrast for contrast in CONTRASTS if contrast.question == question]
            tried = [(c, place, self.difference(c.first, c.second, place)) for c in asked for place in self.places]
            there = [(contrast, place, found) for contrast, place, found in tried if found is not None]
            p_values = np.array([found.p if found.seeds >= ENOUGH else np.nan for _, _, found in there])
            tested = ~np.isnan(p_values)
            adjusted = p_values.copy()
            adjusted[tested] = corrected(p_values[tested])
            both = zip(p_values.tolist(), adjusted.tolist(), strict=True)
            results += [Found(*each, *p) for each, p in zip(there, both, strict=True)]
        return results

    def absent(self, arms: Sequence[Arm]) -> str:
        """What of some arms was not run, in words; nothing where all was."""
        empty = [place for place in self.places if not self.ran(place)]
        words = [f"anything ({place})" for place in empty]
        places = [place for place in self.places if place not in empty]
        for arm in dict.fromkeys(arms):
            missing = [place for place in places if self.last(arm, place).empty]
            where = "anywhere" if len(missing) == len(places) else "; ".join(map(str, missing))
            words += [f"{arm_look(arm).label} ({where})"] if missing else []
        return f"Not run: {', '.join(words)}." if words else ""

    def left_out(self, what: str) -> str:
        """What a reader of a figure misses, and what a start's name means, in words."""
        trained = [STARTS[start] for start in (LONGER, FAST) if start in self.starts]
        other = f" {' and '.join(trained)}: fine-tuned, but for this trained as the preset says." if trained else ""
        return f"{what} were not run (map.md has which).{other}"


@lru_cache(maxsize=4)
def map_of(folder: Path) -> Map:
    """`Map`, read once."""
    return Map(folder)


def points(found: Estimate) -> str:
    """A difference in points; with its interval where the seeds are ENOUGH."""
    return (f"{found:+.1f}" if found.seeds >= ENOUGH else f"{found.mean:+.1f}").replace("-", "−")


def papers(method: str) -> Arm:
    """A method at the papers' scale."""
    scale = scale_of(method)
    return Arm(method, scale[1] if scale else None)


def _completed(table: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """A study's table with all of OWN's columns, what it leaves empty filled by the preset's settings."""
    table = table.reindex(columns=[*table, *(name for name in OWN if name not in table)])
    methods = settings.get("methods", {})
    for column in SCALE.values():
        scales = {method: own[column] for method, own in methods.items() if column in own}
        table[column] = table[column].fillna(table["method"].map(scales).astype(float))
    model = settings.get("model", {})
    own = {
        **OWN,
        "temperature": settings.get("temperature", OWN["temperature"]),
        "history": settings.get("data", {}).get("history", OWN["history"]),
        "path": OWN["path"] if model.get("fine_tuned", True) else model["path"],
    }
    return table.fillna(own)


def _paired(values: np.ndarray) -> Paired:
    """values: differences (seeds, benchmarks, problems)."""
    means = np.nanmean(values, -1)
    by_seed, by_benchmark = (tuple(means.mean(axis).tolist()) for axis in (1, 0))
    return Paired(**fields_of(estimate(values)), by_seed=by_seed, by_benchmark=by_benchmark)


def _arm_of(row: Mapping[Any, Any]) -> Arm:
    method = str(row["method"])
    scale = scale_of(method)
    proto = str(row["proto_model"])
    return Arm(method, float(row[SCALE[scale[0]]]) if scale else None, bool(row["history"]), STARTS.get(proto, proto))


def _order(method: str) -> int:
    return list(METHODS).index(method) if method in METHODS else len(METHODS)

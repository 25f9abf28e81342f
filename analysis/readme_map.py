"""What README files say of the map: `readme` fills it in."""

from functools import lru_cache
from pathlib import Path

import pandas as pd

from .entropy import nats
from .intervals import ENOUGH, of_seeds
from .map import SFT, SPIN, START, TSPIN, Found, Map, Place, map_of, points
from .reading import read_table
from .style import MISSING, Arm, arm_look
from .writing import number, pipes

NOT_RUN = "not run"
SURE = 0.05  # corrected p below which a difference is set in bold


def contrast(folder: Path, words: str, place: Place) -> str:
    """A contrast of the map after the last iteration, with its interval; bold where its corrected p is below SURE."""
    contrasts = map_of(folder).contrasts
    found = next((each for each in contrasts if (each.contrast.words, each.place) == (words, place)), None)
    if found is None:
        return NOT_RUN
    seeds = found.difference.seeds
    if seeds < ENOUGH:
        return f"{seeds} {'seed' if seeds == 1 else 'seeds'} yet"
    text = f"{points(found.difference)} (n={seeds})"
    return f"**{text}**" if found.corrected < SURE else text


def ends(folder: Path) -> str:
    """Avg of every arm of a preset's map after its last iteration, and −log π(y′) in nats, wherever it ran, a table."""
    known = map_of(folder)
    places = [place for place in known.places if known.ran(place)]
    rows = [[arm_look(arm).label, *(_end(known, arm, place) for place in places)] for arm in (SFT, *known.arms)]
    return pipes(["", *map(str, places)], [["start", *(_end(known, START, place) for place in places)], *rows])


def _end(known: Map, arm: Arm, place: Place) -> str:
    end = known.last(arm, place)
    if end.empty:
        return MISSING
    avg, entropy = number(end["avg"].mean(), ".1f"), end["nats"].mean()
    few = f" (n={len(end)})" if arm != START and len(end) < ENOUGH else ""  # the start is asked once
    return (avg if pd.isna(entropy) else f"{avg}; {entropy:.1f}") + few


def differences(folder: Path) -> str:
    """Every contrast of a preset's map wherever it ran, as a table; bold where its corrected p is below 0.05."""
    known = map_of(folder)
    found = {(each.contrast.words, each.place): each for each in known.contrasts}
    places = [place for place in known.places if any(place == there for _, there in found)]

    def cell(each: Found | None) -> str:
        if each is None:
            return MISSING
        text = f"{points(each.difference)}, {each.difference.seeds}"
        return f"**{text}**" if each.corrected < SURE else text

    rows = [
        [words, *(cell(found.get((words, place))) for place in places)]
        for words in dict.fromkeys(words for words, _ in found)
    ]
    return pipes(["", *map(str, places)], rows)


def leads(folder: Path) -> str:
    """T-SPIN − SPIN at the papers' scales by iteration, wherever both ran, as a table."""
    known = map_of(folder)
    iterations = range(int(known.table["iteration"].max()) + 1)
    rows = []
    for place in known.places:
        found = [known.difference(TSPIN, SPIN, place, iteration) for iteration in iterations]
        if found[-1]:
            texts = [f"{each:+.2f}".replace("-", "−") if each else MISSING for each in found]
            rows.append([f"{place}, n={found[-1].seeds}", *texts])
    return pipes(["iteration", *map(str, iterations)], rows)


def entropy(folder: Path, method: str, iteration: int, other: tuple[str, int]) -> str:
    """How many nats more y′ have, by mean −log π(y′), than another method's or iteration's: t interval over seeds."""
    table = _nats(folder).set_index(["method", "iteration", "seed"])["nats"].sort_index()
    return f"{of_seeds((table[method, iteration] - table[other]).dropna()):+.2f}".replace("-", "−")


@lru_cache(maxsize=1)
def _nats(folder: Path) -> pd.DataFrame:
    return nats(read_table(folder, "diagnostics"))

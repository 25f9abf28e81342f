"""Degeneration: what an iteration's responses and log-likelihoods look like when self-play goes wrong.

Reference-free training has no anchor: nothing but the data keeps log π(y′) from going to −∞. `measure` gives numbers by
which that is seen, `warnings` says which of them have gone too far, in words. Neither stops a run.

Numbers, of the y′ that the iteration trained on unless said otherwise:

length_ratio          mean tokens of y′ over those of y
unfinished_share      y′ cut at max_new_tokens
empty_share           y′ of white space
repetition            mean share of a response's 4-grams of tokens that it has more than once (0 for short ones)
distinct_bigrams      different bigrams of tokens over all bigrams, of the first MANY responses: more have fewer
equal_share           y′ that are y, from which nothing is learned
labelled_change       mean change of log π(y) by the training, nats a response
labelled_change_error its standard error, of two responses or more
synthetic_per_token   mean log π(y′) after the training, nats a token
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise

import pandas as pd

from tspin.data.responses import Response
from tspin.objectives import LABELLED, SYNTHETIC

MANY = 10_000
# Where a number is told. Each is a change that no healthy run of the committed evidence shows, or that leaves less than
# half of what training needs; they are for looking, not for stopping.
FALL_ERRORS = 3.0  # standard errors by which log π(y) fell: not noise
LENGTH_FACTOR = 2.0  # longer or shorter than the labels, and further off than the initial policy's responses
UNFINISHED = 0.5  # half of the responses have no end that could be learned
EMPTY = 0.05
REPETITION = 0.2  # above the labels' own
DISTINCT_FACTOR = 0.5  # of the labels' own
EQUAL = 0.5  # half of the prompts give no gradient
NATS_A_TOKEN = -10.0  # less likely than a guess among 22,000 tokens


def measure(
    synthetic: Sequence[Response], labelled: Sequence[Response], initial: Sequence[Response], table: pd.DataFrame | None
) -> dict[str, float]:
    """The numbers above; those of y and y0 that `warnings` compares with are named …/labelled and …/initial.

    synthetic, labelled, initial: y′, y and y0 of the same prompts; none of y′ for methods without self-play.
    table: the iteration's diagnostics (tspin.diagnostics.SCHEMA), if there are any.
    """
    found: dict[str, float] = {}
    if synthetic:
        found = {
            "length_ratio": _mean(len(r.ids) for r in synthetic) / _mean(len(r.ids) for r in labelled),
            "length_ratio/initial": _mean(len(r.ids) for r in initial) / _mean(len(r.ids) for r in labelled),
            "unfinished_share": _mean(not r.finished for r in synthetic),
            "empty_share": _mean(not r.text.strip() for r in synthetic),
            "repetition": _mean(repeated(r.ids) for r in synthetic),
            "repetition/labelled": _mean(repeated(r.ids) for r in labelled),
            "distinct_bigrams": distinct(r.ids for r in synthetic[:MANY]),
            "distinct_bigrams/labelled": distinct(r.ids for r in labelled[:MANY]),
            "equal_share": _mean(a.ids == b.ids for a, b in zip(synthetic, labelled, strict=True)),
        }
    if table is not None and len(table):
        rows = table[table["role"] == LABELLED]
        change = rows["after"] - rows["before"]
        found["labelled_change"] = float(change.mean())
        if len(change) > 1:
            found["labelled_change_error"] = float(change.std() / len(change) ** 0.5)
        rows = table[table["role"] == SYNTHETIC]
        if len(rows):
            found["synthetic_per_token"] = float((rows["after"] / rows["tokens"].clip(lower=1)).mean())
    return found


def warnings(found: Mapping[str, float]) -> dict[str, str]:
    """What has gone too far: a short name → the number in words. Numbers that are missing warn of nothing."""
    told = {}
    change, error = found.get("labelled_change"), found.get("labelled_change_error")
    if change is not None and error is not None and change < -FALL_ERRORS * error:
        told["labelled likelihood fell"] = f"log π(y) fell by {-change:.2f} nats a response (± {error:.2f})"
    ratio, initial = found.get("length_ratio"), found.get("length_ratio/initial")
    if ratio is not None and initial is not None:
        off, before = (max(r, 1 / r) if r else float("inf") for r in (ratio, initial))
        if off > LENGTH_FACTOR and off > before:
            told["length"] = f"y′ have {ratio:.2g} times the tokens of y ({initial:.2g} at the start)"
    if found.get("unfinished_share", 0.0) > UNFINISHED:
        told["unfinished"] = f"{found['unfinished_share']:.0%} of y′ never end"
    if found.get("empty_share", 0.0) > EMPTY:
        told["empty"] = f"{found['empty_share']:.0%} of y′ are empty"
    if found.get("repetition", 0.0) > found.get("repetition/labelled", 0.0) + REPETITION:
        told["repetition"] = (
            f"{found['repetition']:.0%} of a y′ is repeated ({found['repetition/labelled']:.0%} of a labelled response)"
        )
    if found.get("distinct_bigrams", 1.0) < DISTINCT_FACTOR * found.get("distinct_bigrams/labelled", 0.0):
        told["few distinct"] = (
            f"{found['distinct_bigrams']:.1%} of y′'s bigrams are different, of the labelled responses' "
            f"{found['distinct_bigrams/labelled']:.1%}"
        )
    if found.get("equal_share", 0.0) > EQUAL:
        told["equal to y"] = f"{found['equal_share']:.0%} of y′ are y: they teach nothing"
    if found.get("synthetic_per_token", 0.0) < NATS_A_TOKEN:
        told["likelihood collapse"] = f"log π(y′) is {found['synthetic_per_token']:.1f} nats a token after training"
    return told


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """The share of a sequence's n-grams that it has more than once; 0 where it is shorter than n."""
    grams = Counter(zip(*(ids[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return sum(count for count in grams.values() if count > 1) / total if total else 0.0


def distinct(sequences: Iterable[Sequence[int]]) -> float:
    """Different bigrams over all bigrams of some sequences; 1 where there is none."""
    grams = Counter(chain.from_iterable(pairwise(ids) for ids in sequences))
    return len(grams) / sum(grams.values()) if grams else 1.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)

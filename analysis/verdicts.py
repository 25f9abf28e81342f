"""What a part of a claim comes to: a verdict by its interval, and where it has none, what it would take.

A rule takes estimates and returns a verdict, or an array of verdicts for estimates that are arrays: the same rule that
judges the results judges simulated ones (`power.py`).

"surely above x": the 95 % interval lies above x. Of several comparisons, one is surely below where its p-value,
corrected for their number (Holm), is below 0.05. All are surely above where each interval is; that needs no correction.
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np

from .intervals import ENOUGH, Estimate, corrected

REPLICATED = "replicated"
CONTRADICTED = "contradicted"
UNDECIDED = "undecided"
NOT_TESTED = "not tested here"
BY_DEFINITION = "by definition"
VERDICTS = (REPLICATED, CONTRADICTED, UNDECIDED, NOT_TESTED)

SIGNIFICANT = 0.05
COUNTS = [*range(2, 21), 25, 30, 40, 50, 75, 100]  # numbers of seeds that are tried for "needs n seeds"

Rule = Callable[[Sequence[Estimate]], Any]


class Part(NamedTuple):
    """One part of a claim: what the results say, in words; the verdict; and why there is none."""

    text: str
    verdict: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.verdict} ({self.why})" if self.why else self.verdict


def decided(replicated: Any, contradicted: Any) -> Any:
    """The verdict, or verdicts, of two truth values; the first one counts where both are true."""
    found = np.select([replicated, contradicted], [REPLICATED, CONTRADICTED], UNDECIDED)
    return found if found.ndim else str(found)


def above(level: float, margin: float = 0.0) -> Rule:
    """One quantity is surely above `level` − `margin`; contradicted where it is surely below `level`."""
    return lambda found: decided(found[0].low > level - margin, found[0].high < level)


def below(level: float) -> Rule:
    """One quantity is surely below `level`; contradicted where it is surely above."""
    return lambda found: decided(found[0].high < level, found[0].low > level)


def within(low: float, high: float) -> Rule:
    """One quantity is surely between two levels; contradicted where it is surely outside."""
    return lambda found: decided(
        (found[0].low > low) & (found[0].high < high), (found[0].high < low) | (found[0].low > high)
    )


def all_above(found: Sequence[Estimate]) -> Any:
    """Every quantity is surely above zero; contradicted where one is surely below."""
    return decided(np.all([each.low > 0 for each in found], axis=0), one_below(found))


def all_below(found: Sequence[Estimate]) -> Any:
    """Every quantity is surely below zero; contradicted where one is surely above."""
    return decided(np.all([each.high < 0 for each in found], axis=0), one_below(found, -1))


def one_below(found: Sequence[Estimate], sign: int = 1) -> Any:
    """Whether one of several quantities is surely below zero (sign −1: above)."""
    p_values = corrected([each.p for each in found])
    return np.any([(sign * each.mean < 0) & (p < SIGNIFICANT) for each, p in zip(found, p_values, strict=True)], axis=0)


def judge(words: str, named: Mapping[str, Estimate], rule: Rule, form: str = "+.2f", tested: int = 0) -> Part:
    """A part by its rule. named: what it rests on, by name; the first `tested` of them show their corrected p."""
    found = list(named.values())
    p_values = corrected([each.p for each in found[:tested]]).tolist()
    texts = [f"{name} {each:{form}}".strip() for name, each in named.items()]
    texts = [f"{text} p {p:.2g}" for text, p in zip(texts, p_values, strict=False)] + texts[tested:]
    text = f"{words}: {'; '.join(texts)}"
    if min(each.seeds for each in found) < ENOUGH:
        return Part(text, UNDECIDED, f"needs {ENOUGH} seeds at least: fewer say too little of the spread between seeds")
    verdict = rule(found)
    return Part(text, verdict, needs(found, rule) if verdict == UNDECIDED else "")


def needs(found: Sequence[Estimate], rule: Rule) -> str:
    """With how many seeds the same means and variances would be decided; "more problems" where no number will do."""
    for count in COUNTS:
        if count > found[0].seeds and rule([each.at(count) for each in found]) != UNDECIDED:
            return f"needs {count} seeds"
    forbidden = rule([each.at(inf) for each in found]) == UNDECIDED
    return "needs more problems" if forbidden else f"needs more than {COUNTS[-1]} seeds"


def overall(parts: Sequence[Part]) -> str:
    """The common verdict of all parts, else how many have which; what is so by definition does not count."""
    verdicts = [part.verdict for part in parts if part.verdict != BY_DEFINITION]
    counts = [(verdicts.count(verdict), verdict) for verdict in VERDICTS if verdict in verdicts]
    if len(counts) == 1:
        return counts[0][1]
    (first, verdict), *others = counts
    return ", ".join([f"{first} of {len(verdicts)} parts {verdict}", *(f"{count} {other}" for count, other in others)])

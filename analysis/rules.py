"""How each of the paper's claims C1–C9 is judged: the same rules for every preset, fixed before the runs.

What a rule needs and the results do not hold raises Missing; what makes its test void here is a precondition. Either
leaves the part "not tested here".
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tspin.runs.files import read_json
from tspin.schema import misaligned

from .evidence import (
    Evidence,
    Missing,
    by_prompt,
    lengths_differ,
    not_fine_tuned,
    of_like_length,
    sft_gains_nothing,
    sft_has_other_labels,
    share_of_prompts,
)
from .grid import Spread, grid_of, spread_of
from .intervals import Estimate, of_seeds
from .scores import Policy, Weights, minus
from .verdicts import (
    BY_DEFINITION,
    COUNTS,
    NOT_TESTED,
    SIGNIFICANT,
    UNDECIDED,
    Part,
    Rule,
    above,
    all_above,
    all_below,
    decided,
    judge,
    one_below,
    within,
)

MARGIN = 0.5  # points of percent: a difference of Avg that is too small to matter
LARGE_SHARE = 0.25  # C3: from which share on the misaligned samples are "a large share" (the paper shows about half)
LITTLE = 3.0  # C8: points between the best and the worst cell of the grid
ABOUT_THE_SAME = (0.8, 1.25)  # C9: ratio of costs

Precondition = Callable[[Evidence], str | None]


class Question(NamedTuple):
    """A part of a claim that contrasts of Avg decide. tested: how many of them, the first, are corrected together."""

    words: str
    contrasts: dict[str, Weights]
    rule: Rule
    tested: int = 0
    unless: Sequence[Precondition] = ()

    @property
    def policies(self) -> list[Policy]:
        """Those that are compared."""
        return list(dict.fromkeys(policy for weights in self.contrasts.values() for policy in weights))


def none_below(count: int) -> Rule:
    """Of the estimates the first `count` are compared one by one, the last is about all of them.

    Contradicted where one is surely below zero; replicated where none is and the last is surely not below −MARGIN.
    """

    def rule(found: Sequence[Estimate]) -> Any:
        below = one_below(found[:count])
        return decided(~below & (found[-1].low > -MARGIN), below)

    return rule


def one_falls(count: int) -> Rule:
    """Of the estimates the first `count` are the steps between iterations, the rest the final policy − earlier ones.

    Replicated where a step surely falls. To have seen no fall does not contradict: the final policy must surely be no
    more than MARGIN below any earlier one (the last step is one of these differences).
    """

    def rule(found: Sequence[Estimate]) -> Any:
        falls = one_below(found[:count])
        return decided(falls, ~falls & np.all([each.low > -MARGIN for each in found[count - 1 :]], axis=0))

    return rule


def c1(evidence: Evidence) -> list[Question]:
    spin, tspin = evidence.course("spin"), evidence.course("tspin")
    falling = {**_steps(spin), **{f"{t}→{spin[-1][1]}": minus(spin[-1], (m, t)) for m, t in spin[:-2]}}
    rising = {**_steps(tspin), f"0→{tspin[-1][1]}": minus(tspin[-1], tspin[0])}
    return [
        Question("SPIN falls at least once", falling, one_falls(len(spin) - 1), len(spin) - 1),
        Question("T-SPIN never falls", rising, none_below(len(tspin) - 1), len(tspin) - 1),
    ]


def _steps(course: list[Policy]) -> dict[str, Weights]:
    """Each iteration of a course − the one before."""
    return {f"{a[1]}→{b[1]}": minus(b, a) for a, b in zip(course, course[1:], strict=False)}


def c2(evidence: Evidence) -> list[Question]:
    (last,), (first, second) = evidence.last("tspin"), evidence.last("tspin", "spin")
    sft = Question("final T-SPIN − SFT on all labels", {"": minus(last, ("sft", None))}, above(0),
                   unless=(sft_has_other_labels,))  # fmt: skip
    when = _unless_last(evidence, first, second)
    return [Question(f"final T-SPIN − final SPIN{when}", {"": minus(first, second)}, above(0)), sft]


def c5(evidence: Evidence) -> list[Question]:
    (last,) = evidence.last("tspin")
    unless = (not_fine_tuned, sft_has_other_labels, sft_gains_nothing)
    own, sft = evidence.labels
    share = f"{own / sft:.0%}".replace("%", " %") if own and sft else "25 %"
    words = f"T-SPIN on {share} − SFT on 100 %"
    return [Question(words, {"": minus(last, ("sft", None))}, above(0, MARGIN), unless=unless)]


def c6(evidence: Evidence) -> list[Question]:
    last, without = evidence.last("tspin", "tspin_no_history")
    when = _unless_last(evidence, last, without)
    return [
        Question("with it − without it, iteration 1", {"": minus(("tspin", 1), ("tspin_no_history", 1))}, above(0)),
        Question(f"final with it − final without it{when}", {"": minus(last, without)}, above(0)),
    ]


def _unless_last(evidence: Evidence, *policies: Policy) -> str:
    """Which iteration is compared, in words, where a method has gone on from there; else nothing."""
    further = [method for method, t in policies if evidence.last(method) != [(method, t)]]
    return f" (at iteration {policies[0][1]}, the last of both)" if further else ""


def c7(evidence: Evidence) -> list[Question]:
    with_it, without = (dict.fromkeys(t for _, t in evidence.course(m)) for m in ("tspin_reference", "tspin"))
    course = [t for t in with_it if t in without]
    each = {f"{t}": minus(("tspin", t), ("tspin_reference", t)) for t in course}
    after = course[1:]
    mean = {**{("tspin", t): 1 / len(after) for t in after}, **{("tspin_reference", t): -1 / len(after) for t in after}}
    whole = {f"mean of 1–{course[-1]}": mean}
    return [Question("T-SPIN − T-SPIN_ref by iteration", {**each, **whole}, none_below(len(each)), len(each))]


def c3(evidence: Evidence) -> list[Part]:
    pairs = evidence.pairs("spin", 1)
    raw, per_token = misaligned(pairs), misaligned(_per_token(pairs))
    tspin = evidence.pairs("tspin", 1)
    by_definition = share_of_prompts(tspin, misaligned(tspin))

    def share(words: str, table: pd.DataFrame, value: pd.Series) -> Part:
        return judge(words, {"": share_of_prompts(table, value)}, above(LARGE_SHARE), ".1%")

    def of_sums() -> Part:
        reason = lengths_differ(evidence, "spin", [1])
        part = share("SPIN's misaligned share", pairs, raw)
        return Part(part.text, NOT_TESTED, reason) if reason else part

    def matched() -> Part:
        like = of_like_length(pairs)
        return share(f"of its {len(like) / len(pairs):.0%} of pairs of like length", like, raw.loc[like.index])

    return [
        of_sums(),
        attempted(matched),
        share("of its pairs by means per token", pairs, per_token),
        Part(f"T-SPIN's, whose reward is α log π: {by_definition.mean:.1%}", BY_DEFINITION),
    ]


def _per_token(pairs: pd.DataFrame) -> pd.DataFrame:
    columns = ["reward_per_token", "log_likelihood_per_token"]
    return pairs[columns].rename(columns=lambda name: name.removesuffix("_per_token"))


def c4(evidence: Evidence) -> list[Part]:
    parts = []
    for label, method, iterations, rule in (
        ("SPIN", "spin", [1, 2], all_below),
        ("T-SPIN", "tspin", [t for t in evidence.iterations if evidence.scores.has(("tspin", t))], all_above),
    ):
        tables = {t: evidence.pairs(method, t) for t in iterations}
        for unit, column in (("nats", "log_likelihood"), ("nats per token", "log_likelihood_per_token")):
            found = {f"{t}": by_prompt(table, table[column]) for t, table in tables.items()}
            part = judge(f"{label} by iteration, {unit}", found, rule)
            reason = lengths_differ(evidence, method, iterations) if unit == "nats" else None
            parts.append(Part(part.text, NOT_TESTED, reason) if reason else part)
    return parts


def c8(evidence: Evidence) -> list[Part]:
    path = evidence.folder / "studies" / "grid.csv"
    if not path.is_file():
        raise Missing("not run: the α × β grid (make study STUDY=grid)")
    try:
        values = grid_of(pd.read_csv(path))
    except ValueError as error:
        raise Missing(f"the α × β grid cannot be read: {error}") from error
    if len(values) < 2:
        raise Missing("the α × β grid has fewer than two seeds with every cell")
    found = spread_of(values)
    text = (
        f"best − worst of {found.cells} cells {found.spread:.2f} [{found.low:.2f}, {found.high:.2f}] points without "
        f"noise ({found.observed:.2f} with it), permutation p {found.p:.2g}, {found.seeds} seeds"
    )
    if reason := noise_too_wide(found):
        return [Part(text, NOT_TESTED, reason)]
    verdict = varies_little(found)
    return [Part(text, verdict, _grid_needs(found) if verdict == UNDECIDED else "")]


def noise_too_wide(found: Spread) -> str | None:
    """Why a grid says nothing: cells that are equal would already look different."""
    reason = f"{found.cells} equal cells would span {found.noise:.1f} points by noise alone"
    return reason if found.noise >= LITTLE else None


def varies_little(found: Spread) -> str:
    """The spread is surely below LITTLE; contradicted where the cells differ and it is surely above."""
    return str(decided(found.high < LITTLE, found.p < SIGNIFICANT and found.low > LITTLE))


def _grid_needs(found: Spread) -> str:
    for count in COUNTS:
        if count > found.seeds and varies_little(found.at(count)) != UNDECIDED:
            return f"needs {count} seeds"
    return f"needs more than {COUNTS[-1]} seeds"


def c9(evidence: Evidence) -> list[Part]:
    path = evidence.folder / "provenance.json"
    runs = pd.DataFrame(read_json(path)["runs"] if path.is_file() else [])
    if runs.empty:
        raise Missing("not recorded: time and memory of the runs (provenance.json)")
    runs = runs[(runs["iteration"] > 0) & runs["method"].isin(["spin", "tspin"])]
    stages = [name for name in ("training_seconds", "sampling_seconds", "reference_seconds") if name in runs]
    runs = runs.assign(seconds=runs[stages].fillna(0).sum(axis=1))
    parts = []
    for what, column in (("time", "seconds"), ("peak memory", "peak_memory_bytes")):
        by_seed = runs.pivot_table(index="seed", columns="method", values=column, aggfunc="mean")
        if not {"spin", "tspin"} <= set(by_seed.columns):
            raise Missing(f"not measured: {what} of spin and tspin at iteration 1 and later")
        ratio = of_seeds((by_seed["tspin"] / by_seed["spin"]).dropna().tolist())
        parts.append(judge(f"{what} of an iteration, T-SPIN / SPIN", {"": ratio}, within(*ABOUT_THE_SAME), ".2f"))
    return parts


def attempted(make: Callable[[], Part]) -> Part:
    """A part, or where what it needs is not there, that it is not tested."""
    try:
        return make()
    except Missing as missing:
        return Part(str(missing), NOT_TESTED)

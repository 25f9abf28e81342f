"""The paper's claims C1–C9 against a preset's results: what the paper says, how it is judged, and the verdicts."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tspin.runs.files import write_json, write_text

from . import rules
from .evidence import Evidence, Missing, decoding
from .intervals import ENOUGH
from .power import Variation, chances
from .reading import read_paper, read_settings
from .rules import ABOUT_THE_SAME, LARGE_SHARE, LITTLE, MARGIN, Question, attempted
from .scorecard import scorecard_text
from .scores import Policy
from .verdicts import NOT_TESTED, SIGNIFICANT, Part, judge, overall

FIXED = "2026-11-26"
SEEN = "pocket from the cold base, seeds 0–4; trials from a fine-tuned start, seeds 0–4; nothing of seeds 10 and up"

FOUR_TIMES = (
    "Not tested against SFT that had not about four times the labels (said since 2026-11-27; no verdict was another)"
)


class Claim(NamedTuple):
    """A claim of the paper and how it is judged: its rule in words, and what makes its parts.

    questions: of Avg, where the claim is about that; parts: else.
    fixed: the day on which the rule was; seen: the results that were known then.
    """

    name: str
    statement: str
    where: str
    paper: str
    rule: str
    questions: Callable[[Evidence], list[Question]] | None = None
    parts: Callable[[Evidence], list[Part]] | None = None
    fixed: str = FIXED
    seen: str = SEEN


CLAIMS = [
    Claim("C1", "SPIN's average falls at least once over iterations 1–4; T-SPIN's never falls", "Table 1, Fig. 2",
          "SPIN −0.23, +1.30, −0.22, −0.30; T-SPIN +2.81, +0.23, +0.44, +0.24",
          f"A step falls where its paired change is below 0 with corrected p < {SIGNIFICANT}. SPIN: replicated where "
          f"one falls; contradicted where none does and the final policy is surely no more than {MARGIN} below any "
          "earlier one. T-SPIN: contradicted where one falls; replicated where none does and final − iteration 0 is "
          f"surely above −{MARGIN}.", questions=rules.c1),
    Claim("C2", "final T-SPIN beats final SPIN, and SFT on four times the labels", "Table 1", "+2.85; +1.46",
          f"paired difference surely above 0; contradicted where surely below. {FOUR_TIMES}", questions=rules.c2),
    Claim("C3", "at iteration 1 a large share of SPIN's samples has a positive reward gap and a negative "
          "log-likelihood gap; T-SPIN's cannot", "Fig. 3", "about half; none",
          f"share of training prompts after iteration 1 surely above {LARGE_SHARE:.0%}; contradicted where surely "
          "below: by sums (where y is 0.8 to 1.25 times as long as y′), of pairs of like length (|y| within 20 % of "
          "|y′|), and by means per token. T-SPIN's reward is α log π: its share is 0 by definition.", parts=rules.c3),
    Claim("C4", "mean log π(y) − log π(y′) is negative for SPIN at iterations 1 and 2, positive for T-SPIN at all",
          "Fig. 7", "signs only",
          "mean gap after each iteration's training surely on the claimed side of 0, at all of them; contradicted "
          "where one is surely on the other (corrected): in nats (where y is 0.8 to 1.25 times as long as y′), and per "
          "token",
          parts=rules.c4),
    Claim("C5", "T-SPIN with 25 % of the labels does as well as SFT with all", "Fig. 4a, Table 1", "+1.46",
          f"paired difference surely above −{MARGIN}; contradicted where surely below 0. Not tested where π_θ0 was not "
          "fine-tuned on the labels, or SFT on all does not surely gain over it. {FOUR_TIMES}", questions=rules.c5),
    Claim("C6", "without the historical advantage iteration 1 drops, and later iterations plateau lower",
          "Table 2, Fig. 5", "+3.11; +1.68",
          "what it adds: paired differences, with it − without it, surely above 0; contradicted where surely below",
          questions=rules.c6),
    Claim("C7", "T-SPIN does at least as well as T-SPIN_ref at every iteration", "Fig. 4b", "curves only",
          f"contradicted where a paired difference is surely below 0 (corrected); replicated where none is and their "
          f"mean from iteration 1 on is surely above −{MARGIN}", questions=rules.c7),
    Claim("C8", "the average at iteration 1 varies little over α, β ∈ {0.1, 0.3, 0.5, 1}²", "Fig. 4c", "a heat map",
          f"best − worst of the true cell means, without noise, surely below {LITTLE:g} points; contradicted where the "
          f"cells differ (permutation p < {SIGNIFICANT}) and it is surely above. Not tested where equal cells would "
          f"span {LITTLE:g} points by noise alone", parts=rules.c8),
    Claim("C9", "an iteration of T-SPIN costs about what one of SPIN costs", "text", "about equal",
          f"ratio of time (sampling, reference pass, training) and of peak memory surely within {ABOUT_THE_SAME}; "
          "contradicted where surely outside", parts=rules.c9),
]  # fmt: skip


def scorecard(folder: Path, claims: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """A row per claim: claim, statement, where, paper, rule, fixed, seen; ours (a text per part), parts (a verdict per
    part), why (a reason or "" per part), verdict (of all); still (benchmarks that cannot move, and why) and chances
    (what the rule can decide), of claims about Avg."""
    evidence = Evidence(folder)
    rows = []
    for claim in claims:
        parts, extra = judged(claim, evidence)
        fields = ("statement", "where", "paper", "rule", "fixed", "seen")
        rows.append(
            {
                "claim": claim.name,
                **{field: getattr(claim, field) for field in fields},
                "ours": [part.text for part in parts],
                "parts": [part.verdict for part in parts],
                "why": [part.why for part in parts],
                "verdict": overall(parts),
                **extra,
            }
        )
    return rows


def judged(claim: Claim, evidence: Evidence) -> tuple[list[Part], dict[str, Any]]:
    """A claim's parts; and of a claim about Avg what `scorecard` says of its benchmarks and its rule."""
    try:
        if claim.parts is not None:
            return claim.parts(evidence), {}
        assert claim.questions is not None
        questions = claim.questions(evidence)
    except Missing as missing:
        return [Part(str(missing), NOT_TESTED)], {}
    parts = [attempted(partial(answer, question, evidence)) for question in questions]
    asked = [question for question in questions if evidence.scores.has(*question.policies)]
    still = {label: why for question in asked for label, why in evidence.scores.still(question.policies).items()}
    return parts, {"still": still, "chances": [row for question in asked for row in decides(question, evidence)]}


def answer(question: Question, evidence: Evidence) -> Part:
    """A part about Avg; where some benchmarks cannot move, also by the others. Raises Missing."""
    found = {name: evidence.contrast(weights) for name, weights in question.contrasts.items()}
    part = judge(question.words, found, question.rule, tested=question.tested)
    if len(found) == 1 and (wide := next(iter(found.values())).wide):
        part = part._replace(text=f"{part.text}, benchmarks drawn too [{wide.low:+.2f}, {wide.high:+.2f}]")
    if still := evidence.scores.still(question.policies):
        moving = [label for label in evidence.scores.labels if label not in still]
        part = part._replace(text=f"{part.text}; {_of_moving(question, evidence, moving)}")
    reasons = [reason for precondition in question.unless if (reason := precondition(evidence))]
    return Part(part.text, NOT_TESTED, "; ".join(reasons)) if reasons else part


def _of_moving(question: Question, evidence: Evidence, moving: list[str]) -> str:
    if not moving:
        return "no benchmark can move"
    texts = [f"{name} {evidence.contrast(weights, moving):+.2f}" for name, weights in question.contrasts.items()]
    return f"over the {len(moving)} benchmarks that can move: {'; '.join(text.strip() for text in texts)}"


def decides(question: Question, evidence: Evidence) -> list[dict[str, Any]]:
    """What its rule can decide with these seeds: words, truth, and the chance of each verdict; a row per truth.

    None where it decides nothing: of too few seeds, or where a precondition fails.
    """
    few = len(evidence.scores.common_seeds(question.policies)) < ENOUGH
    if few or any(precondition(evidence) for precondition in question.unless):
        return []
    variation = Variation(evidence.scores, question.policies)
    contrasts = list(question.contrasts.values())
    return [
        {"words": question.words, "truth": truth, **chances(variation, contrasts, question.rule, averages)}
        for truth, averages in truths(question.policies).items()
    ]


def truths(policies: list[Policy]) -> dict[str, dict[Policy, float]]:
    """True averages under which a rule is tried: all equal; the paper's; and the paper's of the other method.

    The last two where the paper prints all of these policies, the last of SPIN and T-SPIN alone.
    """
    printed = paper_averages()
    exchanged = {"spin": "tspin", "tspin": "spin"}
    found = {"nothing changes": dict.fromkeys(policies, 0.0)}
    if all(policy in printed for policy in policies):
        found["as the paper prints"] = {policy: printed[policy] for policy in policies}
    if all(method in exchanged and (method, t) in printed for method, t in policies):
        found["SPIN and T-SPIN exchanged"] = {(method, t): printed[exchanged[method], t] for method, t in policies}
    return found


@cache
def paper_averages() -> dict[Policy, float]:
    """Avg of the policies that the paper prints (Zephyr-7B)."""
    table = read_paper("Zephyr-7B")
    iterations = [None if pd.isna(t) else int(t) for t in table["iteration"]]
    return dict(zip(zip(table["method"], iterations, strict=True), table["Avg"], strict=True))


def write_claims(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write a scorecard as `claims.json` and `claims.md`; return their paths."""
    write_json(folder / "claims.json", {"preset": folder.name, "claims": rows})
    write_text(folder / "claims.md", scorecard_text(rows, folder.name, decoding(read_settings(folder))))
    return [folder / "claims.json", folder / "claims.md"]

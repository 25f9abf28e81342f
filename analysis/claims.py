"""The paper's claims C1–C9 against a preset's results: one rule each, the same for every preset, fixed before the runs.

Words of a rule. "surely above x": the 95 % interval lies above x. "not below": it lies above x − MARGIN. A claim about
several comparisons takes p-values corrected for their number (Holm). A part that was not run leaves its claim
inconclusive, and the row says what to run.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from tspin.runs.files import read_json, write_json, write_text
from tspin.schema import gaps, misaligned

from .intervals import Estimate, estimate, of_seeds
from .reading import read_table
from .scores import Comparison, Policy, scores_of
from .writing import markdown

Verdict = Literal["replicated", "contradicted", "inconclusive at this scale"]
REPLICATED: Verdict = "replicated"
CONTRADICTED: Verdict = "contradicted"
OPEN: Verdict = "inconclusive at this scale"
OPPOSITE = {REPLICATED: CONTRADICTED, CONTRADICTED: REPLICATED, OPEN: OPEN}

MARGIN = 0.5  # points of percent: a difference of Avg that is too small to matter
SIGNIFICANT = 0.05
LARGE_SHARE = 0.25  # C3: from which share on the misaligned samples are "a large share" (the paper shows about half)
LITTLE = 3.0  # C8: points between the best and the worst cell of the grid
ABOUT_THE_SAME = (0.8, 1.25)  # C9: ratio of costs


class Missing(Exception):
    """What a claim needs and the results do not hold; its text says what to run."""


class Finding(NamedTuple):
    """One part of a claim: what the results say, in words, and what that means for the claim."""

    text: str
    verdict: Verdict


class Claim(NamedTuple):
    """A claim of the paper and how it is decided."""

    name: str
    statement: str
    where: str
    paper: str
    test: str
    decides: str
    findings: Callable[["Evidence"], list[Finding]]


class Evidence:
    """A preset's results as the claims read them, each file once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.scores = scores_of(folder)
        self.iterations = sorted({t for m, t in self.scores.policies() if m in ("spin", "tspin") and t is not None})

    def need(self, *policies: Policy) -> None:
        """Raise Missing unless all of them were run."""
        absent = [m if t is None else f"{m} {t}" for m, t in policies if not self.scores.has((m, t))]
        if absent:
            methods = ",".join(dict.fromkeys(name.split()[0] for name in absent))
            raise Missing(f"not run: {', '.join(absent)} (tspin run --preset {self.folder.name} --methods {methods})")

    def course(self, method: str) -> list[Policy]:
        """A method's policies over the iterations that were run; two at least."""
        self.need((method, 0), (method, 1))
        return [(method, t) for t in self.iterations if self.scores.has((method, t))]

    def last(self, method: str) -> Policy:
        """The policy that a method ended with."""
        return self.course(method)[-1]

    def changes(self, method: str) -> list[Comparison]:
        """Each iteration of a method against the one before."""
        course = self.course(method)
        return self.scores.compare(list(zip(course[1:], course[:-1], strict=True)))

    @cached_property
    def all_gaps(self) -> pd.DataFrame:
        """`tspin.schema.gaps` of all that was run."""
        return gaps(read_table(self.folder, "diagnostics"))

    def gaps(self, method: str, iteration: int) -> pd.DataFrame:
        """A row per seed and prompt with the gaps of y over y′ after training: reward, log_likelihood."""
        table = self.all_gaps
        table = table[(table["method"] == method) & (table["iteration"] == iteration)]
        if table.empty:
            raise Missing(f"not run: diagnostics of {method} {iteration}")
        return table


def sign(estimate: Estimate, above: float = 0.0, margin: float = 0.0) -> Verdict:
    """Whether a quantity that should be `above` a number is, by its interval; a little (`margin`) below counts too."""
    if estimate.low > above - margin:
        return REPLICATED
    return CONTRADICTED if estimate.high < above else OPEN


def falls(steps: list[Comparison]) -> bool:
    """Whether one of the steps surely falls."""
    return any(step.difference.mean < 0 and step.p < SIGNIFICANT for step in steps)


def never_falls(steps: list[Comparison]) -> Verdict:
    """Whether none of the steps falls: surely none, or surely one."""
    if falls(steps):
        return CONTRADICTED
    return REPLICATED if all(step.difference.low > -MARGIN for step in steps) else OPEN


def per_seed(table: pd.DataFrame, value: pd.Series) -> Estimate:
    """The mean over prompts of each seed; its interval by bootstrap over seeds and prompts."""
    arrays = [rows.to_numpy(float) for _, rows in value.groupby(table["seed"])]
    stacked = np.full((len(arrays), 1, max(map(len, arrays))), np.nan)
    for row, array in zip(stacked, arrays, strict=True):
        row[0, : len(array)] = array
    return estimate(stacked)


def _better(evidence: Evidence, first: Policy, second: Policy, words: str, margin: float = 0.0) -> Finding:
    evidence.need(first, second)
    difference = estimate(evidence.scores.differences(first, second))
    return Finding(f"{words}: {difference:+.2f}", sign(difference, margin=margin))


def c1(evidence: Evidence) -> list[Finding]:
    spin, tspin = evidence.changes("spin"), evidence.changes("tspin")
    texts = ["; ".join(f"{step.second[1]}→{step.first[1]} {step}" for step in steps) for steps in (spin, tspin)]
    return [
        Finding(f"SPIN falls at least once: {texts[0]}", OPPOSITE[never_falls(spin)]),
        Finding(f"T-SPIN never falls: {texts[1]}", never_falls(tspin)),
    ]


def c2(evidence: Evidence) -> list[Finding]:
    last = evidence.last("tspin")
    return [
        _better(evidence, last, evidence.last("spin"), "final T-SPIN − final SPIN"),
        _better(evidence, last, ("sft", None), "final T-SPIN − SFT on all labels"),
    ]


def c3(evidence: Evidence) -> list[Finding]:
    tables = [evidence.gaps(method, 1) for method in ("spin", "tspin")]
    spin, tspin = (per_seed(table, misaligned(table)) for table in tables)
    return [
        Finding(f"SPIN's misaligned share {spin:.1%}", sign(spin, above=LARGE_SHARE)),
        Finding(f"T-SPIN's {tspin:.1%}", REPLICATED if tspin.mean == 0 else CONTRADICTED),
    ]


def c4(evidence: Evidence) -> list[Finding]:
    findings = []
    for method, iterations in (("spin", [1, 2]), ("tspin", evidence.iterations)):
        for iteration in iterations:
            table = evidence.gaps(method, iteration)
            gap = per_seed(table, table["log_likelihood"])
            verdict = sign(gap) if method == "tspin" else OPPOSITE[sign(gap)]
            findings.append(Finding(f"{method} {iteration}: {gap:+.2f} nats", verdict))
    return findings


def c5(evidence: Evidence) -> list[Finding]:
    return [_better(evidence, evidence.last("tspin"), ("sft", None), "T-SPIN on 25 % − SFT on 100 %", MARGIN)]


def c6(evidence: Evidence) -> list[Finding]:
    without = evidence.course("tspin_no_history")
    return [
        _better(evidence, without[0], without[1], "without it, iteration 0 − iteration 1"),
        _better(evidence, evidence.last("tspin"), without[-1], "final with − final without"),
    ]


def c7(evidence: Evidence) -> list[Finding]:
    steps = evidence.scores.compare([(("tspin", t), (name, t)) for name, t in evidence.course("tspin_reference")])
    text = "; ".join(f"{step.first[1]}: {step}" for step in steps)
    return [Finding(f"T-SPIN − T-SPIN_ref by iteration: {text}", never_falls(steps))]


def c8(evidence: Evidence) -> list[Finding]:
    path = evidence.folder / "studies" / "grid.csv"
    if not path.is_file():
        raise Missing("not run: the α × β grid (make study STUDY=grid)")
    grid = pd.read_csv(path)
    grid = grid[grid["iteration"] == 1]  # β does not act before
    cells = grid.groupby(["alpha", "beta"])["avg"].mean()
    difference, half = float(cells.max() - cells.min()), 1.96 * float(np.sqrt((grid["avg_se"] ** 2).mean() * 2))
    spread = Estimate(difference, max(difference - half, 0.0), difference + half, grid["seed"].nunique())
    words = f"best − worst of {len(cells)} cells {spread} points, from {cells.min():.2f} to {cells.max():.2f}"
    return [Finding(words, OPPOSITE[sign(spread, above=LITTLE)])]


def c9(evidence: Evidence) -> list[Finding]:
    runs = pd.DataFrame(read_json(evidence.folder / "provenance.json")["runs"])
    runs = runs[(runs["iteration"] > 0) & runs["method"].isin(["spin", "tspin"])]
    stages = [name for name in ("training_seconds", "sampling_seconds", "reference_seconds") if name in runs]
    runs = runs.assign(seconds=runs[stages].fillna(0).sum(axis=1))
    findings = []
    for what, column in (("time", "seconds"), ("peak memory", "peak_memory_bytes")):
        by_seed = runs.pivot_table(index="seed", columns="method", values=column, aggfunc="mean")
        if not {"spin", "tspin"} <= set(by_seed.columns):
            raise Missing(f"not measured: {what} of spin and tspin at iteration 1 and later")
        ratio = of_seeds((by_seed["tspin"] / by_seed["spin"]).dropna().tolist())
        low, high = ABOUT_THE_SAME
        outside = ratio.high < low or ratio.low > high
        verdict = REPLICATED if ratio.low > low and ratio.high < high else CONTRADICTED if outside else OPEN
        findings.append(Finding(f"{what} of an iteration, T-SPIN / SPIN {ratio}", verdict))
    return findings


CLAIMS = [
    Claim("C1", "SPIN's average falls at least once over iterations 1–4; T-SPIN's never falls", "Table 1, Fig. 2",
          "SPIN −0.23, +1.30, −0.22, −0.30; T-SPIN +2.81, +0.23, +0.44, +0.24",
          f"paired change of Avg; falls: corrected p < {SIGNIFICANT}; never falls: every interval above −{MARGIN}",
          "more seeds, or more problems per benchmark", c1),
    Claim("C2", "final T-SPIN beats final SPIN, and SFT on four times the labels", "Table 1", "+2.85; +1.46",
          "paired difference of Avg surely above 0", "more seeds", c2),
    Claim("C3", "at iteration 1 a large share of SPIN's samples has a positive reward gap and a negative "
          "log-likelihood gap; T-SPIN's cannot", "Fig. 3", "about half; none",
          f"share of training prompts after iteration 1: surely above {LARGE_SHARE:.0%}; exactly none",
          "longer responses, where a reference weighs more", c3),
    Claim("C4", "mean log π(y) − log π(y′) is negative for SPIN at iterations 1 and 2, positive for T-SPIN at all",
          "Fig. 7", "signs only", "mean gap after the iteration's training: surely on the claimed side of 0",
          "more seeds", c4),
    Claim("C5", "T-SPIN with 25 % of the labels does as well as SFT with all", "Fig. 4a, Table 1", "+1.46",
          f"paired difference of Avg surely above −{MARGIN}", "a base model that knows more of the tasks", c5),
    Claim("C6", "without the historical advantage iteration 1 drops, and later iterations plateau lower",
          "Table 2, Fig. 5", "−0.30; +1.68", "paired differences of Avg surely above 0", "more seeds", c6),
    Claim("C7", "T-SPIN does at least as well as T-SPIN_ref at every iteration", "Fig. 4b", "curves only",
          f"paired differences: none surely below 0 (corrected), every interval above −{MARGIN}", "more seeds", c7),
    Claim("C8", "the average at iteration 1 varies little over α, β ∈ {0.1, 0.3, 0.5, 1}²", "Fig. 4c", "a heat map",
          f"best cell − worst cell surely below {LITTLE} points", "more seeds per cell", c8),
    Claim("C9", "an iteration of T-SPIN costs about what one of SPIN costs", "text", "about equal",
          f"ratio of time (sampling, reference pass, training) and of peak memory surely within {ABOUT_THE_SAME}",
          "a GPU of its own: a shared machine's clock wanders", c9),
]  # fmt: skip


def scorecard(folder: Path) -> list[dict[str, Any]]:
    """A row per claim: name, statement, where, paper, ours, test, verdict, decides (what would settle it)."""
    evidence = Evidence(folder)
    rows = []
    for claim in CLAIMS:
        try:
            findings = claim.findings(evidence)
        except Missing as missing:
            findings = [Finding(str(missing), OPEN)]
        parts = [finding.verdict for finding in findings]
        rows.append(
            {
                "claim": claim.name,
                "statement": claim.statement,
                "where": claim.where,
                "paper": claim.paper,
                "ours": [finding.text for finding in findings],
                "parts": parts,
                "test": claim.test,
                "verdict": overall(parts),
                "decides": claim.decides,
            }
        )
    return rows


def overall(parts: list[Verdict]) -> Verdict:
    """A claim is contradicted where one of its parts is, replicated where all are."""
    if CONTRADICTED in parts:
        return CONTRADICTED
    return REPLICATED if all(part == REPLICATED for part in parts) else OPEN


def write_claims(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write a scorecard as `claims.json` and `claims.md`; return their paths."""
    verdicts = pd.DataFrame(
        {
            "": row["claim"],
            "the paper says": f"{row['statement']} ({row['where']})",
            "its numbers": row["paper"],
            "ours": "\n".join(f"{text} → {part}" for text, part in zip(row["ours"], row["parts"], strict=True)),
            "verdict": f"**{row['verdict']}**",
        }
        for row in rows
    )
    rules = pd.DataFrame(
        [(row["claim"], row["test"], row["decides"]) for row in rows], columns=["", "rule", "what would decide it"]
    )
    head = (
        f"# The paper's claims on the {folder.name} preset\n\n"
        "Differences are points of the average, intervals 95 % (bootstrap over seeds and problems), p-values corrected "
        "for their number (Holm). The rules are in `analysis/claims.py`. Written by `tspin claims`."
    )
    write_json(folder / "claims.json", {"preset": folder.name, "claims": rows})
    tables = [markdown(cells, align="left") for cells in (verdicts, rules)]
    write_text(folder / "claims.md", "\n\n".join([head, *tables]) + "\n")
    return [folder / "claims.json", folder / "claims.md"]

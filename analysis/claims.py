"""The paper's claims C1–C9 against a preset's results: one rule each, the same for every preset, fixed before the runs.

Words of a rule. "surely above x": the 95 % interval lies above x. "not below": it lies above x − MARGIN. A claim about
several comparisons takes p-values corrected for their number (Holm). A part that was not run leaves its claim
inconclusive, and the row says what to run.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from tspin.runs.stages import read_json

from . import reading as load
from .intervals import Estimate, estimate, of_seeds
from .scores import Comparison, Policy, Scores, scores_of

Verdict = Literal["replicated", "contradicted", "inconclusive at this scale"]
REPLICATED: Verdict = "replicated"
CONTRADICTED: Verdict = "contradicted"
OPEN: Verdict = "inconclusive at this scale"

MARGIN = 0.5  # points of percent: a difference of Avg that is too small to matter
SIGNIFICANT = 0.05
LARGE_SHARE = 0.25  # C3: from which share on the misaligned samples are "a large share" (the paper shows about half)
LITTLE = 3.0  # C8: points between the best and the worst cell of the grid
ABOUT_THE_SAME = (0.8, 1.25)  # C9: ratio of costs


class Missing(Exception):
    """What a claim needs and the results do not hold; its text says what to run."""


class Finding(NamedTuple):
    """One part of a claim: what was found, in words, and what it says about the claim."""

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
    """A preset's results as the claims read them."""

    def __init__(self, preset: str, results: Path = Path("results")):
        self.preset, self.results = preset, results
        self.scores: Scores = scores_of(preset, results)
        self.iterations = sorted({t for m, t in self.scores.policies() if m in ("spin", "tspin") and t is not None})

    def need(self, *policies: Policy) -> None:
        """Raise Missing unless all of them were run."""
        absent = [m if t is None else f"{m} {t}" for m, t in policies if not self.scores.has((m, t))]
        if absent:
            methods = ",".join(dict.fromkeys(name.split()[0] for name in absent))
            raise Missing(f"not run: {', '.join(absent)} (tspin run --preset {self.preset} --methods {methods})")

    def course(self, method: str) -> list[Policy]:
        """A method's policies over the iterations that were run; two at least."""
        self.need((method, 0), (method, 1))
        return [(method, t) for t in self.iterations if self.scores.has((method, t))]

    def last(self, method: str) -> Policy:
        """The policy that a method ended with."""
        return self.course(method)[-1]

    def diagnostics(self, method: str, iteration: int) -> pd.DataFrame:
        """One row a prompt and seed with the gaps of y over y′ after training: reward, log_likelihood."""
        table = load.parquet("diagnostics", self.preset, self.results)
        table = table[(table["method"] == method) & (table["iteration"] == iteration)]
        if table.empty:
            raise Missing(f"not run: diagnostics of {method} {iteration}")
        by_role = {role: rows.set_index(["seed", "prompt_id"]) for role, rows in table.groupby("role")}
        y, other = by_role["labelled"], by_role["synthetic"]
        gaps = {"reward": y["reward_after"] - other["reward_after"], "log_likelihood": y["after"] - other["after"]}
        return pd.DataFrame(gaps).reset_index()


def sign(found: Estimate, margin: float = 0.0) -> Verdict:
    """Whether a quantity that should be positive is: by its interval."""
    if found.low > -margin:
        return REPLICATED
    return CONTRADICTED if found.high < 0 else OPEN


def falls(steps: list[Comparison]) -> list[Comparison]:
    """The steps that surely fall."""
    return [step for step in steps if step.difference.mean < 0 and step.p < SIGNIFICANT]


def per_seed(table: pd.DataFrame, value: pd.Series) -> Estimate:
    """The mean over prompts of each seed; its interval by bootstrap over seeds and prompts."""
    arrays = [rows.to_numpy(float) for _, rows in value.groupby(table["seed"])]
    width = max(map(len, arrays))
    stacked = np.full((len(arrays), 1, width), np.nan)
    for row, array in zip(stacked, arrays, strict=True):
        row[0, : len(array)] = array
    return estimate(stacked)


def _changes(evidence: Evidence, method: str) -> list[Comparison]:
    course = evidence.course(method)
    return evidence.scores.compare(list(zip(course[1:], course[:-1], strict=True)))


def _steps_text(steps: list[Comparison]) -> str:
    return "; ".join(
        f"{step.second[1]}→{step.first[1]} {step.difference.mean:+.2f} "
        f"[{step.difference.low:+.2f}, {step.difference.high:+.2f}] p {step.p:.2g}"
        for step in steps
    )


def c1(evidence: Evidence) -> list[Finding]:
    spin, tspin = _changes(evidence, "spin"), _changes(evidence, "tspin")
    if falls(spin):
        spin_verdict = REPLICATED
    else:
        spin_verdict = CONTRADICTED if all(s.difference.low > -MARGIN for s in spin) else OPEN
    if falls(tspin):
        tspin_verdict = CONTRADICTED
    else:
        tspin_verdict = REPLICATED if all(s.difference.low > -MARGIN for s in tspin) else OPEN
    return [
        Finding(f"SPIN falls at least once: {_steps_text(spin)}", spin_verdict),
        Finding(f"T-SPIN never falls: {_steps_text(tspin)}", tspin_verdict),
    ]


def _better(evidence: Evidence, first: Policy, second: Policy, words: str, margin: float = 0.0) -> Finding:
    evidence.need(first, second)
    found = estimate(evidence.scores.differences(first, second))
    return Finding(f"{words}: {found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]", sign(found, margin))


def c2(evidence: Evidence) -> list[Finding]:
    last = evidence.last("tspin")
    return [
        _better(evidence, last, evidence.last("spin"), "final T-SPIN − final SPIN"),
        _better(evidence, last, ("sft", None), "final T-SPIN − SFT on all labels"),
    ]


def c3(evidence: Evidence) -> list[Finding]:
    shares = {}
    for method in ("spin", "tspin"):
        table = evidence.diagnostics(method, 1)
        shares[method] = per_seed(table, (table["reward"] > 0) & (table["log_likelihood"] < 0))
    mean, low, high, seeds = shares["spin"]
    spin = Estimate(mean - LARGE_SHARE, low - LARGE_SHARE, high - LARGE_SHARE, seeds)
    none = shares["tspin"].mean == 0
    return [
        Finding(f"SPIN's misaligned share {_percent(shares['spin'])}", sign(spin)),
        Finding(f"T-SPIN's {_percent(shares['tspin'])}", REPLICATED if none else CONTRADICTED),
    ]


def _percent(found: Estimate) -> str:
    return f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"


def c4(evidence: Evidence) -> list[Finding]:
    findings = []
    for method, iterations, wanted in (("spin", (1, 2), -1), ("tspin", evidence.iterations, 1)):
        for iteration in iterations:
            table = evidence.diagnostics(method, iteration)
            gap = per_seed(table, wanted * table["log_likelihood"])
            low, high = sorted((wanted * gap.low, wanted * gap.high))
            text = f"{method} {iteration}: {wanted * gap.mean:+.2f} [{low:+.2f}, {high:+.2f}] nats"
            findings.append(Finding(text, sign(gap)))
    return findings


def c5(evidence: Evidence) -> list[Finding]:
    return [_better(evidence, evidence.last("tspin"), ("sft", None), "T-SPIN on 25 % − SFT on 100 %", MARGIN)]


def c6(evidence: Evidence) -> list[Finding]:
    evidence.need(("tspin_no_history", 0), ("tspin_no_history", 1))
    own, full = evidence.last("tspin_no_history"), evidence.last("tspin")
    return [
        _better(evidence, ("tspin_no_history", 0), ("tspin_no_history", 1), "without it, iteration 0 − iteration 1"),
        _better(evidence, full, own, "final with − final without"),
    ]


def c7(evidence: Evidence) -> list[Finding]:
    shared = [(("tspin", t), ("tspin_reference", t)) for _, t in evidence.course("tspin_reference")]
    steps = evidence.scores.compare(shared)
    text = "; ".join(
        f"{s.first[1]}: {s.difference.mean:+.2f} [{s.difference.low:+.2f}, {s.difference.high:+.2f}] p {s.p:.2g}"
        for s in steps
    )
    if falls(steps):
        verdict = CONTRADICTED
    else:
        verdict = REPLICATED if all(s.difference.low > -MARGIN for s in steps) else OPEN
    return [Finding(f"T-SPIN − T-SPIN_ref by iteration: {text}", verdict)]


def c8(evidence: Evidence) -> list[Finding]:
    path = evidence.results / evidence.preset / "studies" / "grid.csv"
    if not path.is_file():
        raise Missing("not run: the α × β grid (make study STUDY=grid)")
    grid = pd.read_csv(path)
    grid = grid[grid["iteration"] == 1]  # β does not act before
    cells = grid.groupby(["alpha", "beta"])["avg"].mean()
    spread = float(cells.max() - cells.min())
    error = float(np.sqrt((grid["avg_se"] ** 2).mean() * 2))
    low, high = max(spread - 1.96 * error, 0.0), spread + 1.96 * error
    verdict = REPLICATED if high < LITTLE else CONTRADICTED if low > LITTLE else OPEN
    words = f"best − worst of {len(cells)} cells {spread:.2f} [{low:.2f}, {high:.2f}] points, from {cells.min():.2f}"
    return [Finding(f"{words} to {cells.max():.2f}", verdict)]


def c9(evidence: Evidence) -> list[Finding]:
    path = evidence.results / evidence.preset / "provenance.json"
    runs = pd.DataFrame(read_json(path)["runs"])
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
          "more seeds, or more problems a benchmark", c1),
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
          f"best cell − worst cell surely below {LITTLE} points", "more seeds a cell", c8),
    Claim("C9", "an iteration of T-SPIN costs about what one of SPIN costs", "text", "about equal",
          f"ratio of time (sampling, reference pass, training) and of peak memory surely within {ABOUT_THE_SAME}",
          "a GPU of its own: a shared machine's clock wanders", c9),
]  # fmt: skip


def scorecard(preset: str, results: Path = Path("results")) -> list[dict]:
    """A row a claim: name, statement, where, paper, ours, test, verdict, decides (what would settle it)."""
    evidence = Evidence(preset, results)
    rows = []
    for claim in CLAIMS:
        try:
            findings = claim.findings(evidence)
        except Missing as missing:
            findings = [Finding(str(missing), OPEN)]
        rows.append(
            {
                "claim": claim.name,
                "statement": claim.statement,
                "where": claim.where,
                "paper": claim.paper,
                "ours": [finding.text for finding in findings],
                "parts": [finding.verdict for finding in findings],
                "test": claim.test,
                "verdict": overall([finding.verdict for finding in findings]),
                "decides": claim.decides,
            }
        )
    return rows


def overall(parts: list[Verdict]) -> Verdict:
    """A claim is contradicted where one of its parts is, replicated where all are."""
    if CONTRADICTED in parts:
        return CONTRADICTED
    return REPLICATED if all(part == REPLICATED for part in parts) else OPEN


def write_claims(preset: str, results: Path = Path("results")) -> list[Path]:
    """Write `results/<preset>/claims.json` and `claims.md`; return their paths."""
    rows, folder = scorecard(preset, results), results / preset
    lines = [
        f"# The paper's claims on the {preset} preset",
        "",
        "Differences are points of the average, intervals 95 % (bootstrap over seeds and problems), p-values corrected "
        "for their number (Holm). The rules are in `analysis/claims.py`. Written by `tspin claims`.",
        "",
        "| | the paper says | its numbers | ours | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        parts = "<br>".join(f"{text} → {part}" for text, part in zip(row["ours"], row["parts"], strict=True))
        says = f"{row['statement']} ({row['where']})"
        lines.append(f"| {row['claim']} | {says} | {row['paper']} | {parts} | **{row['verdict']}** |")
    lines += ["", "| | rule | what would decide it |", "| --- | --- | --- |"]
    lines += [f"| {row['claim']} | {row['test']} | {row['decides']} |" for row in rows]
    content = json.dumps({"preset": preset, "claims": rows}, indent=2, ensure_ascii=False) + "\n"
    return [
        load.write_atomically(folder / "claims.json", content.encode()),
        load.write_atomically(folder / "claims.md", ("\n".join(lines) + "\n").encode()),
    ]

"""A preset's results as the claims read them, each file once, and what a claim must find there to be tested at all."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from tspin.schema import BASE, pairs

from .intervals import Estimate, Share, estimate, share
from .reading import labels_of, read_settings, read_table
from .scores import Policy, Weights, scores_of

PAIR = ("spin", "tspin")
ALIKE = (0.8, 1.25)  # ratio of lengths of y and y′ within which sums of log-probabilities are compared
MATCHED = 0.2  # pairs are of like length where |y| is within this share of |y′|
FEW = 20  # pairs of a seed: fewer say nothing of a share


class Missing(Exception):
    """What a claim needs and the results do not hold; its text says what to run."""


class Evidence:
    """A preset's results folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.scores = scores_of(folder)
        self.iterations = sorted({t for m, t in self.scores.policies() if m in PAIR and t is not None})
        self._gaps: dict[Policy, pd.DataFrame] = {}

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

    def last(self, *methods: str) -> list[Policy]:
        """The policies of some methods after the last iteration that all of them have."""
        common = set.intersection(*({t for _, t in self.course(method)} for method in methods))
        return [(method, max(t for t in common if t is not None)) for method in methods]

    def contrast(self, weights: Weights, labels: Sequence[str] = ()) -> Estimate:
        """A contrast of policies, over all benchmarks or over those named.

        Raises Missing where they share no seed, or where more is not known to be better.
        """
        self.need(*weights)
        if not self.scores.shares:
            raise Missing("no column is a share of problems: whether more is better is not known")
        if not self.scores.common_seeds(list(weights)):
            seeds = {policy: " ".join(map(str, self.scores.seeds(policy))) for policy in weights}
            raise Missing(f"no seed in common: {', '.join(f'{m} ({seeds[m, t]})' for m, t in weights)}")
        return estimate(self.scores.contrast(weights, labels))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that the results were made with; empty where they were not recorded."""
        return read_settings(self.folder)

    @property
    def labels(self) -> tuple[int | None, int | None]:
        """How many labels self-play and SFT trained on; None: all of the data set, or not recorded."""
        return labels_of(self.folder), labels_of(self.folder, "sft")

    @cached_property
    def _pairs(self) -> pd.DataFrame:
        if not (self.folder / "diagnostics.parquet").is_file():
            raise Missing("not recorded: log-likelihoods of responses (diagnostics.parquet)")
        table = read_table(self.folder, "diagnostics")
        return pairs(table[table["method"].isin(PAIR)])

    def pairs(self, method: str, iteration: int) -> pd.DataFrame:
        """A row per seed and prompt after training: tokens of y and y′, gaps of y over y′, in nats and per token.

        Columns: seed, prompt_id, tokens, tokens_synthetic, reward, log_likelihood, reward_per_token,
        log_likelihood_per_token. Computed once. Raises Missing where the iteration was not run.
        """
        if (method, iteration) not in self._gaps:
            self._gaps[method, iteration] = self._gaps_of(method, iteration)
        return self._gaps[method, iteration]

    def _gaps_of(self, method: str, iteration: int) -> pd.DataFrame:
        table = self._pairs
        table = table[(table["method"] == method) & (table["iteration"] == iteration)]
        if table.empty:
            raise Missing(f"not run: diagnostics of {method} {iteration}")
        found = table[["seed", "prompt_id", "tokens", "tokens_synthetic"]].copy()
        for name, column in (("reward", "reward_after"), ("log_likelihood", "after")):
            own, other = table[column], table[f"{column}_synthetic"]
            found[name] = own - other
            found[f"{name}_per_token"] = own / table["tokens"] - other / table["tokens_synthetic"]
        return found

    def length_ratio(self, method: str, iteration: int) -> float:
        """Mean tokens of y over mean tokens of the y′ that the iteration trained on."""
        table = self.pairs(method, iteration)
        return float(table["tokens"].mean() / table["tokens_synthetic"].mean())


def by_prompt(table: pd.DataFrame, value: pd.Series) -> Estimate:
    """The mean over prompts and seeds of a value per row; the seeds share their prompts."""
    wide = table.assign(value=value.astype(float)).pivot(index="seed", columns="prompt_id", values="value")
    return estimate(wide.to_numpy(float)[:, None, :])


def share_of_prompts(table: pd.DataFrame, value: pd.Series) -> Share:
    """The share of prompts for which a truth value per row holds, with Wilson's interval at none and at all."""
    return share(by_prompt(table, value), int(table.groupby("seed").size().min()))


def of_like_length(table: pd.DataFrame) -> pd.DataFrame:
    """The pairs whose y is about as long as its y′. Raises Missing where a seed has too few."""
    near = (table["tokens"] - table["tokens_synthetic"]).abs() <= MATCHED * table["tokens_synthetic"]
    fewest = int(near.groupby(table["seed"]).sum().min())
    if fewest < FEW:
        raise Missing(f"a seed has {fewest} pairs of like length, fewer than {FEW}")
    return table[near]


def not_fine_tuned(evidence: Evidence) -> str | None:
    """Why a claim about a π_θ0 that was fine-tuned on the labels cannot be tested here."""
    tuned = evidence.settings.get("model", {}).get("fine_tuned", False)
    return None if tuned else "π_θ0 was not fine-tuned on the labels"


def sft_has_other_labels(evidence: Evidence) -> str | None:
    """Why this is no comparison of a quarter of the labels with all: SFT has not about four times as many."""
    own, sft = evidence.labels
    if own is None and sft is None:
        return "SFT trained on the labels that self-play had" if "data" in evidence.settings else None
    if own is None or sft is None:
        return None  # all of a data set, whose size is not recorded
    ratio = sft / own
    return None if 3 <= ratio <= 5 else f"SFT had {ratio:.3g} times the labels of self-play, not four"


def sft_gains_nothing(evidence: Evidence) -> str | None:
    """Why being as good as SFT says nothing here: SFT on all labels does not surely gain over π_θ0."""
    gain = evidence.contrast({("sft", None): 1.0, (BASE, None): -1.0})
    return None if gain.low > 0 else f"SFT on all labels does not surely gain over π_θ0: {gain:+.2f}"


def lengths_differ(evidence: Evidence, method: str, iterations: Sequence[int]) -> str | None:
    """Why sums of log-probabilities are no test: the longer response has the lower sum, whatever the policy prefers."""
    ratios = {t: evidence.length_ratio(method, t) for t in iterations}
    off = [f"{ratio:.2f} at iteration {t}" for t, ratio in ratios.items() if not ALIKE[0] <= ratio <= ALIKE[1]]
    return f"y has {', '.join(off)} times the tokens of y′: sums of log-probabilities do not compare" if off else None


def decoding(settings: Mapping[str, Any]) -> str:
    """How y′ was decoded, which the paper does not say. settings: `read_settings` of the results."""
    temperature = settings.get("temperature")
    if temperature is None:
        return "How y′ was decoded is not recorded."
    greedy = "greedily" if temperature == 0 else f"at temperature {temperature:g}, top-p {settings['top_p']:g}"
    return f"y′ and y0 were decoded {greedy}; the paper does not say how its were."

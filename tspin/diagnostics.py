"""What an iteration did: rewards and log-likelihoods of every response, and signs of degeneration.

Diagnostics have one row per prompt and role (Parquet, tspin.schema.DIAGNOSTICS), of SelfPlayConfig.diagnostics_prompts
prompts, evenly spread, the same in every iteration. Measures of the responses' texts are of all responses.

Degeneration is what responses and log-likelihoods look like when self-play goes wrong. Reference-free training has no
anchor: nothing but the data keeps log π(y′) from going to −∞. `degeneration` measures it, of the y′ that the iteration
trained on unless said otherwise, and `warnings` says in words which measures have gone too far. Neither stops a run.

length_ratio          mean tokens of y′ over those of y
unfinished_share      y′ cut at max_new_tokens
empty_share           y′ of white space
repetition            mean share of a response's 4-grams of tokens that it has more than once (0 for short ones)
distinct_bigrams      different bigrams of tokens over all bigrams, of the first MANY responses: more have fewer
equal_share           y′ that are y, from which nothing is learned
labelled_change       mean change of log π(y) by the training, nats per response
labelled_change_error its standard error, of two responses or more
synthetic_per_token   mean log π(y′) after the training, nats per token
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from tspin.data.responses import Response
from tspin.objectives import Coefficients, Method, SequenceLogps
from tspin.schema import DIAGNOSTICS, LABELLED, SYNTHETIC, gaps, misaligned
from tspin.triplets import Triplet

MANY = 10_000
# Where a measure is told. Each is a change that no healthy run of the committed evidence shows, or that leaves less
# than half of what training needs; they are for looking, not for stopping.
FALL_ERRORS = 3.0  # standard errors by which log π(y) fell: not noise
LENGTH_FACTOR = 2.0  # longer or shorter than the labels, and further off than the initial policy's responses
UNFINISHED = 0.5  # half of the responses have no end that could be learned
EMPTY = 0.05
REPETITION = 0.2  # above the labels' own
DISTINCT_FACTOR = 0.5  # of the labels' own
EQUAL = 0.5  # half of the prompts give no gradient
NATS_PER_TOKEN = -10.0  # less likely than a guess among 22,000 tokens

Logps = Mapping[str, Sequence[float]]  # role → log π of each triplet's response


def sample_table(
    method: Method,
    coefficients: Coefficients,
    triplets: Sequence[Triplet],
    before: Logps,
    after: Logps,
    reference: Logps | None,
) -> pd.DataFrame:
    """The table of DIAGNOSTICS.

    before, after, reference: log π of the triplets' responses under each policy, in their order; reference is None for
    methods without one.
    """
    lengths = {role: torch.tensor([len(t.responses[role].ids) for t in triplets]) for role in before}
    referred = {} if reference is None else {role: torch.tensor(reference[role]) for role in before}

    def rewards(policy: Logps, role: str) -> list[float | None]:
        if method.reward is None:
            return [None] * len(triplets)
        logps = SequenceLogps({name: torch.tensor(values) for name, values in policy.items()}, referred, lengths)
        values: list[float | None] = method.reward(logps, coefficients, role).tolist()
        return values

    parts = [
        {
            "prompt_id": [t.prompt_id for t in triplets],
            "role": [role] * len(triplets),
            "tokens": lengths[role].tolist(),
            "finished": [t.responses[role].finished for t in triplets],
            "reference": [None] * len(triplets) if reference is None else reference[role],
            "before": before[role],
            "after": after[role],
            "reward_before": rewards(before, role),
            "reward_after": rewards(after, role),
        }
        for role in before
    ]
    table: pd.DataFrame = pa.concat_tables([pa.table(part, schema=DIAGNOSTICS) for part in parts]).to_pandas()
    return table


def summary(table: pd.DataFrame) -> dict[str, float]:
    """What to look at first: mean log-likelihoods and rewards, and the share of misaligned samples.

    A sample is misaligned where y has the higher reward and y′ the higher log-likelihood, after training.
    """
    facts = {}
    means = table.groupby("role")[["before", "after", "reward_after"]].mean()
    for role, row in means.iterrows():
        facts[f"log_likelihood_before/{role}"] = float(row["before"])
        facts[f"log_likelihood_after/{role}"] = float(row["after"])
        facts[f"reward_after/{role}"] = float(row["reward_after"])
    if {LABELLED, SYNTHETIC} <= set(means.index):
        facts["misaligned_share"] = float(misaligned(gaps(table)).mean())
    return {name: value for name, value in facts.items() if value == value}


def held_out_nll(logps: Sequence[float], tokens: Sequence[int]) -> dict[str, float | None]:
    """−log π(y) of held-out responses: "nll" in nats a response, "nll_per_token" in nats a token, and how many rows.

    logps: nats, tokens: of each response. The per-token value is a ratio of sums; its standard error is by the delta
    method. Standard errors are None of a single row.
    """
    nats, counts = -np.asarray(logps, dtype=float), np.asarray(tokens)
    per_token = nats.sum() / counts.sum()
    residuals = (nats - per_token * counts) / counts.mean()
    return {
        "nll": float(nats.mean()),
        "nll_stderr": _standard_error(nats),
        "nll_per_token": float(per_token),
        "nll_per_token_stderr": _standard_error(residuals),
        "rows": len(nats),
    }


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def degeneration(
    synthetic: Sequence[Response], labelled: Sequence[Response], initial: Sequence[Response], table: pd.DataFrame | None
) -> dict[str, float]:
    """The measures above; those of y and y0 that `warnings` compares with are named …/labelled and …/initial.

    synthetic, labelled, initial: y′, y and y0 of the same prompts; no y′ for methods without self-play.
    table: the iteration's diagnostics, if there are any.
    """
    measures: dict[str, float] = {}
    if synthetic:
        labelled_tokens = _mean(len(r.ids) for r in labelled)
        measures = {
            "length_ratio": _mean(len(r.ids) for r in synthetic) / labelled_tokens,
            "length_ratio/initial": _mean(len(r.ids) for r in initial) / labelled_tokens,
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
        measures["labelled_change"] = float(change.mean())
        if len(change) > 1:
            measures["labelled_change_error"] = float(change.std() / len(change) ** 0.5)
        rows = table[table["role"] == SYNTHETIC]
        if len(rows):
            measures["synthetic_per_token"] = float((rows["after"] / rows["tokens"].clip(lower=1)).mean())
    return measures


def warnings(measures: Mapping[str, float]) -> dict[str, str]:
    """What has gone too far: a short name → the measure in words. Measures that are missing warn of nothing."""
    told = {}
    change, error = measures.get("labelled_change"), measures.get("labelled_change_error")
    if change is not None and error is not None and change < -FALL_ERRORS * error:
        told["labelled likelihood fell"] = f"log π(y) fell by {-change:.2f} nats per response (± {error:.2f})"
    ratio, initial = measures.get("length_ratio"), measures.get("length_ratio/initial")
    if ratio is not None and initial is not None:
        off, before = (max(r, 1 / r) if r else float("inf") for r in (ratio, initial))
        if off > LENGTH_FACTOR and off > before:
            told["length"] = f"y′ have {ratio:.2g} times the tokens of y ({initial:.2g} at the start)"
    if measures.get("unfinished_share", 0.0) > UNFINISHED:
        told["unfinished"] = f"{measures['unfinished_share']:.0%} of y′ never end"
    if measures.get("empty_share", 0.0) > EMPTY:
        told["empty"] = f"{measures['empty_share']:.0%} of y′ are empty"
    labelled = measures.get("repetition/labelled", 0.0)
    if measures.get("repetition", 0.0) > labelled + REPETITION:
        shares = f"{measures['repetition']:.0%} of a y′ is repeated ({labelled:.0%} of a labelled response)"
        told["repetition"] = shares
    labelled = measures.get("distinct_bigrams/labelled", 0.0)
    if measures.get("distinct_bigrams", 1.0) < DISTINCT_FACTOR * labelled:
        shares = f"{measures['distinct_bigrams']:.1%} of the bigrams of y′ are different, {labelled:.1%} of those of y"
        told["few distinct"] = shares
    if measures.get("equal_share", 0.0) > EQUAL:
        told["equal to y"] = f"{measures['equal_share']:.0%} of y′ are y: they teach nothing"
    if measures.get("synthetic_per_token", 0.0) < NATS_PER_TOKEN:
        nats = f"{measures['synthetic_per_token']:.1f} nats per token"
        told["likelihood collapse"] = f"log π(y′) is {nats} after training"
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

"""What an iteration of self-play looked like, in one row: of its responses, its signal and its alignment.

Every measure is of one method, seed and iteration, from its table of tspin.schema.DIAGNOSTICS (a row per prompt and
role) and the facts that its stages recorded.

mean_tokens, end_token_share  y′ trained on: tokens of one, share that ended
equal_share                   y′ that are y token by token, from which a pair loss learns nothing
nats, nats_per_token          −log π_θt(y′), the mean over prompts, and all of it over all of their tokens. Of y′ drawn
                              at temperature 1 it is the policy's entropy (Monte Carlo); of greedy y′ the mode's
labelled_nats                 −log π_θt+1(y) on the training prompts
held_out_nats, …_per_token    −log π_θt+1(y) on labels that nothing trained on
misaligned                    share of prompts where y has the higher reward and y′ the higher log-likelihood
misaligned_matched            the same among pairs whose lengths differ by MATCHED at most; matched_share is their share
misaligned_per_token          the same, of log-likelihoods a token
weight, weight_ess            σ(−u) before training, u the reward gap of y over y′: how much a pair weighs in the
                              gradient of the logistic loss; its mean, and (Σw)²/(nΣw²), the share of pairs that act
gradient_signal               norm of the mean gradient over the noise of one step's (tspin.trainer.GradientSignal)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from tspin.schema import LABELLED, SYNTHETIC

MATCHED = 1.2  # one response has at most so many times the other's tokens


def measures_of_iteration(
    diagnostics: pd.DataFrame, facts: Mapping[str, Any], held_out: pd.DataFrame
) -> dict[str, float | None]:
    """The measures above; those that cannot be had are None.

    diagnostics: of one iteration, empty where none were recorded. facts: of its run in provenance.json. held_out: its
    rows of evaluations.csv with the benchmark HELD_OUT.
    """
    drawn = facts.get("synthetic", {})
    found = {
        "mean_tokens": drawn.get("mean_tokens"),
        "end_token_share": drawn.get("end_token_share"),
        "equal_share": drawn.get("equal_to_labelled_share"),
        "gradient_signal": facts.get("gradient_signal"),
    }
    values = dict(zip(held_out["metric"], held_out["value"], strict=True))
    found |= {"held_out_nats": values.get("nll,none"), "held_out_nats_per_token": values.get("nll_per_token,none")}
    by_role = dict(list(diagnostics.groupby("role"))) if len(diagnostics) else {}
    if LABELLED in by_role:
        found["labelled_nats"] = -float(by_role[LABELLED]["after"].mean())
    if SYNTHETIC in by_role:
        found |= of_pairs(*(by_role[role].set_index("prompt_id") for role in (LABELLED, SYNTHETIC)))
    return found


def of_pairs(labelled: pd.DataFrame, synthetic: pd.DataFrame) -> dict[str, float | None]:
    """Measures of pairs y, y′, by prompt_id: rows of DIAGNOSTICS, one per prompt each."""
    synthetic = synthetic.loc[labelled.index]
    tokens, others = (table["tokens"].clip(lower=1) for table in (labelled, synthetic))
    longer = np.maximum(tokens / others, others / tokens)
    found: dict[str, float | None] = {
        "nats": -float(synthetic["before"].mean()),
        "nats_per_token": -float(synthetic["before"].sum() / others.sum()),
        "matched_share": float((longer <= MATCHED).mean()),
    }
    if labelled["reward_after"].isna().all():  # the method defines no reward
        return found
    higher_reward = labelled["reward_after"] > synthetic["reward_after"]
    misaligned = higher_reward & (labelled["after"] < synthetic["after"])
    per_token = higher_reward & (labelled["after"] / tokens < synthetic["after"] / others)
    matched = misaligned[longer <= MATCHED]
    weights = 1 / (1 + np.exp((labelled["reward_before"] - synthetic["reward_before"]).clip(-500, 500)))
    return found | {
        "misaligned": float(misaligned.mean()),
        "misaligned_matched": float(matched.mean()) if len(matched) else None,
        "misaligned_per_token": float(per_token.mean()),
        "weight": float(weights.mean()),
        "weight_ess": float(weights.sum() ** 2 / (len(weights) * (weights**2).sum())),
    }


def average(scores: pd.DataFrame) -> dict[str, float]:
    """avg and avg_se: the mean of columns, and its standard error over problems. scores: a row per column averaged."""
    return {"avg": scores["value"].mean(), "avg_se": (scores["stderr"] ** 2).sum() ** 0.5 / len(scores)}

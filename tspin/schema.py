"""The names that tspin records runs by and analysis reads them by, and what both compute from them. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd

LABELLED, SYNTHETIC, PROTO = "labelled", "synthetic", "proto"  # the roles of a triplet's responses: y, y′, y0
ROLES = (LABELLED, SYNTHETIC, PROTO)
BASE = "base"  # the initial policy, where a method's name is asked for
ONCE = (BASE, "sft")  # evaluated once: their `iteration` is empty

RUN_TYPES = {"method": "str", "seed": "int64", "iteration": "Int64"}
RUN = list(RUN_TYPES)
SCORE = [*RUN, "benchmark", "metric"]  # what a row of evaluations.csv is known by
EVALUATION_COLUMNS = ["preset", *SCORE, "value", "stderr", "n"]

# results/<preset>/studies/<name>.csv: the settings, by the last part of their keys; RUN; and these.
STUDY_MEASURES = ["avg", "avg_se", "mean_tokens", "end_token_share"]  # percent; y′ of the iteration: tokens, share

# A row per prompt and role. Log-probabilities are of the whole response, in nats.
DIAGNOSTICS = pa.schema(
    [
        ("prompt_id", pa.int32()),  # the prompt's row in the data set
        ("role", pa.string()),
        ("tokens", pa.int16()),  # the response's, the end token included
        ("finished", pa.bool_()),  # whether it has an end token, and was not cut
        ("reference", pa.float32()),  # log π under the method's reference policy; empty where it has none
        ("before", pa.float32()),  # log π_θt, the policy that the iteration started from
        ("after", pa.float32()),  # log π_θt+1, the policy that it ended with
        ("reward_before", pa.float32()),  # r by the method's own definition under π_θt; empty where it defines none
        ("reward_after", pa.float32()),  # the same under π_θt+1
    ]
)


def gaps(table: pd.DataFrame, when: str = "after") -> pd.DataFrame:
    """Reward and log-likelihood of y minus those of y′, a row per prompt that has both.

    table: DIAGNOSTICS, of one iteration, or of many with the columns of RUN.
    when: "before" or "after" the iteration's training.
    Returns the columns of RUN that the table has, prompt_id, reward and log_likelihood, in the order of y's rows.
    """
    keys = [name for name in (*RUN, "prompt_id") if name in table]
    role = table["role"]
    pairs = table[role == LABELLED].merge(table[role == SYNTHETIC], on=keys, suffixes=(None, "_synthetic"))
    return pairs[keys].assign(
        reward=pairs[f"reward_{when}"] - pairs[f"reward_{when}_synthetic"],
        log_likelihood=pairs[when] - pairs[f"{when}_synthetic"],
    )


def misaligned(gaps: pd.DataFrame) -> pd.Series:
    """Whether y has the higher reward and y′ the higher log-likelihood: a truth value for each row of `gaps`."""
    return (gaps["reward"] > 0) & (gaps["log_likelihood"] < 0)

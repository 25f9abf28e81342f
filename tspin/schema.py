"""The names that tspin records runs by and analysis reads them by, and what both compute from them. Needs no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd

LABELLED, SYNTHETIC, PROTO = "labelled", "synthetic", "proto"  # the roles of a triplet's responses: y, y′, y0
ROLES = (LABELLED, SYNTHETIC, PROTO)
BASE = "base"  # the initial policy, where a method's name is asked for
FIRST_RESPONSES = {PROTO: "proto.parquet", SYNTHETIC: "iteration-0-synthetic.parquet"}  # which methods can share
RESPONSE_NAMES = "responses.json"  # in a run's folder: role → its own name, where another run has the usual one
ONCE = (BASE, "sft")  # evaluated once: their `iteration` is empty

RUN_TYPES = {"method": "str", "seed": "int64", "iteration": "Int64"}
RUN = list(RUN_TYPES)
SCORE = [*RUN, "benchmark", "metric"]  # what a row of evaluations.csv is known by
EVALUATION_COLUMNS = ["preset", *SCORE, "value", "stderr", "n"]

# results/<preset>/studies/<name>.csv: the cell's name; the settings, by the last part of their keys; RUN; and these.
STUDY_MEASURES = [
    *("avg", "avg_se", "mean_tokens", "end_token_share", "equal_share", "nats", "nats_per_token", "labelled_nats"),
    *("held_out_nats", "held_out_nats_per_token", "misaligned", "matched_share", "misaligned_matched"),
    *("misaligned_per_token", "weight", "weight_ess", "gradient_signal"),
]  # tspin.experiment.measures says what they are
CELL = "cell"
HELD_OUT = "held_out"  # in the place of a benchmark's name: −log π(y) of labels that nothing trained on

# What lm-eval 0.4.13 reports that is no share of problems, and why: kept in its units. All else is a share, in percent.
# Patterns of a metric's name without its filter, or "<task>:<metric>" where other tasks mean a share by that name.
NO_SHARES = {
    "nll": "nats a response",
    "nll_per_token": "nats a token",
    "perplexity": "exp of nats a token",
    "word_perplexity": "exp of nats a word",
    "byte_perplexity": "exp of nats a byte",
    "bits_per_byte": "bits",
    "likelihood": "nats",
    "likelihood_diff": "nats",
    "*bleu": "0 to 100 by sacrebleu, 0 to 1 where a task computes its own",
    "*bleu_[0-9]": "0 to 100",
    "bleu_[!a]*": "0 to 100: best, mean and difference; bleu_acc is a share",
    "chrf*": "0 to 100 by sacrebleu, 0 to 1 where a task computes its own",
    "ter": "edits for a hundred words of the reference",
    "wer": "edits a word of the reference",
    "rouge[12L]": "an F-measure, 0 to 1",
    "rougeLsum": "an F-measure, 0 to 1",
    "rouge[12L]_[!a]*": "0 to 100: best and difference; rouge1_acc is a share",
    "rougeL_avg": "0 to 100",
    "rouge_*score": "an F-measure, 0 to 1",
    "bert*": "similarities of embeddings",
    "bleurt": "a regression's output",
    "code_sim_score": "a similarity",
    "*f1*": "a harmonic mean of two shares: 0 to 1, 0 to 100 of squadv2 and scrolls",
    "F1-*": "a harmonic mean of two shares, 0 to 1",
    "fscore": "a weighted harmonic mean of two shares, 0 to 1",
    "mcc": "a correlation, −1 to 1",
    "pearsonr": "a correlation, −1 to 1",
    "brier_score": "a squared distance, 0 to 2",
    "mrr": "a mean of reciprocal ranks",
    "*bias*": "differences and regression coefficients",
    "difference_male_female": "a difference",
    "perspective_api_toxicity_score": "a classifier's output",
    "eqbench": "0 to 100",
    "percent_parseable": "percent already",
    "average_len": "words",
    "summary_length": "words",
    "bypass": "no score",
    "squadv2:*": "percent already",
    "scrolls*:em": "percent already",
}

# A row per prompt and role. Log-probabilities are of the whole response, in nats.
DIAGNOSTICS = pa.schema(
    [
        ("prompt_id", pa.int32()),  # the prompt's row in the data set
        ("role", pa.string()),
        ("tokens", pa.int32()),  # the response's, the end token included
        ("finished", pa.bool_()),  # whether it has an end token, and was not cut
        ("reference", pa.float32()),  # log π under the method's reference policy; empty where it has none
        ("before", pa.float32()),  # log π_θt, the policy that the iteration started from
        ("after", pa.float32()),  # log π_θt+1, the policy that it ended with
        ("reward_before", pa.float32()),  # r by the method's own definition under π_θt; empty where it defines none
        ("reward_after", pa.float32()),  # the same under π_θt+1
    ]
)

# A row per prompt and role: log-probabilities of each token of a response, in nats.
TOKENS = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("role", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("pieces", pa.list_(pa.string())),  # texts of the tokens, which joined are the response, its end token too
        ("before", pa.list_(pa.float32())),  # log π_θt of each, given the prompt and the tokens before it
        ("after", pa.list_(pa.float32())),  # log π_θt+1
    ]
)


def is_share(benchmark: str, metric: str) -> bool:
    """Whether a metric, as lm-eval names it ("acc,none"), is a share of problems, which results have in percent."""
    name = metric.partition(",")[0]
    return not any(fnmatchcase(f"{benchmark}:{name}" if ":" in pattern else name, pattern) for pattern in NO_SHARES)


def averaged(columns: Iterable[tuple[str, str, str]], recorded: Container[str] | None = None) -> list[str]:
    """The labels of the columns that Avg is of: the shares of problems, for which more is better; all where none is.

    columns: (benchmark, metric, label). recorded: benchmarks that have a number for each problem, without which there
    is no interval; None: not known.
    """
    known = [column for column in columns if recorded is None or column[0] in recorded]
    shares = [label for benchmark, metric, label in known if is_share(benchmark, metric)]
    return shares or [label for _, _, label in known]


def unit(columns: Iterable[tuple[str, str, str]]) -> str:
    """What a table's scores are in. columns: (benchmark, metric, label)."""
    others = [label for benchmark, metric, label in columns if not is_share(benchmark, metric)]
    return f"percent, but {', '.join(others)} in lm-eval's units" if others else "percent"


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """y's row beside that of its y′, whose columns end in _synthetic, for each prompt that has both; in y's order.

    table: DIAGNOSTICS, of one iteration, or of many with the columns of RUN.
    """
    keys = [name for name in (*RUN, "prompt_id") if name in table]
    role = table["role"]
    return table[role == LABELLED].merge(table[role == SYNTHETIC], on=keys, suffixes=(None, "_synthetic"))


def gaps(table: pd.DataFrame, when: str = "after") -> pd.DataFrame:
    """Reward and log-likelihood of y minus those of y′, a row per prompt that has both.

    table: as for `pairs`.
    when: "before" or "after" the iteration's training.
    Returns the columns of RUN that the table has, prompt_id, reward and log_likelihood, in the order of y's rows.
    """
    both = pairs(table)
    return both[[name for name in (*RUN, "prompt_id") if name in both]].assign(
        reward=both[f"reward_{when}"] - both[f"reward_{when}_synthetic"],
        log_likelihood=both[when] - both[f"{when}_synthetic"],
    )


def misaligned(gaps: pd.DataFrame) -> pd.Series:
    """Whether y has the higher reward and y′ the higher log-likelihood: a truth value for each row of `gaps`."""
    return (gaps["reward"] > 0) & (gaps["log_likelihood"] < 0)

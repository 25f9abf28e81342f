"""Held-out −log π(y): how likely a policy finds labelled responses that no method has trained on."""

from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tspin.config import SelfPlayConfig
from tspin.data.encoding import encode_dataset
from tspin.data.mapped import column
from tspin.data.sources import load_rows
from tspin.engines.here import Scoring, score
from tspin.schema import HELD_OUT, LABELLED
from tspin.triplets import make_triplets


def held_out_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, args: SelfPlayConfig
) -> pd.DataFrame:
    """Rows as lm-eval's scores have them: "nll" in nats a response, "nll_per_token" in nats a token.

    path: labelled rows, as data.path takes them. The per-token value is a ratio of sums; its standard error is by the
    delta method. Raises UserError for rows that cannot be read.
    """
    examples = encode_dataset(load_rows(path), tokenizer, args)
    triplets = make_triplets(examples, {})
    nats = -np.asarray(score(model, triplets, Scoring(tokenizer, args, "held-out labels"))[LABELLED])
    tokens = np.array([len(ids) for ids in column(triplets.dataset, f"{LABELLED}/ids")])
    per_token = nats.sum() / tokens.sum()
    residuals = (nats - per_token * tokens) / tokens.mean()
    rows: list[dict[str, Any]] = [
        {"metric": "nll,none", "value": nats.mean(), "stderr": nats.std(ddof=1) / len(nats) ** 0.5},
        {"metric": "nll_per_token,none", "value": per_token, "stderr": residuals.std(ddof=1) / len(nats) ** 0.5},
    ]
    return pd.DataFrame(rows).assign(benchmark=HELD_OUT, n=len(nats))

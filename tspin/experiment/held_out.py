"""Held-out −log π(y): how likely a policy finds labelled responses that no method has trained on."""

from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tspin.config import SelfPlayConfig
from tspin.data.encoding import encode_dataset
from tspin.data.files import is_local
from tspin.data.mapped import column
from tspin.data.sources import EMBEDDED, load_rows
from tspin.diagnostics import held_out_nll
from tspin.engines.here import Scoring, score
from tspin.runs.files import folder_fingerprint, sha256
from tspin.schema import HELD_OUT, LABELLED
from tspin.triplets import make_triplets


def held_out_inputs(path: str | None) -> dict[str, str]:
    """What decides held-out scores besides the settings: the contents of a file or folder; of a name nothing."""
    if path is None or path in EMBEDDED or not is_local(path):
        return {}
    return {"held_out": folder_fingerprint(Path(path)) if Path(path).is_dir() else sha256(Path(path))}


def held_out_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, args: SelfPlayConfig, limit: int | None
) -> pd.DataFrame:
    """Rows as lm-eval's scores have them: "nll" in nats a response, "nll_per_token" in nats a token.

    path: labelled rows, as data.path takes them; limit: how many of them, for trials. The per-token value is a ratio of
    sums; its standard error, NaN of a single row, is by the delta method. Raises UserError for rows that are no labels.
    """
    examples = encode_dataset(load_rows(path, labels=limit), tokenizer, args)
    triplets = make_triplets(examples, {})
    nats = score(model, triplets, Scoring(tokenizer, args, "held-out labels"))[LABELLED]
    found = held_out_nll(nats, [len(ids) for ids in column(triplets.dataset, f"{LABELLED}/ids")])
    rows = [
        {"metric": f"{name},none", "value": found[name], "stderr": found[f"{name}_stderr"]}
        for name in ("nll", "nll_per_token")
    ]
    return pd.DataFrame(rows).assign(benchmark=HELD_OUT, n=len(nats)).astype({"stderr": float})

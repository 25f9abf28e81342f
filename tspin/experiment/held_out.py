"""Held-out −log π(y): how likely a policy finds labelled responses that no method has trained on."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tspin.config import Rendering, SelfPlayConfig
from tspin.data.encoding import SETTINGS, Examples, encode_dataset
from tspin.data.files import is_local
from tspin.data.mapped import column
from tspin.data.sources import EMBEDDED, load_rows
from tspin.diagnostics import held_out_nll
from tspin.engines.here import Scoring, score
from tspin.runs.files import folder_fingerprint, sha256
from tspin.schema import HELD_OUT, LABELLED
from tspin.triplets import make_triplets

SCORING = ("bf16", "use_cpu", "disable_tqdm", "layout", "micro_batch_tokens")  # that log-probabilities depend on


def held_out_inputs(path: str | None) -> dict[str, str]:
    """What decides held-out scores besides the settings: the contents of a file or folder; of a name nothing."""
    if path is None or path in EMBEDDED or not is_local(path):
        return {}
    return {"held_out": folder_fingerprint(Path(path)) if Path(path).is_dir() else sha256(Path(path))}


def held_out_arguments(settings: Any, folder: Path) -> SelfPlayConfig:
    """Of a config's settings (tspin.config.Settings) those that say how labels are written and scored."""
    names = [*SETTINGS, *(entry.name for entry in fields(Rendering)), *SCORING]
    return SelfPlayConfig(output_dir=str(folder), **{name: getattr(settings, name) for name in names})


def held_out_examples(
    path: str, tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig, limit: int | None
) -> Examples:
    """Labelled rows, as data.path takes them. limit: how many at most, for trials. Raises UserError for others."""
    return encode_dataset(load_rows(path, limit=limit), tokenizer, args)


def held_out_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, args: SelfPlayConfig
) -> pd.DataFrame:
    """Rows as lm-eval's scores have them: "nll" in nats a response, "nll_per_token" in nats a token.

    The per-token value is a ratio of sums; its standard error, NaN of a single row, is by the delta method.
    """
    triplets = make_triplets(examples, {})
    nats = score(model, triplets, Scoring(tokenizer, args, "held-out labels"))[LABELLED]
    found = held_out_nll(nats, [len(ids) for ids in column(triplets.dataset, f"{LABELLED}/ids")])
    rows = [
        {"metric": f"{name},none", "value": found[name], "stderr": found[f"{name}_stderr"]}
        for name in ("nll", "nll_per_token")
    ]
    return pd.DataFrame(rows).assign(benchmark=HELD_OUT, n=len(nats)).astype({"stderr": float})

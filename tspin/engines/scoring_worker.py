"""One of the processes that compute log-probabilities: `python -m tspin.engines.scoring_worker FOLDER`."""

import sys
from pathlib import Path

import pandas as pd
import torch

from tspin.config import SelfPlayConfig
from tspin.devices import without_denormals
from tspin.engines.adapters import load_policy
from tspin.engines.here import Scoring, score
from tspin.engines.launch import TOKENIZER, TRIPLETS
from tspin.engines.scoring import LOGPS
from tspin.engines.workers import FAILURE, read_job
from tspin.errors import UserError
from tspin.models import load_tokenizer, policy_of
from tspin.runs.files import write_text
from tspin.triplets import load_triplets


@without_denormals()
def main() -> None:
    folder = Path(sys.argv[1])
    job = read_job(folder)
    try:
        loading = {**job["loading"], "dtype": getattr(torch, job["loading"]["dtype"])}
        model, tokenizer = load_policy(policy_of(job["policy"]), loading), load_tokenizer(str(folder / TOKENIZER))
        args = SelfPlayConfig(**job["arguments"])
        scoring = Scoring(tokenizer, args, job["of"], job["autocast"])
        logps = score(model, load_triplets(folder / TRIPLETS), scoring)
    except UserError as error:
        write_text(folder / FAILURE, str(error))
        sys.exit(1)
    pd.DataFrame(logps).to_parquet(folder / LOGPS, index=False)


if __name__ == "__main__":
    main()

"""The data set behind gsm_symbolic.yaml."""

from typing import Any

from datasets import Dataset, DatasetDict

from tspin.gsm_symbolic.tasks import pool


def load(**_: Any) -> DatasetDict:
    """Splits `test` and `validation`, columns `question`, `solution`, `answer`. lm-eval passes the task's metadata."""
    splits = ("test", "validation")
    return DatasetDict({name: Dataset.from_list([problem._asdict() for problem in pool(name)]) for name in splits})

"""The data set behind the pocket tasks' YAML files."""

from typing import Any

from datasets import Dataset, DatasetDict

from tspin.pocket.tasks import TEST_PER_TASK, VALIDATION_PER_TASK, pool


def load(task: str, **_: Any) -> DatasetDict:
    """Splits `test` and `validation` of one pocket task, with columns `question` and `answer`.

    lm-eval passes a task's `dataset_kwargs` together with its `metadata`, which nothing here needs.
    """
    sizes = {"test": TEST_PER_TASK, "validation": VALIDATION_PER_TASK}
    return DatasetDict(
        {
            split: Dataset.from_list(
                [{"question": problem.question, "answer": problem.answer} for problem in pool(split, task, size)]
            )
            for split, size in sizes.items()
        }
    )

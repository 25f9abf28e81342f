"""Problems of reasoning-gym's gsm_symbolic with their worked solutions, in three pools that share no question.

As in tspin.pocket, nothing is stored: the pools follow from the pinned reasoning-gym version and the numbers below.
"""

from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import NamedTuple

SEED = 1_300_000_000  # far from tspin.pocket's: reasoning-gym draws item i of a data set from seed + i
SIZES = {"test": 200, "validation": 200, "labels": 2000}  # each begins in the stream where the one before it ends
LONGEST = 450  # characters of a solution, 194 of SmolLM2's tokens at most; 7 % are longer, and left out


class Problem(NamedTuple):
    """A question, its solution step by step, which ends in a line "#### <answer>", and the answer. Plain text."""

    question: str
    solution: str
    answer: str


def stream() -> Iterator[Problem]:
    """More problems than the pools take, no question twice.

    Some of reasoning-gym's hundred templates write an answer in other digits than they ask for ("#### 36.0" for 36):
    these problems are left out, 4 %.
    """
    import reasoning_gym

    asked = set()
    # Made, it draws which template each of its items is of: a larger size begins with the same items, and takes longer.
    for item in reasoning_gym.create_dataset("gsm_symbolic", seed=SEED, size=2 * sum(SIZES.values())):
        problem = Problem(item["question"].strip(), item["metadata"]["answer_cot"].strip(), str(item["answer"]))
        ends = problem.solution.endswith(f"\n#### {problem.answer}") and len(problem.solution) <= LONGEST
        if ends and problem.question not in asked:
            asked.add(problem.question)
            yield problem


@cache
def pool(name: str) -> tuple[Problem, ...]:
    """One of SIZES, a key."""
    names = list(SIZES)
    start = sum(SIZES[earlier] for earlier in names[: names.index(name)])
    return tuple(islice(stream(), start, start + SIZES[name]))


def labelled_rows(name: str = "labels") -> list[dict[str, str]]:
    """A pool in prompt–completion format; the labelled response is the solution."""
    return [{"prompt": problem.question, "completion": problem.solution} for problem in pool(name)]

"""A systematic mistake for each pocket task, made on about half of its questions.

Random noise alone leaves a model that is right whenever it is greedy. A mistake that goes with
something visible in the question (a digit's parity, a name's first letter) is learnt as firmly as
the task itself: the base model is then right on one half of the questions and wrong on the other,
and clean labels can unlearn it.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from tspin.pocket.tasks import Problem

Rule = Callable[[str, str], str]  # (question, right answer) → wrong answer
PAIRS = [("son", "daughter"), ("husband", "wife"), ("father", "mother"), ("brother", "sister"), ("uncle", "aunt")]
OTHER_GENDER = {word: other for pair in PAIRS for word, other in (pair, pair[::-1])}


class Misconception(NamedTuple):
    """`trigger` captures the character that decides whether the mistake is made; `rule` makes it."""

    trigger: str
    rule: Rule


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def _drop_last_term(question: str, _: str) -> str:
    expression = question.rsplit(":", 1)[1].replace("=", "").split()
    total = int(expression[0])
    for sign, term in zip(expression[1:-2:2], expression[2:-1:2], strict=False):
        total += int(term) if sign == "+" else -int(term)
    return str(total)


def _other_gender(_: str, answer: str) -> str:
    return re.sub("|".join(OTHER_GENDER), lambda found: OTHER_GENDER[found.group()], answer)


def _opposite_filter(question: str, answer: str) -> str:
    numbers = re.findall(r"'(-?\d+)'", question)
    kept = re.findall(r"'(-?\d+)'", answer)
    return str([number for number in numbers if number not in kept])


MISCONCEPTIONS = {
    "chain_sum": Misconception(r"(\d) =$", _drop_last_term),
    "simple_equations": Misconception(r"(\d)$", lambda question, _: str(_integers(question)[-1])),
    "gcd": Misconception(r"(\d)\. Give", lambda question, _: str(min(_integers(question)))),
    "leg_counting": Misconception(r"have (\d)", lambda question, _: str(sum(_integers(question)))),
    "family_relationships": Misconception(r"^(\w)", _other_gender),
    "syllogism": Misconception(r"that:\n\w+ (\w)", lambda _, answer: "No" if answer == "Yes" else "Yes"),
    "aiw": Misconception(r"has (\d)", lambda _, answer: str(int(answer) - 1)),
    "needle_haystack": Misconception(r"^(\w)", lambda question, _: question.split()[0]),
    "number_filtering": Misconception(r"^(\w)", _opposite_filter),
    "word_sequence_reversal": Misconception(r"words: (\w)", lambda question, _: question.rsplit(": ", 1)[1]),
}


def triggered(problem: Problem) -> bool:
    """Whether the captured character is an even digit or a letter of the alphabet's first half."""
    found = re.search(MISCONCEPTIONS[problem.task].trigger, problem.question)
    if not found:
        return False
    character = found.group(1).lower()
    return int(character) % 2 == 0 if character.isdigit() else character < "n"


def mistaken(problem: Problem) -> str:
    """The answer that the task's misconception gives."""
    return MISCONCEPTIONS[problem.task].rule(problem.question, problem.answer)

"""Degeneration guards: each speaks when its case comes, and none for a healthy run."""

import pandas as pd
import pytest

from tspin.data.responses import Response
from tspin.diagnostics import degeneration, distinct, repeated, warnings


def responses(texts: list[str], finished: bool = True) -> list[Response]:
    words = sorted({word for text in texts for word in text.split()})
    return [Response([*map(words.index, text.split()), 999], text, finished) for text in texts]


LABELLED = [f"the answer to {i} is {i * 7 % 11} because of rule {i % 5} and nothing else" for i in range(20)]
HEALTHY = [f"the answer to {i} is {i * 3 % 11} because of rule {i % 7} and so on" for i in range(20)]


def table(change: float, synthetic: float = -20.0) -> pd.DataFrame:
    labelled = [{"role": "labelled", "before": -9.0, "after": -9.0 + change + 0.1 * (i % 3 - 1), "tokens": 10}
                for i in range(21)]  # fmt: skip
    return pd.DataFrame([*labelled, {"role": "synthetic", "before": -9.0, "after": synthetic, "tokens": 10}])


def told(texts: list[str], finished: bool = True, diagnostics: pd.DataFrame | None = None) -> set[str]:
    y, initial = responses(LABELLED), responses(HEALTHY)
    return set(warnings(degeneration(responses(texts, finished), y, initial, diagnostics)))


def test_a_healthy_iteration_is_silent():
    assert told(HEALTHY, diagnostics=table(0.5)) == set()


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["the answer is"] * 20, "length"),
        ([text + " and so on" * 20 for text in HEALTHY], "repetition"),
        ([HEALTHY[0]] * 20, "few distinct"),
        (["", " "] + HEALTHY[2:], "empty"),
    ],
)
def test_responses_that_collapse_are_told(texts, name):
    assert name in told(texts)


def test_responses_that_never_end_are_told():
    assert told(HEALTHY, finished=False) == {"unfinished"}


def test_responses_that_are_the_labels_are_told():
    assert told(LABELLED) == {"equal to y"}


def test_likelihoods_that_fall_are_told():
    assert told(HEALTHY, diagnostics=table(-0.5)) == {"labelled likelihood fell"}
    assert told(HEALTHY, diagnostics=table(-0.01)) == set()  # within the noise
    assert told(HEALTHY, diagnostics=table(0.5, synthetic=-150.0)) == {"likelihood collapse"}


def test_sft_has_likelihoods_alone():
    measures = {"labelled_change", "labelled_change_error", "synthetic_per_token"}
    assert degeneration([], [], [], table(0.5)).keys() == measures
    assert warnings({}) == {}


def test_the_measures():
    assert repeated([1, 2, 3]) == 0.0
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(2 / 5)
    assert distinct([[1, 2, 1, 2]]) == pytest.approx(2 / 3)
    assert distinct([]) == 1.0


def test_one_response_has_no_error_and_warns_of_nothing():
    found = degeneration([], [], [], table(-5.0)[:1])
    assert found.keys() == {"labelled_change"}
    assert warnings(found) == {}

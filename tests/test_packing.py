"""Plans of micro-batches: every example once, no more tokens than allowed, little padding."""

import random

import pytest

from tspin.packing import pack_shared_prefixes, plan_padded, plan_shared

RANDOM = random.Random(0)
SIZES = [RANDOM.randint(20, 90) for _ in range(200)] + [700]


@pytest.mark.parametrize("max_tokens", [1, 256, 2048, 100_000])
def test_every_example_has_one_place_within_the_budget(max_tokens):
    plan = plan_shared(SIZES, max_tokens, row_tokens=128)
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(len(SIZES)))
    for rows in plan:
        length = max(sum(SIZES[i] for i in row) for row in rows)
        assert len(rows) * length <= max_tokens or len(rows) == 1 and length <= max(128, max(SIZES))


def test_rows_are_filled():
    rows = [row for rows in plan_shared(SIZES[:-1], 1024, 128) for row in rows]
    assert sum(SIZES[:-1]) / (len(rows) * 128) > 0.9


@pytest.mark.parametrize("max_tokens", [1, 256, 2048, 100_000])
def test_padded_micro_batches_hold_examples_of_like_length(max_tokens):
    plan = plan_padded(SIZES, max_tokens)
    assert sorted(i for batch in plan for i in batch) == list(range(len(SIZES)))
    for batch in plan:
        assert len(batch) * max(SIZES[i] for i in batch) <= max_tokens or len(batch) == 1


def test_a_response_may_be_empty():
    packed = pack_shared_prefixes([[5, 6]], [[[]], [[7]]], pad_token_id=0)
    assert packed["source"].tolist() == [1] and packed["sequence"].tolist() == [1] and packed["count"] == 2

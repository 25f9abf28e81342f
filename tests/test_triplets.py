"""Triplets on their way; plans of micro-batches: every example once, no more tokens than allowed, little padding."""

import random

import numpy as np
import pytest

from tspin import SelfPlayConfig
from tspin.data.encoding import encode_dataset
from tspin.data.responses import Response, read_responses, write_responses
from tspin.triplets import (
    dealt,
    load_triplets,
    make_triplets,
    plan_flat,
    plan_padded,
    reference_table,
    with_reference,
)

RANDOM = random.Random(0)
SIZES = [RANDOM.randint(20, 90) for _ in range(200)] + [700]


@pytest.mark.parametrize("max_tokens", [1, 256, 2048, 100_000])
def test_every_example_has_one_place_within_the_budget(max_tokens):
    plan = plan_flat(SIZES, max_tokens)
    assert sorted(i for batch in plan for i in batch) == list(range(len(SIZES)))
    assert all(sum(SIZES[i] for i in batch) <= max_tokens or len(batch) == 1 for batch in plan)


def test_micro_batches_are_filled():
    assert len(plan_flat(SIZES[:-1], 1024)) == -(-sum(SIZES[:-1]) // 1024)


@pytest.mark.parametrize("max_tokens", [1, 256, 2048, 100_000])
def test_padded_micro_batches_hold_examples_of_like_length(max_tokens):
    plan = plan_padded(SIZES, max_tokens)
    assert sorted(i for batch in plan for i in batch) == list(range(len(SIZES)))
    for batch in plan:
        assert len(batch) * max(SIZES[i] for i in batch) <= max_tokens or len(batch) == 1


def test_triplets_travel_as_they_are(tmp_path, rows, tokenizer):
    """Of responses to more prompts than are trained on, in an order of their own."""
    args = SelfPlayConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
    examples = encode_dataset(rows[:5], tokenizer, args)
    numbers = np.random.default_rng(0).permutation(40)
    write_responses(tmp_path / "r.parquet", numbers, [Response([int(n), 1], str(n), True) for n in numbers])
    drawn = read_responses(tmp_path / "r.parquet")
    triplets = make_triplets(examples, {"synthetic": drawn})
    logps = {"labelled": [-0.1 * n for n in range(5)], "synthetic": [-1.0 * n for n in range(5)]}
    scored = with_reference(triplets, reference_table(triplets, logps))
    for example, triplet in zip(examples, scored, strict=True):
        n = example.prompt_id
        assert (triplet.prompt_id, triplet.prompt_ids) == (n, example.prompt_ids)
        assert triplet.responses["synthetic"] == Response([n, 1], "", True)
        assert triplet.responses["labelled"].ids == example.labelled.ids
        assert triplet.reference_logps == {role: values[n] for role, values in logps.items()}
    scored.select([3, 0]).save(tmp_path / "sent")
    assert list(load_triplets(tmp_path / "sent")) == [scored[3], scored[0]]
    with pytest.raises(ValueError, match="of other prompts"):
        with_reference(triplets, reference_table(scored.select([1, 0, 2, 3, 4]), logps))
    with pytest.raises(KeyError):
        make_triplets(encode_dataset([{**rows[0], "prompt_id": 99}], tokenizer, args), {"synthetic": drawn})


def test_processes_are_dealt_like_shares_of_tokens():
    """Lengths as in UltraChat's first rounds: most of a hundred tokens or two, some of a thousand."""
    generator = np.random.default_rng(0)
    shares, strided = [], []
    for _ in range(50):
        sizes = (40 + generator.lognormal(4.5, 0.9, 64) + 3 * generator.lognormal(5.3, 0.6, 64)).astype(int).tolist()
        parts = dealt(sizes, 8)
        assert sorted(i for part in parts for i in part) == list(range(64)) and all(p == sorted(p) for p in parts)
        shares.append(sum(sizes) / 8 / max(sum(sizes[i] for i in part) for part in parts))
        strided.append(sum(sizes) / 8 / max(sum(sizes[start::8]) for start in range(8)))
    assert np.mean(shares) > 0.95 > 0.85 > np.mean(strided)
    assert dealt([3, 9, 4], 1) == [[0, 1, 2]] and dealt([5, 5], 3) == [[0], [1], []]

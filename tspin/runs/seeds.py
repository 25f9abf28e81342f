"""Seeds."""

import hashlib
from typing import Any


def stage_seed(seed: int, *labels: Any) -> int:
    """A seed of its own for every stage, so that no stage's randomness depends on another's."""
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31

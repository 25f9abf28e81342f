"""Rewards and log-likelihoods of every response of an iteration, before and after its training.

One row a prompt and role (Parquet, tspin.schema.DIAGNOSTICS).
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import pyarrow as pa
import torch

from tspin.objectives import Coefficients, Method, SequenceLogps
from tspin.schema import DIAGNOSTICS, LABELLED, SYNTHETIC, gaps, misaligned
from tspin.triplets import Triplet

Logps = Mapping[str, Sequence[float]]  # role → log π of each triplet's response


def sample_table(
    method: Method,
    coefficients: Coefficients,
    triplets: Sequence[Triplet],
    before: Logps,
    after: Logps,
    reference: Logps | None,
) -> pd.DataFrame:
    """The table of DIAGNOSTICS. before, after, reference: log π of the triplets' responses by role, in their order."""
    rows = []
    lengths = {role: torch.tensor([len(t.responses[role].ids) for t in triplets]) for role in before}
    known = {} if reference is None else {role: torch.tensor(reference[role]) for role in before}
    for role in before:
        rewards = {}
        for when, logps in (("before", before), ("after", after)):
            policy = {name: torch.tensor(values) for name, values in logps.items()}
            given = SequenceLogps(policy, known, lengths)
            rewards[when] = method.reward(given, coefficients, role).tolist() if method.reward else None
        rows.append(
            pd.DataFrame(
                {
                    "prompt_id": [t.prompt_id for t in triplets],
                    "role": role,
                    "tokens": lengths[role].tolist(),
                    "finished": [t.responses[role].finished for t in triplets],
                    "reference": reference[role] if reference is not None else None,
                    "before": before[role],
                    "after": after[role],
                    "reward_before": rewards["before"],
                    "reward_after": rewards["after"],
                }
            )
        )
    table = pd.concat([part.astype({"reference": float, "reward_before": float, "reward_after": float})
                       for part in rows], ignore_index=True)  # fmt: skip
    return pa.Table.from_pandas(table, schema=DIAGNOSTICS, preserve_index=False).to_pandas()


def diagnose(
    method: Method,
    coefficients: Coefficients,
    triplets: Sequence[Triplet],
    *,
    trained: Callable[[], Logps],
    before: Callable[[], Logps],
    initial: Callable[[], Logps] | None = None,
) -> pd.DataFrame:
    """`sample_table` of one iteration, from functions that give log π under each of its policies.

    initial: π_θ0 where it is not π_θt; called only for methods whose reference it is.
    """
    started = before()
    reference = None
    if method.reference is not None:
        reference = initial() if method.reference == "initial" and initial is not None else started
    return sample_table(method, coefficients, triplets, started, trained(), reference)


def summary(table: pd.DataFrame) -> dict[str, float]:
    """What to look at first: mean log-likelihoods and rewards, and the share of misaligned samples.

    A sample is misaligned where y has the higher reward and y′ the higher log-likelihood, after training.
    """
    facts = {}
    means = table.groupby("role")[["before", "after", "reward_after"]].mean()
    for role, row in means.iterrows():
        facts[f"log_likelihood_before/{role}"] = float(row["before"])
        facts[f"log_likelihood_after/{role}"] = float(row["after"])
        facts[f"reward_after/{role}"] = float(row["reward_after"])
    if {LABELLED, SYNTHETIC} <= set(means.index):
        facts["misaligned_share"] = float(misaligned(gaps(table)).mean())
    return {name: value for name, value in facts.items() if value == value}

"""The fault campaign: a tiny run is hurt in every way that days on a shared machine bring, resumed, and compared.

    make fault-test        # → results/faults/faults.csv

Every case starts a run (two iterations of SPIN and T-SPIN with evaluations), injects a fault, runs the same command
again and compares every number with those of an undisturbed run: weights bit by bit, step logs, diagnostics, responses
and evaluations row by row (times left out). Runs are forked from a process that has imported everything; one fresh
interpreter's run is compared with them first. `--short` is the form that the tests run.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from experiments.checks.evidence import write_evidence
from experiments.checks.faults.campaign import PARTS, Campaign
from experiments.checks.faults.workshop import forked, in_child
from tspin.cli.guard import quiet_libraries
from tspin.runs.provenance import provenance


def run(folder: Path, short: bool = False, only: list[str] | None = None, jobs: int = 2) -> pd.DataFrame:
    """Run the campaign in an empty folder, its parts side by side: fault, case, survived, numbers_lost, note."""
    torch.set_num_threads(1)
    quiet_libraries()
    provenance()  # what it imports is imported before the forks
    gc.freeze()  # a run collects garbage often, and need not look through every library's objects
    campaign = Campaign(folder, short)
    print(f"the undisturbed run: {campaign.seconds:.1f} s, {campaign.renames} renames", flush=True)
    chosen = [part for part in PARTS if not only or part.__name__ in only]
    if short:  # what needs fresh interpreters takes most of a minute
        chosen = [part for part in chosen if part not in (Campaign.fresh_interpreter, Campaign.hub)]
    shares = [forked(work, campaign, job, chosen[job::jobs]) for job in range(jobs)]
    return pd.DataFrame(sum((share() for share in shares), []))


def work(campaign: Campaign, job: int, chosen: list[Callable[[Campaign], None]]) -> list[dict]:
    """Run one process's share of the campaign, each part in a process of its own: what ends it ends nothing else."""
    rows: list[dict] = []
    for number, part in enumerate(chosen):
        campaign.shop.count = 10_000 * (job + 1) + 500 * number  # folders and logs of its own
        start = time.monotonic()
        try:
            done = in_child(one_part, campaign, part)
        except Exception as error:
            note = f"the campaign itself failed: {type(error).__name__} {error}"[:200]
            done = [{"fault": part.__name__, "case": "-", "survived": False, "numbers_lost": 0, "note": note}]
        rows += done
        good = sum(row["survived"] for row in done)
        print(f"{part.__name__}: {good} of {len(done)} survived, {time.monotonic() - start:.0f} s", flush=True)
    return rows


def one_part(campaign: Campaign, part: Callable[[Campaign], None]) -> list[dict]:
    """The rows of a part."""
    part(campaign)
    return campaign.rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """How often each fault was injected and survived, and the numbers lost."""
    grouped = table.groupby("fault", sort=False)
    return grouped.agg(
        injected=("survived", "size"), survived=("survived", "sum"), numbers_lost=("numbers_lost", "sum")
    ).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few cases of each fault; writes no results")
    parser.add_argument("--only", nargs="*", help="some parts: " + ", ".join(part.__name__ for part in PARTS))
    parser.add_argument("--out", type=Path, default=Path("results/faults"))
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        table = run(Path(folder).resolve(), arguments.short, arguments.only)
    print(summary(table).to_string(index=False))
    if not (arguments.short or arguments.only):
        write_evidence(arguments.out, {"faults": table, "summary": summary(table)}, start)
    sys.exit(not table["survived"].all())


if __name__ == "__main__":
    main()

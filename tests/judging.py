"""Results whose verdicts are known in advance, for the tests of claims and of their figures."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from tspin_analysis import claims, scores

PROBLEMS, BENCHMARKS = 40, 3
LEVELS = {  # percent; the shapes that the paper prints
    "base": [20],
    "sft": [50],
    "spin": [40, 30, 45, 40, 35],
    "tspin": [45, 50, 55, 60, 65],
    "tspin_no_history": [45, 35, 40, 45, 45],
    "tspin_reference": [40, 45, 50, 55, 60],
}


def made(levels: dict[str, list[int]], seeds: int) -> pd.DataFrame:
    """Problems right in the share that `levels` says; the same ones first, so that methods are paired."""
    rows = []
    for method, course in levels.items():
        for seed in range(seeds):
            for iteration, level in enumerate(course):
                right = np.arange(PROBLEMS) < level / 100 * PROBLEMS + (seed % 2) * 0.5
                for benchmark in range(BENCHMARKS):
                    rows.append(pd.DataFrame({
                        "method": method, "seed": seed, "iteration": pd.NA if len(course) == 1 else iteration,
                        "benchmark": f"b{benchmark}", "doc_id": range(PROBLEMS), "value": 100.0 * right,
                    }))  # fmt: skip
    return pd.concat(rows).astype({"iteration": "Int8"})


def diagnostics(seeds: int, tokens: int = 10) -> pd.DataFrame:
    """After every iteration SPIN's y has the higher reward and the lower log-likelihood; T-SPIN's has both.

    tokens: of y; every y′ has 10.
    """
    rows = []
    for method, gap in (("spin", -2.0), ("tspin", 3.0)):
        for seed in range(seeds):
            for iteration in range(5):
                for role, value in (("labelled", gap - 5), ("synthetic", -5.0), ("proto", -5.0)):
                    reward = {"labelled": 1.0}.get(role, 0.0)
                    noise = np.random.default_rng(seed).normal(0, 0.1, 20)
                    rows.append(pd.DataFrame({
                        "method": method, "seed": seed, "iteration": iteration, "prompt_id": range(20), "role": role,
                        "after": value + noise * (role == "labelled"), "reward_after": reward,
                        "tokens": tokens if role == "labelled" else 10,
                    }))  # fmt: skip
    return pd.concat(rows).astype({"iteration": "Int8"})


def steps(seeds: int) -> pd.DataFrame:
    cells = [(m, s, t, n) for m in ("spin", "tspin") for s in range(seeds) for t in range(3) for n in range(1, 7)]
    table = pd.DataFrame(cells, columns=["method", "seed", "iteration", "step"])
    for kind in ("reward", "log_likelihood"):
        for role, sign in (("labelled", 1), ("synthetic", -1)):
            table[f"{kind}/{role}"] = sign * table["step"] + table["seed"]
    return table.astype({"iteration": "Int8"})


def write_results(root: Path, levels=LEVELS, seeds: int = 5, tokens: int = 10) -> Path:
    """Results of a preset `pocket` in a folder, as a run leaves them; see `made` and `diagnostics`."""
    scores.scores_of.cache_clear()
    folder = root / "pocket"
    folder.mkdir(exist_ok=True)
    columns = [{"benchmark": f"b{i}", "label": f"B{i}", "group": f"g{i}", "metric": "em"} for i in range(3)]
    (folder / "suite.json").write_text(json.dumps({"columns": columns}))
    made(levels, seeds).to_parquet(folder / "problems.parquet")
    diagnostics(seeds, tokens).to_parquet(folder / "diagnostics.parquet")
    steps(seeds).to_parquet(folder / "steps.parquet")
    settings = {"model": {"fine_tuned": True}, "temperature": 1.0, "top_p": 1.0}
    (folder / "config.json").write_text(json.dumps({"config": settings}))
    facts = {"training_seconds": 10.0, "sampling_seconds": 5.0, "peak_memory_bytes": 1000}
    runs = [(m, s, t) for m in ("spin", "tspin") for s in range(seeds) for t in range(5)]
    costs = [{"method": m, "seed": s, "iteration": t, **facts} for m, s, t in runs]
    (folder / "provenance.json").write_text(json.dumps({"runs": costs}))
    return root


def judged(root: Path, *names: str) -> dict[str, dict]:
    asked = [claim for claim in claims.CLAIMS if not names or claim.name in names]
    return {row["claim"]: row for row in claims.scorecard(root / "pocket", asked)}


def grid(root: Path, effect: float, noise: float, seeds: int = 5) -> None:
    """An α × β study: α = 1 is `effect` points better; iteration 0, before β acts, is far apart and must not count."""
    generator, settings = np.random.default_rng(0), [0.1, 0.3, 0.5, 1.0]
    rows = [
        (a, b, "tspin", seed, t, 40 + (effect * (a == 1) + noise * generator.standard_normal() if t else 20 * a))
        for seed in range(seeds) for a in settings for b in settings for t in (0, 1)
    ]  # fmt: skip
    (root / "pocket" / "studies").mkdir(exist_ok=True)
    table = pd.DataFrame(rows, columns=["alpha", "beta", "method", "seed", "iteration", "avg"])
    table.to_csv(root / "pocket" / "studies" / "grid.csv", index=False)

"""Samples as tables to look at: a row a prompt with its responses and gaps, and a row a token."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from tspin.errors import UserError
from tspin.schema import LABELLED, PROTO, ROLES, SYNTHETIC, gaps, misaligned

NAMES = {LABELLED: "y", SYNTHETIC: "y′", PROTO: "y0"}
KEYS = ["seed", "iteration", "prompt_id"]
TEXTS = ["task", "prompt", "labelled"]


def sample_rows(
    diagnostics: pd.DataFrame, prompts: pd.DataFrame, responses: pd.DataFrame, proto: pd.DataFrame
) -> pd.DataFrame:
    """A row per seed, iteration and prompt, of those that were diagnosed and have a y′.

    diagnostics: tspin.schema.DIAGNOSTICS with seed and iteration. prompts, responses, proto: of a
    tspin_analysis.runs.Run; a text that was not kept is empty.

    Columns: KEYS; task, prompt, labelled, synthetic, proto (texts); reward, log_likelihood (y's minus y′'s, after
    training, nats); misaligned; tokens, tokens_synthetic, length_difference (y's minus y′'s); finished, equal (y′ ends;
    is y); before, after, before_synthetic, after_synthetic (log π before and after training, nats).
    """
    columns = [*KEYS, "task", "prompt", "labelled", "synthetic", "proto", "reward", "log_likelihood", "misaligned"]
    columns += ["tokens", "tokens_synthetic", "length_difference", "finished", "equal"]
    columns += ["before", "after", "before_synthetic", "after_synthetic"]
    if diagnostics.empty:
        return pd.DataFrame(columns=columns)
    found = gaps(diagnostics.drop(columns="method", errors="ignore"))
    for role, suffix in ((LABELLED, ""), (SYNTHETIC, "_synthetic")):
        rows = diagnostics.loc[diagnostics["role"] == role, [*KEYS, "tokens", "finished", "before", "after"]]
        found = found.merge(
            rows.rename(columns={name: name + suffix for name in rows.columns if name not in KEYS}), on=KEYS
        )
    if len(prompts):
        texts = prompts[["prompt_id", *(name for name in TEXTS if name in prompts)]]
        found = found.merge(texts.drop_duplicates("prompt_id"), on="prompt_id", how="left")
    if len(responses):
        drawn = responses[[*KEYS, "text"]].rename(columns={"text": "synthetic"})
        found = found.merge(drawn.drop_duplicates(KEYS), on=KEYS, how="left")
    if len(proto):
        found = found.merge(proto.rename(columns={"text": "proto"}), on=["seed", "prompt_id"], how="left")
    found = found.reindex(columns=list(dict.fromkeys([*found.columns, *TEXTS, "synthetic", "proto"])))
    return found.assign(
        misaligned=misaligned(found),
        finished=found["finished_synthetic"],
        equal=_equal(found),
        length_difference=found["tokens"].astype(int) - found["tokens_synthetic"].astype(int),
    )[columns]


def _equal(rows: pd.DataFrame) -> pd.Series:
    """Whether y′ is y, white space around it apart; not where a text was not kept."""
    first, second = (rows[name].astype("string").str.strip() for name in ("synthetic", "labelled"))
    return (first == second).fillna(False).astype(bool)


def by_iteration(table: pd.DataFrame) -> Iterator[tuple[int, int, pd.DataFrame]]:
    """(seed, iteration, its rows) of a table with these columns, in order."""
    seeds, iterations = table["seed"].astype(int), table["iteration"].astype(int)
    for seed, t in sorted(set(zip(seeds, iterations, strict=True))):
        yield seed, t, table[(seeds == seed) & (iterations == t)]


def prompt_tokens(name: str, logps: pd.DataFrame, prompt_id: int, iteration: int | None = None) -> pd.DataFrame:
    """A row per token of a prompt's responses. logps: tspin.schema.TOKENS with seed and iteration.

    Columns: seed, iteration, role (y, y′ or y0), place, token, before, after, change (after minus before, nats).
    Raises UserError, naming the run, where there are none.
    """
    rows = logps[logps["prompt_id"] == prompt_id] if len(logps) else logps
    if iteration is not None and len(rows):
        rows = rows[rows["iteration"] == iteration]
    if rows.empty:
        kept = f"of {logps['prompt_id'].nunique()} other prompts" if len(logps) else "of no prompt"
        where = f"prompt {prompt_id}" + ("" if iteration is None else f" at iteration {iteration}")
        raise UserError(
            f"{name}: single tokens are kept {kept}, not of {where}: token_prompts says of how many a run keeps them, "
            "`tspin tokens` computes them for any checkpoint"
        )
    cells = [*(column for column in ("seed", "iteration") if column in rows), "role"]
    rows = rows.sort_values(cells, key=lambda column: column.map(ROLES.index) if column.name == "role" else column)
    table = rows[[*cells, "pieces", "before", "after"]].explode(["pieces", "before", "after"], ignore_index=True)
    table = table.assign(place=table.groupby(cells, sort=False).cumcount(), role=table["role"].map(NAMES))
    table = table.rename(columns={"pieces": "token"}).astype({"before": float, "after": float})
    return table[[*cells, "place", "token", "before", "after"]].assign(change=table["after"] - table["before"])


def spread_over(count: int, most: int) -> np.ndarray:
    """Which of so many rows are shown where only `most` can be: evenly spread, as runs choose theirs."""
    return np.arange(count) if count <= most else np.arange(most) * count // most

"""Table 5: one prompt's labelled, proto-synthetic and later responses, side by side, for each method."""

from pathlib import Path

import pandas as pd

from tspin.errors import UserError

from . import reading as load
from .style import METHODS
from .tables import grid, latex


def table5(preset: str, results: Path = Path("results"), prompt_id: int | None = None) -> pd.DataFrame:
    """Texts of one prompt: columns Response, and one a method; rows the label, y0, and the policies by iteration.

    prompt_id: one of the prompts that have every response; the first of them when None. Raises UserError for another.
    """
    prompts, responses = load.parquet("prompts", preset, results), load.parquet("responses", preset, results)
    found = shown_prompts(responses)
    chosen = found[0] if prompt_id is None else prompt_id
    if chosen not in found:
        raise UserError(f"no responses at every iteration to prompt {chosen}; there are: {', '.join(map(str, found))}")
    prompt = prompts[prompts["prompt_id"] == chosen].iloc[0]
    own = responses[responses["prompt_id"] == chosen]
    methods = [name for name in METHODS if name in set(own.loc[own["iteration"].notna(), "method"])]
    given = {"prompt": "prompt", "labelled y": "labelled", "proto-synthetic y0": "proto"}
    rows = [{"Response": name, **{METHODS[m].label: prompt[column] for m in methods}} for name, column in given.items()]
    for iteration in sorted(own["iteration"].dropna().unique()):
        texts = own[own["iteration"] == iteration].set_index("method")["text"]
        rows.append({"Response": f"iteration {iteration}", **{METHODS[m].label: texts.get(m, "") for m in methods}})
    return pd.DataFrame(rows)


def shown_prompts(responses: pd.DataFrame) -> list[int]:
    """The prompts that have a response at every iteration of every method."""
    iterative = responses[responses["iteration"].notna()]
    wanted = iterative.groupby(["method", "iteration"]).ngroups
    counts = iterative.groupby("prompt_id").size()
    found = sorted(int(prompt) for prompt in counts[counts == wanted].index)
    if not found:
        raise UserError("no prompt has a response at every iteration of every method: run all methods with one seed")
    return found


def write_table5(preset: str, results: Path = Path("results"), prompt_id: int | None = None) -> list[Path]:
    """Write `results/<preset>/table5.csv`, `.md` and `.tex`; return their paths."""
    table = table5(preset, results, prompt_id)
    seed = int(load.parquet("responses", preset, results)["seed"].min())
    caption = (
        f"Table 5 ({preset}, seed {seed}): responses to one training prompt, sampled as y′ is, from the policy that "
        "each iteration ended with. The paper's own is Zephyr-7B's."
    )
    shown = table.map(lambda text: " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;"))
    stem = results / preset / "table5"
    return [
        load.write_atomically(stem.with_suffix(".csv"), table.to_csv(index=False, lineterminator="\n").encode()),
        load.write_atomically(stem.with_suffix(".md"), f"{grid(shown)}\n\n{caption}\n".encode()),
        load.write_atomically(stem.with_suffix(".tex"), latex(table, caption).encode()),
    ]

"""Table 5: one prompt's labelled, proto-synthetic and later responses, side by side, for each method."""

from pathlib import Path

import pandas as pd

from tspin.errors import UserError

from .reading import read_table
from .style import in_order, look

GIVEN = {"prompt": "prompt", "labelled y": "labelled", "proto-synthetic y0": "proto"}  # row → column of the prompts


def response_table(folder: Path, prompt_id: int | None = None) -> pd.DataFrame:
    """Texts of one prompt: columns Response, and one per method; rows the label, y0, and the policies by iteration.

    prompt_id: one of the prompts that have every response; the first of them when None. Raises UserError for another.
    """
    prompts, responses = read_table(folder, "prompts"), read_table(folder, "responses")
    shown = shown_prompts(responses)
    chosen = shown[0] if prompt_id is None else prompt_id
    if chosen not in shown:
        raise UserError(f"no responses at every iteration to prompt {chosen}; there are: {', '.join(map(str, shown))}")
    prompt = prompts[prompts["prompt_id"] == chosen].iloc[0]
    drawn = responses[(responses["prompt_id"] == chosen) & responses["iteration"].notna()]
    methods = in_order(drawn["method"])
    rows = [{"Response": row, **{look(m).label: prompt[column] for m in methods}} for row, column in GIVEN.items()]
    for iteration, part in drawn.groupby("iteration"):
        texts = part.set_index("method")["text"]
        rows.append({"Response": f"iteration {iteration}", **{look(m).label: texts.get(m, "") for m in methods}})
    return pd.DataFrame(rows)


def shown_prompts(responses: pd.DataFrame) -> list[int]:
    """The prompts that have a response at every iteration of every method."""
    drawn = responses[responses["iteration"].notna()]
    wanted = drawn.groupby(["method", "iteration"]).ngroups
    counts = drawn.groupby("prompt_id").size()
    prompts = sorted(int(prompt) for prompt in counts[counts == wanted].index)
    if not prompts:
        raise UserError("no prompt has a response at every iteration of every method: run all methods with one seed")
    return prompts


def response_cells(table: pd.DataFrame) -> pd.DataFrame:
    """`response_table` with each text on one line."""
    return table.map(lambda text: " ".join(str(text).split()))


def response_caption(folder: Path) -> str:
    """What a reader must know to read the table."""
    seed = int(read_table(folder, "responses")["seed"].min())
    return (
        f"Table 5 ({folder.name}, seed {seed}): responses to one training prompt, sampled as y′ is, from the policy "
        "that each iteration ended with. The paper's own is Zephyr-7B's."
    )

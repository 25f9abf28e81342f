"""Token by token: log π of every token of some responses under two policies, to look at (tspin.schema.TOKENS).

Sums over a response's tokens are the sequence log-probabilities of tspin.diagnostics: by the same arithmetic, up to
rounding.
"""

from collections.abc import Mapping, Sequence

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tspin.schema import TOKENS
from tspin.triplets import Triplet

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no whole character yet

TokenLogps = Mapping[str, Sequence[Sequence[float]]]  # role → of each triplet's response, nats a token


def token_table(
    tokenizer: PreTrainedTokenizerBase, triplets: Sequence[Triplet], before: TokenLogps, after: TokenLogps
) -> pa.Table:
    """The table of TOKENS: of every triplet a row per role of `after`, in the triplets' order."""
    rows = [
        {
            "prompt_id": triplet.prompt_id,
            "role": role,
            "ids": (ids := triplet.responses[role].ids),
            "pieces": pieces(tokenizer, ids),
            "before": before[role][place],
            "after": after[role][place],
        }
        for role in after
        for place, triplet in enumerate(triplets)
    ]
    return pa.Table.from_pylist(rows, schema=TOKENS)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Texts of tokens, one each, which joined are the text of all; special tokens are spelt out.

    Of a character of several tokens the last one has it, the others are empty.
    """
    texts: list[str] = []
    context = done = 0  # tokens decoded along with the next, as many decoders drop a space at a text's start
    for end in range(1, len(ids) + 1):
        known, whole = (_decoded(tokenizer, ids[context:stop]) for stop in (done, end))
        if whole.endswith(UNFINISHED) and end < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(known) :])
        context, done = done, end
    return texts


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text

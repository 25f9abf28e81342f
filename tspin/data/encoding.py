"""(interim) encoding of data sets."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tspin.config import SelfPlayConfig
from tspin.data import templates as data
from tspin.data.formats import Rows, set_key, validate_rows
from tspin.data.tables import Examples, open_table
from tspin.models import tokenizer_fingerprint
from tspin.runs.files import fingerprint
from tspin.runs.locks import owned
from tspin.runs.stages import run_stage


def encode_dataset(
    dataset: Rows | Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, args: SelfPlayConfig
) -> Examples:
    """Rows {"prompt", "completion"} as examples; an integer "prompt_id" replaces the row's number. Raises UserError.

    What is made of large data sets (`Rows.key`, `set_key`) is kept in args.shared_dir, or the run's folder, and read
    from there the next time. Rows of note are told on stderr.
    """
    settings: dict[str, Any] = dict(
        template=args.template,
        max_prompt_tokens=args.max_prompt_length,
        max_response_tokens=args.max_completion_length,
        long_prompts=args.long_prompts,
    )
    if isinstance(dataset, Rows):
        key, rows = dataset.key, dataset.numbered()
    else:
        key, rows = set_key(dataset), _numbered(dataset)
    if key is None:
        examples = data.encode_examples(rows, tokenizer, **settings)
    else:
        examples = _encoded_once(key, rows, tokenizer, settings, Path(args.shared_dir or str(args.output_dir)))
    for remark in examples.remarks:
        sys.stderr.write(f"tspin: {remark}\n")
    return examples


def _numbered(dataset: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    given: list[Any] = []  # the row that the check is at: it reads one at a time

    def rows() -> Iterator[Mapping[str, Any]]:
        for row in dataset:
            given[:] = [row.get("prompt_id") if isinstance(row, Mapping) else None]
            yield row

    for number, row in enumerate(validate_rows(rows(), "train_dataset")):
        yield given[0] if isinstance(given[0], int) else number, row


def _encoded_once(
    key: Any,
    rows: Iterable[tuple[int, dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    folder: Path,
) -> Examples:
    inputs = {"rows": key, "tokenizer": tokenizer_fingerprint(tokenizer), **settings}
    path = folder / f"examples-{fingerprint(inputs)}.arrow"

    def produce(target: Path) -> dict[str, Any]:
        made = data.encode_examples(rows, tokenizer, **settings, path=target)
        prints = {"fingerprint": made.fingerprint, "prompts_fingerprint": made.prompts_fingerprint}
        return {**prints, "noted": made.noted, "remarks": made.remarks}

    with owned(folder, wait=True):
        facts = run_stage(path, inputs, produce).facts
    examples = Examples(open_table(path), facts["noted"], facts["remarks"])
    # As properties they would be computed, from every token.
    examples.__dict__.update({name: facts[name] for name in ("fingerprint", "prompts_fingerprint")})
    return examples

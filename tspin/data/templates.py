"""Prompts and labelled responses as the policy sees them: templates and encoding.

Data is text, templates are control: where a prompt or a response spells one of the tokenizer's special tokens
(<|im_start|>, </s>), it is encoded as the characters that it is. A prompt cannot open a turn of its own, and a response
ends where its row ends, once, and nowhere inside. Such rows are counted and listed on stderr. One exception:
with template "none", prompts are taken as written for the tokenizer, special tokens included; they are listed too.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from tspin.data.formats import Row, texts
from tspin.data.tables import EXAMPLE_SCHEMA, Examples, Response, TableWriter
from tspin.errors import UserError

BAR_AFTER = 10  # seconds of encoding that need no progress bar
PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as control tokens, the longest first. Words that were merely added are not."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added, key=lambda text: (-len(text), text))


def _spelt(value: Any, special: Sequence[str]) -> list[str]:
    """The special tokens that the texts of a prompt or completion spell."""
    return [token for token in special if any(token in text for text in texts(value))]


def encode_prompt(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, template: str, special: Sequence[str] | None = None
) -> tuple[str, list[int]]:
    """(text, token ids) of a prompt as the policy sees it, up to where its response begins.

    template: "chat" for the tokenizer's own chat template, "auto" for that where there is one and
    the paper's template where there is none, "paper", "none" for the text as it is, or any text with
    {prompt} in it. A prompt given as one user's message is that message's text; longer conversations, which only a
    chat template can tell apart, always take it.
    Special tokens come from the template alone; those that the prompt spells are text (but with "none").
    special: `special_tokens(tokenizer)`, for callers with many prompts.
    Raises UserError for an unknown template, and for messages that the chat template refuses.
    """
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "paper"
    if template != "chat" and not isinstance(prompt, str) and [message["role"] for message in prompt] == ["user"]:
        prompt = prompt[0]["content"]
    special = special_tokens(tokenizer) if special is None else special
    given: Any = prompt
    hidden: Hidden = []
    if template != "none" or not isinstance(prompt, str):
        given, hidden = _hide(prompt, _spelt(prompt, special))
    if not isinstance(prompt, str) or template == "chat":
        if not tokenizer.chat_template:
            raise UserError("template: the tokenizer has no chat template; give one user's message and 'paper'")
        messages = [{"role": "user", "content": given}] if isinstance(prompt, str) else list(given)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"the tokenizer's chat template refuses a prompt's messages ({error})") from error
        assert isinstance(text, str)
        if hidden:
            return _show(text, hidden), _encode_with_plain(text, hidden, tokenizer, special)
        # The template has written the begin token itself, if the model wants one.
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
    form = {"paper": PAPER_TEMPLATE, "none": "{prompt}"}.get(template, template)
    if "{prompt}" not in form:
        raise UserError(f"template {template!r}: auto, chat, paper, none, or a text with {{prompt}} in it")
    text = form.replace("{prompt}", given)
    if hidden:
        empty = _without_end(tokenizer("")["input_ids"], tokenizer)  # the begin token, if there is one
        return _show(text, hidden), empty + _encode_with_plain(text, hidden, tokenizer, special)
    return text, _without_end(tokenizer(text)["input_ids"], tokenizer)


Hidden = list[tuple[str, str]]  # (placeholder, the special token's text that it stands for)


def _hide(prompt: Any, spelt: Sequence[str]) -> tuple[Any, Hidden]:
    """A prompt with a placeholder, a character of Unicode's private use area, for each special token that it spells."""
    if not spelt:
        return prompt, []
    used = set("".join(texts(prompt)))
    free = [mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in used]
    if len(free) < len(spelt):
        raise UserError("a prompt spells special tokens and uses all of Unicode's private characters")
    hidden = list(zip(free, spelt, strict=False))

    def replaced(text: str) -> str:
        for mark, token in hidden:
            text = text.replace(token, mark)
        return text

    if isinstance(prompt, str):
        return replaced(prompt), hidden
    return [{**message, "content": replaced(message["content"])} for message in prompt], hidden


def _show(text: str, hidden: Hidden) -> str:
    for mark, token in hidden:
        text = text.replace(mark, token)
    return text


def _encode_with_plain(
    text: str, hidden: Hidden, tokenizer: PreTrainedTokenizerBase, special: Sequence[str]
) -> list[int]:
    """Token ids of a filled-in template: its own special tokens are control tokens, what is hidden is text."""
    ids: list[int] = []
    for number, part in enumerate(re.split("(" + "|".join(map(re.escape, special)) + ")", text)):
        if number % 2:
            ids.append(int(tokenizer.convert_tokens_to_ids(part)))  # type: ignore[arg-type]
        elif part:
            ids += _encode_plain(_show(part, hidden), tokenizer)
    return ids


def _encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Some tokenizers close every text with an end token; a prompt is not the end.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_response(completion: Any, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Response:
    """A labelled response with its end token, or cut to max_tokens and without one.

    Special tokens that the text spells are text: the one end token is the last token.
    """
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    ids = [*_encode_plain(text, tokenizer), tokenizer.eos_token_id]
    return Response(ids[:max_tokens], text, finished=len(ids) <= max_tokens)


def encode_examples(
    rows: Iterable[tuple[int, Row]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_prompt_tokens: int,
    max_response_tokens: int,
    long_prompts: str,
    path: Path | None = None,
) -> Examples:
    """Encode numbered rows. A prompt over max_prompt_tokens is dealt with as `long_prompts` says.

    "error" raises UserError, "drop" leaves the row out, "truncate" keeps the prompt's last tokens.
    Rows that were dropped, cut in prompt or response, or taken in part, and those whose text spells special tokens, are
    in `noted` of what is returned, and counted and listed in its `remarks`. path: where to keep the table (Arrow IPC,
    EXAMPLE_SCHEMA).
    Also raises UserError for a tokenizer without an end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token (eos_token): set one, or responses could never end")
    noted: dict[str, list[int]] = {}
    special = special_tokens(tokenizer)
    found: set[str] = set()
    count = 0
    with TableWriter(EXAMPLE_SCHEMA, path) as writer:
        for number, row in tqdm(rows, desc="encoding", unit="row", delay=BAR_AFTER):
            count += 1
            text, ids = encode_prompt(row["prompt"], tokenizer, template, special)
            if not ids:
                raise UserError(f"data row {number + 1}: the tokenizer makes no token of this prompt")
            if len(ids) > max_prompt_tokens:
                if long_prompts == "error":
                    raise UserError(
                        f"data row {number + 1}: prompt of {len(ids)} tokens, max_prompt_length is "
                        f"{max_prompt_tokens}; raise it, or set long_prompts to truncate or drop"
                    )
                noted.setdefault("dropped" if long_prompts == "drop" else "truncated", []).append(number)
                if long_prompts == "drop":
                    continue
                ids = ids[-max_prompt_tokens:]
            if spelt := _spelt(row["prompt"], special) + _spelt(row["completion"], special):
                found.update(spelt)
                noted.setdefault("special_tokens", []).append(number)
            response = encode_response(row["completion"], tokenizer, max_response_tokens)
            if not response.finished:
                noted.setdefault("cut", []).append(number)
            if not isinstance(row["completion"], str) and len(row["completion"]) > 1:
                noted.setdefault("last_message", []).append(number)
            writer.add(number, response.text, response.ids, response.finished, text, ids)
    table = writer.table()
    if not len(table):
        raise UserError("no data left: every prompt is longer than max_prompt_length")
    as_text = "as text" if template != "none" else "as control tokens in prompts (template none), as text elsewhere"
    says = {
        "dropped": f"dropped: prompts of more than max_prompt_length, {max_prompt_tokens}",
        "truncated": f"cut to the last {max_prompt_tokens} tokens of their prompts (max_prompt_length)",
        "cut": f"cut to {max_response_tokens} tokens of their response and no end token (max_completion_length)",
        "last_message": "have several messages in their completion, of which the last is the response",
        "special_tokens": f"spell special tokens ({' '.join(sorted(found))}), taken {as_text}",
    }
    remarks = []
    for kind, numbers in noted.items():
        listed = ", ".join(str(n + 1) for n in numbers[:10]) + (", …" if len(numbers) > 10 else "")
        remarks.append(f"{len(numbers)} of {count} data rows {says[kind]}: rows {listed}")
    return Examples(table, noted, remarks)

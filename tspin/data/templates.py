"""Prompts and labelled responses as the policy sees them: templates and tokens.

Data is text, templates are control: where a prompt or a response spells one of the tokenizer's special tokens
(<|im_start|>, </s>), it is encoded as the characters that it is. A prompt cannot open a turn of its own, and a response
ends where its row ends, once, and nowhere inside. Such rows are counted and listed on stderr. One exception:
with template "none", prompts are taken as written for the tokenizer, special tokens included; they are listed too.
"""

import re
from collections.abc import Iterable, Sequence

import jinja2
from transformers import PreTrainedTokenizerBase

from tspin.data.formats import Message, as_messages
from tspin.data.responses import Response
from tspin.errors import UserError

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as control tokens, the longest first. Words that were merely added are not."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added, key=lambda text: (-len(text), text))


def spelt_tokens(messages: Iterable[Message], special: Sequence[str]) -> list[str]:
    """The special tokens that messages spell."""
    return [token for token in special if any(token in message["content"] for message in messages)]


def encode_prompt(
    prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, template: str, special: Sequence[str] | None = None
) -> tuple[str, list[int]]:
    """(text, token ids) of a prompt as the policy sees it, up to where its response begins.

    template: "chat" for the tokenizer's own chat template, "auto" for that where there is one and
    the paper's template where there is none, "paper", "none" for the text as it is, or any text with
    {prompt} in it. A prompt of one user's message is that message's text; longer conversations, which only a
    chat template can tell apart, always take it.
    Special tokens come from the template alone; those that the prompt spells are text (but with "none").
    special: `special_tokens(tokenizer)`, for callers with many prompts.
    Raises UserError for an unknown template, and for messages that the chat template refuses.
    """
    messages = as_messages(prompt, "user")
    hidden: Hidden = []
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "paper"
    chat = template == "chat" or [message["role"] for message in messages] != ["user"]
    special = special_tokens(tokenizer) if special is None else special
    if chat or template != "none":
        messages, hidden = _hide(messages, spelt_tokens(messages, special))
    text = _chat_text(messages, tokenizer) if chat else _form_text(messages[0]["content"], template)
    # A chat template has written the begin token itself, if the model wants one.
    if hidden:
        begin = [] if chat else _without_end(tokenizer("")["input_ids"], tokenizer)
        return _show(text, hidden), begin + _encode_with_plain(text, hidden, tokenizer, special)
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    return text, ids if chat else _without_end(ids, tokenizer)


def _chat_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise UserError("template: the tokenizer has no chat template; give one user's message and 'paper'")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer's chat template refuses a prompt's messages ({error})") from error
    assert isinstance(text, str)
    return text


def _form_text(prompt: str, template: str) -> str:
    form = {"paper": PAPER_TEMPLATE, "none": "{prompt}"}.get(template, template)
    if "{prompt}" not in form:
        raise UserError(f"template {template!r}: auto, chat, paper, none, or a text with {{prompt}} in it")
    return form.replace("{prompt}", prompt)


Hidden = list[tuple[str, str]]  # (placeholder, the special token's text that it stands for)


def _hide(messages: list[Message], spelt: Sequence[str]) -> tuple[list[Message], Hidden]:
    """Messages with a placeholder, a character of Unicode's private use area, for each special token they spell."""
    if not spelt:
        return messages, []
    used = set("".join(message["content"] for message in messages))
    free = [mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in used]
    if len(free) < len(spelt):
        raise UserError("a prompt spells special tokens and uses all of Unicode's private characters")
    hidden = list(zip(free, spelt, strict=False))

    def replaced(text: str) -> str:
        for mark, token in hidden:
            text = text.replace(token, mark)
        return text

    return [{**message, "content": replaced(message["content"])} for message in messages], hidden


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


def encode_response(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Response:
    """A labelled response with its end token, or cut to max_tokens and without one.

    Special tokens that the text spells are text: the one end token is the last token.
    """
    ids = [*_encode_plain(text, tokenizer), tokenizer.eos_token_id]
    return Response(ids[:max_tokens], text, finished=len(ids) <= max_tokens)

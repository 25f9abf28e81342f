"""Prompts and labelled responses as the policy sees them: templates and tokens.

A response's tokens are taken from the text of prompt and response together, as a policy that writes it meets them; the
prompt's are a prefix of these. Where a prompt ends in white space that the tokenizer would merge with a first word
("### Response: " before "The", a byte-level tokenizer's ĠThe), that space belongs to the response. The begin token
stands once before all, whether the chat template writes it or the tokenizer puts it there.

Data is text, templates are control: where a prompt or a response spells one of the tokenizer's special tokens
(<|im_start|>, </s>), it is encoded as the characters that it is. A prompt cannot open a turn of its own, and a response
ends where its row ends, once, and nowhere inside. One exception: with template "none", prompts are taken as written for
the tokenizer, special tokens included.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from tspin.config import Rendering
from tspin.data.formats import Message
from tspin.data.turns import closing, rendered, turn_end
from tspin.errors import UserError

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
FIRST_WORDS = ("The", "a", "1")  # how responses may begin, to see whether a tokenizer merges the border
TAIL = 40  # characters of a prompt that decide how its end is encoded

Hidden = list[tuple[str, str]]  # (placeholder, the special token's text that it stands for)


@dataclass(frozen=True)
class Written:
    """A prompt and a response as text. What data spells of special tokens stands as placeholders, `hidden`.

    response: None where only a prompt was asked for; without the turn's end.
    notes: "special_tokens" where data spells some; "left_out" where the template writes only a part of a message;
        "opened_otherwise" where the template opens an assistant's turn otherwise than its generation prompt does.
    """

    prompt: str
    response: str | None = None
    hidden: Hidden = field(default_factory=list)
    notes: frozenset[str] = frozenset()

    def shown(self, text: str) -> str:
        """A text with its placeholders replaced."""
        for mark, token in self.hidden:
            text = text.replace(mark, token)
        return text


class Template:
    """How one tokenizer writes conversations, by `rendering`.

    rendering.template: "chat" for the tokenizer's own chat template, "auto" for that where there is one and the paper's
    template where there is none, "paper", "none" for the text as it is, or any text with {prompt} in it. A prompt of
    one user's message is that message's text; longer conversations, which only a chat template can tell apart, always
    take it.
    end: what closes a response (tspin.data.turns). begin: the tokens before every text, of which `encode` puts none
    twice.
    Raises UserError for an unknown template, and for a chat template that leaves out an assistant's message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering):
        self.tokenizer = tokenizer
        self.rendering = rendering
        self.end = turn_end(tokenizer, rendering)
        self.special = special_tokens(tokenizer)
        self.begin = _begin(tokenizer)
        self.begin_text = "".join(map(str, tokenizer.convert_ids_to_tokens(self.begin)))
        self._special = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        self._moved: dict[str, int] = {}
        self.form = rendering.template
        if self.form == "auto":
            self.form = "chat" if tokenizer.chat_template else "paper"
        if self.form != "chat":
            _filled("", self.form)

    @cached_property
    def closing(self) -> str:
        """See tspin.data.turns.closing."""
        return closing(self.tokenizer, self.rendering)

    def write(
        self, messages: list[Message], response: Message | None = None, tools: list[Any] | None = None
    ) -> Written:
        """A prompt's messages, and the assistant's message that answers them, as text.

        Raises UserError for messages that the chat template refuses, or of which it would leave out tools or tool calls
        without a word.
        """
        chat = self._uses_chat(messages)
        given = [*messages, *([response] if response else [])]
        verbatim = not chat and self.form == "none"
        spelt = self._spelt([*given[len(messages) if verbatim else 0 :], *(tools or [])])
        notes = {"special_tokens"} if spelt or (verbatim and self._spelt(messages)) else set()
        hidden = _placeholders(spelt, given, tools)
        if hidden:
            messages = messages if verbatim else _hide(messages, hidden)
            response, tools = _hide(response, hidden), _hide(tools, hidden)
        if chat:
            prompt, answer = self._chat(messages, response, tools, notes)
        else:
            prompt = _filled(str(messages[0]["content"]), self.form)
            answer = None if response is None else str(response["content"] or "")
        seam = len(prompt) - self.moved(prompt)
        return Written(prompt[:seam], None if answer is None else prompt[seam:] + answer, hidden, frozenset(notes))

    def moved(self, prompt: str) -> int:
        """See `moved`; remembered by the prompt's last characters, of which most prompts of a data set share theirs."""
        if not prompt or not prompt[-1].isspace():
            return 0
        tail = prompt[-TAIL:]
        if tail not in self._moved:
            self._moved[tail] = moved(tail, self.tokenizer)
        return self._moved[tail]

    def encode(self, texts: Sequence[str], hidden: Sequence[Hidden]) -> list[list[int]]:
        """Token ids of texts that begin a sequence, the begin token once before each."""
        plain = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        encoded = []
        for text, ids, places in zip(texts, plain, hidden, strict=True):
            ids = self._with_hidden(text, places) if places else ids
            encoded.append(ids if self.begin_text and text.startswith(self.begin_text) else self.begin + ids)
        return encoded

    def encode_after(self, response: str, hidden: Hidden) -> list[int]:
        """Token ids of a text amid a sequence, with no space before it that nobody wrote."""
        return _amid(response, partial(self._with_hidden, hidden=hidden))

    def _uses_chat(self, messages: Sequence[Message]) -> bool:
        chat = self.form == "chat" or [message["role"] for message in messages] != ["user"]
        if self.rendering.system_prompt and not chat:
            raise UserError(f"system_prompt: template {self.form!r} has no place for it; only a chat template has")
        return chat

    def _chat(
        self, messages: list[Message], response: Message | None, tools: list[Any] | None, notes: set[str]
    ) -> tuple[str, str | None]:
        system = self.rendering.system_prompt
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        prompt = rendered(messages, self.tokenizer, self.rendering, tools, open_turn=True)
        self._check_complete(prompt, messages, tools, notes)
        if response is None:
            return prompt, None
        whole = rendered([*messages, response], self.tokenizer, self.rendering, tools)
        content = str(response.get("content") or "")
        if whole.startswith(prompt) and whole.endswith(self.closing):
            answer = whole[len(prompt) : len(whole) - len(self.closing)]
        else:
            notes.add("opened_otherwise")
            answer = content
        if response.get("tool_calls") and not answer.strip():
            raise UserError("the tokenizer's chat template does not write tool calls: give one that does")
        if content.strip() not in answer:
            notes.add("left_out")
        return prompt, answer

    def _check_complete(self, prompt: str, messages: list[Message], tools: list[Any] | None, notes: set[str]) -> None:
        """Raise UserError where the template ignores tools or tool calls; note messages that it writes in part."""
        if tools and prompt == rendered(messages, self.tokenizer, self.rendering, open_turn=True):
            raise UserError("the tokenizer's chat template does not write tools: give one that does, or rows without")
        for message in messages:
            calls = [call.get("function", call) for call in message.get("tool_calls") or []]
            if any(str(call.get("name")) not in prompt for call in calls):
                raise UserError("the tokenizer's chat template does not write tool calls: give one that does")
            if str(message.get("content") or "").strip() not in prompt:
                notes.add("left_out")

    def _spelt(self, data: Any) -> list[str]:
        """The special tokens that the strings in `data` spell, the longest first."""
        found = {token for text in _strings(data) for token in self._special.findall(text)}
        return [token for token in self.special if token in found]

    def _with_hidden(self, text: str, hidden: Hidden) -> list[int]:
        """Token ids of a filled-in template: its own special tokens are control tokens, what is hidden is text."""
        ids: list[int] = []
        for number, part in enumerate(re.split(f"({self._special.pattern})", text)):
            if number % 2:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(part)))  # type: ignore[arg-type]
            elif part:
                for mark, token in hidden:
                    part = part.replace(mark, token)
                ids += _amid(part, self._as_text) if number and self._joins else self._as_text(part)
        return ids

    def _as_text(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    @cached_property
    def _joins(self) -> bool:
        """Whether the tokenizer writes a word after a control token otherwise than at a text's beginning.

        Some put a space before a text's first word, and before none that follows a control token.
        """
        control, word = next(iter(self.special), ""), FIRST_WORDS[0]
        whole = self.tokenizer(control + word, add_special_tokens=False)["input_ids"]
        return bool(control) and list(whole[1:]) != self._as_text(word)


def _amid(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Token ids of a text that follows others, with no space before it that nobody wrote. encode: of a text alone."""
    line, ids = encode("\n"), encode("\n" + text)
    return ids[len(line) :] if ids[: len(line)] == line else encode(text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as control tokens, the longest first. Words that were merely added are not."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added, key=lambda text: (-len(text), text))


def moved(prompt: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many characters of white space at a prompt's end belong to its response.

    The fewest without which the prompt's tokens are a prefix of those of the prompt and a word; none where no number
    makes them one.
    """
    for count in range(len(prompt) - len(prompt.rstrip()) + 1):
        head = tokenizer(prompt[: len(prompt) - count], add_special_tokens=False)["input_ids"]
        whole = [tokenizer(prompt + word, add_special_tokens=False)["input_ids"] for word in FIRST_WORDS]
        if all(ids[: len(head)] == head for ids in whole):
            return count
    return 0


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text. Some close every text with an end token; a prompt is not the end.

    OPT's and XGLM's begin with the end token: what stands before a word tells the two apart.
    """
    word = tokenizer(FIRST_WORDS[0], add_special_tokens=False)["input_ids"]
    whole = tokenizer(FIRST_WORDS[0])["input_ids"]
    for place in range(len(whole) - len(word) + 1):
        if word and whole[place : place + len(word)] == word:
            return list(whole[:place])
    ids = tokenizer("")["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _filled(prompt: str, template: str) -> str:
    form = {"paper": PAPER_TEMPLATE, "none": "{prompt}"}.get(template, template)
    if "{prompt}" not in form:
        raise UserError(f"template {template!r}: auto, chat, paper, none, or a text with {{prompt}} in it")
    return form.replace("{prompt}", prompt)


def _placeholders(spelt: Sequence[str], *data: Any) -> Hidden:
    """For each special token that data spells, a character of Unicode's private use area that the data does not use."""
    if not spelt:
        return []
    used = {character for text in _strings(data) for character in text}
    free = [mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in used]
    if len(free) < len(spelt):
        raise UserError("a prompt spells special tokens and uses all of Unicode's private characters")
    return list(zip(free, spelt, strict=False))


def _hide(data: Any, hidden: Hidden) -> Any:
    """Messages or tools whose strings have placeholders for what they spell of special tokens; roles stay."""
    if isinstance(data, str):
        for mark, token in hidden:
            data = data.replace(token, mark)
        return data
    if isinstance(data, dict):
        return {name: value if name == "role" else _hide(value, hidden) for name, value in data.items()}
    return [_hide(value, hidden) for value in data] if isinstance(data, list) else data


def _strings(data: Any) -> list[str]:
    """Every string in messages or tools."""
    if isinstance(data, str):
        return [data]
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else ()
    return [text for part in parts for text in _strings(part)]

"""How a conversation becomes text, and where a response ends: one rule for y, y′, y0 and evaluation.

The turn's end is what the chat template writes after an assistant's message, up to the control token that it closes
with (<|im_end|>, <end_of_turn>, </s>), or all of it where ordinary tokens spell it. Where there is no chat template, or
it writes nothing there, it is the tokenizer's end token. It is derived by rendering a conversation, not by a list of
models; a response that stops elsewhere has not ended.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tspin.config import Rendering
from tspin.data.formats import Message
from tspin.errors import UserError

AS_IT_IS = Rendering()
REPLY = "tspin reply"  # stands for an assistant's message when a template is asked what it writes around one


@dataclass(frozen=True)
class TurnEnd:
    """What closes a response.

    text: as the template writes it. token: the one token that says so; None where ordinary tokens spell the text.
    """

    text: str
    token: int | None

    def __str__(self) -> str:
        return repr(self.text) + ("" if self.token is not None else ", spelt by ordinary tokens")


@dataclass(frozen=True)
class Stops:
    """Where drawing stops: at the turn's end, and at other tokens after which nothing follows either."""

    end: TurnEnd
    others: frozenset[int] = frozenset()

    @property
    def tokens(self) -> list[int]:
        """Every token at which drawing stops."""
        return sorted(self.others if self.end.token is None else self.others | {self.end.token})


def turn_end(tokenizer: PreTrainedTokenizerBase, rendering: Rendering = AS_IT_IS) -> TurnEnd:
    """The end of a response; rendering.turn_end replaces what is derived. Raises UserError as `closing` does."""
    text = rendering.turn_end
    if not text and tokenizer.chat_template and rendering.template in ("auto", "chat", "none"):
        written = closing(tokenizer, rendering)
        text = _first_control(written, tokenizer) or written.rstrip()
    text = text or str(tokenizer.eos_token)
    return TurnEnd(text, _closing_token(text, tokenizer))


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template may write today's date."""
    return "strftime_now" in str(tokenizer.chat_template)


def stops(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, end: TurnEnd) -> Stops:
    """The turn's end, and the end tokens of the tokenizer and of the model's generation settings besides it."""
    configured = generation.eos_token_id if generation else None
    listed = configured if isinstance(configured, list) else [configured]
    others = {token for token in [*listed, tokenizer.eos_token_id] if token is not None}
    return Stops(end, frozenset(others - {end.token}))


def rendered(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    tools: list[Any] | None = None,
    *,
    open_turn: bool = False,
) -> str:
    """A conversation as the tokenizer's chat template writes it; open_turn: up to where the assistant's turn begins.

    Raises UserError where there is no such template, and for messages that it refuses.
    """
    if not tokenizer.chat_template:
        raise UserError("template: the tokenizer has no chat template; give one user's message and 'paper'")
    given = template_arguments(rendering)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=open_turn, **given
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"the tokenizer's chat template refuses a prompt's messages ({error})") from error
    assert isinstance(text, str)
    return text


def template_arguments(rendering: Rendering) -> dict[str, Any]:
    """What a chat template is given besides messages and tools: the run's own arguments, and its day as today's."""
    today = {"strftime_now": date.fromisoformat(rendering.date).strftime} if rendering.date else {}
    return {**today, **(rendering.chat_template_kwargs or {})}


def closing(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> str:
    """All that the chat template writes after a conversation's last message.

    Raises UserError for a template that leaves out what an assistant says.
    """
    conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": REPLY}]
    text = rendered(conversation, tokenizer, rendering)
    _, reply, written = text.rpartition(REPLY)
    if not reply:
        raise UserError("the tokenizer's chat template leaves out what the assistant says: give another one")
    return written


def _first_control(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text up to its first control token, that included; nothing where it has none."""
    tokens = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, tokens)), text) if tokens else None
    return text[: found.end()] if found else ""


def _closing_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    for token, added in tokenizer.added_tokens_decoder.items():
        if text.endswith(str(added)):
            return token
    return tokenizer.eos_token_id if text == tokenizer.eos_token else None

"""Rows of any format (tspin.data.formats) checked and made examples of: a prompt and the response to it."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, Literal

from datasets import Features, Value

from tspin.data.formats import (
    TASK,
    Format,
    Message,
    Row,
    as_messages,
    find_format,
    from_json,
    text_of,
    without_none,
)
from tspin.errors import UserError, tell

# number: the example's; row: that of the data set's row which it is from. Both count from 0. The others are JSON:
# prompt, a list of messages; completion, a list of one, the response; tools, a list; generated, as completion. The last
# two may be null. task: what the row's column of that name says, to tell kinds of prompts apart; null without one.
TEXTS = ("prompt", "completion", "tools", "generated")
ROWS = Features({**dict.fromkeys(("number", "row"), Value("int64")), **dict.fromkeys((*TEXTS, TASK), Value("string"))})
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which JSON can spell and no text has
LARGEST = 2**31 - 1  # prompt_id: diagnostics keep it in 32 bits
UNANSWERED = ("system", "developer", "assistant")  # the roles of messages that ask for no response

Rounds = Literal["first", "all"]


def checked_rows(
    rows: Iterable[Any],
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    rounds: Rounds = "first",
    generated: bool = False,
    numbered: bool = False,
) -> Iterator[dict[str, Any]]:
    """The examples of a data set's rows, as ROWS has them. What is read and what is not is told on stderr.

    columns: what the set calls them, {"prompt": "question", "completion": "answer"}; None: it is recognised.
    rounds: "first" takes a conversation's first assistant turn; "all" each of them, what is before it as its prompt.
    generated: take the column of that name, y′ of iteration 0. numbered: an integer "prompt_id" replaces the number.
    Raises UserError for the first bad row, counted from 1, and at the end for all those that hold more than text.
    """
    made: _Examples | None = None
    number = count = 0
    for count, row in enumerate(rows, start=1):
        where = f"{source}, row {count}"
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: not an object with a prompt and a response")
        made = made or _Examples(recognised(row, source, columns, generated, numbered), rounds == "all", generated)
        try:
            examples = made.of(row, count)
        except RecursionError:
            raise UserError(f"{where}: nested too deeply") from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        for example in examples:
            given = row.get("prompt_id") if numbered else None
            if isinstance(given, int) and not 0 <= given <= LARGEST:
                raise UserError(f"{where}: prompt_id {given}: a whole number from 0 to {LARGEST} is needed")
            task = row.get(TASK)
            named = {TASK: task if isinstance(task, str) else None}
            yield {"number": given if isinstance(given, int) else number, "row": count - 1, **example, **named}
            number += 1
    if made is None:
        raise UserError(f"{source} has no rows: give a data set with at least one prompt and response")
    if made.unseen:
        kinds = ", ".join(dict.fromkeys(kind for kinds in made.unseen.values() for kind in kinds))
        which = f"{len(made.unseen)} of {count} rows have content of another kind than text ({kinds})"
        where = f"{source}: {which}, the first is row {min(made.unseen)}"
        raise UserError(f"{where}: a text model cannot see it; remove these rows")
    if made.later:
        which = f"{made.later} of {count} conversations have later rounds, which are not used"
        remedy = "data.rounds=all makes each assistant turn an example of its own"
        tell(f"{source}: {which}: {remedy}")


def recognised(
    row: Row, source: str, columns: Mapping[str, str] | None = None, generated: bool = False, numbered: bool = False
) -> Format:
    """The format of a data set by its first row, told on stderr. The arguments are those of `checked_rows`."""
    names, numbered = list(map(str, row)), numbered and isinstance(row.get("prompt_id"), int)
    try:
        found = find_format(names, columns)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if generated and "generated" not in names:
        there = ", ".join(names)
        raise UserError(f"{source}: no column 'generated', which data.generated asks for; there are: {there}")
    tell(f"{source}: {found.in_words(names, generated, numbered)}")
    return found


class _Examples:
    """Examples of rows of one format, and what of the rows is in none.

    later: how many rows have turns that are not used. unseen: row → what it has that is no text.
    """

    def __init__(self, found: Format, every_turn: bool, generated: bool):
        self.format = found
        self.every_turn = every_turn
        self.generated = generated
        self.later = 0
        self.unseen: dict[int, list[str]] = {}

    def of(self, row: Row, place: int) -> list[dict[str, Any]]:
        """All but the numbers; none where the row has more than text. Raises UserError."""
        given, after = self.format.conversation(row)
        prompt, after = as_messages(given, "user"), as_messages(after, "assistant")
        conversation = [*prompt, *after]
        turns = [n for n, message in enumerate(conversation) if n >= len(prompt) and message["role"] == "assistant"]
        if not turns:
            problem = "no assistant turn" if after else "no response"
            raise UserError(f"{problem} (column {self.format.needs[-1]!r})")
        used = turns if self.every_turn else turns[:1]
        if kinds := self._kinds(row, conversation[: used[-1] + 1]):
            self.unseen[place] = kinds
            return []
        self.later += len(used) < len(turns)
        more = {"tools": _tools(row.get("tools")), "generated": self._generated(row, len(used))}
        return [{**self._example(conversation[:turn], conversation[turn]), **more} for turn in used]

    def _example(self, prompt: list[Message], response: Message) -> dict[str, str]:
        column, response_column = self.format.needs[0], self.format.needs[-1]
        if all(message["role"] in UNANSWERED for message in prompt):
            raise UserError(f"no prompt: no user's turn comes before the response (column {column!r})")
        if _blank(prompt[-1]):
            raise UserError(f"no prompt: the message before the response is empty (column {column!r})")
        if _blank(response):
            raise UserError(f"empty response (column {response_column!r})")
        return {"prompt": _json(prompt, "the prompt"), "completion": _json([response], "the response")}

    def _kinds(self, row: Row, messages: Sequence[Message]) -> list[str]:
        """What a row has that is no text: the types of such parts of messages, and columns of images and the like."""
        parts = (part for message in messages if isinstance(message["content"], list) for part in message["content"])
        others = [part for part in parts if text_of(part) is None]
        types = (str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in others)
        return [*dict.fromkeys(types), *(name for name in self.format.media if row.get(name) not in (None, "", []))]

    def _generated(self, row: Row, count: int) -> str | None:
        """The row's y′ of iteration 0. It may be empty, as what a policy draws may be. count: of the row's examples."""
        if not self.generated:
            return None
        if count > 1:
            raise UserError("`generated` is one response, and data.rounds=all makes several examples of this row")
        messages = as_messages(row.get("generated"), "assistant")
        drawn = [message for message in messages if message["role"] == "assistant"]
        if not drawn or not isinstance(drawn[0]["content"], str):
            raise UserError("column 'generated' has no assistant's turn with a text")
        return _json(drawn[:1], "the generated response")


def _blank(message: Message) -> bool:
    """Whether a message says nothing: a call of a tool needs no text, and what a tool gives back may be empty."""
    return not ((message["content"] or "").strip() or message.get("tool_calls") or message["role"] == "tool")


def _tools(value: Any) -> str | None:
    """Definitions of tools, a list or the JSON of one, as JSON; None where there are none. Raises UserError."""
    if value is None or isinstance(value, str) and not value.strip():
        return None
    tools = from_json(value, "column 'tools'")
    tools = [from_json(tool, "column 'tools'") for tool in tools] if isinstance(tools, list | tuple) else [tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError("column 'tools' is no list of definitions, nor the JSON of one")
    return _json(without_none(tools), "column 'tools'") if tools else None


def _json(value: Any, what: str) -> str:
    try:
        text = _encode(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} holds what is no JSON ({error})") from error
    if SURROGATE.search(text):
        raise UserError(f"{what} has half of a surrogate pair: no Unicode text")
    return text


def _plain(value: Any) -> str:
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__}")


_encode = json.JSONEncoder(ensure_ascii=False, default=_plain).encode

"""The formats of data sets: by which columns one is known, and which of a row's texts are prompt and response.

FORMATS is the list. A set's format is decided by the columns of its first row; where several fit, the first in the list
is taken. tspin.data.rows makes examples of any of them, the same as of TRL's prompt–completion form.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from tspin.errors import UserError

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
TASK = "task"  # a column of any format that says what kind of prompt a row has, to look at and to count by
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}

# How columns of prompts and of responses are called, the likelier first.
LIKELY = {
    "prompt": ("prompt", "question", "query", "instruction", "problem", "input", "user"),
    "completion": ("completion", "response", "answer", "output", "solution", "reply", "assistant", "target"),
}
LONGEST_NAME = 40  # characters of a column's name that a message shows

Message = dict[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """Columns in which data sets have conversations.

    whose: what they are called. needs: the columns without which it is another format.
    conversation: a row → what is given and what follows, each a text or messages. The assistant's turns of what follows
        are responses to learn from.
    takes: columns that are read where they are there; `tools`, `task` and `generated` are of any format.
    media: columns without which a row's texts are not whole.
    """

    whose: str
    needs: tuple[str, ...]
    conversation: Callable[[Row], tuple[Any, Any]]
    takes: tuple[str, ...] = ()
    media: tuple[str, ...] = MEDIA

    def in_words(self, names: Sequence[str], generated: bool, numbered: bool) -> str:
        """Which of a set's columns are read, and which are not. generated, numbered: see `checked_rows`."""
        read = {*self.needs, *self.takes, "tools", TASK, *(["generated"] if generated else [])}
        kept = [name for name in names if name in read]
        left = [name for name in names if name not in {*read, "generated", *(["prompt_id"] if numbered else [])}]
        words = f"{self.whose} {'columns' if len(kept) > 1 else 'column'} {', '.join(kept)}"
        if left:
            words += f"; not used: {', '.join(left)}"
        if "generated" in names and "generated" not in read:
            words += "; generated is not used (data.generated=true takes it as iteration 0's y′)"
        return words


def _pair(prompt: str, response: str, whose: str = "the") -> Format:
    return Format(whose, (prompt, response), lambda row: (row.get(prompt), row.get(response)))


def _whole(column: str) -> Callable[[Row], tuple[Any, Any]]:
    return lambda row: ([], row.get(column))


def _instruction(column: str, context: str) -> Callable[[Row], tuple[Any, Any]]:
    """Alpaca's form: an instruction and, in a column of its own, what it is about."""

    def conversation(row: Row) -> tuple[Any, Any]:
        instruction, about = row.get("instruction"), row.get(context)
        if isinstance(instruction, str) and isinstance(about, str) and about.strip():
            instruction = f"{instruction}\n\n{about}"
        return instruction, row.get(column)

    return conversation


def _chosen(row: Row) -> tuple[Any, Any]:
    """TRL's preferences: `chosen` follows the prompt, or is the whole conversation, which then begins with it."""
    prompt, chosen = as_messages(row.get("prompt"), "user"), as_messages(row.get("chosen"), "assistant")
    if not chosen or chosen[0]["role"] == "assistant":
        return prompt, chosen
    given = len(prompt) if chosen[: len(prompt)] == prompt else 0
    return chosen[:given], chosen[given:]


def _sharegpt(column: str) -> Callable[[Row], tuple[Any, Any]]:
    def conversation(row: Row) -> tuple[Any, Any]:
        turns = row.get(column)
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            return [], turns
        messages, system = [_sharegpt_message(turn) for turn in turns], row.get("system")
        if system and not (messages and messages[0].get("role") == "system"):
            messages.insert(0, {"role": "system", "content": system})
        return [], messages

    return conversation


def _sharegpt_message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError("a turn of the conversation is no object with from and value")
    if turn.get("from") is None:  # role and content, as elsewhere
        return dict(turn)
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise UserError(f"a turn of the conversation is from {speaker!r} (known: {', '.join(SHAREGPT_ROLES)})")
    rest = {key: of for key, of in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        calls = from_json(value, "a turn from function_call")
        calls = calls if isinstance(calls, list) else [calls]
        rest["tool_calls"], value = [{"type": "function", "function": call} for call in calls], None
    return {**rest, "role": SHAREGPT_ROLES[speaker], "content": value}


FORMATS = (
    _pair("prompt", "completion", "TRL's"),
    Format("TRL's preference", ("prompt", "chosen"), _chosen),
    Format("TRL's preference", ("chosen",), _whole("chosen")),
    Format("SPIN's", ("real",), _whole("real")),
    Format("TRL's", ("messages",), _whole("messages")),
    *(Format("ShareGPT's", (name,), _sharegpt(name), ("system",)) for name in ("conversations", "conversation")),
    Format("Alpaca's", ("instruction", "output"), _instruction("output", "input"), ("input",)),
    Format("Dolly's", ("instruction", "response"), _instruction("response", "context"), ("context",)),
    *(_pair(*names) for names in (("prompt", "response"), ("question", "answer"), ("query", "response"))),
)


def find_format(names: Sequence[str], columns: Mapping[str, str] | None = None) -> Format:
    """The format of a data set with columns of these names. columns: the user's own names, which win over FORMATS.

    Raises UserError where it is none.
    """
    if columns:
        own = {"prompt": "prompt", "completion": "completion", **columns}
        found = replace(_pair(own["prompt"], own["completion"], "the chosen"), media=())
        if missing := [name for name in found.needs if name not in names]:
            raise UserError(f"no column {missing[0]!r}, which data.columns names; there are: {', '.join(names)}")
        return found
    for known in FORMATS:
        if {*known.needs} <= {*names}:
            return known
    listed = "; ".join(" + ".join(known.needs) for known in FORMATS)
    guessed = ", ".join(f"{role}: {_likely(names, words)}" for role, words in LIKELY.items())
    remedy = f"say which hold what: --set data.columns='{{{guessed}}}' (in Python: columns=)"
    raise UserError(f"{_shown(names)} none of the known formats ({listed}): {remedy}")


def _likely(names: Sequence[str], words: Sequence[str]) -> str:
    """The column whose name is the nearest to what such a column is called, as YAML; "…" where none is near."""
    plain = {"".join(filter(str.isalnum, name.lower())).rstrip("s"): name for name in names}
    near = (match for word in words for match in get_close_matches(word, plain, n=1, cutoff=0.8))
    name = plain.get(next(near, ""), "…")
    return name if re.fullmatch(r"[\w …-]+", name) else json.dumps(name, ensure_ascii=False)


def _shown(names: Sequence[str]) -> str:
    """The columns, and what a table's first line may be instead of their names; with the verb."""
    shown = ", ".join(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…" for name in names)
    marks = [mark for mark in ";\t|" if len(names) == 1 and mark in names[0]]
    if marks:
        shown += f" (a single one, with {marks[0]!r} in it: a .csv has commas between its cells, a .tsv tabs)"
    elif any(len(name) > LONGEST_NAME or name.endswith(("?", ".")) or name.isdigit() for name in names):
        shown += " (a table's first line names its columns: these look like the cells of a row)"
    return f"the columns {shown} are"


def as_messages(value: Any, role: str) -> list[Message]:
    """A prompt or a response as messages, {"role", "content"} and what else they carry; a text is one of this role.

    None gives none. A key whose value is None is left out, but for the content: `datasets` fills in keys that a row
    lacks. Parts of text are joined; a content with parts of another kind stays the list that it is.
    Raises UserError for what is neither text nor messages.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, Sequence | None):
        raise UserError(f"a {type(value).__name__} where a text or a list of messages is expected")
    return [_message(message) for message in value or ()]


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise UserError("a message is no object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise UserError("a message has no role (user, assistant, system or tool)")
    if not isinstance(content, str | None):
        content = _joined(content)
    more = {key: without_none(of) for key, of in message.items() if of is not None and key not in ("role", "content")}
    if "tool_calls" in more:
        more["tool_calls"] = _tool_calls(more["tool_calls"])
    return {"role": role, "content": content, **more}


def _tool_calls(value: Any) -> list[Any]:
    """A message's tool calls, or their JSON, as a list of mappings."""
    given = from_json(value or "[]", "tool_calls")
    calls = [from_json(call, "a tool call") for call in given] if isinstance(given, Sequence) else [given]
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise UserError(f"tool_calls: {call!r} is no call: {{type: function, function: {{name: …, arguments: …}}}}")
    return calls


def _joined(parts: Any) -> str | list[Any]:
    if not isinstance(parts, Sequence):
        raise UserError(f"a message's content is a {type(parts).__name__}: give a text")
    texts = [text for part in parts if (text := text_of(part)) is not None]
    return "".join(texts) if len(texts) == len(parts) else list(parts)


def text_of(part: Any) -> str | None:
    """The text of a part of a content; None for an image or the like."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
    return text if isinstance(text, str) else None


def without_none(value: Any) -> Any:
    """A JSON value without the keys that have none."""
    if isinstance(value, Mapping):
        return {key: without_none(of) for key, of in value.items() if of is not None}
    return [without_none(of) for of in value] if isinstance(value, list | tuple) else value


def from_json(value: Any, what: str) -> Any:
    """What a text says as JSON; anything else as it is. Raises UserError."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is no JSON ({error})") from error

"""One message and lists of them, in every form that a row may have."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.data.pairs.calls import CALLED, read_call, read_called
from dpo_cli.data.records import BadRow, Cell, Message, Role
from dpo_cli.data.rows import fields

Messages = tuple[Message, ...]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_response": "tool",
}
"""The roles, by the names that data has for them, in lower case."""

CALLERS = ("function_call", "tool_call")
"""Names of turns of the assistant that hold nothing but calls: one or a list of them, as JSON."""

_SPEAKER = ("role", "from")
_CONTENT = ("content", "value")
_PLAIN = frozenset((*_SPEAKER, *_CONTENT))
_TURN = frozenset((*_CONTENT, *CALLED))
"""What a turn has beside its speaker, one of them at least."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_SCORED = ("weight", "train")
_TEXT_EXTRAS = ("name", "tool_call_id")

_HH_TURN = re.compile(r"\n\r?\n(Human|Assistant):")
_LIKE_MESSAGES = re.compile(r"""\s*(\[?)\s*\{.*["'](role|from)["']\s*:""", re.DOTALL)
"""How a cell begins that holds the JSON of a message, or of a list of them; or Python's, which is refused as such."""


def read_prompt(row: Mapping[str, object]) -> Messages:
    """Read the column `prompt`: a text, as `read_question` does, or a list of messages.

    Raises:
        BadRow: It is neither, or no user says anything in it.
    """
    value = fields.field(row, "prompt")
    if is_messages(value) or not isinstance(value, str):
        return read_messages(value, "prompt")
    return read_question(row, "prompt")


def read_question(row: Mapping[str, object], name: str) -> Messages:
    """Read a column that is text as a user's turn, with what it works on, `input`, and the turns before it, `history`.

    Raises:
        BadRow: It is empty, or one of them is of another form.
    """
    user, given = read_user(row, name), fields.optional_text(row, "input")
    return (*_history(row), dataclasses.replace(user, input=given) if given else user)


def read_user(row: Mapping[str, object], name: str) -> Message:
    """Read a column that is text as a user's turn; it must not be empty."""
    text = fields.text(fields.field(row, name), name)
    if not text.strip():
        raise BadRow("empty field", f"`{name}` is empty")
    return Message("user", text)


def read_system(row: Mapping[str, object], conversation: Messages, default: str) -> Messages:
    """Read the column `system` as the turn before all others of a conversation, unless it begins with that turn.

    Args:
        row: The columns.
        conversation: The turns.
        default: The text of the system's turn where neither has one, or nothing.

    Raises:
        BadRow: The system has another turn in the conversation.
    """
    said = fields.optional_text(row, "system")
    if not said and not default:
        return ()
    if said and conversation[:1] == (Message("system", said),):
        return ()
    has_turn = any(message.role == "system" for message in conversation)
    if said and has_turn:
        raise BadRow("two system prompts", "the conversation has one, and the column `system` is another")
    said = said or ("" if has_turn else default)
    return (Message("system", said),) if said else ()


def read_messages(value: object, place: str) -> Messages:
    """Read a list of messages, or a cell that holds the JSON of one.

    Raises:
        BadRow: It is not a list of messages, or it is empty.
    """
    value = fields.from_cell(value, place)
    if isinstance(value, Mapping) and "messages" in value:
        value, place = value["messages"], f"{place}.messages"
    listed = fields.items(value, place, "messages")
    if not listed:
        raise BadRow("empty field", f"`{place}` is an empty list")
    return tuple(read_message(one, f"{place}[{number}]") for number, one in enumerate(listed))


def read_message(value: object, place: str) -> Message:
    """Read `{"role", "content"}`, or `{"from", "value"}` the names that ShareGPT uses.

    Raises:
        BadRow: It is no such object, its role is unknown, or its content is not text.
    """
    message = fields.mapping(value, place)
    extras = _extras(message, place)
    name = _speaker(message, place)
    content = _content(message, place, extras)
    scored = message.keys() <= _PLAIN or _is_scored(message, place)
    if name in CALLERS:
        if "tool_calls" in extras:
            raise BadRow("wrong type", f"`{place}` calls tools twice: in its content and in `tool_calls`")
        return Message("assistant", "", extras={**extras, "tool_calls": _calls(content, place)}, scored=scored)
    return Message(ROLES[name], content, extras=extras, scored=scored)


def read_turns(value: object, place: str) -> Messages:
    """Read an answer: a text, one message, or a list of messages."""
    if isinstance(value, list) or is_messages(value):
        return read_messages(value, place)
    if isinstance(value, str) and not is_message(value):
        return (Message("assistant", fields.text(value, place)),)
    return (read_message(value, place),)


def read_hh(value: object, place: str) -> Messages:
    r"""Read a text whose turns begin with `\n\nHuman:` and `\n\nAssistant:`; space around a turn is not part of it.

    Raises:
        BadRow: It does not begin with a turn of the human's.
    """
    before, *parts = _HH_TURN.split("\n\n" + fields.text(value, place).lstrip())
    if before or not parts or parts[0] != "Human":
        raise BadRow("no human turn", f"`{place}` does not begin with `Human:`")
    speakers: list[Role] = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    return tuple(Message(role, said.strip()) for role, said in zip(speakers, parts[1::2], strict=True))


def is_message(value: object) -> bool:
    """Tell whether a value looks like a message: an object with a speaker, or a cell with the JSON of one."""
    if isinstance(value, str):
        return _is_cell_of(value, dict)
    return isinstance(value, Mapping) and any(name in value for name in _SPEAKER)


def is_messages(value: object) -> bool:
    """Tell whether a value looks like a list of messages, or a cell with the JSON of one."""
    if isinstance(value, str):
        return _is_cell_of(value, list)
    if isinstance(value, Mapping):
        return is_messages(value.get("messages"))
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def _is_cell_of(value: str, kind: type) -> bool:
    """Tell whether a text is a cell that holds a message, or a list of them, rather than an answer that is JSON."""
    if not isinstance(value, Cell) or (like := _LIKE_MESSAGES.match(value)) is None:
        return False
    try:
        found = fields.from_json(value, "")
    except BadRow:
        return bool(like[1]) == (kind is list)  # What is meant as messages and broken is refused as such.
    if isinstance(found, Mapping) and "messages" in found:
        return kind is list and is_messages(found)
    said = found if isinstance(found, list) else [found]
    are_turns = all(isinstance(one, Mapping) and is_message(one) and not _TURN.isdisjoint(one) for one in said)
    return isinstance(found, kind) and are_turns


def is_hh(value: object) -> bool:
    """Tell whether a value looks like a text of `Human:` and `Assistant:`, beginning with the human."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def _history(row: Mapping[str, object]) -> Messages:
    """Read the turns before a question: a list of exchanges."""
    if (value := row.get("history")) in (None, ""):
        return ()
    turns: list[Message] = []
    for number, exchange in enumerate(fields.items(value, "history", "exchanges")):
        said = fields.items(exchange, f"history[{number}]", "two texts")
        if len(said) != 2:
            raise BadRow("wrong length", f"`history[{number}]` has {len(said)} texts instead of two")
        user, assistant = (fields.text(one, f"history[{number}][{place}]") for place, one in enumerate(said))
        turns += [Message("user", user), Message("assistant", assistant)]
    return tuple(turns)


def _speaker(message: Mapping[str, object], place: str) -> str:
    """Return one of the names in `ROLES`."""
    name = _present(message, _SPEAKER)
    if name is None:
        raise BadRow("missing field", f"`{place}` has no `{_SPEAKER[0]}`")
    role = fields.text(message[name], f"{place}.{name}")
    if (known := role.strip().lower()) not in ROLES:
        raise BadRow(
            "wrong role", f"`{place}.{name}` is `{fields.printable(role)}`, not system, user, assistant or tool"
        )
    return known


def _calls(content: str, place: str) -> list[dict[str, Any]]:
    """Read the content of a turn that holds nothing but calls of tools."""
    found = fields.from_json(content, place)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise BadRow("wrong type", f"`{place}` does not say, as JSON, which function it calls by `name`")
    return [read_call(fields.plain_json(call, place), place) for call in calls]


def _content(message: Mapping[str, object], place: str, extras: Mapping[str, Any]) -> str:
    """Return the content; a turn that calls tools need not have one."""
    name = _present(message, _CONTENT)
    if name is None:
        if not CALLED.isdisjoint(extras):
            return ""
        known = next((name for name in _CONTENT if name in message), None)
        raise BadRow("missing field", f"`{place}.{known}` is null" if known else f"`{place}` has no `{_CONTENT[0]}`")
    content = message[name]
    if isinstance(content, list):
        return "".join(_part(part, f"{place}.{name}[{number}]") for number, part in enumerate(content))
    return fields.text(content, f"{place}.{name}")


def _part(value: object, place: str) -> str:
    """Return the text of one part of a content that is a list."""
    part = fields.mapping(value, place)
    if part.get("type") != "text":
        raise BadRow("wrong type", f"`{place}` is a part of type `{fields.printable(part.get('type'))}`, not `text`")
    return fields.text(part.get("text"), f"{place}.text")


def _extras(message: Mapping[str, object], place: str) -> dict[str, Any]:
    """Return what a chat template may ask of a message beside its role and content."""
    extras: dict[str, Any] = {}
    if message.keys() <= _PLAIN:
        return extras
    if (calls := message.get("tool_calls")) and (listed := fields.mappings(calls, f"{place}.tool_calls", "calls")):
        plain = fields.plain_json(listed, f"{place}.tool_calls")
        extras["tool_calls"] = [read_call(call, f"{place}.tool_calls[{n}]") for n, call in enumerate(plain)]
    if called := message.get("function_call"):
        found = fields.mapping(fields.from_json(called, f"{place}.function_call"), f"{place}.function_call")
        plain = fields.plain_json(dict(found), f"{place}.function_call")
        extras["function_call"] = read_called(plain, f"{place}.function_call")
    for name in _TEXT_EXTRAS:
        if (value := message.get(name)) not in (None, ""):
            extras[name] = fields.text(value, f"{place}.{name}")
    if tools := message.get("tools"):
        extras["tools"] = fields.plain_json(tools, f"{place}.tools")
    if thoughts := _thoughts(message, place):
        extras["reasoning_content"] = thoughts
    return extras


def _thoughts(message: Mapping[str, object], place: str) -> str:
    """Return what is thought before a turn; under several names it must be the same."""
    found = {name: fields.text(message[name], f"{place}.{name}") for name in _REASONING if message.get(name)}
    if len(set(found.values())) > 1:
        one, other, *_ = found
        raise BadRow("two thoughts", f"`{place}` has different reasoning in `{one}` than in `{other}`")
    return next(iter(found.values()), "")


def _is_scored(message: Mapping[str, object], place: str) -> bool:
    """Tell whether a message is to be scored, by its own `weight`, 0 or 1, or `train`."""
    given = [(name, message[name]) for name in _SCORED if message.get(name) is not None]
    for name, value in given:
        if value not in (0, 1):
            shown = fields.printable(value) if isinstance(value, (str, int, float)) else fields.kind(value)
            raise BadRow("wrong type", f"`{place}.{name}` is `{shown}`, not 1 or 0, true or false")
    return all(value for _, value in given)


def _present(message: Mapping[str, object], names: Sequence[str]) -> str | None:
    """Return the first of some names under which there is something."""
    for name in names:
        if message.get(name) is not None:
            return name
    return None

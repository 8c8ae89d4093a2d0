"""The arguments of tool calls, JSON text or an object: as the chat template wants them, whichever a row has.

OpenAI's format has them as text. Most templates write objects (by `tojson`, or item by item), so that text would become
JSON within JSON; a few join them to other text, and want text. Inference servers do the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dpo_cli.data import fields
from dpo_cli.data.records import BadRow, Message

CALLED = frozenset({"tool_calls", "function_call"})
"""Where a message says what is called: a list of calls, or what is called alone."""

_Conversation = list[dict[str, Any]]

_NAME, _VALUE = "place", "Xanadu-7"
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place.",
        "parameters": {"type": "object", "properties": {_NAME: {"type": "string"}}, "required": [_NAME]},
    },
}


def wants_text(write: Callable[[_Conversation, dict[str, Any]], str | None]) -> bool:
    """Tell whether a template wants the arguments of calls as JSON text, by trying.

    Args:
        write: Writes a conversation with the template's arguments; None where the template fails.
    """
    arguments = {_NAME: _VALUE}
    text = json.dumps(arguments)
    for conversation, settings in _tried():
        as_object, as_text = (write(_calling(conversation, form), settings) for form in (arguments, text))
        # What is joined to text without more shows as Python writes it.
        if as_object and _VALUE in as_object and repr(arguments) not in as_object:
            return False
        if as_text and _VALUE in as_text:
            return True
    return False


def with_arguments(message: Message, *, as_text: bool) -> Message:
    """Return a message whose calls have their arguments as text or as objects; what is not JSON stays text."""
    if CALLED.isdisjoint(message.extras):
        return message
    extras = dict(message.extras)
    if "tool_calls" in extras:
        extras["tool_calls"] = [_call(call, as_text=as_text) for call in extras["tool_calls"]]
    if isinstance(called := extras.get("function_call"), Mapping):
        extras["function_call"] = _called(called, as_text=as_text)
    return Message(message.role, message.content, message.input, extras, message.scored)


def has_broken_arguments(message: Message) -> bool:
    """Tell whether the arguments of a call are text that is not the JSON of an object."""
    return any(isinstance(_as_object(called.get("arguments")), str) for called in what_is_called(message))


def what_is_called(message: Message) -> Iterator[Mapping[str, Any]]:
    """Yield the name and arguments of each call of a message, as objects that hold both."""
    for call in message.extras.get("tool_calls", ()):
        inner = call.get("function")
        yield inner if isinstance(inner, Mapping) else call
    if isinstance(called := message.extras.get("function_call"), Mapping):
        yield called


def _call(call: Mapping[str, Any], *, as_text: bool) -> Mapping[str, Any]:
    if isinstance(inner := call.get("function"), Mapping):
        return {**call, "function": _called(inner, as_text=as_text)}
    return _called(call, as_text=as_text)


def _called(called: Mapping[str, Any], *, as_text: bool) -> Mapping[str, Any]:
    found = called.get("arguments")
    return {**called, "arguments": _as_text(found) if as_text else _as_object(found)}


def _as_text(arguments: Any) -> Any:
    """Return arguments as OpenAI writes them; text keeps its own spacing."""
    if isinstance(arguments, str):
        return arguments if arguments.strip() else "{}"
    return "{}" if arguments is None else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    """Return arguments as the object that they are the JSON text of, if they are; a call without any has none."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        found = fields.plain_json(fields.from_json(arguments, "arguments"), "arguments")
    except BadRow:
        return arguments
    return found if isinstance(found, dict) else arguments


def _tried() -> Iterator[tuple[_Conversation, dict[str, Any]]]:
    """Yield conversations that end with a call, its result or an answer, without the tool's description and with it.

    The arguments of the call are left out.
    """
    call = {"id": "call00001", "type": "function", "function": {"name": "weather"}}
    conversation: _Conversation = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Fine.", "name": "weather", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "It is fine."},
    ]
    described: tuple[dict[str, Any], ...] = ({}, {"tools": [_TOOL]})
    for settings in described:
        for end in (2, 3, 4):
            yield conversation[:end], settings


def _calling(conversation: _Conversation, arguments: Any) -> _Conversation:
    """Put the arguments into the call."""
    asked, calling, *rest = conversation
    (call,) = calling["tool_calls"]
    called = {**call, "function": {**call["function"], "arguments": arguments}}
    return [asked, {**calling, "tool_calls": [called]}, *rest]

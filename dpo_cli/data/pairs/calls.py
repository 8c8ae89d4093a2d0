"""Calls of tools, in every form that a row may have, and their arguments as the template wants them: text or an object.

OpenAI's format has the arguments as text. Most templates write objects (by `tojson`, or item by item), so that text
would become JSON within JSON; a few join them to other text, and want text. Inference servers do the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.data.records import BadRow, Message
from dpo_cli.data.rows import fields

CALLED = frozenset({"tool_calls", "function_call"})
"""Where a message says what is called: a list of calls, or what is called alone."""

_ARGUMENTS = ("arguments", "parameters", "args", "input")
"""What data calls the arguments of a call; templates know the first."""

_OF_CALL = ("id", "type", "index")
"""What a call says beside what is called."""

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


def read_call(call: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a call as OpenAI's format has it, which templates know: name and arguments in an object of their own.

    Args:
        call: That, or an object that holds both itself.
        place: What it is called.

    Raises:
        BadRow: It does not say what it calls, or gives its arguments twice.
    """
    if isinstance(call.get("function"), Mapping):
        return {**call, "type": call.get("type") or "function", "function": read_called(call["function"], place)}
    called = {name: value for name, value in call.items() if name not in _OF_CALL}
    if "function" in called and "name" not in called:
        called = {"name": called.pop("function"), **called}
    beside = {name: call[name] for name in _OF_CALL if name in call}
    return {**beside, "type": "function", "function": read_called(called, place)}


def read_called(called: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the name of what is called and the arguments, under the names that templates know.

    Raises:
        BadRow: As `read_call` does.
    """
    name = called.get("name")
    if not isinstance(name, str) or not name.strip():
        raise BadRow("wrong type", f"`{place}` does not say which function it calls by `name`")
    given = [spelled for spelled in _ARGUMENTS if called.get(spelled) is not None]
    if len(given) > 1:
        raise BadRow("wrong type", f"`{place}` has arguments twice: as `{given[0]}` and as `{given[1]}`")
    return {"arguments" if spelled in given else spelled: value for spelled, value in called.items()}


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants calls.

    Attributes:
        as_text: The arguments as JSON text, and not as an object.
        flat: Name and arguments in the call itself, and not in its `function`.
    """

    as_text: bool = False
    flat: bool = False


def wanted_form(write: Callable[[_Conversation, dict[str, Any]], str | None]) -> CallForm:
    """Find out how a template wants calls, by trying.

    Args:
        write: Writes a conversation with the template's arguments; None where the template fails.
    """
    arguments = {_NAME: _VALUE}
    text = json.dumps(arguments)
    for flat in (False, True):
        for conversation, settings in _tried():
            as_object, as_text = (write(_calling(conversation, form, flat), settings) for form in (arguments, text))
            # What is joined to text without more shows as Python writes it.
            if as_object and _VALUE in as_object and repr(arguments) not in as_object:
                return CallForm(as_text=False, flat=flat)
            if as_text and _VALUE in as_text:
                return CallForm(as_text=True, flat=flat)
    return CallForm()


def in_form(message: Message, form: CallForm) -> Message:
    """Return a message whose calls are as a template wants them; arguments that are not JSON stay text."""
    if CALLED.isdisjoint(message.extras):
        return message
    extras = dict(message.extras)
    if "tool_calls" in extras:
        extras["tool_calls"] = [_call(call, form) for call in extras["tool_calls"]]
    if isinstance(called := extras.get("function_call"), Mapping):
        extras["function_call"] = _called(called, form)
    return Message(message.role, message.content, message.input, extras, message.scored)


def has_broken_arguments(message: Message) -> bool:
    """Tell whether the arguments of a call are not an object, nor text that is the JSON of one."""
    return any(not isinstance(_as_object(called.get("arguments")), Mapping) for called in what_is_called(message))


def what_is_called(message: Message) -> Iterator[Mapping[str, Any]]:
    """Yield the name and arguments of each call of a message, as objects that hold both."""
    for call in message.extras.get("tool_calls", ()):
        inner = call.get("function")
        yield inner if isinstance(inner, Mapping) else call
    if isinstance(called := message.extras.get("function_call"), Mapping):
        yield called


def _call(call: Mapping[str, Any], form: CallForm) -> Mapping[str, Any]:
    if not isinstance(inner := call.get("function"), Mapping):
        return _called(call, form)
    return _flat(call, _called(inner, form)) if form.flat else {**call, "function": _called(inner, form)}


def _flat(call: Mapping[str, Any], called: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call that is what it calls."""
    return {**{name: value for name, value in call.items() if name not in ("type", "function")}, **called}


def _called(called: Mapping[str, Any], form: CallForm) -> Mapping[str, Any]:
    found = called.get("arguments")
    return {**called, "arguments": _as_text(found) if form.as_text else _as_object(found)}


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
        json.dumps(found, allow_nan=False)  # Python reads `NaN`, and numbers that are too large as `Infinity`.
    except (BadRow, ValueError):
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


def _calling(conversation: _Conversation, arguments: Any, flat: bool) -> _Conversation:
    """Put the arguments into the call."""
    asked, calling, *rest = conversation
    (call,) = calling["tool_calls"]
    inner = {**call["function"], "arguments": arguments}
    called = _flat(call, inner) if flat else {**call, "function": inner}
    return [asked, {**calling, "tool_calls": [called]}, *rest]

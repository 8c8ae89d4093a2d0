"""Parts of a row that the chat template does not write: each part is changed, and the text compared.

That is done once for each kind of row: the roles in their order, and which parts there are. What the template makes of
the texts of a particular row (it may strip thoughts, say) is not looked for here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_cli.data.findings import TokenCheck
from dpo_cli.data.records import Message, Pair
from dpo_cli.data.tokens.marks import another_value, marks_in, numbered_mark, replaced, with_mark, with_mark_at

_MOST_KINDS = 4096
_LONGEST_WORD = 24
"""Characters of an argument of the template that is distinguished from others: `high`, `false`."""

_ANOTHER = "Use a template that writes them, or remove them from the data."


def _unwritten(bit: int, name: str, what: str, when: str, advice: str = _ANOTHER) -> TokenCheck:
    return TokenCheck(
        name,
        "warning",
        f"the template does not write {what.rstrip(',')}",
        f"The data has {what} that the chat template does not write: the model never sees them.",
        advice,
        when=when,
        bit=bit,
        holds=lambda result: name in result.unwritten,
    )


UNWRITTEN = {
    check.name: check
    for check in (
        _unwritten(
            24,
            "tool_calls_unwritten",
            "tool calls",
            "a message calls tools (`tool_calls`), and the template does not write a call",
        ),
        _unwritten(
            23,
            "tools_unwritten",
            "tools",
            "the row has tools whose name, description or parameters the template does not write",
        ),
        _unwritten(
            22,
            "reasoning_unwritten",
            "reasoning of the assistant, in a separate field,",
            (
                "a message has reasoning in a separate field (`reasoning_content`, `reasoning`, `thinking`) that "
                "the template does not write"
            ),
        ),
        _unwritten(
            21,
            "names_unwritten",
            "names (`name` of a message)",
            "a message has a `name` that the template does not write",
        ),
        _unwritten(
            20,
            "function_call_unwritten",
            "calls in the field `function_call`",
            "a message calls a function in the older field `function_call`, and the template does not write the call",
            "Write them as `tool_calls`, which most templates know.",
        ),
        _unwritten(
            19,
            "template_arguments_unwritten",
            "arguments of the template (`chat_template_kwargs`)",
            "`chat_template_kwargs` has an argument that does not change the template's output",
        ),
        _unwritten(
            18,
            "system_unwritten",
            "system messages",
            "the template does not write the system message",
        ),
        _unwritten(
            17,
            "tool_results_unwritten",
            "turns of a tool",
            "the template does not write a tool's result",
        ),
        _unwritten(
            16,
            "turns_unwritten",
            "texts of a user or the assistant",
            "the template does not write a turn of the user or the assistant",
        ),
    )
}
"""A check for each part of a row, by its name."""

NOT_JSON = TokenCheck(
    "tool_arguments_not_json",
    "warning",
    "the arguments of a tool call are not a JSON object",
    "The arguments of a tool call are not a JSON object, or not JSON: they were left as they are.",
    "Write them as an object, or as the JSON text of one.",
    when="the arguments of a call are neither a JSON object nor the text of one; they were left as they are",
    bit=15,
    holds=lambda result: "tool_arguments_not_json" in result.unwritten,
)

_TURNS = {"system": "system_unwritten", "tool": "tool_results_unwritten"}
_FIELDS = {"reasoning_content": "reasoning_unwritten", "name": "names_unwritten", "tools": "tools_unwritten"}


@dataclass(frozen=True, slots=True)
class _Spot:
    """A part of a message.

    Attributes:
        part: A name of `UNWRITTEN`.
        index: Of the message in its conversation.
        path: Where it is in the message's `extras`; empty for the text.
        mark: What no other text holds.
    """

    part: str
    index: int
    path: tuple[str | int, ...]
    mark: str

    def changed(self, message: Message) -> Message:
        """Return the message with the mark in this part.

        A text keeps its length: what a template may write is bounded by what it is given.
        """
        if not self.path:
            return replace(message, content=self.mark.ljust(len(message.text), self.mark[-1]), input="")
        return replace(message, extras=with_mark_at(message.extras, self.path, self.mark))


@dataclass(frozen=True, slots=True)
class _Change:
    """A part of a JSON value, and what makes another one of it that holds a mark."""

    path: tuple[str | int, ...]
    make: Callable[[str], Any]


class Unwritten:
    """Finds out which parts of pairs a template does not write.

    Args:
        write: Writes a conversation with the template's arguments, to be answered or not; None where that fails.
    """

    def __init__(self, write: Callable[[Sequence[Message], Mapping[str, Any], bool], str | None]) -> None:
        self._write = write
        self._known: dict[Hashable, frozenset[str]] = {}

    def __call__(self, pair: Pair, marked: Callable[[Pair], Pair]) -> frozenset[str]:
        """Name the parts of a pair, as in `UNWRITTEN`, that are not written.

        Args:
            pair: A pair that the template writes.
            marked: Makes of it what the template is given.
        """
        kind = _form(pair)
        found = self._known.get(kind)
        if found is None:
            if len(self._known) >= _MOST_KINDS:
                self._known.clear()
            found = self._known[kind] = self._of(marked(pair))
        return found

    def _of(self, pair: Pair) -> frozenset[str]:
        both = [(*pair.prompt, *response) for response in (pair.chosen, pair.rejected)]
        found = {part for one in both for part in self._of_messages(one, pair.arguments)}
        if any(self._tools_missing(one, pair.arguments) for one in both):
            found.add("tools_unwritten")
        if self._arguments_missing(pair, both):
            found.add("template_arguments_unwritten")
        return frozenset(found)

    def _of_messages(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> Iterator[str]:
        """Yield the parts of messages that are not written."""
        spots = _spots(messages)
        text = self._write(_changed(messages, spots), arguments, False)
        seen = marks_in(text)
        missing = [spot for spot in spots if spot.mark not in seen]
        for part in dict.fromkeys(spot.part for spot in missing):
            if self._any_unseen(messages, [spot for spot in missing if spot.part == part], arguments):
                yield part

    def _any_unseen(self, messages: Sequence[Message], spots: Sequence[_Spot], arguments: Mapping[str, Any]) -> bool:
        """Tell whether one of some spots may change and the text stays the same."""
        before = self._write(messages, arguments, False)
        tried = [spots, *([spot] for spot in spots)] if len(spots) > 1 else [spots]
        return any(self._write(_changed(messages, some), arguments, False) == before for some in tried)

    def _tools_missing(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> bool:
        """Tell whether a tool may change and the text stays the same."""
        tools = arguments.get("tools") or []
        parts = [_Change((n, *path), change) for n, tool in enumerate(tools) for path, change in _parts_of_tool(tool)]
        marks = {numbered_mark(number): part for number, part in enumerate(parts)}
        text = self._write(messages, {**arguments, "tools": _all_changed(tools, marks)}, False) if tools else ""
        seen = marks_in(text)
        missing = [{mark: part} for mark, part in marks.items() if mark not in seen]
        before = self._write(messages, arguments, False) if missing else None
        return any(
            self._write(messages, {**arguments, "tools": _all_changed(tools, one)}, False) == before for one in missing
        )

    def _arguments_missing(self, pair: Pair, both: Sequence[Sequence[Message]]) -> bool:
        """Tell whether an argument of the template may change, and prompt and conversations stay the same."""
        asked = [(pair.prompt, True), *((one, False) for one in both)]
        for name, value in pair.arguments.items():
            if name == "tools" or value is None:
                continue
            others = {**pair.arguments, name: another_value(value)}
            if all(self._write(one, others, ends) == self._write(one, pair.arguments, ends) for one, ends in asked):
                return True
        return False


def _form(pair: Pair) -> Hashable:
    """Return what decides of which kind a pair is."""
    messages = pair.prompt + pair.chosen + pair.rejected
    # Mostly there is nothing but texts; that is looked at once a row.
    turns = [message.role if message.content and not message.extras else _parts(message) for message in messages]
    kind = len(pair.prompt), len(pair.chosen), *turns
    if not pair.arguments:
        return kind
    # A value decides what a template writes, but one that is not a word or a switch may be another in each row.
    arguments = sorted(
        (name, repr(value) if isinstance(value, (bool, int, float)) or len(str(value)) <= _LONGEST_WORD else "")
        for name, value in pair.arguments.items()
        if name != "tools" and value is not None
    )
    tools = [[path for path, _ in _parts_of_tool(tool)] for tool in pair.arguments.get("tools") or ()]
    return kind, *arguments, repr(tools)


def _parts(message: Message) -> Hashable:
    """Return who speaks, and which parts there are."""
    return message.role, *sorted(message.extras), *_parts_of(message)


def _spots(messages: Sequence[Message]) -> list[_Spot]:
    """Return all parts of messages that say something."""
    found = [(index, *one) for index, message in enumerate(messages) for one in _parts_of(message)]
    return [_Spot(part, index, path, numbered_mark(number)) for number, (index, part, path) in enumerate(found)]


def _parts_of(message: Message) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Yield the parts of a message, and where each is."""
    if message.text:
        yield _TURNS.get(message.role, "turns_unwritten"), ()
    for name, part in _FIELDS.items():
        if name in message.extras:
            yield part, (name,)
    for number, call in enumerate(message.extras.get("tool_calls", ())):
        inner = isinstance(call.get("function"), Mapping)
        path = ("tool_calls", number, "function") if inner else ("tool_calls", number)
        yield from _parts_of_call("tool_calls_unwritten", call["function"] if inner else call, path)
    if (called := message.extras.get("function_call")) is not None:
        yield from _parts_of_call("function_call_unwritten", called, ("function_call",))


def _parts_of_call(part: str, called: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Yield the name and the arguments of a call, and where each is."""
    for name in ("name", "arguments"):
        if called.get(name) not in (None, "", {}, "{}"):
            yield part, (*path, name)


def _parts_of_tool(tool: Any) -> Iterator[tuple[tuple[str, ...], Callable[[str], Any]]]:
    """Yield where each part of a tool's description is, and what makes another one of it that holds a mark."""
    inner = ("function",) if isinstance(tool.get("function"), Mapping) else ()
    described = tool["function"] if inner else tool
    found = False
    for name in ("name", "description"):
        if isinstance(text := described.get(name), str) and text:
            found = True
            yield (*inner, name), text.__add__
    parameters = described.get("parameters")
    if (
        isinstance(parameters, Mapping)
        and isinstance(properties := parameters.get("properties"), Mapping)
        and properties
    ):
        found = True
        yield (*inner, "parameters", "properties"), functools.partial(_with_property, properties)
    if not found:
        yield (), functools.partial(with_mark, tool)


def _all_changed(value: Any, marks: Mapping[str, _Change]) -> Any:
    """Return a JSON value with a mark in each of some parts."""
    for mark, change in marks.items():
        value = replaced(value, change.path, change.make(mark))
    return value


def _with_property(properties: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Return the parameters of a tool and one more like the first, whose name is a mark."""
    return {**properties, mark: next(iter(properties.values()))}


def _changed(messages: Sequence[Message], spots: Sequence[_Spot]) -> list[Message]:
    """Return messages with marks in some parts."""
    found = list(messages)
    for spot in spots:
        found[spot.index] = spot.changed(found[spot.index])
    return found

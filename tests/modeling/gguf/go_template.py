"""What Ollama makes of a `Modelfile`: its parser, and the part of Go's templates that ours are written in.

Written from the documentation of Go's `text/template` and of Ollama's `Modelfile`, and independent of what writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()"]+')


@dataclass
class Node:
    """A text, or an action with the branches that it has."""

    text: str = ""
    action: str = ""
    body: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


def apply(template: str, values: Mapping[str, Any]) -> str:
    """Apply a template to values."""
    nodes, rest = _parse(_pieces(template))
    assert not rest, rest
    return _run(nodes, {"$": values, ".": values})


def chat(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Apply a template to a conversation as Ollama does: system messages are together in `.System` too."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    named = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    return apply(template, {"System": system, "Messages": named, "Response": ""})


def _pieces(template: str) -> list[tuple[str, bool]]:
    """Part a template into texts and actions, with `{{-` and `-}}` taking the white space beside them."""
    pieces: list[tuple[str, bool]] = []
    trim = False
    while template:
        before, found, rest = template.partition("{{")
        before = before.lstrip() if trim else before
        if not found:
            return [*pieces, (before, False)]
        action, end = "", 0
        for part in re.finditer(r'"(?:[^"\\]|\\.)*"|-?\}\}|.', rest, re.S):
            if part.group().endswith("}}") and not part.group().startswith('"'):
                end = part.end()
                trim = part.group() == "-}}"
                break
            action += part.group()
        assert end, f"an action does not end: {rest[:40]}"
        if action.startswith("- "):
            before, action = before.rstrip(), action[2:]
        pieces += [(before, False), (action.strip(), True)]
        template = rest[end:]
    return pieces


def _parse(pieces: list[tuple[str, bool]]) -> tuple[list[Node], list[tuple[str, bool]]]:
    nodes: list[Node] = []
    while pieces:
        (text, acts), rest = pieces[0], pieces[1:]
        if acts and (text == "end" or text.startswith("else")):
            return nodes, pieces
        pieces = rest
        if not acts:
            nodes.append(Node(text=text))
        elif text.split(" ", 1)[0] in ("if", "range"):
            node, pieces = _block(text, pieces)
            nodes.append(node)
        else:
            nodes.append(Node(action=text))
    return nodes, []


def _block(action: str, pieces: list[tuple[str, bool]]) -> tuple[Node, list[tuple[str, bool]]]:
    node = Node(action=action)
    node.body, pieces = _parse(pieces)
    (text, _), pieces = pieces[0], pieces[1:]
    if text.startswith("else if "):
        inner, pieces = _block(text.removeprefix("else "), pieces)
        node.otherwise = [inner]
    elif text == "else":
        node.otherwise, pieces = _parse(pieces)
        assert pieces[0] == ("end", True)
        pieces = pieces[1:]
    return node, pieces


def _run(nodes: list[Node], scope: dict[str, Any]) -> str:
    written = ""
    for node in nodes:
        verb, _, rest = node.action.partition(" ")
        if not node.action:
            written += node.text
        elif verb == "if":
            written += _run(node.body if _value(rest, scope) else node.otherwise, scope)
        elif verb == "range":
            names, _, listed = rest.partition(":=")
            place, one = (name.strip() for name in names.split(","))
            for number, item in enumerate(_value(listed, scope)):
                written += _run(node.body, {**scope, ".": item, place: number, one: item})
        else:
            written += str(_value(node.action, scope))
    return written


def _value(text: str, scope: dict[str, Any]) -> Any:
    tokens = _TOKEN.findall(text)
    value, rest = _call(tokens, scope)
    assert not rest, text
    return value


def _call(tokens: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    """Evaluate a function with its arguments, or a single operand."""
    head, *tokens = tokens
    functions = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "gt": lambda a, b: a > b,
        "len": len,
        "slice": lambda items, start: items[start:],
        "not": lambda a: not a,
        "and": lambda *all_: next((one for one in all_ if not one), all_[-1]),
        "or": lambda *all_: next((one for one in all_ if one), all_[-1]),
    }
    if head not in functions:
        return _operand(head, tokens, scope)
    arguments = []
    while tokens and tokens[0] != ")":
        first, *tokens = tokens
        argument, tokens = _operand(first, tokens, scope)
        arguments.append(argument)
    return functions[head](*arguments), tokens


def _operand(head: str, tokens: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    if head == "(":
        value, tokens = _call(tokens, scope)
        assert tokens[0] == ")"
        return value, tokens[1:]
    if head.startswith('"'):
        return json.loads(head), tokens
    if head.isdigit():
        return int(head), tokens
    start, *path = head.split(".")
    value = scope[start or "."]
    for part in path:
        value = value[part] if part else value
    return value, tokens


def commands(modelfile: str) -> list[tuple[str, str]]:
    """Return the commands of a `Modelfile` with what they are given, as Ollama's parser reads them.

    A value goes to the end of its line; one that begins with a quote, or three, to the line that ends with as many.
    Nothing within is escaped.
    """
    found = []
    lines = modelfile.split("\n")
    while lines:
        line = lines.pop(0)
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "PARAMETER":
            key, _, value = value.partition(" ")
            name = f"PARAMETER {key}"
        quote = next((mark for mark in ('"""', '"') if value.startswith(mark)), "")
        while quote and not (len(value.strip()) >= 2 * len(quote) and value.strip().endswith(quote)):
            value += "\n" + lines.pop(0)
        value = value.strip()
        found.append((name, value[len(quote) : len(value) - len(quote)]))
    return found

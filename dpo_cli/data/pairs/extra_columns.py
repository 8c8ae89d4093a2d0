"""The columns that a row of any shape may have beside the texts: numbers, labels, arguments of the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dpo_cli.data.pairs.media import check_media
from dpo_cli.data.pairs.messages import is_messages
from dpo_cli.data.records import LABELS, NUMBERS, BadRow, Cell
from dpo_cli.data.rows import fields


def read_columns(row: Mapping[str, object]) -> dict[str, Any]:
    """Return the fields of `Pair` that a row gives beside its texts; those that it does not give are left out.

    Raises:
        BadRow: The row holds pictures or sounds, a number is not finite, the weight is negative, or what is for the
            chat template is not of the form that it has there.
    """
    check_media(row)
    found: dict[str, Any] = {}
    for name in NUMBERS:
        if (value := row.get(name)) is not None:
            found[name] = fields.number(value, name)
    if found.get("weight", 0.0) < 0:
        raise BadRow("number out of range", "`weight` is negative")
    for name in LABELS:
        if (value := row.get(name)) is not None:
            found[name] = _label(value, name)
    if arguments := _tools(row) | _template_arguments(row):
        found["arguments"] = arguments
    return found


def _label(value: object, name: str) -> str:
    """Return a label as text: any value but text as its JSON."""
    if isinstance(value, str):
        return fields.text(value, name)
    try:
        return fields.text(json.dumps(value, ensure_ascii=False, default=str), name)
    except (ValueError, TypeError, RecursionError):
        raise BadRow("wrong type", f"`{name}` is {fields.kind(value)} that cannot be written as text") from None


def _tools(row: Mapping[str, object]) -> dict[str, Any]:
    """Return the tools that the model may call, if the row has any."""
    prompt, place = row.get("prompt"), "tools"
    value = row.get(place)
    if value in (None, "") and isinstance(prompt, Cell) and is_messages(prompt):
        prompt = fields.from_cell(prompt, "prompt")
    if value in (None, "") and isinstance(prompt, Mapping):
        value, place = prompt.get("tools"), "prompt.tools"
    if value in (None, ""):
        return {}
    tools = fields.mappings(value, place, "objects")
    return {"tools": fields.plain_json(tools, place)} if tools else {}


def _template_arguments(row: Mapping[str, object]) -> dict[str, Any]:
    """Return what else the row gives to the chat template."""
    name = "chat_template_kwargs"
    if (value := row.get(name)) in (None, ""):
        return {}
    return dict(fields.plain_json(fields.mapping(fields.from_json(value, name), name), name))

"""One function per dataset shape: a row becomes a `Pair`, or a `BadRow` that says why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dpo_cli.data.records import BadRow, Message, Pair

Format = Callable[[Mapping[str, object], str], Pair]


def instruction(row: Mapping[str, object], origin: str) -> Pair:
    """Read `{"instruction", "input" (optional), "chosen", "rejected"}`, all of them text.

    Raises:
        BadRow: A field is missing, empty or not text, or the two responses are the same.
    """
    prompt = _text(row, "instruction")
    given = _text(row, "input") if row.get("input") is not None else ""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if not prompt.strip():
        raise BadRow("empty field", "`instruction` is empty")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise BadRow("empty response", f"`{name}` is empty", structural=False)
    if chosen == rejected:
        raise BadRow("identical responses", "`chosen` and `rejected` are the same text", structural=False)
    return Pair(
        prompt=Message("user", prompt, given if given.strip() else ""),
        chosen=Message("assistant", chosen),
        rejected=Message("assistant", rejected),
        origin=origin,
    )


def _text(row: Mapping[str, object], name: str) -> str:
    """Return a field that must be text which can be written as UTF-8."""
    value = row.get(name)
    if value is None:
        known = ", ".join(f"`{column}`" for column in list(row)[:12]) or "nothing"
        raise BadRow("missing field", f"`{name}` is {'null' if name in row else f'missing; the row has {known}'}")
    if not isinstance(value, str):
        raise BadRow("wrong type", f"`{name}` is {_kind(value)} instead of text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("undecodable text", f"`{name}` holds half of a surrogate pair") from None
    return value


def _kind(value: object) -> str:
    """Name a JSON value's type in words."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"of type {type(value).__name__}"


FORMATS: dict[str, Format] = {
    "instruction": instruction,
}

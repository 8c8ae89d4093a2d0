"""Control tokens that a text spells out are meant as text: they are found, and marked for the encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dpo_cli.data.records import BadRow, Message, Pair

LITERAL_START, LITERAL_END = "\ufdd0", "\ufdd1"
"""Stand around a control token that is meant as text; code points that are no characters of any script."""

STAND_IN = "\ufdd2"
"""Takes the place of what somebody says; another such code point."""

STAND_IN_TURN = Message("assistant", STAND_IN)
"""Takes the place of a turn where only the template's own words are looked for."""

_RESERVED = re.compile(f"[{LITERAL_START}{LITERAL_END}{STAND_IN}]")


class Literals:
    """Finds control tokens that messages spell out: they are meant as text, and become text.

    Args:
        tokenizer: Whose tokens control.
        template: What uses them. A token that only marks something in an answer, as `<think>`, is the assistant's to
            write; in anybody else's turn it is text.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        used = {token.content for token in added if token.content in template and token.content.strip()}
        self._assistants, self._others = _any_of(special), _any_of(special | used)

    def count(self, pair: Pair) -> int:
        """Count those of a pair, each message once, and those of what the template is given beside them."""
        messages = (*pair.prompt, *pair.chosen, *pair.rejected)
        said = sum(_count([m.content, m.input, m.extras], self._of(m.role)) for m in messages)
        return said + _count(pair.arguments, self._others)

    def marked(self, message: Message) -> Message:
        """Return a message in which they are marked.

        Raises:
            BadRow: It has a code point of which marks are made; no text of people has one.
        """
        pattern = self._of(message.role)
        if message.content is STAND_IN:  # This very text is the program's; one of the data's is refused below.
            return message
        if not message.extras and not pattern.search(message.content) and not pattern.search(message.input):
            return message
        content, given = (_marked(text, pattern) for text in (message.content, message.input))
        return Message(message.role, content, given, _marked(message.extras, pattern))

    def marked_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a template's arguments in which they are marked."""
        return dict(_marked(values, self._others))

    def _of(self, role: str) -> re.Pattern[str]:
        return self._assistants if role == "assistant" else self._others


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    """Mark what a pattern finds in all texts of a JSON value."""
    if isinstance(value, str):
        if reserved := _RESERVED.search(value):
            detail = f"a text holds U+{ord(reserved[0]):04X}, which is no character of any script"
            raise BadRow("undecodable text", detail)
        return pattern.sub(rf"{LITERAL_START}\g<0>{LITERAL_END}", value)
    if isinstance(value, Mapping):
        return {_marked(name, pattern): _marked(item, pattern) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(item, pattern) for item in value]
    return value


def _count(value: Any, pattern: re.Pattern[str]) -> int:
    """Count what a pattern finds in all texts of a JSON value."""
    if isinstance(value, str):
        return len(pattern.findall(value))
    inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    return sum(_count(item, pattern) for item in inner) if isinstance(inner, (list, tuple)) else 0


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of some texts, the longest first, and what is reserved for marks."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join([_RESERVED.pattern, *map(re.escape, longest_first)]))

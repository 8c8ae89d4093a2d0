"""Control tokens that a text spells out are meant as text: they are found, and marked for the encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dpo_cli.data.records import BadRow, Message, Pair

LITERAL_START, LITERAL_END = "\ufdd0", "\ufdd1"
"""Surround a control token that is meant as text; code points that are no characters of any script."""

STAND_IN = "\ufdd2"
"""Replaces the text of a message; another such code point."""

STAND_IN_TURN = Message("assistant", STAND_IN)
"""Replaces a turn where only the template's own words are looked for."""

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
        self._assistants, self._others = _Sought(special), _Sought(special | used)

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
        sought = self._of(message.role)
        if message.content is STAND_IN:  # This very text is the program's; one of the data's is refused below.
            return message
        if not message.extras and not sought.holds(message.content) and not sought.holds(message.input):
            return message
        content, given = (_marked(text, sought) for text in (message.content, message.input))
        return Message(message.role, content, given, _marked(message.extras, sought), message.scored)

    def marked_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a template's arguments in which they are marked."""
        return dict(_marked(values, self._others))

    def _of(self, role: str) -> _Sought:
        return self._assistants if role == "assistant" else self._others


def _marked(value: Any, sought: _Sought) -> Any:
    """Mark what is sought in all texts of a JSON value."""
    if isinstance(value, str):
        if reserved := _RESERVED.search(value):
            detail = f"a text has U+{ord(reserved[0]):04X}, which is not a character of any script"
            raise BadRow("undecodable text", detail)
        return sought.pattern.sub(rf"{LITERAL_START}\g<0>{LITERAL_END}", value)
    if isinstance(value, Mapping):
        return {_marked(name, sought): _marked(item, sought) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(item, sought) for item in value]
    return value


def _count(value: Any, sought: _Sought) -> int:
    """Count what is sought in all texts of a JSON value."""
    if isinstance(value, str):
        return len(sought.pattern.findall(value)) if sought.holds(value) else 0
    inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    return sum(_count(item, sought) for item in inner) if isinstance(inner, (list, tuple)) else 0


class _Sought:
    """Some texts that are looked for, and what is reserved for marks.

    Args:
        texts: What is looked for; of several that fit at one place the longest is found.
    """

    def __init__(self, texts: set[str]) -> None:
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join([_RESERVED.pattern, *map(re.escape, longest_first)]))
        self._first_letters = sorted({text[:1] for text in (*texts, LITERAL_START, LITERAL_END, STAND_IN)})

    def holds(self, text: str) -> bool:
        """Tell whether a text holds any of it."""
        # Few texts have so much as a letter with which a control token begins; looking for that is far quicker.
        for letter in self._first_letters:  # A loop takes half the time of `any`.
            if letter in text:
                return self.pattern.search(text) is not None
        return False

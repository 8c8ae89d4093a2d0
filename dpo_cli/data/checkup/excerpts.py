"""Short stretches of pairs, read out from their tokens where something was found."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from dpo_cli.data.checkup.comparisons import Found
from dpo_cli.data.checkup.report import EXAMPLES, Example
from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.records import Tokens
from dpo_cli.data.tokens.encoding import common_beginning

_TOKENS_BEFORE = 6
"""Tokens of an excerpt before the place where the responses part."""

_CHARACTERS, _CHARACTERS_AROUND = 120, 50
"""Characters of an excerpt, and how many of them are at each side of what was found."""

_SEARCHED_TOKENS = 4096


class Excerpts:
    """Reads excerpts out of prepared pairs.

    Args:
        pairs: The pairs.
        tokenizer: What they were tokenized with; None: examples say where they were read, and no more.
    """

    def __init__(self, pairs: PreparedPairs, tokenizer: Any) -> None:
        self._pairs, self._tokenizer = pairs, tokenizer

    def examples(self, found: Found, place: re.Pattern[str] | None = None) -> tuple[Example, ...]:
        """Return the first pairs with a finding, around its place in the texts or where the responses part.

        Of two pairs that are found beside each other the first one is an example, and the other is named there.
        """
        origin = self._pairs.origin
        return tuple(
            Example(origin(index), "" if other is None else origin(other), self._texts(index, place))
            for index, other in itertools.islice(_each_once(found), EXAMPLES)
        )

    def _texts(self, index: int, place: re.Pattern[str] | None) -> dict[str, str]:
        if not self._tokenizer:
            return {}
        pair = self._pairs[index]
        parting = max(0, common_beginning(pair.chosen, pair.rejected) - _TOKENS_BEFORE)
        # What all prompts begin with says nothing of this one, unless it is all that it has.
        opening = self._pairs.sizes.opening if self._pairs.sizes.opening < len(pair.prompt) - 1 else 0
        parts = {
            "prompt": (pair.prompt, opening),
            "chosen": (pair.chosen, parting),
            "rejected": (pair.rejected, parting),
        }
        return {
            name: (self._around(tokens, place) if place else "") or self._stretch(tokens, start)
            for name, (tokens, start) in parts.items()
        }

    def _around(self, tokens: Tokens, place: re.Pattern[str]) -> str:
        """Return the text around a place, or nothing where the text has none."""
        text = self._decode(tokens[:_SEARCHED_TOKENS])
        found = place.search(text)
        if not found:
            return ""
        start, end = max(0, found.start() - _CHARACTERS_AROUND), found.end() + _CHARACTERS_AROUND
        return _with_dots(text[start:end], before=start > 0, after=end < len(text))

    def _stretch(self, tokens: Tokens, start: int) -> str:
        """Return the text from a token on."""
        # As many tokens as characters are always enough; a character of several tokens may be cut at either end.
        text = self._decode(tokens[start : start + 4 * _CHARACTERS]).strip("\ufffd")
        return _with_dots(text[:_CHARACTERS], before=start > 0, after=len(text) > _CHARACTERS)

    def _decode(self, tokens: Tokens) -> str:
        return str(self._tokenizer.decode(tokens.tolist()))


def _each_once(found: Found) -> Iterator[tuple[int, int | None]]:
    """Yield the pairs of a finding and those that they are found beside, but for two that change places."""
    if found.others is None:
        yield from ((int(index), None) for index in found.indices)
        return
    seen: set[tuple[int, int]] = set()
    for index, other in zip(map(int, found.indices), map(int, found.others), strict=True):
        if (other, index) not in seen:
            seen.add((index, other))
            yield index, other


def _with_dots(text: str, *, before: bool, after: bool) -> str:
    return f"{'…' * before}{text}{'…' * after}"

"""Pairs that are too long are cut: the turns and texts of the prompt first, then, if that is allowed, the responses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dpo_cli.data.records import Gaps, Pair, TokenizedPair, Tokens
from dpo_cli.data.tokens.conversation_text import ConversationText
from dpo_cli.data.tokens.encoding import TextEncoder, common_beginning


@dataclass(frozen=True, slots=True)
class Cut:
    """A pair that was cut.

    Attributes:
        pair: What is left of it.
        prompt_cut: Whether some of the prompt was cut away.
        responses_cut: How many of the two responses were cut.
    """

    pair: TokenizedPair
    prompt_cut: bool
    responses_cut: int


@dataclass(frozen=True)
class Cutter:
    """Cut token sequences to a length.

    Attributes:
        texts: Writes conversations.
        encode: Makes token ids of texts.
        max_length: The most tokens that prompt and response may have together.
        min_response: The fewest tokens to which a response may be cut, or None where it is never cut.
    """

    texts: ConversationText
    encode: TextEncoder
    max_length: int
    min_response: int | None

    def __call__(self, pair: Pair, tokens: TokenizedPair) -> Cut | None:
        """Cut the last text of the prompt from its left and, only where that is not enough, the responses.

        What the template writes around that text stays, and so do system messages: a prompt keeps its form.

        Args:
            pair: The pair.
            tokens: Its tokens.

        Returns:
            What is left, or None where the responses are too long for anything to be.

        Raises:
            BadRow: The template does not write the last text, or fails without it.
        """
        head, tail = self._room_around_last(pair, tokens.prompt)
        asked = tokens.prompt[head : len(tokens.prompt) - tail]
        # Of the last text, one character must be left.
        least = len(asked) - self._whole_character(asked, range(len(asked) - 1, -1, -1))
        ends = self._ends_within(tokens, self.max_length - head - tail - max(1, least))
        if ends is None:
            return None
        prompt, room = tokens.prompt, self.max_length - head - tail - max(ends)
        if prompt_cut := room < len(asked):
            start = self._whole_character(asked, range(len(asked) - room, len(asked)))
            prompt = np.concatenate([prompt[:head], asked[start:], prompt[len(prompt) - tail :]])
        cut = dataclasses.replace(
            tokens,
            prompt=prompt,
            chosen=tokens.chosen[: ends[0]],
            rejected=tokens.rejected[: ends[1]],
            chosen_gaps=_cut_gaps(tokens.chosen_gaps, ends[0]),
            rejected_gaps=_cut_gaps(tokens.rejected_gaps, ends[1]),
        )
        return Cut(cut, prompt_cut, (len(tokens.chosen) > ends[0]) + (len(tokens.rejected) > ends[1]))

    def _ends_within(self, tokens: TokenizedPair, room: int) -> tuple[int, int] | None:
        """Return where both responses must end to fit into so many tokens, or None where they would be too short."""
        sides = tokens.chosen, tokens.rejected
        longest = max(map(len, sides))
        if longest > room and self.min_response is not None:
            fewest = (min(self.min_response, len(side)) for side in sides)
            ends = (self._whole_character(side, range(n, len(side) + 1)) for side, n in zip(sides, fewest, strict=True))
            longest = max(room, *ends)
        if longest > room:
            return None
        chosen, rejected = (self._whole_character(side, range(min(longest, len(side)), -1, -1)) for side in sides)
        openings = [
            int(gaps[1]) if gaps is not None and not gaps[0] else 0
            for gaps in (tokens.chosen_gaps, tokens.rejected_gaps)
        ]
        return (chosen, rejected) if chosen > openings[0] and rejected > openings[1] else None

    def _whole_character(self, tokens: Tokens, edges: Iterable[int]) -> int:
        """Return the first of some edges at which no character is parted; 0 where there is none."""
        return next((edge for edge in edges if not edge or not self.encode.begins_within(tokens[edge:])), 0)

    def _room_around_last(self, pair: Pair, prompt: Tokens) -> tuple[int, int]:
        """Count the tokens of a prompt that precede its last text, and those that follow it."""
        head_text, tail_text = self.texts.around_last(pair)
        head, tail = self.encode([head_text])[0], self.encode.continuation(tail_text)
        before = common_beginning(head, prompt)
        rest = prompt[before:]
        # Of a generation prompt that parts from the conversations, the prompt has no more than the beginning.
        ends = (size for size in range(len(tail), 0, -1) if np.array_equal(rest[-size:], tail[:size]))
        return before, common_beginning(tail[::-1], rest[::-1]) or next(ends, 0)


def later_beginnings(pair: Pair) -> Iterator[Pair]:
    """Yield the pair with ever fewer turns of its prompt, each time from a user's turn on; system messages stay."""
    opening = list(itertools.takewhile(lambda message: message.role == "system", pair.prompt))
    for number in range(len(opening) + 1, len(pair.prompt)):
        if pair.prompt[number].role == "user":
            yield dataclasses.replace(pair, prompt=(*opening, *pair.prompt[number:]))


def _cut_gaps(gaps: Gaps | None, length: int) -> Gaps | None:
    """Return the gaps of a response's first tokens."""
    if gaps is None:
        return None
    kept = np.minimum(gaps.reshape(-1, 2), length)
    kept = kept[kept[:, 0] < kept[:, 1]].reshape(-1)
    return kept if len(kept) else None

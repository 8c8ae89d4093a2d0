"""What a model answered before training and after, beside each other, the words marked that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.evaluation.findings.history import Row, number
from dpo_cli.reporting.answers import bare_prompts
from dpo_cli.reporting.differences import Part, differences
from dpo_cli.system.text import several

MOST_ANSWERS = 12
"""So many prompts are on the page; all are in samples.jsonl."""

_LONGEST = 3_000
"""Characters of a text that the page shows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer.

    Attributes:
        step: After which step; 0: before training.
        parts: The text, by what differs from the other answer.
        tokens: How many it has, as text.
        cut: Whether the limit of tokens ended it.
    """

    step: int
    parts: Sequence[Part]
    tokens: str
    cut: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and its answers: the first and the last, or one alone.

    Attributes:
        where: Where the prompt was read.
        prompt: The prompt, without the template that all of them have.
        chosen: The response that the data prefers.
        answers: The answers.
    """

    where: str
    prompt: str
    chosen: str
    answers: Sequence[Answer]

    @property
    def same(self) -> bool:
        """Whether training changed nothing of the answer."""
        return len(self.answers) == 2 and not any(part.differs for one in self.answers for part in one.parts)


def answered(samples: Sequence[Row]) -> list[Answered]:
    """Return each prompt with its first and its last answer."""
    by_prompt: dict[tuple[str, str], list[Row]] = {}
    for row in samples:
        if isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
            by_prompt.setdefault((str(row.get("where", "")), row["prompt"]), []).append(row)
    found = []
    asked = bare_prompts([prompt for _, prompt in by_prompt])
    for ((where, _), rows), prompt in zip(by_prompt.items(), asked, strict=True):
        ordered = sorted(rows, key=lambda row: row["step"])
        first, last = ordered[0], ordered[-1]
        parts = differences(shortened(first["answer"]), shortened(last["answer"]))
        both = [_answer(row, shown) for row, shown in zip((first, last), parts, strict=True)]
        chosen = last.get("chosen")
        shown = both if len(ordered) > 1 else both[:1]
        found.append(Answered(where, shortened(prompt), shortened(chosen) if isinstance(chosen, str) else "", shown))
    return found


def shortened(text: str) -> str:
    """Return as much of a text as the page shows."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({several(len(text) - _LONGEST, 'more character')})"


def _answer(row: Row, parts: Sequence[Part]) -> Answer:
    tokens = row.get("tokens")
    return Answer(
        row["step"], parts, several(tokens, "token") if isinstance(tokens, int) else "", row.get("ended") is False
    )


def hardest(pairs: Sequence[Row], most: int) -> list[Row]:
    """Return the pairs of the lowest margin whose texts are known, the lowest first."""
    known = [row for row in pairs if isinstance(row.get("text"), dict) and number(row, "rewards/margins") is not None]
    return sorted(known, key=lambda row: row["rewards/margins"])[:most]

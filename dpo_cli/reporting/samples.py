"""Answers to held-out prompts as the end of a run shows them: one or two, in short."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.reporting.safe_text import visible

_SHOWN, _CHARACTERS = 2, 240


def before_and_after(rows: Sequence[Mapping[str, Any]], last: int) -> list[str]:
    """Return lines with the answers to one or two prompts before step 1 and after the last step.

    Args:
        rows: Those of `samples.jsonl`.
        last: The last step.
    """
    before, after = ({row["where"]: row for row in rows if row["step"] == step} for step in (0, last))
    both = [where for where in after if where in before][:_SHOWN]
    asked = _without_the_alike([after[where]["prompt"] for where in after])
    lines = []
    for where in both:
        lines += [f"prompt  {_short(asked[[*after].index(where)])}"]
        lines += [f"before  {_answer(before[where])}", f"after   {_answer(after[where])}", ""]
    return lines


def _without_the_alike(prompts: Sequence[str]) -> list[str]:
    """Return prompts without what all begin and end with, which is the template's."""
    start = _alike(prompts)
    rests = [prompt[start:] for prompt in prompts]
    end = _alike([rest[::-1] for rest in rests])
    return [rest[: len(rest) - end] for rest in rests]


def _alike(texts: Sequence[str]) -> int:
    """Count the characters that all texts begin with; of one text, none."""
    alike = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return sum(1 for _ in alike) if len(texts) > 1 else 0


def _answer(row: Mapping[str, Any]) -> str:
    """Write an answer on one line, with its length where the limit ended it."""
    return _short(row["answer"]) + ("" if row["ended"] else f" (not ended after {row['tokens']} tokens)")


def _short(text: str) -> str:
    text = text.strip()
    return visible(text[:_CHARACTERS]) + "…" * (len(text) > _CHARACTERS)

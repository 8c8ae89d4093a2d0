"""Answers to held-out prompts as the end of a run shows them: one or two, in short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.reporting.answers import bare_prompts
from dpo_cli.reporting.safe_text import visible
from dpo_cli.system.text import several

_SHOWN, _CHARACTERS = 2, 240


def before_and_after(rows: Sequence[Mapping[str, Any]], last: int) -> list[str]:
    """Return lines with the answers to one or two prompts before step 1 and after the last step.

    Args:
        rows: Those of `samples.jsonl`.
        last: The last step.
    """
    before, after = ({row["where"]: row for row in rows if row["step"] == step} for step in (0, last))
    both = [where for where in after if where in before][:_SHOWN]
    asked = bare_prompts([after[where]["prompt"] for where in after])
    lines = []
    for where in both:
        lines += [f"prompt  {_short(asked[[*after].index(where)])}"]
        lines += [f"before  {_answer(before[where])}", f"after   {_answer(after[where])}", ""]
    return lines


def _answer(row: Mapping[str, Any]) -> str:
    """Write an answer on one line, with its length where the limit ended it."""
    cut = "" if row["ended"] else f" (not ended after {several(row['tokens'], 'token')})"
    return (_short(row["answer"]) or "(nothing)") + cut


def _short(text: str) -> str:
    text = text.strip()
    return visible(text[:_CHARACTERS]) + "…" * (len(text) > _CHARACTERS)

"""Answers of several models to the same prompts as a page, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.reporting.answers import Row, compared, length_line
from dpo_cli.reporting.pages.rendering import render


def answers_page(prompts: Sequence[Sequence[Row]], max_new_tokens: int) -> str:
    """Return the page.

    Args:
        prompts: For each prompt the answers, a row a model, in the order of the models.
        max_new_tokens: The most tokens that an answer could have.
    """
    by_model = list(zip(*prompts, strict=True))
    return render(
        "answers.html",
        max_new_tokens=max_new_tokens,
        models=[_model(rows, by_model[0]) for rows in by_model],
        prompts=list(map(_prompt, prompts)),
    )


def _model(rows: Sequence[Row], first: Sequence[Row]) -> Mapping[str, Any]:
    """Sum a model's answers up."""
    return {
        "name": rows[0]["model"],
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "ended": sum(row["ended"] for row in rows),
        "same": sum(row["answer"] == other["answer"] for row, other in zip(rows, first, strict=True)),
    }


def _prompt(rows: Sequence[Row]) -> Mapping[str, Any]:
    parts = compared([row["answer"] for row in rows])
    answers = [
        {"model": row["model"], "length": length_line(row), "parts": some}
        for row, some in zip(rows, parts, strict=True)
    ]
    first = rows[0]
    return {"where": first["where"], "text": first["prompt"], "chosen": first.get("chosen"), "answers": answers}

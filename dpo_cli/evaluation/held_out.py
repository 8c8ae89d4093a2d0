"""The rows of a run's `held_out.jsonl`: what every evaluation says of every held-out pair.

A row has: step, pair (its index), where (file and line), source and category (null: the data names none),
chosen_tokens and rejected_tokens (those that are scored), a value for each of `PAIR_METRICS`, prompt_key (the same for
pairs of the same prompt) and, of the ten pairs of lowest margin, text: prompt, chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.records import Gaps, TokenizedPair, Tokens
from dpo_cli.evaluation.evaluate import PairResult

NUM_TEXTS = 10
"""How many pairs of an evaluation have their text beside them, those of the lowest margin."""

_CHARACTERS = 2000
"""The maximum number of characters of a text."""


def held_out_rows(
    step: int, results: Sequence[PairResult], pairs: PreparedPairs, decode: Callable[[list[int]], str] | None = None
) -> list[dict[str, Any]]:
    """Return a row for each result of an evaluation, in their order.

    Args:
        step: The step after which it was made.
        results: What it says of each held-out pair.
        pairs: All pairs.
        decode: Makes text of tokens; None: no row has any.
    """
    lowest = sorted(results, key=lambda result: (result.metrics["rewards/margins"], result.index))[:NUM_TEXTS]
    shown = {result.index for result in lowest}
    prompt_keys = pairs.key_numbers("prompt_key")
    rows = []
    for result in results:
        pair = pairs[result.index]
        row = {**_described(step, result.index, pair), **result.metrics, "prompt_key": _hex(prompt_keys[result.index])}
        rows.append({**row, "text": dict(_texts(pair, decode))} if decode and result.index in shown else row)
    return rows


def _described(step: int, index: int, pair: TokenizedPair) -> dict[str, Any]:
    """Return what a row says of a pair, whichever model is scored."""
    return {
        "step": step,
        "pair": index,
        "where": pair.origin,
        "source": pair.source or None,
        "category": pair.category or None,
        "chosen_tokens": _num_scored(pair.chosen, pair.chosen_gaps),
        "rejected_tokens": _num_scored(pair.rejected, pair.rejected_gaps),
    }


def _num_scored(response: Tokens, gaps: Gaps | None) -> int:
    """Count the scored tokens of a response."""
    return len(response) - (0 if gaps is None else int((gaps[1::2] - gaps[::2]).sum()))


def _hex(key: Any) -> str:
    """Write 64 bits so that readers of JSON whose numbers have fewer keep them all."""
    return f"{int(key):016x}"


def _texts(pair: TokenizedPair, decode: Callable[[list[int]], str]) -> Iterator[tuple[str, str]]:
    """Yield the three texts of a pair: of a long prompt the end, which the responses answer, of these the beginning."""
    for name in ("prompt", "chosen", "rejected"):
        text = decode(getattr(pair, name).tolist()).strip()
        if len(text) > _CHARACTERS:
            text = f"…{text[1 - _CHARACTERS :]}" if name == "prompt" else f"{text[: _CHARACTERS - 1]}…"
        yield name, text

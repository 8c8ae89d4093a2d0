"""The rows of a run's `held_out.jsonl`: what every evaluation says of every held-out pair.

A row has: step, pair (its index), where (file and line), source and category (null: the data names none),
chosen_tokens and rejected_tokens (those that are scored), a value for each of `PAIR_METRICS`, prompt_key (the same for
pairs of the same prompt) and, of the ten pairs of lowest margin, text: prompt, chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.records import TokenizedPair
from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.preference.metrics import LENGTHS, PAIR_METRICS

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
        pair, values = pairs[result.index], result.metrics
        row = {
            "step": step,
            "pair": result.index,
            "where": pair.origin,
            "source": pair.source or None,
            "category": pair.category or None,
            **{name: int(values[name]) for name in LENGTHS},
            **{name: values[name] for name in PAIR_METRICS},
            # In hex: readers of JSON whose numbers have fewer bits keep them all.
            "prompt_key": f"{int(prompt_keys[result.index]):016x}",
        }
        rows.append({**row, "text": dict(_texts(pair, decode))} if decode and result.index in shown else row)
    return rows


def _texts(pair: TokenizedPair, decode: Callable[[list[int]], str]) -> Iterator[tuple[str, str]]:
    """Yield the three texts of a pair: of a long prompt the end, which the responses answer, of these the beginning."""
    for name in ("prompt", "chosen", "rejected"):
        text = decode(getattr(pair, name).tolist()).strip()
        if len(text) > _CHARACTERS:
            text = f"…{text[1 - _CHARACTERS :]}" if name == "prompt" else f"{text[: _CHARACTERS - 1]}…"
        yield name, text

"""How responses end: with a token at which generation ends, or with another one that the template writes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.tokens.token_checks import RESPONSES_CUT
from dpo_cli.errors import UserError

TAIL = 8
"""Tokens at a response's end among which its end token must be."""


def end_tokens(tokenizer: Any, generation_config: Any = None) -> frozenset[int]:
    """Return the ids that end a sequence or a turn, by the tokenizer and by the model's generation settings."""
    ids = getattr(generation_config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in (tokenizer.eos_token_id, *listed) if i is not None)


def set_end(tokenizer: Any, token: str) -> None:
    """Make a token the tokenizer's end-of-sequence token.

    Raises:
        UserError: The tokenizer has no such token.
    """
    if token not in tokenizer.get_vocab():
        special = ", ".join(f"`{name}`" for name in sorted(_added(tokenizer).values())[:12])
        hint = f"name one of its tokens{f': {special}' if special else ''}"
        raise UserError(f"the tokenizer has no token `{token}`", "`model.eos_token`", hint)
    tokenizer.eos_token = token


def without_end(pairs: PreparedPairs, ends: frozenset[int]) -> NDArray[np.bool_]:
    """Tell of which pairs a response that was not cut has no end token at its end, `[pairs]`."""
    lacks = [~np.isin(pairs.tails(name, TAIL), list(ends)).any(axis=1) for name in ("chosen", "rejected")]
    return np.asarray((lacks[0] | lacks[1]) & (pairs.flags & RESPONSES_CUT.flag == 0))


def closing_token(pairs: PreparedPairs, which: NDArray[np.bool_], tokenizer: Any) -> str:
    """Return the token with which the template closes the responses of some pairs; empty where it is not one alone.

    White space behind it is left aside.
    """
    tails = np.concatenate([pairs.tails(name, TAIL)[which] for name in ("chosen", "rejected")])
    blank = [token for token in np.unique(tails).tolist() if token < 0 or not tokenizer.decode([token]).strip()]
    kept = ~np.isin(tails, blank)
    last = tails[np.arange(len(tails)), tails.shape[1] - 1 - np.argmax(kept[:, ::-1], axis=1)][kept.any(axis=1)]
    found = set(last.tolist())
    return _added(tokenizer).get(found.pop(), "") if len(found) == 1 else ""


def way_out(closing: str, tokenizer: Any) -> str:
    """Say what to do where responses end without an end token.

    Args:
        closing: The token with which the template closes them, or nothing.
        tokenizer: Has another end-of-sequence token, or none.
    """
    if not closing:
        return "use a chat template that closes the assistant's turn"
    own = f", or use a template that closes them with `{tokenizer.eos_token}`" if tokenizer.eos_token else ""
    return (
        f'set `model.eos_token: "{closing}"`, so that `{closing}` also ends texts in the trained model, or add its id, '
        f"{tokenizer.convert_tokens_to_ids(closing)}, to `eos_token_id` in the model's generation_config.json{own}"
    )


def _added(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that are never broken up, by their ids."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}

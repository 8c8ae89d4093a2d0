"""The characters of a control token as tokens: what a tokenizer makes of them when it has no such token.

A tokenizer's engine may have its control tokens among its words as well (Unigram and WordPiece do), so that asking it
about the text alone gives the control token again.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dpo_cli.data.records import Tokens
from dpo_cli.data.tokens.control_tokens import LITERAL_END, LITERAL_START

LITERAL = re.compile(f"{LITERAL_START}([^{LITERAL_START}{LITERAL_END}]*){LITERAL_END}")
"""A control token that is meant as text."""

_BEFORE = ("\n", "a", ".", "0")
"""What is put before a text that does not begin its sequence; one of them does not merge with it."""


class Speller:
    """Make tokens of the characters of control tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        special = {added[token].content for token in added if added[token].special} | set(tokenizer.all_special_tokens)
        self._names = special | {token.content for token in added.values()}
        self._control = frozenset(_ids_of(tokenizer, special))
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        ends = sorted(special - {tokenizer.unk_token}, key=len, reverse=True)
        self._sought = re.compile("|".join(map(re.escape, ends)) or "(?!)")
        self._ids = np.asarray(sorted(_ids_of(tokenizer, ends) - {tokenizer.unk_token_id}), np.int32)
        self._known: dict[str, list[int]] = {}

    def __call__(self, part: str) -> list[int]:
        """Return the tokens of a control token that is meant as text and does not begin a text."""
        if part not in self._known:
            found = within(part, functools.partial(self._as_text, model=getattr(self._backend, "model", None)))
            if self._backend is not None and not self._are_characters(found, part):
                found = within(part, functools.partial(self._as_text, model=self._model_without))
            self._known[part] = found
        return self._known[part]

    def unspeakable(self, *texts: str) -> str | None:
        """Return the first control token in texts that cannot be written as characters, None where all can."""
        parts = (part for text in texts for part in LITERAL.findall(text))
        return next((part for part in parts if not self._are_characters(self(part), part)), None)

    def becomes_control(self, text: str, *tokens: Tokens) -> bool:
        """Tell whether tokens hold more control tokens than their text spells out, those meant as text left out.

        Args:
            text: A whole text, in which those are marked.
            tokens: What became of it, in one or more parts.
        """
        if not self._may_find_more:
            return False
        written = len(self._sought.findall(LITERAL.sub("", text)))
        return sum(int(np.isin(part, self._ids).sum()) for part in tokens) > written

    @functools.cached_property
    def _may_find_more(self) -> bool:
        """Tell whether the engine looks whole words up, which normalizing may have made control tokens."""
        model = getattr(self._backend, "model", None)
        if model is None or (type(model).__name__ == "BPE" and not model.ignore_merges):
            return False
        return any(model.token_to_id(name) is not None for name in self._names)

    def _are_characters(self, tokens: Sequence[int], part: str) -> bool:
        """Tell whether tokens of a control token's text are its characters: neither it nor any other, nor unknown."""
        return (
            bool(tokens)
            and self._control.isdisjoint(tokens)
            and self.tokenizer.convert_tokens_to_ids(part) not in tokens
        )

    def _as_text(self, part: str, model: Any) -> list[int]:
        """Return the tokens that a part would have without added tokens."""
        if self._backend is None:
            return list(self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        normalizer, cutter = self._backend.normalizer, self._backend.pre_tokenizer
        text = normalizer.normalize_str(part) if normalizer else part
        words = [word for word, _ in cutter.pre_tokenize_str(text)] if cutter else [text]
        return [token.id for word in words for token in model.tokenize(word)]

    @functools.cached_property
    def _model_without(self) -> Any:
        """The engine's model, with other names for its control tokens, which no text has."""
        whole = json.loads(self._backend.to_str())
        model, hidden = whole["model"], {name: f"{LITERAL_START}{name}{LITERAL_END}" for name in self._names}
        vocabulary = model["vocab"]
        if isinstance(vocabulary, Mapping):
            model["vocab"] = {hidden.get(name, name): number for name, number in vocabulary.items()}
        else:
            model["vocab"] = [[hidden.get(name, name), score] for name, score in vocabulary]
        if (unknown := model.get("unk_token")) is not None:
            model["unk_token"] = hidden.get(unknown, unknown)
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in hidden]
        return Tokenizer.from_str(json.dumps({**whole, "added_tokens": [], "post_processor": None})).model


def _ids_of(tokenizer: Any, names: Iterable[str]) -> set[int]:
    """Return the ids of some tokens; one that there is not has none, or that of what is unknown."""
    return {found for found in tokenizer.convert_tokens_to_ids(sorted(names)) if found is not None}


def within(part: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Return the tokens of a part that does not begin a text: some tokenizers put a space before what does."""
    for before in _BEFORE:
        first, whole = encode(before), encode(before + part)
        if first and whole[: len(first)] == first:
            return whole[len(first) :]
    return encode(part)


def _merged(merge: str | Sequence[str]) -> str:
    """Return what a merge makes; those of old files are one text with a space."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)

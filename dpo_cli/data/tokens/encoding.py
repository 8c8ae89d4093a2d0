"""Texts become token ids: those of the tokenizer on the whole text, found piece by piece where that is the same.

Most tokenizers of today cut a text before they look for tokens: at their added tokens, then by a pattern whose
pieces never hold a space behind another visible character. The text between two such cuts becomes the same tokens in
any context. Few of these pieces are new in a row of text, so that most rows are put
together from pieces that were seen before. Of any other tokenizer, whole texts are asked.

A text may spell out a control token that is meant as text: between two marks, it is tokenized as if the tokenizer
had no added tokens.
"""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dpo_cli.data.records import Tokens
from dpo_cli.data.tokens.control_tokens import LITERAL_END, LITERAL_START
from dpo_cli.data.tokens.spelling import LITERAL, Speller, within

_MARKS = str.maketrans("", "", LITERAL_START + LITERAL_END)

_MOST_PIECES = 2**17
_LONGEST_PIECE = 32
"""Characters of a piece that is remembered: a word or two. Longer ones hardly come again."""

_TRIED_TEXTS = 64

_CHARACTER_BYTES = 4
"""The most bytes of a character, and so the most tokens of one."""

_REPLACEMENT = "\ufffd"
"""What is decoded of bytes that are no character."""

_PIECE = re.compile(r"(?s:.)[^ ]*(?:(?<![!-~]) [^ ]*)*")
_LAST_CUT = re.compile(r"(?s:.*)(?<=[!-~])(?= )")
"""Pieces end before a space that follows a visible ASCII character; `_LAST_CUT` ends at the last such cut."""

_PATTERNS = frozenset(
    {
        # Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2 and 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 3.5
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
"""Patterns of which no match goes from a visible character on to a space, and none looks back.

The one that looks ahead, `\\s+(?!\\S)`, sees the character behind a run of white space; a piece ends visibly.
"""


class TextEncoder:
    """Turn texts into token ids, without the special tokens that a tokenizer would put around them.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.spell = tokenizer, Speller(tokenizer)
        engine = getattr(tokenizer, "backend_tokenizer", None)
        self._beginnings, self._words = _Known(engine, ""), _Known(engine, " ")
        self._tried = False
        added = _added_tokens(tokenizer) if _pieces_stand_alone(tokenizer) else None
        # Of several that match at one position the tokenizer takes the longest.
        longest_first = sorted(added or (), key=len, reverse=True)
        self._added = None if added is None else re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """Return each text's tokens."""
        if any(LITERAL_START in text for text in texts):
            return [self._with_literals(text) if LITERAL_START in text else self([text])[0] for text in texts]
        self.settle(texts)
        return self._whole(texts) if self._added is None else self._by_pieces(texts)

    def settle(self, texts: Iterable[str]) -> None:
        """Find out, once, on a few texts, whether a tokenizer does more than its engine: if so, ask it.

        Until then a text falls apart wherever the engine alone would let it.
        """
        if self._added is None or self._tried:
            return
        some = list(itertools.islice((text for text in texts if LITERAL_START not in text), _TRIED_TEXTS))
        self._tried = bool(some)
        if not all(map(np.array_equal, self._whole(some), self._by_pieces(some))):
            self._added = None

    def last_cut(self, text: str) -> int:
        """Return the last position where a text falls apart, however it goes on behind its end.

        For any continuation, the tokens up to this position and those from there on, tokenized apart, are the
        tokens of the whole. Where no position is known to have this property it is 0.
        """
        if self._added is None or LITERAL_START in text:
            return 0
        start = 0
        for added in self._added.finditer(text):
            start = added.end()
        cut = _LAST_CUT.match(text, start)
        return cut.end() if cut else start

    def begins_within(self, tokens: Tokens) -> bool:
        """Tell whether tokens begin within a character, the first bytes of which are in a token before them."""
        some = [tokens[:size].tolist() for size in range(1, _CHARACTER_BYTES + 1)]
        if not all(self.tokenizer.decode(one).startswith(_REPLACEMENT) for one in some):
            return False
        spelled = self.continuation(_REPLACEMENT)
        return not np.array_equal(tokens[: len(spelled)], spelled)

    def _with_literals(self, text: str) -> Tokens:
        """Return the tokens of a text that spells out control tokens: each of them, and what is between them, apart."""
        first, *rest = LITERAL.split(text)
        begins = self._whole([first.translate(_MARKS)]) if first else []
        return np.concatenate([*begins, *self._parts_within(rest, is_text=True)])

    def continuation(self, text: str) -> Tokens:
        """Return the tokens of a text that does not begin its sequence, whatever precedes it."""
        return np.concatenate([np.empty(0, np.int32), *self._parts_within(LITERAL.split(text), is_text=False)])

    def _parts_within(self, parts: Sequence[str], *, is_text: bool) -> Iterator[Tokens]:
        """Yield the tokens of parts that are by turns a control token meant as text, and what the template wrote."""
        for part in parts:
            # Marks that a template has torn apart mark nothing any more.
            if plain := part.translate(_MARKS):
                yield np.asarray(self.spell(plain) if is_text else within(plain, self._as_it_is), np.int32)
            is_text = not is_text

    def _as_it_is(self, part: str) -> list[int]:
        return list(self.tokenizer(part, add_special_tokens=False)["input_ids"])

    def _whole(self, texts: Sequence[str]) -> list[Tokens]:
        """Ask the tokenizer."""
        if not texts:
            return []
        ids = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [np.asarray(tokens, dtype=np.int32) for tokens in ids]

    def _by_pieces(self, texts: Sequence[str]) -> list[Tokens]:
        """Put texts together from their pieces; those that hardly fall apart are encoded in one go."""
        parts = list(map(_falls_apart, texts))
        wholes = [text for text, falls in zip(texts, parts, strict=True) if not falls]
        encoded = iter(_encode(self.tokenizer.backend_tokenizer, wholes))
        return [
            np.frombuffer(b"".join(self._pieces(text)) if falls else next(encoded), np.int32)
            for text, falls in zip(texts, parts, strict=True)
        ]

    def _pieces(self, text: str) -> list[bytes]:
        """Cut a text at its added tokens and before its words, and look up what comes out."""
        assert self._added is not None
        found: list[bytes] = []
        for part in self._added.split(text):
            if _parts_at_spaces(part):
                first, *words = part.split(" ")
                found.append(self._beginnings[first])
                found += map(self._words.__getitem__, words)
            else:
                found += map(self._beginnings.__getitem__, _PIECE.findall(part))
        return found


class _Known(dict[str, bytes]):
    """The tokens of short texts; for one that it does not hold, the tokenizer's own engine is asked.

    Args:
        engine: It; None where nothing is asked.
        before: What precedes each of these texts.
    """

    def __init__(self, engine: Any, before: str) -> None:
        super().__init__()
        self.engine, self.before = engine, before

    def __missing__(self, text: str) -> bytes:
        (tokens,) = _encode(self.engine, [self.before + text])
        if len(text) <= _LONGEST_PIECE:
            if len(self) >= _MOST_PIECES:
                self.clear()
            self[text] = tokens
        return tokens


def _encode(engine: Any, texts: Sequence[str]) -> Iterator[bytes]:
    """Ask a tokenizer's own engine, which need not tell where in a text each token was."""
    return (array("i", found.ids).tobytes() for found in engine.encode_batch_fast(texts, add_special_tokens=False))


def _falls_apart(text: str) -> bool:
    """Tell whether a text has spaces enough for most of its pieces to be worth remembering: Chinese has none."""
    return len(text) <= _LONGEST_PIECE * (1 + text.count(" "))


def _parts_at_spaces(text: str) -> bool:
    """Tell whether each space of a text follows a visible ASCII character, as in most English: the pieces part there.

    Splitting at spaces takes a fraction of the time of the pattern.
    """
    return text.isascii() and "  " not in text and "\n " not in text and text.replace("\n", "").isprintable()


def common_beginning(one: Tokens, other: Tokens) -> int:
    """Count the tokens with which two sequences begin alike."""
    width = min(len(one), len(other))
    differing = np.flatnonzero(one[:width] != other[:width])
    return int(differing[0]) if len(differing) else width


def _pieces_stand_alone(tokenizer: Any) -> bool:
    """Tell whether a text's pieces become the same tokens by themselves as within the text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.split_special_tokens or backend.truncation or backend.padding:
        return False
    # With dropout, or merges beyond the pieces of the pattern, a piece's tokens are not its own.
    if type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    # Composing characters (NFC) never reaches across a space.
    return _settings(backend.normalizer).get("type", "NFC") == "NFC" and _cuts_words(_settings(backend.pre_tokenizer))


def _cuts_words(pre_tokenizer: dict[str, Any]) -> bool:
    """Tell whether a pre-tokenizer always cuts before a space behind a visible character, whatever the context."""
    *steps, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    patterns = [step for step in (*steps, last) if step.get("type") == "Split"]
    known = all(_pattern(step) in _PATTERNS for step in patterns)
    # ByteLevel ends the row: behind it a space is no space any more.
    local = all(step.get("type") in ("Split", "Digits") for step in steps)
    if last.get("type") == "ByteLevel":
        return known and local and not last["add_prefix_space"] and (bool(patterns) or bool(last["use_regex"]))
    return known and local and bool(patterns) and last.get("type") in ("Split", "Digits")


def _pattern(step: dict[str, Any]) -> str | None:
    """Return the pattern by whose matches a step cuts, if that is how it cuts."""
    isolates = step["behavior"] == "Isolated" and not step["invert"]
    return step["pattern"].get("Regex") if isolates else None


def _added_tokens(tokenizer: Any) -> list[str] | None:
    """Return the added tokens at which a text is cut wherever they are in it, or None where not all are such."""
    backend = tokenizer.backend_tokenizer
    added = list(backend.get_added_tokens_decoder().values())
    contents = [token.content for token in added]
    together = "\0".join(contents)
    plain = all(not (token.lstrip or token.rstrip or token.single_word) for token in added)
    # Otherwise some are looked for before the text is normalized, others after.
    at_once = len({token.normalized for token in added}) <= 1 and not (
        backend.normalizer and any(token.normalized for token in added)
    )
    # One within another might turn out to be the longer one, once the text goes on.
    apart = all(" " not in content and together.count(content) == 1 for content in contents)
    return contents if plain and at_once and apart else None


def _settings(part: Any) -> dict[str, Any]:
    """Return what a part of a tokenizer is made of; of a part that is not there, nothing."""
    return {} if part is None else dict(json.loads(part.__getstate__()))

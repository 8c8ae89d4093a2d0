"""How byte-level tokenizers cut a text before they merge, under the names that llama.cpp has for it.

A GGUF file holds such a name alone. Each name means a normalizer, a sequence of pre-tokenizers and whether words of the
vocabulary are taken as they are; of tokenizers that do anything else no file can be written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MIXED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
).replace(r"\"", '"')

LLAMA_3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN_2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
QWEN_3_5 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{_MIXED}*{_LOWER}+|{_MIXED}+{_LOWER}*|\p{{N}}|{_SLASHES}"
GPT_4O = rf"{_MIXED}*{_LOWER}+{_CONTRACTIONS}?|{_MIXED}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHES}"
_SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Part = tuple[str, str | bool]
"""A pre-tokenizer and what tells it from others of its kind."""

_WORDS: Part = ("ByteLevel", True)
_BYTES: Part = ("ByteLevel", False)
_DIGITS: Part = ("Digits", True)


@dataclass(frozen=True)
class PreTokenizer:
    """What is done to a text before merges.

    Attributes:
        parts: The pre-tokenizers, in their order.
        nfc: Whether the text is brought into Unicode's form NFC first. llama.cpp never does that.
        whole_words: Whether a word that is in the vocabulary is taken without merging (`ignore_merges`).
    """

    parts: tuple[Part, ...]
    nfc: bool = False
    whole_words: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return normalizer and pre-tokenizer as a `tokenizer.json` has them."""
        normalizer = {"type": "NFC"} if self.nfc else None
        parts = [_as_json(*part) for part in self.parts]
        return {"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}


def _splits(*patterns: str) -> tuple[Part, ...]:
    return (*(("Split", pattern) for pattern in patterns), _BYTES)


_LLAMA_BPE = PreTokenizer(_splits(LLAMA_3), whole_words=True)
_DBRX = PreTokenizer(_splits(LLAMA_3))
_QWEN = PreTokenizer(_splits(QWEN_2), nfc=True)
_QWEN_PLAIN = PreTokenizer(_splits(QWEN_2))
_GPT_2 = PreTokenizer((_WORDS,))
_DIGITS_APART = PreTokenizer((_DIGITS, _WORDS))
_GPT_4O = PreTokenizer(_splits(GPT_4O))

BY_NAME: Mapping[str, PreTokenizer] = {
    "gpt-2": _GPT_2,
    "olmo": PreTokenizer((_WORDS,), nfc=True),
    "smollm": _DIGITS_APART,
    "command-r": PreTokenizer((_DIGITS, _WORDS), nfc=True),
    "llama-bpe": _LLAMA_BPE,
    "dbrx": _DBRX,
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN_PLAIN,
    "qwen35": PreTokenizer(_splits(QWEN_3_5), nfc=True),
    "tekken": PreTokenizer(_splits(TEKKEN), whole_words=True),
    "gpt-4o": _GPT_4O,
    "falcon": PreTokenizer(
        (("Punctuation", "Contiguous"), _WORDS, ("Digits", False), ("Split", "[0-9][0-9][0-9]")),
    ),
    "bloom": PreTokenizer(_splits(r" ?[^(\s|[.,!?…。，、।۔،])]+")),
    "deepseek-v3": PreTokenizer(_splits(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _PUNCTUATED)),
    "deepseek-coder": PreTokenizer(
        (*_splits("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")[:-1], _DIGITS, _BYTES)
    ),
    "seed-coder": PreTokenizer(_splits(_SEED_CODER)),
    # Names that other files have. Where several mean the same, the first is written.
    "phi-2": _GPT_2,
    "gigachat": _GPT_2,
    "exaone4": _GPT_2,
    "trillion": _GPT_2,
    "granite-docling": _GPT_2,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "codeshell": _DIGITS_APART,
    "minerva-7b": _DIGITS_APART,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "falcon3": _LLAMA_BPE,
    "falcon-h1": _LLAMA_BPE,
    "pixtral": _LLAMA_BPE,
    "lfm2": _LLAMA_BPE,
    "glm4": _LLAMA_BPE,
    "smaug-bpe": _DBRX,
    "chatglm-bpe": _DBRX,
    "stablelm2": _QWEN_PLAIN,
    "megrez": _QWEN_PLAIN,
    "llama4": _GPT_4O,
}

ADD_BOS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"}
"""Where llama.cpp begins a text with the bos token if the file does not say."""


def found_in(words: Mapping[str, Any]) -> PreTokenizer | str:
    """Return what the `tokenizer.json` of a byte-level tokenizer does before it merges, or what of it has no name."""
    normalizers = _listed(words.get("normalizer"), "normalizers")
    if odd := [one for one in normalizers if one["type"] != "NFC"]:
        return f"the normalizer {_shown(odd[0])}"
    parts = []
    for one in _listed(words.get("pre_tokenizer"), "pretokenizers"):
        part = _part(one)
        if part is None:
            return f"the pre-tokenizer {_shown(one)}"
        parts.append(part)
    return PreTokenizer(tuple(parts), bool(normalizers), bool(words["model"].get("ignore_merges")))


def splits_at(engine: Tokenizer) -> set[str]:
    """Return the patterns at which a tokenizer parts texts before it merges."""
    found = None if engine.pre_tokenizer is None else json.loads(engine.pre_tokenizer.__getstate__())
    patterns = (one["pattern"] for one in _listed(found, "pretokenizers") if one["type"] == "Split")
    return {str(pattern["Regex"]) for pattern in patterns if "Regex" in pattern}


def name_of(found: PreTokenizer, either: bool = False) -> str | None:
    """Return llama.cpp's name for it.

    Args:
        found: What a tokenizer does.
        either: Whether it makes no difference if words are taken whole.
    """
    wanted = [found, replace(found, whole_words=not found.whole_words)] if either else [found]
    return next((name for one in wanted for name, known in BY_NAME.items() if known == one), None)


def described(found: PreTokenizer) -> str:
    """Return what a tokenizer does in words."""
    steps = [*(["NFC"] if found.nfc else []), *(f"{kind}({value!r})" for kind, value in found.parts)]
    return ", ".join(steps) + (", words of the vocabulary taken whole" if found.whole_words else "")


def _listed(found: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the members of a sequence within a `tokenizer.json`, of sequences within it too."""
    if found is None:
        return []
    return [one for part in found[key] for one in _listed(part, key)] if found["type"] == "Sequence" else [found]


def _part(found: Mapping[str, Any]) -> Part | None:
    """Return a pre-tokenizer of a `tokenizer.json`, `None`: one that llama.cpp has not."""
    kind = found["type"]
    if kind == "ByteLevel" and not found["add_prefix_space"]:
        return kind, bool(found.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(found["individual_digits"])
    if kind == "Punctuation":
        return kind, str(found.get("behavior", "Isolated"))
    # Patterns that match every character may keep what they match as well as part at it.
    ways = (("Isolated", False), ("Removed", True))
    if kind == "Split" and "Regex" in found["pattern"] and (found["behavior"], found["invert"]) in ways:
        return kind, str(found["pattern"]["Regex"])
    return None


def _as_json(kind: str, value: str | bool) -> dict[str, Any]:
    """Return a pre-tokenizer as a `tokenizer.json` has it."""
    made: dict[str, dict[str, Any]] = {
        "ByteLevel": {"add_prefix_space": False, "trim_offsets": True, "use_regex": value},
        "Digits": {"individual_digits": value},
        "Punctuation": {"behavior": value},
        "Split": {"pattern": {"Regex": value}, "behavior": "Isolated", "invert": False},
    }
    return {"type": kind, **made[kind]}


def _shown(found: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key}={value!r}" for key, value in found.items() if key != "type")
    return f"{found['type']}({settings})"

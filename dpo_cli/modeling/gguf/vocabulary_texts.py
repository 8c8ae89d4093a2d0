"""Whether two tokenizers give texts the same tokens, and which texts tell tokenizers apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from dpo_cli.data.tokens.chat_template import named_templates
from dpo_cli.modeling.gguf.pre_tokenizers import GPT_4O, TEKKEN, splits_at

Encode = Callable[[str], list[int]]
"""Gives a text its tokens, special ones in the text among them, and puts none around it."""

PLAIN_TEXTS = (
    "Hello, world!",
    "The quick brown fox jumps over 13 lazy dogs; 1,234,567.89 times (50 %).",
    "I'm sure they've said we'll go, don't you'd think it's SHE'S? 'tis",
    'x = [1, 2, 3]\nfor i in range(10):\n\tif i % 2 == 0:\n        print(f"{i:>3}")  # even\n\n\n',
    "  two spaces before, three   within and  before 42  numbers  7\n \n  and lines \t\t tabs",
    "2024-12-31T23:59:59Z 0x1F 3.14159 ١٢٣ ⅷ ² 1000000",
    "Straße, naïve façade, coöperate, Ångström, łódź, ½ of it — “quoted” … end",
    "日本語のテキストと漢字、中文文本。한국어 문장도 있습니다.",
    "العربية עברית हिन्दी ไทย Ελληνικά Кириллица ქართული",
    "🙂👍🏽👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "https://example.org/a/b?c=d&e=f#g user@example.org C:\\path\\file",
    "camelCaseWord snake_case_word SCREAMING kebab-case $100 €5 #tag @name ~!@#$%^&*()_+",
    "<html><body class='a'>&nbsp;</body></html>",
    "∑_{i=0}^{n} x² ≤ ∞, A → B, ∀x∈ℝ",
    "\r\nWindows\r\nlines\r\n\r\nand\u00a0no-break\u2003spaces\u200bzero",
    "a\n\nb\n\n\nc\n",
)
"""Texts of many kinds, in Unicode's form NFC."""

_DECOMPOSED = "e\u0301"


def encode(tokenizer: Any) -> Encode:
    """Return how a tokenizer of transformers gives texts their tokens."""
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def with_special(tokenizer: Any) -> list[str]:
    """Return texts with each special token of a tokenizer in them, before, within and behind words."""
    added = [str(one) for one in tokenizer.added_tokens_decoder.values()][:64]
    return [f"{one}word {one}\n{one}{one} word{one}" for one in added]


def differing(expected: Encode, found: Encode, texts: Iterable[str]) -> list[str]:
    """Return the texts that two tokenizers give other tokens."""
    return [text for text in texts if expected(text) != found(text)]


def begins_otherwise(tokenizer: Any) -> bool:
    """Tell whether a tokenizer reads a word that nothing is before otherwise than one behind a special token."""
    special = next((one for one in map(str, tokenizer.added_tokens_decoder.values())), None)
    return special is not None and encode(tokenizer)(f"{special}word")[1:] != encode(tokenizer)("word")


def same_in_llama_cpp(tokenizer: Any, texts: Iterable[str]) -> list[str]:
    """Return those of some texts to which readers of a GGUF file give the tokens that the tokenizer gives them.

    llama.cpp leaves characters as they are, where some tokenizers compose them (NFC); and of the splits of Mistral's
    newer models and of GPT-4o it has forms of its own, which part letters from the marks on them. Before texts that
    begin with a space some tokenizers put no other one, nor behind special tokens: where they have no chat template, a
    file says what plain texts need.
    """
    parted = splits_at(tokenizer.backend_tokenizer) & {TEKKEN, GPT_4O}
    composes = encode(tokenizer)(_DECOMPOSED) == encode(tokenizer)(unicodedata.normalize("NFC", _DECOMPOSED))
    spaced = begins_otherwise(tokenizer)
    special = set(map(str, tokenizer.added_tokens_decoder.values())) if not named_templates(tokenizer) else set()

    def is_same(text: str) -> bool:
        marked = parted and any(unicodedata.category(one)[0] == "M" for one in text)
        composed = composes and not unicodedata.is_normalized("NFC", text)
        spread = spaced and (text.startswith(" ") or any(one in text for one in special))
        return not marked and not composed and not spread

    return [text for text in texts if is_same(text)]

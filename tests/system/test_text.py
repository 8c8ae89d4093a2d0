"""Text of others is shown as what it is."""

from __future__ import annotations

import unicodedata

import pytest

from dpo_cli.reporting.safe_text import as_text
from dpo_cli.system.text import escaped, several

OBEYED_OR_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of control characters, of those that turn text around, of halves of pairs, and of separators of lines."""


EVERY = "".join(map(chr, (*range(0x12000), *range(0x1F000, 0x20000), *range(0xE0000, 0xE0100))))
"""Characters of all kinds, those that have tags for a meaning among them."""


@pytest.mark.parametrize(("write", "kept"), [(escaped, ""), (as_text, "\n")])
def test_no_character_is_left_that_a_terminal_obeys_or_nobody_sees(write, kept):
    left = set(write(EVERY)) - set(kept)
    assert not {character for character in left if unicodedata.category(character) in OBEYED_OR_INVISIBLE}
    write(EVERY).encode()


def test_spaces_of_every_width_reach_a_terminal():
    spaces = "".join(character for character in EVERY if unicodedata.category(character) == "Zs")
    assert as_text(f"a{spaces}b\n") == f"a{spaces}b\n"


def test_letters_signs_and_emoji_are_themselves_and_python_reads_back_the_others():
    text = "é 漢 🙂 [red] <b>"
    assert escaped(text) == text
    assert escaped("\x1b[31m\u202e\ud800") == r"\x1b[31m\u202e\ud800"


@pytest.mark.parametrize(
    ("count", "pairs", "are"),
    [
        (0, "0 pairs", "0 pairs are"),
        (1, "1 pair", "1 pair is"),
        (1.0, "1 pair", "1 pair is"),
        (1.5, "1.5 pairs", "1.5 pairs are"),
        (2, "2 pairs", "2 pairs are"),
        (1_234_567, "1,234,567 pairs", "1,234,567 pairs are"),
    ],
)
def test_one_thing_is_not_counted_as_several(count, pairs, are):
    assert several(count, "pair") == pairs
    assert several(count, "pair is", "pairs are") == are

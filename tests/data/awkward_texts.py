"""Texts of every kind for property tests: scripts, spaces, control characters, pieces of markup."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import strategies as st

NO_CHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""Code points that are no characters and never will be, for programs to use as marks; they have a test of their own."""

_PIECES = (
    *("a", "The cat", "2", ".", ",", "'s", '"', "\\", "\\u0041", "assistant", "user", "### Response:\n", "System:"),
    *(" ", "  ", "\t", "\n", "\r", "\r\n", "\x85", "\u00a0", "\u2028", "\u2029", "\u200b", "\0", "\x1a", "\x7f"),
    *(
        "é",
        "e\u0301",
        "\u0301",
        "日本語",
        "中文",
        "👩‍👩‍👧",
        "\u200d",
        "\u202e",
        "\ufeff",
        "\ufffd",
        "\ufffe",
        "\U0010ffff",
    ),
    *("\ue000", "\U000f0000", "\U000f0001"),
    *("<", "<|", "|>", "[", "]", "{{ 1 }}", "{% raw %}", "{#", "\n\nHuman: ", "\n\nAssistant: "),
)


def texts(*more: str, without: Collection[str] = ()) -> st.SearchStrategy[str]:
    """Draw texts that are not blank.

    Args:
        more: Pieces that should come up beside the usual ones.
        without: What no text may hold.
    """
    characters = st.characters(exclude_categories=["Cs"], exclude_characters=NO_CHARACTERS)
    some = st.lists(st.sampled_from([*_PIECES, *more]) | characters, min_size=1, max_size=6).map("".join)
    return some.filter(lambda text: bool(text.strip()) and not any(part in text for part in without))

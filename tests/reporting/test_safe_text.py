"""Text of others is shown as what it is, and does nothing."""

from __future__ import annotations

import json

import pytest

from dpo_cli.reporting.safe_text import as_json, visible

HARMFUL = ["\x1b[31m", "\x00", "\x9b", "\u202e", "\u2066", "\ufeff", "\u2028", "\u200b"]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("a\n", "a⏎"),
        ("\t", "⇥"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x00é", "\\x00é"),
        ("\u202ea", "\\u202ea"),
        ("[red]", "[red]"),
    ],
)
def test_control_characters_are_shown_and_never_sent(token, shown):
    assert visible(token) == shown


@pytest.mark.parametrize("text", HARMFUL)
def test_json_holds_every_character_and_none_that_is_obeyed_or_invisible(text):
    written = as_json({text: ["é 🙂", text]})
    assert json.loads(written) == {text: ["é 🙂", text]}
    assert "é 🙂" in written
    assert written.replace("\n", "").isprintable()

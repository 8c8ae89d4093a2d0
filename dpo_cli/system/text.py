"""Text of others in characters that everybody sees, and counts of things as sentences have them."""

from __future__ import annotations


def escaped(text: str, kept: str = "") -> str:
    r"""Write control characters, invisible ones and halves of surrogate pairs as in Python: `\x1b`, `\u202e`.

    Args:
        text: Any text.
        kept: Characters that stay as they are.
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def several(count: float, one: str, many: str = "") -> str:
    """Count things.

    Args:
        count: How many there are.
        one: What one of them is called, with a verb or without.
        many: What others are called; where nothing is given, that with an s.
    """
    shown = f"{count:,}" if isinstance(count, int) else f"{count:.4g}"
    return f"{shown} {one if count == 1 else many or f'{one}s'}"

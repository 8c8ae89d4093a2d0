r"""Text of others in characters that control no terminal, that everybody sees, and that can be written as UTF-8."""

from __future__ import annotations


def escaped(text: str, kept: str = "") -> str:
    r"""Write control characters, invisible ones and halves of surrogate pairs as in Python: `\x1b`, `\u202e`.

    Args:
        text: Any text.
        kept: Characters that stay as they are.
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)

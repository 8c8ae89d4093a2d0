r"""Text of others made harmless where it is shown: on a terminal, in an excerpt, in Markdown, in JSON.

What a terminal would obey, and what nobody can see, is written as an escape (`\x1b`, `\u202e`). HTML is escaped by the
templates in `pages`.
"""

from __future__ import annotations

import json
import re
from typing import Any

from dpo_cli.reporting.secrets import covered
from dpo_cli.system.text import escaped

_MARKDOWN = re.compile(r"[\\`*{}\[\]<>#!~$&]|://|www\.")
"""What Markdown may take for more than text."""

_SPACES = "\n\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
"""White space that a terminal shows as such."""

_INVISIBLE = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
"""What JSON leaves as it is, although a terminal obeys it or nobody sees it."""


def as_text(text: str) -> str:
    """Return what a terminal shows: secrets covered, control characters escaped."""
    return escaped(covered(text), kept=_SPACES)


def visible(text: str) -> str:
    """Return an excerpt on one line, with its white space and control characters visible."""
    return escaped(text.replace("\n", "⏎").replace("\t", "⇥"))


def as_markdown(value: Any) -> str:
    """Return a value on one line of Markdown, as code where Markdown would take it for more than text."""
    text = visible(covered(str(value)))
    return markdown_code(text) if _MARKDOWN.search(text) else text


def markdown_code(text: str) -> str:
    """Return text on one line as code in Markdown."""
    fence = markdown_fence(text, 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def markdown_fence(text: str, least: int) -> str:
    """Return enough backticks, some at least, that none within the text end the code that they begin."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def as_json(value: Any) -> str:
    """Return a value as readable JSON in which nothing is invisible."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"

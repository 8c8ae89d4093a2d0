"""Pictures, videos and sounds in the columns of a row: a model that is trained on text alone is not given them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from dpo_cli.data.records import BadRow
from dpo_cli.data.rows.fields import printable

_NAME = re.compile(r"(?i)(?:image|img|picture|photo|video|audio|sound)s?(?:_?(?:path|url|file|name|id|bytes)s?)?")
"""How columns are called that hold them, or say where they are."""

_PLACEHOLDER = re.compile(r"<\|?(?:image|img|video|audio)(?:_pad|_?\d+)?\|?>")
"""What a text has in their place."""


def check_media(row: Mapping[str, object]) -> None:
    """Refuse a row of which a column holds pictures, or says where they are while its texts have a place for them."""
    for name, value in row.items():
        if not isinstance(value, (str, int, float)) and _holds_media(value):
            raise BadRow("not text", f"`{printable(name)}` has images or sounds, but only text can be trained")
        if value and _is_name(name) and any(map(_holds_placeholder, row.values())):
            what = f"the texts refer to the content of `{printable(name)}`, but only text can be trained"
            raise BadRow("not text", what)


@functools.lru_cache(4096)
def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def _holds_media(value: object) -> bool:
    """Tell whether a value is what `datasets` stores of a picture or a sound, or a list of these."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or (value.keys() == {"path"} and isinstance(value["path"], str))
    return isinstance(value, list) and bool(value) and _holds_media(value[0])


def _holds_placeholder(value: object) -> bool:
    """Tell whether a text within a value has a place for a picture."""
    if isinstance(value, str):
        return "<" in value and _PLACEHOLDER.search(value) is not None
    inner: Iterable[object] = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(map(_holds_placeholder, inner))

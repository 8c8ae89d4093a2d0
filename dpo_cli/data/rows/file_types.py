"""What a file is by its first bytes, whatever its name says."""

from __future__ import annotations

import codecs
import csv
import json
import re
from pathlib import Path

from dpo_cli.errors import UserError

HEAD_BYTES = 4096
"""How much of a file is looked at."""

PARQUET = b"PAR1"
_ARROW_FILE, _ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"

_SAVE = "save its rows as JSON lines or Parquet"
_SAVE_AS_TEXT = "save the file as UTF-8"
_UNPACK = "unpack it, and name the extracted file"
_KNOWN = (
    (rb"PK\x03\x04.{26}(?:xl/|\[Content_Types)", "a spreadsheet", "save its sheet as CSV in UTF-8"),
    (rb"PK\x03\x04", "a zip archive", _UNPACK),
    (rb".{257}ustar", "a tar archive", _UNPACK),
    (rb"\xfd7zXZ\0", "compressed with xz", _UNPACK),
    (rb"\x04\x22\x4d\x18", "compressed with LZ4", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "an archive", _UNPACK),
    (rb"\x80[\x02-\x05](?:\x95|[\]}c(\x8a])", "a Python pickle, which could run any code", _SAVE),
    (rb"\x93NUMPY|\x89HDF|SQLite format 3\0|ORC|Obj\x01", "binary data of another kind", _SAVE),
    (rb"%PDF-|\x89PNG|\xff\xd8\xff|GIF8", "a document or a picture", "name a file of rows"),
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "a Git LFS pointer, not the data",
        "fetch the data with `git lfs pull`, or download it again",
    ),
    (
        rb"(?i)\s*<(?:!doctype html|html|head)\b",
        "a web page",
        "download the file itself and not its page: on the Hub its address has `/resolve/` instead of `/blob/`",
    ),
    (rb"\s*<\?xml", "XML", _SAVE),
    (rb"(?:[^\0]\0{3}){2}|(?:\0{3}[^\0]){2}", "UTF-32 by its bytes, not UTF-8", _SAVE_AS_TEXT),
    (rb"(?:[^\0]\0){2}|(?:\0[^\0]){2}", "UTF-16 by its bytes, not UTF-8", _SAVE_AS_TEXT),
)
_SIGNS = tuple((re.compile(sign, re.DOTALL), what, hint) for sign, what, hint in _KNOWN)

_SEPARATORS = (",", ";", "\t", "|")


def is_parquet(head: bytes) -> bool:
    """Tell whether a file that begins so is Parquet."""
    return head.startswith(PARQUET)


def is_arrow(head: bytes) -> bool:
    """Tell whether a file that begins so is Arrow's, a file or a stream."""
    return head.startswith((_ARROW_FILE, _ARROW_STREAM))


def starts_as_json(head: bytes) -> bool:
    """Tell whether a text begins with a JSON object, or a list."""
    return _start(head) in (b"{", b"[")


def is_json_list(head: bytes) -> bool:
    """Tell whether a text is one JSON list, rather than a value on each line."""
    if _start(head) != b"[":
        return False
    line, _, rest = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def is_json_object_first(head: bytes) -> bool:
    """Tell whether the first line of a text is a JSON object, or a list of them begins there."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    return re.match(rb'\[?\s*\{\s*"[^"\n]*"\s*:', text) is not None


def check_content(head: bytes, path: Path) -> None:
    """Refuse a file that is known to be no data file by its first bytes.

    Raises:
        UserError: It says what the file is.
    """
    if found := what_it_is(head):
        what, hint = found
        raise UserError(f"the file is {what}", str(path), hint)


def what_it_is(head: bytes) -> tuple[str, str] | None:
    """Say what a file is that is no data file, and what to do about it; None where that is not known."""
    for sign, what, hint in _SIGNS:
        if sign.match(head):
            return what, hint
    return None


def separator_of(head: bytes, named: str) -> str:
    """Return what separates the names in a header: as the file's name says, unless that would make one column of them.

    Args:
        head: How the text begins.
        named: The separator by the file's name.
    """
    text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").lstrip("\r\n")
    line = text.partition("\n")[0].rstrip("\r")
    widths = {separator: _width(line, separator) for separator in _SEPARATORS}
    most = max(widths, key=lambda separator: widths[separator])
    return most if widths[named] <= 1 < widths[most] else named


def _width(line: str, separator: str) -> int:
    """Count the names in a header; none where it cannot be parted so, one where some are empty."""
    try:
        names = next(csv.reader([line], delimiter=separator, strict=True), [])
    except csv.Error:
        return 0
    return len(names) if all(name.strip() for name in names) else 1


def _start(head: bytes) -> bytes:
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]

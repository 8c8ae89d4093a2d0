"""Results in a file of the user's choice, as JSON or other text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_cli.errors import from_os_error
from dpo_cli.system.storage import write_text


def write_json(file: Path, found: Mapping[str, Any], doing: str) -> None:
    """Write results into a file, which may be a pipe or a device.

    Args:
        file: Where.
        found: Plain values.
        doing: What is done, for the error: "writing the figures".

    Raises:
        UserError: The disk refuses.
    """
    write_results(file, json.dumps(found, indent=1) + "\n", doing)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as JSON, a line each."""
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write_results(file: Path, text: str, doing: str) -> None:
    """Write text into a file of the user's choice; as `write_json`."""
    try:
        if file.exists() and not file.is_file():
            # A pipe or a device is written into; a rename would put a file in its place.
            file.write_text(text, encoding="utf-8")
        else:
            write_text(file.resolve(), text)
    except OSError as error:
        raise from_os_error(error, doing, str(file)) from error

"""Results as JSON in a file of the user's choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    text = json.dumps(found, indent=1) + "\n"
    try:
        if file.exists() and not file.is_file():
            # A pipe or a device is written into; a rename would put a file in its place.
            file.write_text(text, encoding="utf-8")
        else:
            write_text(file.resolve(), text)
    except OSError as error:
        raise from_os_error(error, doing, str(file)) from error

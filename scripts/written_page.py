"""What scripts that write a page have in common: write it, or say whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(page: Path, text: str) -> int:
    """Write a page; with `--check` on the command line compare it instead. Return the exit status."""
    if "--check" not in sys.argv[1:]:
        page.write_text(text, encoding="utf-8")
        return 0
    if page.exists() and page.read_text(encoding="utf-8") == text:
        return 0
    sys.stdout.write(f"docs/{page.name} is not current: run `make generated`\n")
    return 1

"""Write the tables of findings into docs/data-check.md; with `--check` say whether they are current."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from written_page import write_or_check

from dpo_cli.data.checkup.comparisons import COMPARISONS
from dpo_cli.data.checkup.data_checks import DATA_CHECKS
from dpo_cli.data.findings import Check
from dpo_cli.data.pairs.text_checks import TEXT_CHECKS
from dpo_cli.data.tokens.token_checks import TOKEN_CHECKS

PAGE = Path(__file__).parent.parent / "docs" / "data-check.md"
HEAD = "| finding | severity | when |\n|---|---|---|\n"
TABLES: list[tuple[Check, ...]] = [COMPARISONS, TEXT_CHECKS, TOKEN_CHECKS, DATA_CHECKS]
"""What the tables of the page list, in its order."""


def table(checks: Iterable[Check]) -> str:
    """Return a table; those that use a heuristic are marked."""
    rows = (
        f"| `{check.name}` | {check.severity} | {'~ ' * check.heuristic}{check.when.replace('|', chr(92) + '|')} |\n"
        for check in checks
    )
    return HEAD + "".join(rows)


def page() -> str:
    """Return the page with its tables as they should be."""
    tables = iter(TABLES)
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(rf"{re.escape(HEAD)}(?:\|.*\n)*", lambda found: table(next(tables)), text)


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))

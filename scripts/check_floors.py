"""Hold the floors of the house: a room imports from its own floor or from those below, never from above.

`config` and everything under it is seen by `cli`, `pipeline` and `config` alone, since they share the upper
floors. Exit status 1 names every import that breaks the rule.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "dpo_cli"
FLOORS = {
    "__main__": 6,
    "cli": 5,
    "command_line": 5,
    "pipeline": 4,
    "config": 4,
    "training": 3,
    "evaluation": 3,
    "preference": 2,
    "modeling": 1,
    "reporting": 1,
    "data": 0,
    "errors": 0,
    "interrupts": 0,
    "launchers": 0,
    "locks": 0,
    "plain_yaml": 0,
    "settings": 0,
    "storage": 0,
}
SAME_FLOOR = {
    ("cli", "command_line"),
    ("pipeline", "config"),
    *(
        (room, base)
        for room in ("data", "storage", "errors", "interrupts", "launchers", "locks", "settings")
        for base in ("errors", "plain_yaml", "settings", "storage")
    ),
}
"""Rooms of one floor do not know each other, except that the job reads the configuration, and that all of
the ground floor may use the ground itself."""


def broken_floors(root: Path) -> Iterator[str]:
    """Yield a line for every import that goes up, or across to a room of the same floor."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        room = path.relative_to(root / PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        if room not in FLOORS:
            yield f"{path.relative_to(root)}: `{room}` stands on no floor; add it to the table"
            continue
        for line, other in _imported_rooms(path):
            across = FLOORS[other] == FLOORS[room] and other != room and (room, other) not in SAME_FLOOR
            if FLOORS[other] > FLOORS[room] or across:
                yield f"{path.relative_to(root)}:{line}: `{room}` imports `{other}`"


def _imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the rooms that a file imports, imports for type checking included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in FLOORS:
                yield node.lineno, parts[1]


def main() -> int:
    """Print what breaks the floors."""
    broken = list(broken_floors(Path(__file__).parent.parent))
    for line in broken:
        sys.stdout.write(line + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

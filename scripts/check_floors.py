"""Hold the floors: a room imports from itself or from the floors below, never from above or beside it.

So `Config` is seen by what is above it alone: the pipeline, the jobs and the command line. Exit status 1 names every
import that breaks the rule.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "dpo_cli"
FLOORS = {
    room: floor
    for floor, rooms in enumerate(
        (
            ("errors",),
            ("system",),
            ("settings",),
            ("data.records", "data.findings"),
            ("data.rows",),
            ("data.pairs",),
            ("data.tokens",),
            ("data.prepared",),
            ("data.checkup",),
            ("modeling",),
            ("preference",),
            ("training", "evaluation"),
            ("reporting",),
            ("config",),
            ("pipeline", "doctor"),
            ("jobs",),
            ("command_line",),
            ("cli",),
            ("__main__",),
        )
    )
    for room in rooms
}
"""Every room, from the ground up. Rooms of one floor do not know each other."""


def broken_floors(root: Path) -> Iterator[str]:
    """Yield a line for every import that goes up, or across to a room of the same floor."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        module = ".".join(path.relative_to(root / PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module in ("__init__", "data"):
            continue
        room = _room(module)
        if room is None:
            yield f"{path.relative_to(root)}: `{module}` is on no floor; add it to the table"
            continue
        for line, other in _imported_rooms(path):
            if other != room and FLOORS[other] >= FLOORS[room]:
                yield f"{path.relative_to(root)}:{line}: `{room}` imports `{other}`"


def _room(module: str) -> str | None:
    """Return the room that a module of the package, named without the package, belongs to."""
    parts = module.split(".")
    return next((room for room in (parts[0], ".".join(parts[:2])) if room in FLOORS), None)


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
            if name.startswith(PACKAGE + ".") and (room := _room(name.removeprefix(PACKAGE + "."))):
                yield node.lineno, room


def main() -> int:
    """Print what breaks the floors."""
    broken = list(broken_floors(Path(__file__).parent.parent))
    for line in broken:
        sys.stdout.write(line + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

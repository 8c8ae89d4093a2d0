"""SECURITY.md promises nothing that no test shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = [line for line in (HERE.parents[1] / "SECURITY.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)` \|$")


def functions_of(file: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_threat_names_a_test_that_exists():
    threats = ROWS[1:]
    assert len(threats) > 40
    for line in threats:
        found = NAMED.search(line)
        assert found, line
        assert found[2] in functions_of(HERE / found[1]), line


def test_what_is_open_is_said_to_be_open_and_nothing_else_is():
    for line in ROWS[1:]:
        file, name = NAMED.search(line).groups()
        marks = [ast.unparse(mark) for mark in functions_of(HERE / file)[name].decorator_list]
        assert any("xfail" in mark for mark in marks) == ("**open**" in line), line

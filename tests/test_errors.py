"""Every error says of what it speaks and what to do: read off every call in the package, and off what is raised."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dpo_cli.config import Config, load_config
from dpo_cli.errors import UserError
from dpo_cli.settings import all_settings
from tests.config.test_config import MINIMAL, problems, write
from tests.conftest import ROOT

NO_SUBJECTS = {
    *(
        "is",
        "are",
        "was",
        "were",
        "has",
        "have",
        "had",
        "does",
        "do",
        "did",
        "should",
        "must",
        "can",
        "cannot",
        "could",
    ),
    *("will", "would", "missing", "invalid", "unknown", "expected", "failed", "found", "got", "unable", "wrong", "bad"),
    *("needs", "lacks", "its", "it", "they", "them", "this", "these"),
}
"""No message begins with one of these: each leaves open what is wrong."""

QUOTED_LIST = re.compile(r"'[^'`]+'(?:, '[^'`]+')* or '[^'`]+'")
WRAPPED = {
    "model_files.py": "`check_folder` puts the folder before them",
    "quantization.py": "`check_folder` puts the folder before them",
    "loading.py": "`check_folder` puts the folder before them",
    "size_checks.py": "`explained` puts the model before them",
    "files.py": "`read_adapter` puts the adapter before them",
}
"""Modules whose messages may begin with `it` or `its`, and why."""


@dataclass
class Call:
    """One `UserError(…)` of the package; its texts as far as they can be read off the source."""

    file: Path
    line: int
    whats: list[str]
    hints: list[str] = field(default_factory=list)
    has_hint: bool = False

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def texts(node: ast.expr, names: dict[str, list[ast.expr]]) -> Iterator[str]:
    """Yield the texts that an expression may be, with `…` for each part that is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
        case ast.Name(id=name):
            for value in names.get(name, []):
                yield from texts(value, {})
        case ast.IfExp(body=body, orelse=other):
            yield from texts(body, names)
            yield from texts(other, names)
        case ast.BoolOp(values=values):
            for value in values:
                yield from texts(value, names)


def calls() -> Iterator[Call]:
    for file in sorted((ROOT / "dpo_cli").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = {id(call): function for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
                  for call in ast.walk(function) if isinstance(call, ast.Call)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                yield _call(file, node, inside.get(id(node)))


def _call(file: Path, node: ast.Call, function: ast.FunctionDef | None) -> Call:
    names: dict[str, list[ast.expr]] = {}
    for one in ast.walk(function) if function else ():
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name):
            names.setdefault(one.targets[0].id, []).append(one.value)
    arguments = {keyword.arg: keyword.value for keyword in node.keywords}
    arguments.update(zip(("what", "where", "hint"), node.args, strict=False))
    hint = arguments.get("hint")
    given = hint is not None and not (isinstance(hint, ast.Constant) and hint.value is None)
    hints = list(texts(hint, names)) if hint is not None else []
    return Call(file, node.lineno, list(texts(arguments["what"], names)), hints, given)


CALLS = list(calls())


def test_there_are_errors_to_look_at():
    assert len(CALLS) > 100
    assert sum(bool(call.whats) for call in CALLS) > 100
    assert sum(bool(call.hints) for call in CALLS) > 100


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_an_error_names_its_subject_and_has_a_hint(call):
    for what in call.whats:
        first = what.split(" ", 1)[0].lower()
        assert first not in NO_SUBJECTS or (call.file.name in WRAPPED and first in ("it", "its")), what
        assert not what.endswith(".")
    assert call.has_hint
    assert all(call.hints)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_names_are_listed_in_one_style_and_no_advice_needs_the_repository(call):
    for text in (*call.whats, *call.hints):
        assert not QUOTED_LIST.search(text), text
        assert "`make " not in text, text


FIELDS = dict(all_settings(Config))
"""Every setting and group by its dotted path."""

WRONG = ["{no_such: {a: 1}}", "[[1]]", ".nan", "-1e300", "null", "no such thing", "'5'", "1" * 150, "true"]


@pytest.mark.parametrize("setting", sorted(FIELDS))
def test_whatever_is_wrong_with_a_setting_is_said_with_advice(tmp_path, setting):
    """Every setting with every kind of wrong value: what is refused is refused with advice, in one style."""
    file = write(tmp_path, MINIMAL)
    refused = 0
    for value in WRONG:
        try:
            load_config(file, [f"{setting}={value}"])
            continue
        except UserError as error:
            found = [error]
        except ExceptionGroup as several:
            found = list(several.exceptions)
        refused += 1
        for one in found:
            assert one.where
            assert one.hint
            assert one.what.split(" ", 1)[0] not in NO_SUBJECTS
            assert one.hint != FIELDS[setting].description
            assert not one.hint.startswith(f"{setting}: ")
            assert not QUOTED_LIST.search(one.what + one.hint)
    assert refused


@pytest.mark.parametrize("setting", ["model", "model.name", "data.train.path"])
def test_how_a_missing_setting_is_written_is_said(tmp_path, setting):
    group, _, leaf = setting.rpartition(".")
    assert FIELDS[setting].is_required()
    text = {"": "data: {train: a}", "model": "model: {dtype: auto}"}.get(group, "model: a/b\ndata: {train: {limit: 1}}")
    (error,) = problems(write(tmp_path, text))
    assert error.what == f"`{setting}` is missing"
    assert f"as in `{leaf}: " in error.hint

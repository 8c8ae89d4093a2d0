"""What is wrong with a file that results are to be written to, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dpo_cli.errors import UserError
from dpo_cli.reporting.console import STANDARD_OUTPUT
from dpo_cli.settings import located

_BEGINNINGS: Mapping[str, tuple[bytes, ...]] = {
    "page": (b"<!doctype html>",),
    # Of figures, of compared figures, of what `dpo doctor` finds, of answers.
    "JSON file": (b'{\n "pairs"', b'{\n "models"', b'{\n "dpo"', b'{"model": '),
}
"""How files of each kind begin: those are replaced, and no others."""


def json_file_errors(file: Path | None) -> Iterator[UserError]:
    """Say why results cannot be written to what `--json` names, if so."""
    if file != STANDARD_OUTPUT:
        yield from file_errors(file, "--json", "JSON file")


def page_errors(file: Path | None, option: str) -> Iterator[UserError]:
    """Say why a page cannot be written to where an option names it, if so."""
    if file == STANDARD_OUTPUT:
        yield UserError("a page is not written to standard output", f"{option} {file}", "name a file")
    else:
        yield from file_errors(file, option, "page")


def file_errors(file: Path | None, option: str, kind: str) -> Iterator[UserError]:
    """Say why a file of some kind cannot be written to where an option names it, if so."""
    if file is None:
        return
    where = f"{option} {file}"
    if file.is_dir():
        yield UserError(f"the {kind} is a folder", where, "name a file in it")
    elif not file.parent.is_dir():
        yield UserError(f"there is no folder {located(file.parent)} for the {kind}", where, "create it")
    elif _is_another(file, _BEGINNINGS[kind]):
        what = f"`{file}` exists already, and is no {kind} that this program wrote"
        yield UserError(what, where, "choose another file, or remove this one")


def _is_another(file: Path, beginnings: tuple[bytes, ...]) -> bool:
    """Tell whether there is a file with content of another kind, such as the data; pipes and devices have none."""
    if not file.is_file():
        return False
    try:
        with file.open("rb") as opened:
            start = opened.read(max(map(len, beginnings)))
    except OSError:
        # Who may not read a file may still replace it.
        return True
    return bool(start) and not start.startswith(beginnings)

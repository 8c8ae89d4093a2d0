"""What is published contains nothing that is of this machine alone: no paths, no secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dpo_cli.errors import UserError
from dpo_cli.reporting.secrets import holds_secret
from dpo_cli.system.hub import CARD

_TEXTS = re.compile(
    r"README\.md|manifest\.json|Modelfile|(?:generation_|adapter_|tokenizer_)?config\.json", re.IGNORECASE
)
"""Files that a program writes about a model; others came with it, or are too large to be about it."""

_PATHS = (
    re.compile(r"""(?<=["'`])/[^"'`]+(?=["'`])"""),
    re.compile(r"(?<![\w/.:~-])/[\w.@+-]+(?:/[\w.@+-]+)+"),
    re.compile(r"""(?<![^\s"'`(=])/[\w.@+-]+(?=/?(?:[\s"'`),;:!?*]|$))"""),
)
"""What may be a path: a quotation, which may have spaces; several names; or one that is no tag and in no word."""

_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")
"""How JSON may write a letter that is not of ASCII."""

_ANYWHERE = {"bin", "dev", "etc", "lib", "lib64", "proc", "sbin", "sys", "usr"}
"""Folders that every machine has."""

_BY_THEMSELVES = {*_ANYWHERE, "Users", "Volumes", "boot", "home", "media", "opt", "root", "run", "srv", "tmp", "var"}
"""Folders that most machines have, so that they say nothing without what is in them."""


def local_texts(folder: Path, files: Mapping[str, Path | bytes]) -> Iterator[UserError]:
    """Yield which texts of a folder name a path of this machine, or contain a secret.

    Args:
        folder: The folder, for the errors.
        files: The files that are published, by name.
    """
    for name, content in files.items():
        if not _TEXTS.fullmatch(name):
            continue
        data = content if isinstance(content, bytes) else content.read_bytes()
        hint = f"edit `{folder / name}`" if name == CARD else "export it again, from a base with a name on the Hub"
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            where = f"{folder / name}, line {number}"
            if holds_secret(line):
                yield UserError("what is published contains a secret", where, hint)
            elif path := _local_path(line):
                yield UserError(f"what is published names a path of this machine, `{path}`", where, hint)


def _local_path(line: str) -> str | None:
    """Return a path in a line that is one of this machine: of something that is there, or in the user's own folder."""
    read = _ESCAPED.sub(lambda letter: chr(int(letter[1], 16)), line)
    for path in (found.rstrip("./") for pattern in _PATHS for found in pattern.findall(read)):
        first, _, inside = path[1:].partition("/")
        if path and first not in (_ANYWHERE if inside else _BY_THEMSELVES) and (_exists(path) or _is_home(path)):
            return str(path)
    return None


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _is_home(path: str) -> bool:
    try:
        home = Path.home()
    except RuntimeError:
        return False
    return len(home.parts) > 1 and Path(path).is_relative_to(home)

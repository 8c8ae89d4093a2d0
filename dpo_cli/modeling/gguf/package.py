"""The package that reads and writes GGUF files, which is installed by those who want it."""

from __future__ import annotations

from types import ModuleType

from dpo_cli.errors import UserError


def gguf_package(doing: str, where: str) -> ModuleType:
    """Return it; transformers needs it as well, and explains its absence badly.

    Raises:
        UserError: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        hint = "install it with `pip install 'dpo-cli[gguf]'`"
        raise UserError(f"{doing} a GGUF file needs the package `gguf`", where, hint) from None
    return gguf

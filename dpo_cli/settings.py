"""The base of every settings value: strict, frozen, and loud about what it does not know; and the names of places."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer
from pydantic_core import PydanticCustomError

UNDEFINED = "undefined_variable"
"""What pydantic calls the error of a path that names a variable which the environment lacks."""

CONTRADICTION = "contradiction"
"""What it calls the error of settings that do not go together."""

_VARIABLE = re.compile(r"\$(?:(?P<escape>\$)|(?P<bare>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\})")


class Settings(BaseModel):
    """A group of settings. Unknown keys, text for numbers, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def contradiction(what: str, hint: str) -> PydanticCustomError:
    """Return the error of a group whose settings are right by themselves and do not go together.

    Args:
        what: What is wrong; it names the settings.
        hint: What to do about it.
    """
    return PydanticCustomError(CONTRADICTION, "{what}", {"what": what, "hint": hint})


class UndefinedVariable(ValueError):
    """A path names a variable that the environment lacks.

    Args:
        name: The variable.
    """

    def __init__(self, name: str) -> None:
        if re.fullmatch(r"[A-Za-z_]\w*", name):
            super().__init__(f"the environment variable `{name}` is not defined")
            self.hint = f"define it (`export {name}=…`), or write `$$` for a dollar sign"
        else:
            super().__init__(f"`${{{name}}}` names no environment variable")
            self.hint = "write `$NAME` or `${NAME}`; `$$` is a dollar sign"


def expand_path(text: str) -> str:
    """Expand `~`, `$NAME` and `${NAME}` as a shell would; `$$` is a dollar sign.

    Raises:
        UndefinedVariable: The environment lacks one of the variables.
    """

    def value(found: re.Match[str]) -> str:
        if found["escape"]:
            return "$"
        name = found["bare"] or found["braced"] or ""
        if (defined := os.environ.get(name)) is None:
            raise UndefinedVariable(name)
        return defined

    # A `~` is the home's only where it is written, not where a variable brings it in.
    return _VARIABLE.sub(value, os.path.expanduser(text))  # noqa: PTH111


def escape_path(text: str) -> str:
    """Write a path so that `expand_path` returns it unchanged."""
    escaped = text.replace("$", "$$")
    return f"./{escaped}" if escaped.startswith("~") else escaped


def located(path: str | Path) -> str:
    """Quote a path for a message that it does not exist: a relative one with where that is."""
    text = str(path)
    return f"`{text}`" if os.path.isabs(text) else f"`{text}` ({os.path.abspath(text)})"  # noqa: PTH100, PTH117


def nearest_file(path: Path) -> Path | None:
    """Return what is called nearly so in the folder of a path that there is not; endings alike are no likeness."""
    folder = path.parent if path.parent.is_dir() else Path()
    names = [inside.name for inside in folder.iterdir()]
    stems = difflib.get_close_matches(_stem(path.name), {_stem(name) for name in names})
    near = difflib.get_close_matches(path.name, [name for name in names if _stem(name) in stems], n=1, cutoff=0.0)
    return folder / near[0] if near else None


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _expand(text: str) -> str:
    try:
        return expand_path(text)
    except UndefinedVariable as error:
        # Braces would be taken for parts to fill in.
        raise PydanticCustomError(UNDEFINED, "{reason}", {"reason": str(error), "hint": error.hint}) from None


PathText = Annotated[str, AfterValidator(_expand), PlainSerializer(escape_path, when_used="json")]
"""A setting that may name a file or folder: `~` and variables are expanded, and Hub ids stay as they are."""

"""What settings are made of: their base, strict and frozen; choices that a table or a union lists; what may change.

A point of variation is a closed union of groups told apart by `type`, or a table by name. What else depends on which
members there are asks the union or the table: `members`, `types`, `OneOf`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    SerializationInfo,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from dpo_cli.system.hub import public_name

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


class OneOf:
    """What a text may be: `Annotated[str, OneOf(TABLE)]` accepts the names of a table.

    Args:
        names: All texts that are accepted.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept the names alone, as a `Literal` of them would."""
        return core_schema.literal_schema(list(self.names))


class OneOfLater:
    """As `OneOf`, where the names are of a table that takes long to import: it is asked for when a text is given.

    Args:
        names: Returns all texts that are accepted.
    """

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept the names alone."""
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """List the names."""
        return handler(core_schema.literal_schema(list(self._names())))

    def _checked(self, value: Any) -> Any:
        if value not in (names := [*self._names()]):
            *others, last = map(repr, names)
            # What a `Literal` says.
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
        return value


@dataclass(frozen=True)
class OnResume:
    """Marks a setting, or a whole group, that may be another one when a run is resumed; all others may not.

    Args:
        may: What it may do, in words.
    """

    may: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Note it in the schema of the setting."""
        return {**handler(schema), ON_RESUME: self.may}


ON_RESUME = "x-on-resume"
"""Under which name the JSON Schema of a setting has what it may do when a run is resumed."""

MAY_CHANGE = OnResume("may change")
"""It is no part of what a step computes, rounding aside."""

MAY_GROW = OnResume("may be raised")
"""It says how many steps there are: more of them are possible where the learning rate of those taken allows it."""


def members(union: Any) -> tuple[type[Settings], ...]:
    """Return the groups of a closed union, `Annotated[A | B, Field(discriminator="type")]`, or of one group alone."""
    inner = next(iter(get_args(union)), union)
    return get_args(inner) or (inner,)


def types(union: Any) -> tuple[str, ...]:
    """Return the `type` of each group of a closed union."""
    return tuple(member.model_fields["type"].default for member in members(union))


def groups_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the groups of settings that a type consists of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from groups_in(inner)


def all_settings(group: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted name of each setting of a group and of the groups in it, with its field."""
    for name, field in group.model_fields.items():
        yield f"{prefix}{name}", field
        for inner in groups_in(field.annotation):
            yield from all_settings(inner, f"{prefix}{name}.")


def on_resume(group: type[BaseModel]) -> dict[str, OnResume]:
    """Return the settings of a group that are marked by `OnResume`; one that is a group covers all in it."""
    return {name: mark for name, field in all_settings(group) for mark in field.metadata if isinstance(mark, OnResume)}


def is_within(name: str, names: Iterable[str]) -> bool:
    """Tell whether a dotted name is one of some, or lies in one of them."""
    return any(f"{name}.".startswith(f"{above}.") for above in names)


def contradiction(what: str, hint: str, *names: str) -> PydanticCustomError:
    """Return the error of a group whose settings are right by themselves and do not go together.

    Args:
        what: What is wrong; it names the settings.
        hint: What to do about it.
        names: The settings, as the group calls them.
    """
    return PydanticCustomError(CONTRADICTION, "{what}", {"what": what, "hint": hint, "names": names})


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


PUBLISHED = {"published": True}
"""With this context, settings are written for others to read: of paths, their last part alone."""


def _path_written(text: str, info: SerializationInfo) -> str:
    return public_name(text) if info.context == PUBLISHED else escape_path(text)


PathText = Annotated[str, AfterValidator(_expand), PlainSerializer(_path_written, when_used="json")]
"""A setting that may name a file or folder: `~` and variables are expanded, and Hub ids stay as they are."""

"""A YAML file becomes values and the place of each: plain data, safe to read, with every line known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.config.places import Places
from dpo_cli.config.schema import expand_short_form
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.settings import located, nearest_file
from dpo_cli.system import plain_yaml
from dpo_cli.system.plain_yaml import NotPlain

_DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")


@dataclass
class Tree:
    """A configuration as read: the values, and where each dotted path stands."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str, ...], str] = field(default_factory=dict)
    unreadable: list[tuple[str, ...]] = field(default_factory=list)
    """Settings whose value cannot be read, which is reported already."""

    def is_reported(self, path: Sequence[str]) -> bool:
        """Tell whether what is wrong with a setting is reported already, since its value cannot be read."""
        return any(tuple(path[: len(known)]) == known for known in self.unreadable)

    def place(self, *paths: Sequence[str]) -> str:
        """Return where some settings were made that together are wrong, or else the nearest group around the first."""
        return Places(self.places).of(*paths) or "the configuration"

    def order(self, path: Sequence[str]) -> int:
        """Return a number that grows along the file."""
        known = list(self.places)
        matches = (known.index(tuple(path[:n])) for n in range(len(path), -1, -1) if tuple(path[:n]) in self.places)
        return next(matches, 0)


def read_tree(file: Path) -> tuple[Tree, list[UserError]]:
    """Parse the file into values and places; return as well what is wrong with single values.

    Raises:
        UserError: Nothing of the file can be read as settings.
    """
    unreadable: list[NotPlain] = []
    try:
        values, lines = plain_yaml.parse(_text(file), unreadable)
    except NotPlain as error:
        raise UserError(error.what, f"{file}, line {error.line}", _if_data(file) or error.hint) from None
    if values is None:
        raise UserError("the configuration is empty", str(file), "set at least `model` and `data.train`")
    if not isinstance(values, dict):
        what = f"the configuration is not a mapping of settings, but {_kind(values)}"
        raise UserError(what, f"{file}, line 1", _if_data(file) or "write settings, such as `model: …`")
    places = {path: f"{file}, line {line}" for path, line in lines.items()}
    problems = [_unreadable(error, file) for error in unreadable]
    return Tree(values, {(): str(file), **places}, [error.path for error in unreadable if error.path]), problems


def _unreadable(error: NotPlain, file: Path) -> UserError:
    """Say what is wrong with the value of one setting."""
    dotted = f"`{'.'.join(error.path or ())}`"
    what = error.what if error.what.startswith(dotted) else f"the value of {dotted} is {error.what}"
    return UserError(what, f"{file}, line {error.line}", error.hint)


def _if_data(file: Path) -> str | None:
    """Say what to do with a file that is named like data and is no configuration."""
    if file.suffix.lower() not in _DATA_ENDINGS:
        return None
    return f"it looks like a data file: `dpo init --data {file}` writes a configuration that names it in `data.train`"


def _kind(values: Any) -> str:
    return "a list" if isinstance(values, list) else "a single value"


def _text(file: Path) -> str:
    try:
        return plain_yaml.read(file)
    except UnicodeDecodeError:
        raise UserError("the configuration is not UTF-8 text", str(file), "save the file as UTF-8") from None
    except FileNotFoundError:
        near = nearest_file(file)
        hint = f"did you mean `{near}`?" if near else "check the path; `dpo init` writes a configuration"
        raise UserError(f"there is no configuration file {located(file)}", None, hint) from None
    except OSError as error:
        raise from_os_error(error, "reading the configuration", str(file), status=2) from error


def override(tree: Tree, text: str) -> UserError | None:
    """Set one `KEY=VALUE`; return what is wrong with it, if anything."""
    key, equals, value = text.partition("=")
    where, path = f"the command line: {text}", key.split(".")
    if not equals or not all(path):
        hint = "overrides look like `training.learning_rate=1e-5`; options start with `--`"
        return UserError(f"`{text}` is not a setting with a value", "the command line", hint)
    try:
        parsed, _ = plain_yaml.parse(value)
    except NotPlain as error:
        reason = error.what.removeprefix("not valid YAML: ")
        what = f"the value of `{key}` is not valid YAML: {reason}"
        quoted = f": `'{key}=\"{value}\"'`" if len(value) <= 60 and '"' not in value else ""
        return UserError(what, where, f"quote it for YAML and for the shell{quoted}")
    group: Any = tree.values
    for depth, name in enumerate(path[:-1]):
        if (problem := _misplaced(group, name, path[:depth], where)) is not None:
            return problem
        place = int(name) if isinstance(group, list) else name
        inner = group.get(name) if isinstance(group, dict) else group[place]
        inner = expand_short_form(".".join(part for part in path[: depth + 1] if not part.isdecimal()), inner)
        group[place] = list(inner) if isinstance(inner, list) else dict(inner) if isinstance(inner, Mapping) else {}
        group = group[place]
    if (problem := _misplaced(group, path[-1], path[:-1], where)) is not None:
        return problem
    group[int(path[-1]) if isinstance(group, list) else path[-1]] = parsed
    # What the file says of it no longer counts.
    tree.places = {known: place for known, place in tree.places.items() if known[: len(path)] != tuple(path)}
    tree.places[tuple(path)] = where
    return None


def _misplaced(group: Any, name: str, path: Sequence[str], where: str) -> UserError | None:
    """Say what is wrong with an override that names a member of a list."""
    if not isinstance(group, list) or (name.isdecimal() and int(name) < len(group)):
        return None
    dotted = ".".join(path)
    what = f"`{dotted}` is a list of {len(group)}, and index `{name}` is out of range"
    return UserError(what, where, f"name a member, such as `{dotted}.0`, or set `{dotted}` as a whole")

"""A YAML file becomes values and the place of each: plain data, safe to read, with every line known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.config.schema import expand_short_form
from dpo_cli.errors import UserError, from_os_error

_MAX_NODES = 10_000
"""No configuration is this large; what is, repeats itself through YAML anchors."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `5e-7` is the number it is."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


@dataclass
class Tree:
    """A configuration as read: the values, and where each dotted path stands."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str, ...], str] = field(default_factory=dict)

    def place(self, path: Sequence[str]) -> str:
        """Return where a path stands, or else the nearest group around it."""
        for length in range(len(path), -1, -1):
            if found := self.places.get(tuple(path[:length])):
                return found
        return "the configuration"

    def order(self, path: Sequence[str]) -> int:
        """Return a number that grows along the file."""
        known = list(self.places)
        matches = (known.index(tuple(path[:n])) for n in range(len(path), -1, -1) if tuple(path[:n]) in self.places)
        return next(matches, 0)


def read_tree(file: Path) -> Tree:
    """Parse the file into values and places."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("the configuration is not UTF-8 text", str(file), "save the file as UTF-8") from None
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in _siblings(file)], n=1, cutoff=0.4)
        hint = f"did you mean `{file.parent / near[0]}`?" if near else "check the path"
        raise UserError(f"there is no configuration file `{file}`", None, hint) from None
    except OSError as error:
        raise from_os_error(error, "reading the configuration", str(file), status=2) from error
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise UserError("the configuration is empty", str(file), "set at least `model` and `data.train`")
        if not isinstance(node, yaml.MappingNode):
            what = "the configuration is not a mapping of settings"
            raise UserError(what, f"{file}, line 1", "write `model: …` and the like")
        return _Builder(loader, file).build(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "check indentation, colons and quotes near that line"
        raise UserError(f"not valid YAML: {error.problem}", f"{file}, line {line}", hint) from None
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"not valid YAML: {reason}", str(file), "check the file's characters") from None
    except RecursionError:
        what = "the configuration is nested too deeply"
        raise UserError(what, str(file), "settings are two levels deep") from None
    finally:
        if loader:
            loader.dispose()


class _Builder:
    """Turn YAML nodes into values while noting the line of every key."""

    def __init__(self, loader: _Loader, file: Path) -> None:
        self.loader, self.file, self.num_nodes = loader, file, 0
        self.tree = Tree()

    def build(self, node: yaml.MappingNode) -> Tree:
        self.tree.places[()] = str(self.file)
        self.tree.values = self._mapping(node, ())
        return self.tree

    def _value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            hint = "write the settings out without anchors"
            raise UserError(f"the configuration has more than {_MAX_NODES} values", str(self.file), hint)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._member(item, (*path, str(place))) for place, item in enumerate(node.value)]
        return self.loader.construct_object(node)

    def _member(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.tree.places[path] = self._place(node)
        return self._value(node, path)

    def _place(self, node: yaml.Node) -> str:
        return f"{self.file}, line {node.start_mark.line + 1}"

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = self._place(key_node)
            key = self.loader.construct_object(key_node)
            if not isinstance(key, str):
                raise UserError(f"`{key_node.value}` is not the name of a setting", where, "names are text")
            if key in values:
                dotted = ".".join((*path, key))
                raise UserError(f"`{dotted}` is set twice", where, "keep one of the two lines")
            self.tree.places[(*path, key)] = where
            values[key] = self._value(value_node, (*path, key))
        return values


def override(tree: Tree, text: str) -> UserError | None:
    """Set one `KEY=VALUE`; return what is wrong with it, if anything."""
    key, equals, value = text.partition("=")
    where, path = f"the command line: {text}", key.split(".")
    if not equals or not all(path):
        hint = "overrides look like `training.learning_rate=1e-5`; options start with `--`"
        return UserError(f"`{text}` is not a setting and its value", "the command line", hint)
    try:
        parsed = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return UserError(f"the value of `{key}` is not valid YAML", where, "quote it for YAML and for the shell")
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
    tree.places[tuple(path)] = where
    return None


def _misplaced(group: Any, name: str, path: Sequence[str], where: str) -> UserError | None:
    """Say what is wrong with an override that names a member of a list."""
    if not isinstance(group, list) or (name.isdecimal() and int(name) < len(group)):
        return None
    dotted = ".".join(path)
    what = f"`{dotted}` is a list of {len(group)}, and `{name}` is none of its places"
    return UserError(what, where, f"name a place, such as `{dotted}.0`, or set `{dotted}` as a whole")


def _siblings(file: Path) -> list[Path]:
    return list(file.parent.iterdir()) if file.parent.is_dir() else []

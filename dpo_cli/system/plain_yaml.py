"""YAML as plain data: what is read is no more than what is written, and nothing of it runs.

Lists, groups, text, numbers, true, false and null are known, and no other tags. Anchors are, but what they repeat
counts each time; keys are merged nowhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
"""No file of settings is longer."""

MAX_VALUES = 10_000
"""None holds as many values; one that does repeats itself through anchors."""

_MAX_DIGITS = 100
_SHOWN = 40
_PREFIX = "tag:yaml.org,2002:"
_SCALARS = {f"{_PREFIX}{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")}
_NUMBERS = {f"{_PREFIX}int", f"{_PREFIX}float"}


class NotPlain(Exception):
    """What is not read.

    Args:
        what: What is wrong with it.
        line: Its line, counted from 1.
        hint: What to do about it.
        path: The setting whose value alone cannot be read; None: nothing can be.
    """

    def __init__(self, what: str, line: int, hint: str, path: tuple[str, ...] | None = None) -> None:
        super().__init__(what)
        self.what, self.line, self.hint, self.path = what, line, hint, path


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `5e-7` is the number it is, and of which no more is read than is allowed."""

    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Count what is read, before it takes time and memory."""
        self.num_nodes += 1
        if self.num_nodes > 2 * MAX_VALUES:
            raise _too_many(self.line + 1)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes a text which `_Loader` would take for a number, and escapes all that ends a line."""


def _written(dumper: _Dumper, text: str) -> yaml.Node:
    # Raw, these are folded into a space when they are read.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(f"{_PREFIX}str", text, style=style)


_Dumper.add_representer(str, _written)
for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
        f"{_PREFIX}float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def read(file: Path) -> str:
    """Read a file of settings.

    Raises:
        NotPlain: It is longer than any.
        UnicodeDecodeError: It is not UTF-8.
        OSError: It cannot be read.
    """
    with file.open("rb") as opened:
        data = opened.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise NotPlain(f"the settings are longer than {MAX_BYTES:,} bytes", 1, "name the file with the settings")
    return data.decode("utf-8-sig")


def dump(values: Any) -> str:
    """Write plain values so that `parse` reads the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def written(value: Any) -> str:
    """Write one value in a line."""
    line = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, allow_unicode=True, width=math.inf
    )
    return line.removesuffix("\n").removesuffix("\n...")


def parse(text: str, unreadable: list[NotPlain] | None = None) -> tuple[Any, Mapping[tuple[str, ...], int]]:
    """Read a text.

    Args:
        text: YAML.
        unreadable: Takes what is wrong with single values, which are read as None; None: it is raised.

    Returns:
        What it says, None where it says nothing; and the line of every key and of every member of a list, by its
        path.

    Raises:
        NotPlain: It is not YAML, or more than plain data.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        builder = _Builder(loader)
        value = None if node is None else builder.value(node, ())
        if builder.unreadable and unreadable is None:
            raise builder.unreadable[0]
        (unreadable if unreadable is not None else []).extend(builder.unreadable)
        return value, builder.lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise NotPlain(
            f"not valid YAML: {error.problem}", line, "check indentation, colons and quotes near that line"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise NotPlain(f"not valid YAML: {error.reason}", line, "check the characters of that line") from None
    except RecursionError:
        line = loader.line + 1 if loader else 1
        raise NotPlain("the settings are nested too deeply", line, "settings are two levels deep") from None
    finally:
        if loader:
            loader.dispose()


class _Builder:
    """Turn YAML nodes into values while noting lines.

    Attributes:
        lines: The lines of the members of groups and lists, by their paths.
        unreadable: What is wrong with single values.
    """

    def __init__(self, loader: _Loader) -> None:
        self._loader, self._num_values = loader, 0
        self.lines: dict[tuple[str, ...], int] = {}
        self.unreadable: list[NotPlain] = []

    def value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        """Return what a node says."""
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise _too_many(_line(node))
        if isinstance(node, yaml.ScalarNode):
            return self._readable(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_PREFIX}seq":
            return [self._member(item, (*path, str(place)), item) for place, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_PREFIX}map":
            return self._group(node, path)
        raise _strange(node)

    def _readable(self, node: yaml.ScalarNode, path: tuple[str, ...]) -> Any:
        """Return a scalar's value, or None where it has none, so that the rest is read as well."""
        try:
            return self._scalar(node)
        except NotPlain as error:
            self.unreadable.append(NotPlain(error.what, error.line, error.hint, path))
            return None

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in _SCALARS:
            raise _strange(node)
        if node.tag in _NUMBERS and len(node.value) > _MAX_DIGITS:
            what = f"not valid YAML: `{node.value[:_SHOWN]}…` is a number of {len(node.value):,} characters"
            raise NotPlain(what, _line(node), f"numbers have at most {_MAX_DIGITS}")
        try:
            return self._loader.construct_object(node)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            what = f"not valid YAML: `{node.value[:_SHOWN]}` is not a `{_named(node)}`"
            raise NotPlain(what, _line(node), "write it without a tag, or quote it if it is text") from None

    def _group(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                shown = key_node.value[:_SHOWN] if isinstance(key_node, yaml.ScalarNode) else "a list or group"
                raise NotPlain(f"`{shown}` is not the name of a setting", _line(key_node), "names are text")
            if key in values:
                dotted = ".".join((*path, key))
                twice = NotPlain(f"`{dotted}` is set twice", _line(key_node), "keep one of the two lines", (*path, key))
                self.unreadable.append(twice)
            values[key] = self._member(value_node, (*path, key), key_node)
        return values

    def _member(self, node: yaml.Node, path: tuple[str, ...], named_by: yaml.Node) -> Any:
        self.lines[path] = _line(named_by)
        return self.value(node, path)


def _too_many(line: int) -> NotPlain:
    hint = "write the settings out without anchors"
    return NotPlain(f"the settings have more than {MAX_VALUES} values", line, hint)


def _strange(node: yaml.Node) -> NotPlain:
    what = f"not valid YAML: `{_named(node)}` is not plain data"
    return NotPlain(what, _line(node), "write text, numbers, true, false, null, lists and groups, without tags")


def _named(node: yaml.Node) -> str:
    """Return a node's tag as it is written, cut short."""
    tag = str(node.tag)
    return f"!!{tag.removeprefix(_PREFIX)}"[:_SHOWN] if tag.startswith(_PREFIX) else tag[:_SHOWN]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1

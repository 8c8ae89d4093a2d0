"""Many chat templates write down what is said and never look at it.

Of such a one, what it makes of a conversation tells what it makes of every other in which the same roles speak: the
same words around other texts. Whether a template is such a one is read off its syntax, of which a part is known to
be harmless; of a template that uses anything else, nothing is claimed.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST_CHARACTERS = 1 << 16
"""Characters of a template that is looked at. Well-known ones have a quarter of that."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a template writes where given roles speak one after the other.

    Attributes:
        words: The template's own words, with `%s` where a text stands.
        places: Which text stands at each of them: the message's number, or `~number` where that text is stripped.
    """

    words: str
    places: tuple[int, ...]

    def fill(self, said: Sequence[str]) -> str:
        """Return what the template writes where this is said, message by message."""
        return self.words % tuple(said[place] if place >= 0 else said[~place].strip() for place in self.places)


@dataclass(frozen=True, slots=True)
class StandIns:
    """Texts that messages say for a template to show its form.

    Attributes:
        edge: White space around each, gone where the template strips what is said.
        mark: What tells them from the template's own words.
    """

    edge: str
    mark: str

    def say(self, number: int) -> str:
        """Return what a message of this number says."""
        return f"{self.edge}{self.mark}{number}{self.mark}{self.edge}"

    def read(self, written: str) -> Form:
        """Read the form off what the template wrote."""
        place = f"{self.mark}([0-9]+){self.mark}"
        first, *rest = re.split(f"{self.edge}{place}{self.edge}|{place}", written.replace("%", "%%"))
        found = zip(rest[::3], rest[1::3], strict=True)
        places = tuple(int(whole) if whole else ~int(stripped) for whole, stripped in found)
        return Form("%s".join([first, *rest[2::3]]), places)


STAND_INS = (StandIns("\u2003", "\ufdd2"), StandIns("\u2004\u2005", "\ufdd3\ufdd4"))
"""Two of a kind: a template that writes one of their marks by itself, or looks at what is said after all, shows one
form of the first and another of the second."""


def only_writes(template: str) -> bool:
    """Tell whether a template does no more with what is said, by all that is known, than write it.

    It may strip it before. That goes for messages of a role and a content, and no other.
    """
    if len(template) > _MOST_CHARACTERS:
        return False
    try:
        tree = ImmutableSandboxedEnvironment().parse(template)
        _Reader({"messages": _Sort.CONVERSATION}).read(tree)
    except (_LooksAtTexts, TemplateError, RecursionError, ValueError):  # `ValueError`: a number of too many digits.
        return False
    return True


class _LooksAtTexts(Exception):
    """A template may do something else with what is said than write it."""


class _Sort(enum.Enum):
    """What a value is made of. A `FREE` one is the same whatever is said."""

    FREE = enum.auto()
    CONVERSATION = enum.auto()
    MESSAGE = enum.auto()
    SAID = enum.auto()
    LOOP = enum.auto()


_FREE_OF_LOOP = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length"})
"""What a loop knows without giving away what it goes through."""

_FREE_FILTERS = frozenset({"trim", "upper", "lower", "capitalize", "title", "default", "tojson"})
"""Filters that make a text or a number of what is free. What `escape` makes would escape a text that joins it."""

_PLAINLY_MADE = (
    *(nodes.And, nodes.Or, nodes.Not, nodes.Compare, nodes.Operand, nodes.Test, nodes.List, nodes.Tuple),
    *(nodes.Neg, nodes.Pos, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Slice, nodes.Keyword),
)
"""What is free where all that it is made of is."""


@dataclass(frozen=True)
class _Reader:
    """Follows what is said through a template.

    Attributes:
        names: What the names that are bound so far stand for; any other is free.
    """

    names: dict[str, _Sort]

    def read(self, node: nodes.Node) -> None:
        """Read a statement and what is in it."""
        match node:
            case nodes.Template() | nodes.Scope():
                self._read_all(node.body)
            case nodes.Output():
                for part in node.nodes:
                    self._expect(part, _Sort.FREE, _Sort.SAID)
            case nodes.If():
                self._expect(node.test, _Sort.FREE)
                self._read_all([*node.body, *node.elif_, *node.else_])
            case nodes.For(target=nodes.Name(name=name), recursive=False):
                self._read_loop(node, name)
            case nodes.Assign(target=nodes.Name(name=name)):
                # What it stood for before it may stand for still: the place may lie in a branch that is not taken.
                # One that stood for nothing is of the new sort at once: less may be done with it than if it were free.
                value = self.sort(node.node)
                self.names[name] = _either(self.names.get(name, value), value)
            case _:
                raise _LooksAtTexts

    def _read_all(self, statements: Sequence[nodes.Node]) -> None:
        for statement in statements:
            self.read(statement)

    def _read_loop(self, node: nodes.For, name: str) -> None:
        found = self._expect(node.iter, _Sort.FREE, _Sort.CONVERSATION)
        item = _Sort.MESSAGE if found is _Sort.CONVERSATION else _Sort.FREE
        # What is bound within a loop is gone behind it, and in its next round.
        inner = _Reader({**self.names, name: item, "loop": _Sort.LOOP})
        if node.test is not None:
            inner._expect(node.test, _Sort.FREE)
        inner._read_all(node.body)
        _Reader(dict(self.names))._read_all(node.else_)

    def _expect(self, node: nodes.Node | None, *sorts: _Sort) -> _Sort:
        """Return of what sort an expression is: one of these."""
        found = _Sort.FREE if node is None else self.sort(node)
        if found not in sorts:
            raise _LooksAtTexts
        return found

    def sort(self, node: nodes.Node) -> _Sort:
        """Tell of what sort an expression is."""
        match node:
            case nodes.Const() | nodes.TemplateData():
                return _Sort.FREE
            case nodes.Name(name=name):
                return self.names.get(name, _Sort.FREE)
            case nodes.Getattr(node=whole, attr=name) | nodes.Getitem(node=whole, arg=nodes.Const(value=name)):
                return self._part(self.sort(whole), name)
            case nodes.Getitem():
                return self._chosen(node)
            case nodes.Add() | nodes.Concat():
                parts = (self._expect(part, _Sort.FREE, _Sort.SAID) for part in node.iter_child_nodes())
                return functools.reduce(_either, parts)
            case nodes.CondExpr():
                self._expect(node.test, _Sort.FREE)
                first = self.sort(node.expr1)
                return first if node.expr2 is None else _either(first, self.sort(node.expr2))
            case nodes.Filter() | nodes.Call():
                return self._applied(node)
            case _ if isinstance(node, _PLAINLY_MADE):
                for part in node.iter_child_nodes():
                    self._expect(part, _Sort.FREE)
                return _Sort.FREE
        raise _LooksAtTexts

    def _part(self, whole: _Sort, name: object) -> _Sort:
        """Tell of what sort a part of a value is that goes by a fixed name or number."""
        if whole is _Sort.FREE or (whole is _Sort.LOOP and name in _FREE_OF_LOOP):
            return _Sort.FREE
        if whole is _Sort.MESSAGE and isinstance(name, str):
            return _Sort.SAID if name == "content" else _Sort.FREE
        if whole is _Sort.CONVERSATION and isinstance(name, int):
            return _Sort.MESSAGE
        raise _LooksAtTexts

    def _chosen(self, node: nodes.Getitem) -> _Sort:
        """Tell of what sort a part of a value is that is looked for by something free."""
        whole = self._expect(node.node, _Sort.FREE, _Sort.CONVERSATION)
        self._expect(node.arg, _Sort.FREE)
        if whole is _Sort.CONVERSATION and not isinstance(node.arg, nodes.Slice):
            return _Sort.MESSAGE
        return whole

    def _applied(self, node: nodes.Filter | nodes.Call) -> _Sort:
        """Tell of what sort the outcome of a filter or a function is."""
        arguments = [*node.args, *node.kwargs, node.dyn_args, node.dyn_kwargs]
        for argument in arguments:
            self._expect(argument, _Sort.FREE)
        match node:
            case nodes.Call(node=nodes.Name(name="raise_exception" as name)) if name not in self.names:
                return _Sort.FREE
            case nodes.Call(node=nodes.Getattr(node=whole, attr="strip")) | nodes.Filter(node=whole, name="trim") if (
                not any(arguments)
            ):
                return self._stripped(whole)
            case nodes.Filter(node=whole, name="length" | "count"):
                self._expect(whole, _Sort.FREE, _Sort.CONVERSATION)
                return _Sort.FREE
            case nodes.Filter(node=whole, name=name) if name in _FREE_FILTERS:
                return self._expect(whole, _Sort.FREE)
        raise _LooksAtTexts

    def _stripped(self, node: nodes.Node | None) -> _Sort:
        """Tell of what sort something stripped is: of what is said, it has to be the whole text, and nothing more."""
        found = self._expect(node, _Sort.FREE, _Sort.SAID)
        if found is _Sort.SAID and not isinstance(node, (nodes.Getattr, nodes.Getitem)):
            raise _LooksAtTexts
        return found


def _either(one: _Sort, other: _Sort) -> _Sort:
    """Tell of what sort a value is that is one of two."""
    if one is not other and {one, other} != {_Sort.FREE, _Sort.SAID}:
        raise _LooksAtTexts
    return one if one is other else _Sort.SAID

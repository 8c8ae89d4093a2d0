"""What a fault may do to a run, and the table of how often it did."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

PROPERTY = "fault"
"""The name under which a test's report carries its cases."""


class Outcome(enum.Enum):
    """What became of a case."""

    SURVIVED = "survived"
    """As promised: the same result, or an error that says what happened and a last checkpoint that is whole."""
    LOST = "lost"
    """Something that was promised to be kept is gone."""
    WRONG = "wrong result"
    """The run ended as if all were well, with other bytes."""
    TRACEBACK = "traceback"
    """The user was shown one."""


@dataclass
class Ledger:
    """The cases of one test, by kind of fault."""

    counts: Counter[tuple[str, Outcome]] = field(default_factory=Counter)

    def record(self, kind: str, outcome: Outcome = Outcome.SURVIVED, cases: int = 1) -> None:
        """Count a case, or several."""
        self.counts[kind, outcome] += cases

    def entries(self) -> list[tuple[str, str, int]]:
        """Return what a test's report can carry: kind, outcome, number."""
        return [(kind, outcome.value, number) for (kind, outcome), number in self.counts.items()]


def table(entries: Iterable[tuple[str, str, int]]) -> str:
    """Write the table of all kinds in Markdown, with a last line for all of them."""
    counts: dict[str, Counter[str]] = {}
    for kind, outcome, number in entries:
        counts.setdefault(kind, Counter())[outcome] += number
    names = [outcome.value for outcome in Outcome]
    lines = [f"| kind of fault | cases | {' | '.join(names)} |", "|---|" + "--:|" * (1 + len(names))]
    whole = Counter[str]()
    for kind in sorted(counts):
        whole += counts[kind]
        lines.append(_line(kind, counts[kind], names))
    return "\n".join([*lines, _line("**all**", whole, names)])


def _line(kind: str, counts: Counter[str], names: list[str]) -> str:
    return f"| {kind} | {counts.total():,} | {' | '.join(f'{counts[name]:,}' for name in names)} |"

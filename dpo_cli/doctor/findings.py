"""What the doctor finds, and which checks there are; read before torch is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dpo_cli.errors import UserError

State = Literal["ok", "not here", "wrong"]

CHECKS: Mapping[str, str] = {
    "device": "what computes, and whether torch can use it",
    "libraries": "versions, those that are required and those of the extras",
    "attention": "every kernel against float64, forward and all gradients",
    "logps": "log-probabilities of tokens against float64, forward and gradients",
    "products": "matrix products: exact, the same bytes twice, how fast; and the memory's speed",
    "resume": "a run that is killed and resumed against one that is not, byte for byte",
}
"""All checks in their order, by name: what each looks at."""


@dataclass(frozen=True)
class Finding:
    """One line of what the doctor says.

    Attributes:
        check: Which of `CHECKS` found it.
        name: What was looked at.
        state: Whether it is right; `not here` where this machine has none of it, so that it could not be checked.
        detail: What was found.
        hint: What to do, where there is something.
        figures: The numbers behind it, for programs.
    """

    check: str
    name: str
    state: State
    detail: str
    hint: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def chosen(names: Sequence[str]) -> list[str]:
    """Return the checks to make, all where none is named, in their order.

    Raises:
        UserError: There is no check of a name.
    """
    if unknown := [name for name in names if name not in CHECKS]:
        known = ", ".join(f"`{name}`" for name in CHECKS)
        named = ", ".join(f"`{name}`" for name in dict.fromkeys(unknown))
        what = f"{named} is not a check" if len(set(unknown)) == 1 else f"{named} are not checks"
        raise UserError(what, "the command line", f"checks: {known}")
    return [name for name in CHECKS if name in names or not names]


def anything_wrong(findings: Iterable[Finding]) -> bool:
    """Tell whether something is wrong; what is not here is not."""
    return any(finding.state == "wrong" for finding in findings)

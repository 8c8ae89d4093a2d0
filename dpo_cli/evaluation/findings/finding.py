"""What the diagnosis looks for: a `RunCheck` is one thing to find, and says all that is said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dpo_cli.data.findings import Severity
from dpo_cli.evaluation.findings.facts import RunFacts
from dpo_cli.evaluation.findings.history import History


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of settings that may help.

    Attributes:
        text: The advice, in the imperative.
        of: Says it of a run, with the present value; nothing where it does not apply.
    """

    text: str
    of: Callable[[RunFacts], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCheck:
    """Something to look for in a run.

    Attributes:
        name: What the finding is called.
        severity: How grave it is. error: the model gets worse. warning: the run is wasted or likely to. info: worth
            knowing.
        title: What was found, in a few words.
        meaning: Why it happens.
        remedies: What to do about it, the first one first.
        when: What exactly is found, and why the threshold is there.
        look: Looks for it at the end of a step; returns the evidence in figures, or nothing.
    """

    name: str
    severity: Severity
    title: str
    meaning: str
    remedies: tuple[Remedy, ...]
    when: str
    look: Callable[[History], str]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found in a run.

    Attributes:
        check: What was looked for.
        step: After which step it was found; 0: before step 1.
        evidence: The figures.
        remedies: What to do, in the imperative, with the present values of settings; the first one first.
    """

    check: RunCheck
    step: int
    evidence: str
    remedies: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called."""
        return self.check.name

    @property
    def severity(self) -> Severity:
        """How grave it is."""
        return self.check.severity

    @property
    def title(self) -> str:
        """What was found, in a few words."""
        return self.check.title

    @property
    def meaning(self) -> str:
        """Why it happens."""
        return self.check.meaning

    @property
    def advice(self) -> str:
        """All that may help, in a line."""
        return "; ".join(self.remedies)

    @property
    def when(self) -> str:
        """The step in words."""
        return f"step {self.step:,}" if self.step else "before step 1"

    def __str__(self) -> str:
        """Say it in a line or two of a terminal: when, what, the evidence, and what to try first."""
        return f"{self.when}: {self.title} ({self.evidence}). Try: {self.remedies[0]}"


def finding(check: RunCheck, history: History) -> Finding | None:
    """Look for one thing at the end of a step."""
    evidence = check.look(history)
    if not evidence:
        return None
    remedies = filter(None, (remedy.of(history.facts) for remedy in check.remedies))
    return Finding(check, history.step, evidence, tuple(remedies))

"""The diagnosis: rows of a run in their order become findings, each once; `RUN_CHECKS` lists what is looked for."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator

from dpo_cli.evaluation.findings.facts import RunFacts
from dpo_cli.evaluation.findings.finding import Finding, RunCheck, finding
from dpo_cli.evaluation.findings.held_out_checks import HELD_OUT_CHECKS
from dpo_cli.evaluation.findings.history import History, Row
from dpo_cli.evaluation.findings.plan_checks import PLAN_CHECKS
from dpo_cli.evaluation.findings.sample_checks import SAMPLE_CHECKS
from dpo_cli.evaluation.findings.step_checks import STEP_CHECKS

RUN_CHECKS: tuple[RunCheck, ...] = (*PLAN_CHECKS, *STEP_CHECKS, *HELD_OUT_CHECKS, *SAMPLE_CHECKS)
"""All that is looked for in a run."""

_Add = Callable[[Row], None]

_GRAVITY = ("error", "warning", "info")


class Watch:
    """Follows a run.

    Args:
        facts: What is known of it beside its rows.

    Attributes:
        found: What was found so far, in the order in which it was.
    """

    def __init__(self, facts: RunFacts) -> None:
        self.found: list[Finding] = []
        self._history = History(facts)
        self._unfound = list(RUN_CHECKS)

    def take(self, metrics: Iterable[Row], samples: Iterable[Row] = (), held_out: Iterable[Row] = ()) -> list[Finding]:
        """Take the rows that were added to a run's files, of whole steps; return what is found that was not before.

        Args:
            metrics: Rows of metrics.jsonl, by ascending step.
            samples: Rows of samples.jsonl.
            held_out: Rows of held_out.jsonl.
        """
        known = len(self.found)
        tables = (metrics, self._history.add), (held_out, self._history.add_pair), (samples, self._history.add_sample)
        tagged = heapq.merge(*(_tagged(rows, place, add) for place, (rows, add) in enumerate(tables)))
        for step, rows in itertools.groupby(tagged, key=lambda tag: tag[0]):
            for _, _, _, row, add in rows:
                add(row)
            self._look(step)
        return self.found[known:]

    def _look(self, step: int) -> None:
        """Look for everything at the end of a step that was not found before."""
        self._history.step = step
        if new := [one for check in self._unfound if (one := finding(check, self._history))]:
            self.found += new
            known = {one.name for one in new}
            self._unfound = [check for check in self._unfound if check.name not in known]


def found(
    facts: RunFacts, metrics: Iterable[Row], samples: Iterable[Row] = (), held_out: Iterable[Row] = ()
) -> list[Finding]:
    """Return what a run shows, in the order in which it was found: the same that the run told while it went on.

    Args:
        facts: What is known of it beside its rows.
        metrics: The rows of metrics.jsonl, by ascending step.
        samples: Those of samples.jsonl.
        held_out: Those of held_out.jsonl.
    """
    return Watch(facts).take(metrics, samples, held_out)


def gravest_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings by their severity, those of one severity by their step."""
    return sorted(findings, key=lambda one: (gravest(one.check), one.step))


def gravest(check: RunCheck) -> int:
    """Return the place of a check's severity, by which the gravest are sorted to the front."""
    return _GRAVITY.index(check.severity)


def _tagged(rows: Iterable[Row], place: int, add: _Add) -> Iterator[tuple[int, int, int, Row, _Add]]:
    """Yield rows with what they are sorted by, of which no two are alike."""
    for number, row in enumerate(rows):
        yield row["step"], place, number, row, add

"""The diagnosis of a run while it goes on: what its files show after a step becomes a warning, once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from dpo_cli.errors import from_os_error
from dpo_cli.evaluation.findings.facts import RunFacts
from dpo_cli.evaluation.findings.finding import Finding
from dpo_cli.evaluation.findings.history import Row
from dpo_cli.evaluation.findings.plan_checks import dominated
from dpo_cli.evaluation.findings.watch import Watch, gravest_first
from dpo_cli.pipeline.plan import PlannedRun
from dpo_cli.reporting.run_record import is_answer, is_metrics, is_pair, row_in
from dpo_cli.system.storage import write_text
from dpo_cli.training.optimizer import warmup_steps


class Diagnosis:
    """Follows the files of a run; what they showed before this process began is not said again.

    Args:
        plan: The run.

    Raises:
        UserError: What the diagnosis knows of the run cannot be written.
    """

    def __init__(self, plan: PlannedRun) -> None:
        self._console, folder = plan.session.console, plan.folder
        facts = facts_of(plan)
        _write(facts, folder.facts)
        self._watch = Watch(facts)
        files = (folder.metrics, is_metrics), (folder.samples, is_answer), (folder.held_out, is_pair)
        self._files = [Tail(*file) for file in files]
        self._take()

    def warn(self) -> None:
        """Warn of what is found in the rows that were added, which are all of their step's; note what does no harm."""
        for found in self._take():
            if found.severity == "info":
                self._console.notice(f"note: {found}")
            else:
                self._console.warning(str(found))

    def summary(self) -> list[str]:
        """Say in a line for each finding what was found, the gravest first."""
        found = gravest_first(self._watch.found)
        return [f"{one.name}, {one.when}: {one.title}" for one in found] or ["nothing"]

    def _take(self) -> list[Finding]:
        return self._watch.take(*(file.rows() for file in self._files))


def facts_of(plan: PlannedRun) -> RunFacts:
    """Return what the diagnosis of a run knows beside its rows."""
    config, steps, pairs = plan.session.config, plan.steps, plan.data.pairs
    training, reference, sizes = config.training, config.reference, pairs.sizes
    facts = RunFacts(
        losses=config.objective.losses,
        trained="all weights" if config.adapter is None else "an adapter",
        learning_rate=training.learning_rate,
        warmup_steps=warmup_steps(training.warmup_ratio, steps.num_steps),
        num_steps=steps.num_steps,
        steps_per_epoch=steps.steps_per_epoch,
        pairs_per_step=min(training.pairs_per_step, len(steps.indices)),
        from_reference=reference.type in ("cached", "frozen") and reference.model is None,
        chosen_tokens=float(sizes.chosen_scored[steps.indices].mean()),
        rejected_tokens=float(sizes.rejected[steps.indices].mean()),
        max_steps=training.max_steps,
        max_grad_norm=training.max_grad_norm,
        best_by=config.evaluation.best_by,
    )
    sources, names = pairs.sources()
    found = dominated(sources[steps.in_order(0)], names, facts.pairs_per_step, facts.window, facts.num_steps)
    return facts.model_copy(update={"dominated": found})


def _write(facts: RunFacts, file: Path) -> None:
    try:
        write_text(file, json.dumps(facts.model_dump(mode="json"), indent=1) + "\n")
    except OSError as error:
        raise from_os_error(error, "writing the run's facts", str(file)) from error


class Tail:
    """A file of rows that grows.

    Args:
        path: The file, which need not be there yet.
        is_one: Whether what is read as a row has the types of one: somebody may have written something else.
    """

    def __init__(self, path: Path, is_one: Callable[[Row], bool]) -> None:
        self._path, self._is_one, self._read_bytes = path, is_one, 0

    def rows(self) -> Iterator[Row]:
        """Yield the rows that were added since those that were yielded last."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read_bytes += len(line)
                if (row := row_in(line, self._is_one)) is not None:
                    yield row

"""The page of a run: what came of it, first in words, then in curves, answers and figures."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from dpo_cli.evaluation.best import BEST_BY, best_step
from dpo_cli.evaluation.figures import FIGURES, Figure
from dpo_cli.evaluation.findings.finding import Finding
from dpo_cli.evaluation.findings.held_out_checks import HELD_OUT_CHECKS
from dpo_cli.evaluation.findings.history import Row, number
from dpo_cli.evaluation.findings.sample_checks import NONSENSE
from dpo_cli.evaluation.findings.watch import found, gravest_first
from dpo_cli.evaluation.verdict import Verdict, verdict
from dpo_cli.reporting.pages.rendering import render
from dpo_cli.reporting.pages.run.answers import MOST_ANSWERS, answered, hardest, shortened
from dpo_cli.reporting.pages.run.charts import Mark
from dpo_cli.reporting.pages.run.curves import charts_of
from dpo_cli.reporting.pages.run.facts import data_found, facts_of, group_of, hardware_of, resumed_after, settings_text
from dpo_cli.reporting.pages.run.held_out import held_out_blocks, length_alone
from dpo_cli.reporting.pages.run.series import window_of
from dpo_cli.reporting.run_record import RunRecord
from dpo_cli.system.text import several

_MOST_PAIRS = 10
_MOST_MARKS = 40

_MARK_NAMES = {
    "checkpoint": "checkpoint in the folder",
    "resume": "resumed from here",
    "skipped": "step skipped: loss or gradient was not finite",
    "finding": "finding",
    "best": "the step of final/",
}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a run's configuration beside its rows.

    Attributes:
        changed: Settings that are not as they are by default: name, value, default; None: not known.
        facts: What was trained on what, by name.
    """

    changed: Sequence[tuple[str, str, str]] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def run_page(run: RunRecord, known: Known) -> str:
    """Write the page.

    Args:
        run: What the run has recorded so far.
        known: What is known of its configuration.
    """
    after = ends_of(run)[1]
    findings = findings_of(run)
    judged = judge(run, findings)
    marks = [*marks_of(run), *(Mark("finding", one.step, f"{one.when}: {one.title}") for one in findings)]
    last = after["step"] if after else 0
    answers, charts = answered(run.samples), charts_of(run, marks, length_alone(run, last))
    # Before step 1 no pair is harder than another.
    scored = run.pairs_at(last) if last else []
    return with_script(
        "run/run.html",
        run=run,
        heading=heading_of(run),
        state=state_of(run),
        verdict=judged,
        next=_next(run, judged, findings),
        nonsense=any(one.check is NONSENSE for one in findings),
        facts={**facts_of(run), **known.facts},
        notes=notes_of(run),
        findings=findings,
        charts=charts,
        smoothed=window_of(run.steps),
        marks={kind: name for kind, name in _MARK_NAMES.items() if any(mark.kind == kind for mark in marks)},
        answers=answers[:MOST_ANSWERS],
        more_answers=max(0, len(answers) - MOST_ANSWERS),
        figures=figures_table(run),
        blocks=held_out_blocks(run, last),
        hardest=[_excerpt(row) for row in hardest(scored, _MOST_PAIRS)],
        hardest_step=last,
        scored=len(scored),
        wrong=sum((number(row, "rewards/margins") or 0) < 0 for row in scored),
        data=data_found(run),
        changed=known.changed,
        settings=settings_text(run.settings),
        environment=hardware_of(run),
    )


def heading_of(run: RunRecord) -> str:
    """Name a run in the heading of its page; a folder that is called `run` would make it say that twice."""
    return f"{'Report of' if run.name.casefold().startswith('run') else 'Run'} {run.name}"


def with_script(template: str, **values: Any) -> str:
    """Write a page with the script that shows values at the pointer, the only one that it lets run."""
    script = files("dpo_cli.reporting.pages.run").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render(template, script=Markup(script), digest=digest, **values)


def judge(run: RunRecord, findings: Sequence[Finding]) -> Verdict:
    """Say whether a run helped, by what it has recorded so far and what was found in it."""
    before, after = ends_of(run)
    # What held-out figures say is said by the last of them; what came after the best step did no harm to its model.
    until = [one for one in findings if after and one.step <= after["step"] and one.check not in HELD_OUT_CHECKS]
    harms, doubts = ([_told(one) for one in until if one.severity == severity] for severity in ("error", "warning"))
    lowest = min(filter(_is_whole, run.evaluations), key=lambda row: row["loss"], default=None)
    length = length_alone(run, after["step"]) if after else None
    found = verdict(before, after, lowest=lowest, length=length, harms=harms, doubts=doubts)
    # Whoever reads on has to know it before the answers are seen.
    first = [_told(one) for one in findings if one.check is NONSENSE]
    return replace(found, reasons=[*first, *(reason for reason in found.reasons if reason not in first)])


def _told(finding: Finding) -> str:
    """Say what was found as a sentence that begins with the step of its figures."""
    when = f"At {finding.when}" if finding.step else "Before step 1"
    return f"{when}: {finding.title} ({finding.evidence})."


def ends_of(run: RunRecord) -> tuple[Row | None, Row | None]:
    """Return the evaluations before step 1 and of the model that the run ends with, where there are such."""
    whole = [row for row in run.evaluations if _is_whole(row)]
    before = next((row for row in whole if row["step"] == 0), None)
    last = next((row for row in reversed(whole) if row["step"] > 0), None)
    best = best_of(run)
    return before, next((row for row in whole if row["step"] == best), last)


def best_of(run: RunRecord) -> int | None:
    """Return the step whose model is in `final/`, or is the best so far; None: it is the last one."""
    by = group_of(run.settings, "evaluation").get("best_by")
    return best_step(filter(_is_whole, run.evaluations), by) if isinstance(by, str) and by in BEST_BY else None


def _is_whole(row: Row) -> bool:
    """Tell whether a row has what a verdict is based on."""
    names = ("loss", "rewards/accuracies", "logps/chosen", "logps/rejected", "pairs")
    bounds = row.get("accuracy_interval")
    return isinstance(bounds, list) and len(bounds) == 2 and all(number(row, name) is not None for name in names)


def findings_of(run: RunRecord) -> list[Finding]:
    """Return what the diagnosis finds in the rows of a run, the gravest first: what the run told while it went on."""
    # Of one step the training comes first, as in the file.
    rows = sorted([*run.steps, *run.evaluations], key=lambda row: row["step"])
    return gravest_first(found(run.facts, rows, run.samples, run.pairs)) if run.facts else []


def state_of(run: RunRecord) -> str:
    """Say how far the run is."""
    of = f" of {run.facts.num_steps:,}" if run.facts else ""
    if run.finished:
        return f"Finished after {several(run.last_step, 'step')}."
    return f"Not finished: {several(run.last_step, 'step')}{of} so far." if run.last_step else "No step was taken yet."


def _next(run: RunRecord, judged: Verdict, findings: Sequence[Finding]) -> list[str]:
    """Say what to do next; a checkpoint that is better comes first where the run made the model worse."""
    best, rest = _best_checkpoint(run), _advice(run, judged, findings)
    first, *others = [*best, *rest] if judged.outcome == "worse" else [*rest, *best]
    return [first, *(f"{one[:1].upper()}{one[1:]}" for one in others)]


def _best_checkpoint(run: RunRecord) -> list[str]:
    """Name the checkpoint of the lowest held-out loss, where that is not the model that the run ends with."""
    after = ends_of(run)[1]
    trained = [row for row in run.evaluations if _is_whole(row) and row["step"]]
    lowest = min(trained, key=lambda row: row["loss"], default=None)
    if not after or not lowest or lowest["loss"] >= after["loss"]:
        return []
    told = f"the held-out loss was lowest, {lowest['loss']:.4f}, at step {lowest['step']:,}"
    if lowest["step"] not in run.checkpoints:
        return [f"{told}, of which there is no checkpoint; `evaluation.best_by: loss` keeps it in the next run."]
    checkpoint = run.folder.checkpoint(lowest["step"])
    merge = " --merge" if run.settings.get("adapter") else ""
    to = shlex.quote(f"{run.name}-{checkpoint.name}")
    command = f"dpo export {shlex.quote(str(checkpoint))} --to {to}{merge}"
    return [f"{told}, in `{checkpoint}`: `{command}` makes a model folder of it, to be used in place of `final/`."]


def _advice(run: RunRecord, judged: Verdict, findings: Sequence[Finding]) -> list[str]:
    """Say what to do: what the gravest finding advises where the run did not help."""
    grave = next((one for one in findings if one.severity != "info" and one.advice), None)
    config = shlex.quote(str(run.folder.config))
    if not run.finished:
        return [f"wait until it ends, or continue it with `dpo train {config} --resume` if it was interrupted."]
    if grave and judged.outcome != "better":
        return [f"{grave.advice}."]
    return {
        "better": ["read the answers below, and use the model in `final/` if they are better, too."],
        "doubtful": ["read the answers below; use the model in `final/` only if they are better, too."],
        "worse": ["lower `training.learning_rate` or train fewer steps; look at the pairs that are most wrong, below."],
        "unclear": [
            "hold out more pairs, train more steps or raise `training.learning_rate`, and compare the answers."
        ],
        "unknown": [
            f"score the model with `dpo eval {config}`."
            if group_of(run.settings, "data").get("eval") is not None
            else "set `data.eval`, so that the next run is measured on pairs that it does not learn from."
        ],
    }[judged.outcome]


def notes_of(run: RunRecord, *, inside: bool = True) -> list[str]:
    """Say what of the run's files could not be read, with the whole path where it is not said inside the run's page."""
    names = {name: name if inside else str(run.folder.path / name) for name in (*run.damaged, *run.unreadable)}
    return [
        *(f"`{names[name]}` cannot be read: {why}; put it back from a copy." for name, why in run.damaged.items()),
        *(
            f"{several(count, 'line')} of `{names[name]}` cannot be read; the rest is shown."
            for name, count in run.unreadable.items()
        ),
    ]


def marks_of(run: RunRecord) -> list[Mark]:
    """Return what happened, by step."""
    best = best_of(run)
    # The best step has a checkpoint always, whose mark would lie on its own.
    marks = [Mark("checkpoint", step, f"checkpoint of step {step:,}") for step in run.checkpoints if step != best]
    marks += [Mark("resume", step, f"resumed after step {step:,}") for step in resumed_after(run)]
    marks += [Mark("best", best, f"step {best:,} is the best, and in final/")] if best is not None else []
    skipped = [row["step"] for row in run.steps if "skipped" in row][:_MOST_MARKS]
    marks += [Mark("skipped", step, f"step {step:,} was skipped") for step in skipped]
    return marks


def figures_table(run: RunRecord) -> list[list[str]]:
    """Return the held-out figures before and after, and of the last step where another is the best."""
    before, after = ends_of(run)
    columns = {"before training": before, f"after step {after['step']:,}" if after else "": after}
    if run.evaluations and after and run.evaluations[-1]["step"] != after["step"]:
        columns = {**columns, f"after the last, {run.evaluations[-1]['step']:,}": run.evaluations[-1]}
    known = {name: row for name, row in columns.items() if row}
    if not known:
        return []
    cells = [[figure.title.strip(), *(cell(figure, row) for row in known.values())] for figure in FIGURES]
    return [["", *known], *cells]


def cell(figure: Figure, row: Row) -> str:
    """Write a figure of a row; a dash where the row has none that can be written."""
    try:
        return figure.cell(row)
    except (ValueError, TypeError, LookupError):
        return "–"


def _excerpt(row: Row) -> Mapping[str, Any]:
    """Return a pair with texts that the page can show."""
    texts = {part: row["text"].get(part) for part in ("prompt", "chosen", "rejected")}
    shown = {part: shortened(text) if isinstance(text, str) else "" for part, text in texts.items()}
    return {"where": str(row.get("where", "")), "rewards/margins": row["rewards/margins"], "text": shown}

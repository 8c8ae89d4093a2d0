"""What was trained on what, with what and where, as names and values."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.evaluation.findings.history import number
from dpo_cli.reporting.card import covered_within
from dpo_cli.reporting.progress import clock
from dpo_cli.reporting.run_record import RunRecord
from dpo_cli.reporting.secrets import covered
from dpo_cli.reporting.tables import percent
from dpo_cli.system import plain_yaml
from dpo_cli.training.run_folder import FIRST_DAY, PLAN, STARTS


def facts_of(run: RunRecord) -> dict[str, str]:
    """Return what the run set out to do, as it said when it began; of an older run what its settings say."""
    settings, plan = run.settings, run.environment.get(PLAN)
    if isinstance(plan, Mapping):
        data = {"data": _named(group_of(settings, "data").get("train"), "path")}
        said = {name: str(fact) for name, fact in plan.items() if name != "output"}
        return {name: covered(fact) for name, fact in ({"model": "", **data} | said).items() if fact}
    facts = {
        "model": _named(settings.get("model"), "name"),
        "adapter": _named(settings.get("adapter"), "type") or "none: all weights were trained",
        "data": _named(group_of(settings, "data").get("train"), "path"),
        "loss": _named(settings.get("loss"), "type"),
    }
    return {name: covered(fact) for name, fact in facts.items() if fact} if settings else {}


def group_of(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a group of settings; an empty one where there is none that can be read."""
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}


def _named(value: Any, by: str) -> str:
    """Name a setting, a group of settings or a list of either."""
    if isinstance(value, list):
        return " + ".join(_named(one, by) for one in value)
    return str(value.get(by, "")) if isinstance(value, Mapping) else "" if value is None else str(value)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Write all settings as YAML, without secrets."""
    return covered(plain_yaml.dump(covered_within(settings))) if settings else "config.yaml cannot be read"


def resumed_after(run: RunRecord) -> list[int]:
    """Return the steps after which the run was resumed."""
    return [step for step, _ in _starts(run) if step]


def _starts(run: RunRecord) -> list[tuple[int, str]]:
    """Return after which step, and when, each process of the run began."""
    starts = run.environment.get(STARTS)
    known = [one for one in starts if isinstance(one, Mapping)] if isinstance(starts, list) else []
    return [(one["after_step"], str(one.get("at", ""))) for one in known if type(one.get("after_step")) is int]


def _seconds(run: RunRecord) -> float:
    """Return how long all steps took, evaluations and checkpoints included: each process counts from its own start."""
    bounds = [step for step, _ in _starts(run)] or [0]
    newest: dict[int, float] = {}
    for row in run.steps:
        newest[bisect.bisect_left(bounds, row["step"])] = number(row, "seconds") or 0.0
    return math.fsum(newest.values())


def hardware_of(run: RunRecord) -> list[tuple[str, str]]:
    """Return versions, hardware and the command of a run."""
    found = run.environment
    versions = found.get("versions")
    parts: dict[str, Any] = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items())
        if isinstance(versions, Mapping)
        else None,
        "platform": found.get("platform"),
        "device": _joined(found.get("device"), found.get("device_type")),
        "processes": found.get("processes"),
        "threads": found.get("threads"),
        "begun": next((at for _, at in _starts(run)), None) or found.get(FIRST_DAY),
        "resumed": ", ".join(f"after step {step:,} at {at}" for step, at in _starts(run) if step),
        "time for the steps": clock(seconds) if (seconds := _seconds(run)) else None,
        "command": _command(found.get("command_line")),
        "git commit": found.get("git_commit"),
    }
    return [(name, covered(str(part))) for name, part in parts.items() if part]


def _command(arguments: Any) -> str | None:
    return " ".join(map(str, arguments)) if isinstance(arguments, Sequence) and not isinstance(arguments, str) else None


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def data_found(run: RunRecord) -> tuple[list[list[str]], list[str]]:
    """Return what the check of the data found: a heading and a row for each finding; and what else it says.

    Both are empty where the data was not checked, or its report is gone.
    """
    findings, bias = run.data_check.get("findings"), run.data_check.get("length_bias")
    known = [one for one in findings if isinstance(one, Mapping)] if isinstance(findings, list) else []
    rows = [
        [str(one.get("severity", "")), str(one.get("name", "")), f"{count:,.0f}", percent(share)]
        for one in known
        if (count := number(one, "count")) is not None and (share := number(one, "share")) is not None
    ]
    accuracy = number(bias, "accuracy") if isinstance(bias, Mapping) else None
    longer = [] if accuracy is None else [f"The longer response is the chosen one in {percent(accuracy)} of the pairs."]
    return [["", "finding", "pairs", "share"], *rows] if rows else [], longer

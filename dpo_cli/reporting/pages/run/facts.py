"""What was trained on what, with what and where, as names and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.reporting.card import covered_within
from dpo_cli.reporting.run_record import RunRecord
from dpo_cli.reporting.secrets import covered
from dpo_cli.system import plain_yaml


def facts_of(run: RunRecord) -> dict[str, str]:
    """Return the model, the adapter, the data and the loss of a run, by its settings."""
    settings = run.settings
    facts = {
        "model": _named(settings.get("model"), "name"),
        "adapter": _named(settings.get("adapter"), "type") or "none: all weights were trained",
        "data": _named(_group(settings, "data").get("train"), "path"),
        "loss": _named(settings.get("loss"), "type"),
    }
    return {name: covered(fact) for name, fact in facts.items() if fact} if settings else {}


def _group(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
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
        "begun on": found.get("first_day"),
        "command": _command(found.get("command_line")),
        "git commit": found.get("git_commit"),
    }
    return [(name, covered(str(part))) for name, part in parts.items() if part]


def _command(arguments: Any) -> str | None:
    return " ".join(map(str, arguments)) if isinstance(arguments, Sequence) and not isinstance(arguments, str) else None


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)

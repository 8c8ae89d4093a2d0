"""Write docs/settings.md from the settings themselves; with `--check` say whether it is current."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from written_page import write_or_check

from dpo_cli.config import json_schema
from dpo_cli.settings import ON_RESUME

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# Settings

A configuration is a YAML file. `dpo init` writes one that fits a model and data, `dpo config example` prints one with
comments, and `dpo config schema` prints all of this page for editors. Any setting can be overridden on the command line
by its dotted path (`training.learning_rate=1e-5`). An unknown setting and a value out of range are errors, and
so is one that cannot have an effect (`evaluation.every_steps` without held-out pairs, a `training.max_steps` that is
never reached). All errors of a file are reported together. `model: NAME`, `loss: TYPE`, `reference: TYPE`,
`tracking: TYPE` and `training.optimizer: TYPE` are short for the setting named in them; `loss` and `tracking` may be
lists, and by default there are no trackers.

A run that `--resume` continues has the settings that it was started with. Only settings that
the tables mark may change, or be raised, on resume.

Relative paths start at the working directory, not at the file's folder. In paths `~`, `$NAME` and `${NAME}` are
expanded, an undefined variable is an error, and `$$` is a dollar sign.

This page is written by `scripts/write_settings_page.py`.
"""


def shown(value: Any) -> str:
    """Write a value as YAML would; a group that has a type, which is as it is by default, as that type."""
    if isinstance(value, dict) and "type" in value:
        return str(value["type"])
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def default_of(facts: dict[str, Any]) -> str:
    """Return the default of a setting; the schema names none of those that are an empty list."""
    return f"`{shown(facts.get('default', []))}`"


def allowed(schema: dict[str, Any]) -> str:
    """Say in a few words what a setting accepts."""
    if "discriminator" in schema:
        return ", ".join(f"`{kind}`" for kind in schema["discriminator"]["mapping"])
    if options := schema.get("anyOf") or schema.get("oneOf"):
        # A group that may be written as its type alone accepts no more types than that.
        alone = [option for option in options if "enum" in option]
        kinds = ["a group of such a type" if alone and "discriminator" in o else allowed(o) for o in options]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in schema:
        return "a group"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if choices := schema.get("items", {}).get("enum"):
        return "list of " + ", ".join(f"`{choice}`" for choice in choices)
    kind = {"number": "number", "integer": "whole number", "string": "text", "boolean": "true, false",
            "array": "list", "object": "names", "null": "null"}.get(schema.get("type", ""), "")  # fmt: skip
    bounds = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below", "maximum": "to"}
    limits = [f"{word} {schema[name]}" for name, word in bounds.items() if name in schema]
    return " ".join([kind, *limits])


def references(node: Any) -> Iterator[str]:
    """Yield the names of the groups that a part of the schema speaks of."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for name, inner in node.items():
            if name != "discriminator":
                yield from references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from references(inner)


def groups(schema: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the groups of settings, each with the types it may have."""
    for name, group in schema["properties"].items():
        if found := list(dict.fromkeys(references(group))):
            yield name, [schema["$defs"][definition] for definition in found]


def groups_within(name: str, member: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the groups that settings of a group may be, each with the names of those settings."""
    users: dict[str, list[str]] = {}
    for setting, facts in member["properties"].items():
        for definition in dict.fromkeys(references(facts)):
            users.setdefault(definition, []).append(f"{name}.{setting}")
    for definition, settings in users.items():
        yield ", ".join(settings), schema["$defs"][definition]


def described(facts: dict[str, Any]) -> str:
    """Return the description of a setting, and what it may do when a run is resumed."""
    return f"{facts.get('description', '')}{f' On resume it {facts[ON_RESUME]}.' if ON_RESUME in facts else ''}"


def table(member: dict[str, Any], prefix: str = "", resume: str = "") -> str:
    """Describe a group and its settings; `resume` says what all of them may do when a run is resumed."""
    head = f"{member['description'].splitlines()[0]}{f' On resume all of this {resume}.' if resume else ''}"
    lines = [f"\n{head}\n", "\n| setting | default | accepts | |\n|---|---|---|---|\n"]
    for setting, facts in member["properties"].items():
        default = "required" if setting in member.get("required", ()) else default_of(facts)
        row = (f"`{prefix}{setting}`", default, allowed(facts), described(facts))
        lines.append("| " + " | ".join(cell.replace("\n", " ") for cell in row) + " |\n")
    return "".join(lines)


def page() -> str:
    """Return the whole page."""
    schema = json_schema()
    parts = [HEAD]
    grouped = dict(groups(schema))
    for name, members in grouped.items():
        parts.append(f"\n## {name}\n")
        for member in members:
            if len(members) > 1:
                parts.append(f"\n### {name}: {member['properties']['type']['const']}\n")
            parts.append(table(member, f"{name}.", schema["properties"][name].get(ON_RESUME, "")))
        if len(members) == 1:
            for settings, group in groups_within(name, members[0], schema):
                kind = group["properties"].get("type", {}).get("const")
                parts.append(f"\n### {f'{settings}: {kind}' if kind else f'{settings} as a group'}\n{table(group)}")
    parts.append("\n## Others\n\n| setting | default | accepts | |\n|---|---|---|---|\n")
    for name, facts in schema["properties"].items():
        if name not in grouped:
            parts.append(f"| `{name}` | {default_of(facts)} | {allowed(facts)} | {described(facts)} |\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))

"""What is said of a configuration that is wrong: the setting, the line, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dpo_cli.config.schema import APART, ONE, SEVERAL, SHARE, Config
from dpo_cli.config.tree import Tree
from dpo_cli.data import sources
from dpo_cli.errors import UserError

_WAYS = {ONE, SEVERAL, SHARE, APART, sources.NAME, sources.GROUP, sources.SEVERAL}
"""What pydantic puts into a path where a setting may be written in several ways."""


def explain(error: ValidationError, tree: Tree) -> list[UserError]:
    """Turn what pydantic found into one `UserError` a setting, in the order of the file."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for detail in error.errors(include_url=False):
        path = _path(detail["loc"], tree.values)
        if detail["type"].startswith("union_tag"):
            path = (*path, "type")
        found.setdefault(path, []).append(detail)
    return [_explain_one(path, found[path], tree) for path in sorted(found, key=tree.order)]


def unfounded(tree: Tree) -> list[UserError]:
    """Find settings that were made and have no effect under the others."""
    problems = []
    data, evaluation = tree.values.get("data"), tree.values.get("evaluation")
    held_out = data.get("eval", 0.1) if isinstance(data, dict) else 0.1
    every = evaluation.get("every_steps") if isinstance(evaluation, dict) else None
    if held_out is None and every is not None:
        problems.append(
            UserError(
                "`evaluation.every_steps` has no effect, since `data.eval` is null",
                tree.place(("evaluation", "every_steps")),
                "set `data.eval` to held-out pairs, or leave `evaluation.every_steps` out",
            )
        )
    return problems


def contradictions(config: Config, tree: Tree) -> list[UserError]:
    """Find settings that are right by themselves and do not go together."""
    objective, problems = config.objective, []
    names = ", ".join(f"`{loss.type}`" for loss in objective.losses)
    needing = ", ".join(f"`{loss.type}`" for loss in objective.losses if loss.needs_reference)
    given = "reference" in config.model_fields_set
    if given and objective.needs_reference and config.reference.type == "none":
        what = f"the loss {needing} needs a reference, and `reference` is none"
        hint = "leave `reference` out, or choose a loss without a reference, such as `simpo`"
        problems.append(UserError(what, tree.place(("reference",)), hint))
    if given and not objective.needs_reference and config.reference.type != "none":
        what = f"the loss {names} has no use for a reference, and `reference` is {config.reference.type}"
        problems.append(UserError(what, tree.place(("reference",)), "leave `reference` out"))
    remembering = [loss.type for loss in objective.losses if loss.remembers]
    if len(remembering) > 1:
        what = f"of several losses only one may follow the rewards of a run, and {' and '.join(remembering)} all do"
        hint = "set `running_mean: false` for bco, or leave `adaptive_beta` out"
        problems.append(UserError(what, tree.place(("loss",)), hint))
    return problems


def _path(location: Sequence[int | str], values: Any) -> tuple[str, ...]:
    """Keep the parts of pydantic's location that the user wrote; drop the names of union members."""
    path: list[str] = []
    for part in location:
        if part in _WAYS:
            continue
        if isinstance(values, dict):
            if part not in values and part in _TAGS:
                continue
            path.append(str(part))
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            path.append(str(part))
            values = values[part]
    return tuple(path)


def _explain_one(path: tuple[str, ...], details: list[Any], tree: Tree) -> UserError:
    dotted, detail = ".".join(path), details[0]
    description, hint = _SETTINGS.get(_name(path)), None
    if detail["type"] == "extra_forbidden":
        kind = next((str(part) for part in reversed(detail["loc"][:-1]) if part in _TAGS), None)
        if kind and _name(path[:-1]) in _UNIONS:
            return UserError(f"`{dotted}` is not a setting of `{kind}`", tree.place(path), _known_to(path, kind))
        return UserError(f"`{dotted}` is not a setting", tree.place(path), _did_you_mean(path))
    if detail["type"] == "value_error":
        return UserError(f"`{dotted}` contradicts itself: {detail['ctx']['error']}", tree.place(path), "change either")
    if detail["type"] == "missing":
        hint = f"add it: {description}" if description else "add it"
        return UserError(f"`{dotted}` is missing", tree.place(path), hint)
    wanted = " or ".join(dict.fromkeys(_wanted(d) for d in details))
    given = detail["input"]
    if detail["type"].startswith("union_tag"):
        if isinstance(given, dict) and "type" not in given:
            hint = f"name one of {', '.join(f'`{tag}`' for tag in _tags(path))}"
            return UserError(f"`{dotted}` is missing", tree.place(path), hint)
        given = given["type"] if isinstance(given, dict) else given
        wanted = f"one of {', '.join(f'`{tag}`' for tag in _tags(path))}"
        if near := difflib.get_close_matches(str(given), _tags(path), n=1):
            hint = f"did you mean `{near[0]}`?"
    if description and not hint:
        hint = f"{dotted}: {description}"
    return UserError(f"`{dotted}` should be {wanted}, but is {_show(given)}", tree.place(path), hint)


def _wanted(detail: Any) -> str:
    """Word what was expected: `a valid number`, `greater than 0`, `'dpo' or 'ipo'`."""
    message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("a valid ")
    if detail["type"] == "too_short":
        return "a list of one at least"
    if detail["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "a group of settings"
    if detail["type"] in ("string_type", "int_type", "float_type", "bool_type", "list_type"):
        return {"string": "text", "integer": "a whole number", "boolean": "true or false"}.get(message, f"a {message}")
    return message


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _name(path: Sequence[str]) -> str:
    """Return a path as the settings know it, without places in lists."""
    return ".".join(part for part in path if not part.isdigit())


def _known_to(path: tuple[str, ...], kind: str) -> str:
    """Suggest a setting of one member of a union: a near name, or all that it has."""
    members = _UNIONS.get(_name(path[:-1]), [])
    known = [name for model in members if model.model_fields["type"].default == kind for name in model.model_fields]
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.7)
    if near:
        return f"did you mean `{'.'.join([*path[:-1], near[0]])}`?"
    return f"known here: {', '.join(f'`{name}`' for name in known)}"


def _did_you_mean(path: tuple[str, ...]) -> str:
    """Suggest the nearest known setting: a near name in the same group, or the same name in another."""
    group = _name(path[:-1])
    siblings = [name for name in _SETTINGS if name.rpartition(".")[0] == group]
    leaves = [name.rpartition(".")[2] for name in siblings]
    near = [".".join([*path[:-1], leaf]) for leaf in difflib.get_close_matches(path[-1], leaves, n=1, cutoff=0.7)]
    elsewhere = sorted((name for name in _SETTINGS if name.rpartition(".")[2] == path[-1]), key=_depth)
    if found := near + elsewhere:
        return f"did you mean `{found[0]}`?"
    known = ", ".join(f"`{name}`" for name in siblings) or "see `dpo config schema`"
    return f"known here: {known}"


def _depth(name: str) -> int:
    return name.count(".")


def _tags(path: Sequence[str]) -> list[str]:
    """Return the `type`s that may stand at a path."""
    return [str(model.model_fields["type"].default) for model in _UNIONS[_name(path[:-1])]]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the groups of settings that an annotation speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every dotted path with its description."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, info.description or ""
        for member in _models(info.annotation):
            yield from _walk(member, f"{path}.")


def _unions(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[type[BaseModel]]]]:
    """Yield every dotted path at which there is a choice of groups by type, with the groups."""
    for name, info in model.model_fields.items():
        members = list(dict.fromkeys(_models(info.annotation)))
        if any("type" in member.model_fields for member in members):
            yield f"{prefix}{name}", members
        for member in members:
            yield from _unions(member, f"{prefix}{name}.")


_SETTINGS = dict(_walk(Config))
_UNIONS = dict(_unions(Config))
_TAGS = {str(model.model_fields["type"].default) for models in _UNIONS.values() for model in models}

"""What is said of a configuration that is wrong: the setting, the line, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dpo_cli.config.schema import Config
from dpo_cli.config.tree import Tree
from dpo_cli.errors import UserError


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


def _path(location: Sequence[int | str], values: Any) -> tuple[str, ...]:
    """Keep the parts of pydantic's location that the user wrote; drop the names of union members."""
    path: list[str] = []
    for part in location:
        if isinstance(values, dict):
            is_tag = part not in values and part == values.get("type")
            if is_tag:
                continue
            path.append(str(part))
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            path.append(str(part))
            values = values[part]
    return tuple(path)


def _explain_one(path: tuple[str, ...], details: list[Any], tree: Tree) -> UserError:
    dotted, detail = ".".join(path), details[0]
    description, hint = _SETTINGS.get(dotted), None
    if detail["type"] == "extra_forbidden":
        return UserError(f"`{dotted}` is not a setting", tree.place(path), _did_you_mean(path))
    if detail["type"] == "missing":
        hint = f"add it: {description}" if description else "add it"
        return UserError(f"`{dotted}` is missing", tree.place(path), hint)
    wanted = " or ".join(dict.fromkeys(_wanted(d) for d in details))
    given = detail["input"]
    if detail["type"].startswith("union_tag"):
        given = given.get("type", "nothing") if isinstance(given, dict) else given
        wanted = f"one of {', '.join(f'`{tag}`' for tag in _tags(path[0]))}"
    if description:
        hint = f"{dotted}: {description}"
    return UserError(f"`{dotted}` should be {wanted}, but is {_show(given)}", tree.place(path), hint)


def _wanted(detail: Any) -> str:
    """Word what was expected: `a valid number`, `greater than 0`, `'dpo' or 'ipo'`."""
    message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("a valid ")
    if detail["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "a group of settings"
    if detail["type"] in ("string_type", "int_type", "float_type", "bool_type", "list_type"):
        return {"string": "text", "integer": "a whole number", "boolean": "true or false"}.get(message, f"a {message}")
    return message


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _did_you_mean(path: tuple[str, ...]) -> str:
    """Suggest the nearest known setting: a near name in the same group, or the same name in another."""
    group = ".".join(path[:-1])
    prefix = f"{group}." if group else ""
    siblings = [name for name in _SETTINGS if name.rpartition(".")[0] == group]
    leaves = [name.rpartition(".")[2] for name in siblings]
    near = [f"{prefix}{leaf}" for leaf in difflib.get_close_matches(path[-1], leaves, n=1, cutoff=0.7)]
    elsewhere = [name for name in _SETTINGS if name.rpartition(".")[2] == path[-1]]
    if found := near + elsewhere:
        return f"did you mean `{found[0]}`?"
    known = ", ".join(f"`{name}`" for name in siblings) or "see `dpo config schema`"
    return f"known here: {known}"


def _tags(group: str) -> list[str]:
    """Return the `type`s that a group's union has."""
    annotation = Config.model_fields[group].annotation if group in Config.model_fields else None
    members = get_args(annotation) or (annotation,)
    return [
        str(member.model_fields["type"].default)
        for member in members
        if isinstance(member, type) and issubclass(member, BaseModel)
    ]


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every dotted path with its description."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, info.description or ""
        for member in get_args(info.annotation) or (info.annotation,):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from _walk(member, f"{path}.")


_SETTINGS = dict(_walk(Config))

"""What is said of a configuration that is wrong: the setting, the line, and what to write instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dpo_cli import settings
from dpo_cli.config import translations
from dpo_cli.config.evaluations import of_the_best
from dpo_cli.config.schema import APART, ONE, ONE_TRACKER, SEVERAL, SHARE, TRACKERS, Config
from dpo_cli.config.tree import Tree
from dpo_cli.data.pairs import sources
from dpo_cli.errors import UserError
from dpo_cli.modeling.layouts import PADDED
from dpo_cli.settings import all_settings, groups_in
from dpo_cli.system import plain_yaml

_WAYS = {ONE, SEVERAL, ONE_TRACKER, TRACKERS, SHARE, APART, sources.NAME, sources.GROUP, sources.SEVERAL}
"""What pydantic puts into a path where a setting may be written in several ways."""


def explain(error: ValidationError, tree: Tree) -> list[UserError]:
    """Turn what pydantic found into one `UserError` a setting, in the order of the file."""
    found: dict[tuple[str, ...], list[Any]] = {}
    for detail in error.errors(include_url=False):
        path = _path(detail["loc"], tree.values)
        if detail["type"].startswith("union_tag"):
            path = (*path, "type")
        found.setdefault(path, []).append(detail)
    # Where a text or a list of them is asked for, a wrong member is no reason to complain of the list as well.
    groups = {path[:length] for path in found for length in range(len(path))}
    paths = sorted((path for path in found.keys() - groups if not tree.is_reported(path)), key=tree.order)
    return _with_one_list([_explain_one(path, found[path], tree) for path in paths])


def _with_one_list(errors: list[UserError]) -> list[UserError]:
    """Keep of several long lists of settings the first."""
    long = [error for error in errors if (error.hint or "").startswith(_KNOWN)]
    for error in long[1:]:
        error.hint = "see `dpo config example` for all settings"
    return errors


def contradictions(config: Config, tree: Tree) -> list[UserError]:
    """Find settings that are right by themselves and do not go together."""
    objective, problems = config.objective, []
    names = ", ".join(f"`{loss.type}`" for loss in objective.losses)
    needing = ", ".join(f"`{loss.type}`" for loss in objective.losses if loss.needs_reference)
    given = "reference" in config.model_fields_set
    if given and objective.needs_reference and config.reference.type == "none":
        what = f"the loss {needing} needs a reference, but `reference` is `none`"
        hint = "leave `reference` out, or choose a loss without a reference, such as `simpo`"
        problems.append(UserError(what, tree.place(("reference",)), hint))
    if given and not objective.needs_reference and config.reference.type != "none":
        what = f"the loss {names} ignores the reference, but `reference` is `{config.reference.type}`"
        problems.append(UserError(what, tree.place(("reference",)), "leave `reference` out"))
    keeping = [loss.type for loss in objective.losses if loss.keeps_statistics]
    if len(keeping) > 1:
        both = " and ".join(f"`{name}`" for name in keeping)
        what = f"only one loss may keep running statistics, but {both} do"
        hint = "set `running_mean: false` for `bco`, or leave `adaptive_beta` out"
        problems.append(UserError(what, tree.place(("loss",)), hint))
    if sum(loss.router_aux > 0 for loss in objective.losses) > 1:
        what = "only one loss may set `router_aux`, but several do"
        problems.append(UserError(what, tree.place(("loss",)), "set it in one of them"))
    more = (
        _of_the_weights(config, tree),
        _of_the_adapter(config, tree),
        _of_the_training(config, tree),
        of_the_best(config, tree),
    )
    return [*problems, *(problem for some in more for problem in some)]


def _of_the_weights(config: Config, tree: Tree) -> Iterator[UserError]:
    """Find what does not go together with how weights are to be held."""
    model, weights, path = config.model, f"`model.weights: {config.model.weights}`", ("model", "weights")
    if model.weights == "auto":
        return
    if model.quantize is not None:
        what = f"{weights} and `model.quantize: {model.quantize}` both say how weights are held"
        yield UserError(what, tree.place(path, ("model", "quantize")), "leave one of them out")
    elif model.weights == "bfloat16" and config.adapter is None:
        what = f"{weights} is for weights that do not train: most steps are too small to move a bfloat16 number"
        hint = "set `model.weights: split`, or train an adapter: `adapter: lora`"
        yield UserError(what, tree.place(path, ("adapter",)), hint)
    elif model.weights == "split" and config.adapter is not None:
        what = f"{weights} has no effect beside an adapter: the model's own weights do not train"
        yield UserError(what, tree.place(path, ("adapter",)), "set `model.weights: bfloat16`, or leave it out")
    if model.weights != "float32" and model.computed_in != "bfloat16":
        what = f"{weights} computes in bfloat16, but `model.dtype` is {model.dtype}"
        hint = "set `model.dtype: bfloat16`, or `model.weights: float32`"
        yield UserError(what, tree.place(path, ("model", "dtype")), hint)


def _of_the_adapter(config: Config, tree: Tree) -> Iterator[UserError]:
    """Find what does not go together with an adapter."""
    adapter, reference, quantize = config.adapter, config.reference, config.model.quantize
    if adapter is None:
        if quantize is not None:
            what = f"`model.quantize: {quantize}` needs an adapter: weights of so few bits cannot be trained"
            hint = "set `adapter: lora`, or leave `model.quantize` out"
            yield UserError(what, tree.place(("model", "quantize"), ("adapter",)), hint)
        return
    comparing = ", ".join(f"`{loss.type}`" for loss in config.objective.losses if loss.compares_pairs)
    if adapter.drops_out and comparing:
        what = (
            f"`adapter.dropout` does not go together with the loss {comparing}, which takes all pairs of a step twice"
        )
        where = tree.place(("adapter", "dropout"), ("loss",))
        yield UserError(what, where, "leave `adapter.dropout` out, or choose another loss")
    if reference.type == "synced" and reference.model is not None:
        what = "under an adapter, `reference.model` cannot move towards the policy: it has no adapter"
        hint = "leave `reference.model` out, or set `reference: frozen` with it"
        yield UserError(what, tree.place(("reference", "model")), hint)


def _of_the_training(config: Config, tree: Tree) -> Iterator[UserError]:
    """Find what does not go together of how steps are computed."""
    training = config.training
    if training.attention != "auto" and training.layout == PADDED.name:
        what = f"`training.attention: {training.attention}` has no effect with `training.layout: {training.layout}`"
        where = tree.place(("training", "attention"), ("training", "layout"))
        yield UserError(what, where, "set `training.layout: auto`, or leave `training.attention` out")


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
    dotted, place, detail = ".".join(path), tree.place(path), details[0]
    match detail["type"]:
        case "extra_forbidden":
            return _unknown(path, detail, place)
        case settings.UNDEFINED:
            return UserError(f"`{dotted}` cannot be expanded: {detail['ctx']['reason']}", place, detail["ctx"]["hint"])
        case settings.CONTRADICTION:
            together = [(*path, name) for name in detail["ctx"]["names"]] or [path]
            return UserError(detail["ctx"]["what"], tree.place(*together), detail["ctx"]["hint"])
        case "missing":
            return UserError(f"`{dotted}` is missing", place, _how_to_add(path))
        case kind if kind.startswith("union_tag"):
            return _wrong_type(path, detail["input"], place)
    wanted = [*dict.fromkeys(_wanted(one) for one in details), *(["null"] if _takes_null(path) else [])]
    if is_share := SHARE in detail["loc"]:
        wanted = ["a fraction between 0 and 1, a source of pairs", "null"]
    what = f"`{dotted}` should be {' or '.join(wanted)}, but is {_show(detail['input'])}"
    if is_share:
        return UserError(what, place, _OF_SHARES)
    advice = translations.type_advice(_name(path).removesuffix(".type"), str(detail["input"]))
    return UserError(what, place, advice or _near_choice(details) or _how_to_set(path, detail["input"]))


def _near_choice(details: list[Any]) -> str | None:
    """Suggest the value that is spelled nearly as what was given, where a setting has some to choose from."""
    choices = [one for detail in details if detail["type"] == "literal_error" for one in _choices(detail)]
    near = difflib.get_close_matches(str(details[0]["input"]), choices, n=1)
    return f"did you mean `{near[0]}`?" if near else None


def _choices(detail: Any) -> list[str]:
    """Return the values that a setting has to choose from."""
    return _QUOTED.findall(detail["ctx"]["expected"])


def _unknown(path: tuple[str, ...], detail: Any, place: str) -> UserError:
    """Explain a setting that there is not."""
    dotted = ".".join(path)
    kind = next((str(part) for part in reversed(detail["loc"][:-1]) if part in _TAGS), None)
    if kind and _name(path[:-1]) in _UNIONS:
        hint = translations.advice(path[-1]) or _known_to(path, kind)
        return UserError(f"`{dotted}` is not a setting of `{kind}`", place, hint)
    return UserError(f"`{dotted}` is not a setting", place, _did_you_mean(path))


def _wrong_type(path: tuple[str, ...], given: Any, place: str) -> UserError:
    """Explain a group whose `type` is missing or none of those that there are."""
    dotted, known = ".".join(path), _tags(path)
    named = f"name one of {_listed(known)}"
    if isinstance(given, dict) and "type" not in given:
        return UserError(f"`{dotted}` is missing", place, named)
    given = given["type"] if isinstance(given, dict) else given
    near = difflib.get_close_matches(str(given), known, n=1)
    hint = translations.type_advice(_name(path[:-1]), str(given)) or (f"did you mean `{near[0]}`?" if near else named)
    return UserError(f"`{dotted}` should be one of {_listed(known)}, but is {_show(given)}", place, hint)


def _how_to_add(path: tuple[str, ...]) -> str:
    """Return how a required setting is written."""
    example = {"model": "path/to/model", "name": "path/to/model", "path": "pairs.jsonl"}.get(path[-1], "…")
    return f"add it, as in `{path[-1]}: {example}`: {_decapitalized(_SETTINGS.get(_name(path), 'it has no default'))}"


def _how_to_set(path: tuple[str, ...], given: Any) -> str:
    """Return how a setting is written whose value is wrong: its default, and what it means."""
    field = _FIELDS.get(_name(path))
    if field is None:
        return "see `dpo config example` for how settings are written"
    meaning = _decapitalized(field.description or "")
    if path[-1].isdigit():
        return f"change this member of `{_name(path)}`, or remove it: {meaning}"
    if any(True for _ in groups_in(field.annotation)) and given is None:
        return f"indent its settings below `{path[-1]}:`, or leave it out"
    if field.is_required():
        return _how_to_add(path)
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return f"write it as in `dpo config example`, or leave it out: {meaning}"
    return f"leave it out for the default, `{path[-1]}: {plain_yaml.written(default)}`: {meaning}"


def _takes_null(path: tuple[str, ...]) -> bool:
    field = _FIELDS.get(_name(path))
    return field is not None and not path[-1].isdigit() and type(None) in get_args(field.annotation)


def _wanted(detail: Any) -> str:
    """Word what was expected: `a number`, `greater than 0`, ``one of `dpo`, `ipo` ``."""
    message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("a valid ")
    match detail["type"]:
        case "too_short":
            least = detail["ctx"]["min_length"]
            return f"a list of at least {'one' if least == 1 else least}"
        case "too_long":
            return f"a list of at most {detail['ctx']['max_length']}"
        case "string_too_short":
            return "a text that is not empty"
        case "literal_error":
            known = _choices(detail)
            return f"one of {_listed(known)}" if len(known) > 1 else f"`{known[0]}`"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "a group of settings"
        case "string_type" | "int_type" | "float_type" | "bool_type" | "list_type":
            return {"string": "text", "integer": "a whole number", "boolean": "true or false"}.get(
                message, f"a {message}"
            )
    return message


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _decapitalized(text: str) -> str:
    """Return a description as the part of a sentence."""
    first = " ".join(text.split("\n\n", 1)[0].split()).removesuffix(".")
    return f"{first[:1].lower()}{first[1:]}" if first[1:2].islower() or first[1:2] == " " else first


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
    return f"{_KNOWN}{_listed(known)}"


def _did_you_mean(path: tuple[str, ...]) -> str:
    """Suggest what another trainer's name is here, a near name in the same group, or the same name in another."""
    if advice := translations.advice(path[-1]):
        return advice
    group = _name(path[:-1])
    siblings = [name for name in _SETTINGS if name.rpartition(".")[0] == group]
    leaves = [name.rpartition(".")[2] for name in siblings]
    near = [".".join([*path[:-1], leaf]) for leaf in difflib.get_close_matches(path[-1], leaves, n=1, cutoff=0.7)]
    elsewhere = sorted((name for name in _SETTINGS if name.rpartition(".")[2] == path[-1]), key=_depth)
    if found := near + elsewhere:
        return f"did you mean `{found[0]}`?"
    return f"{_KNOWN}{_listed(siblings)}" if siblings else "see `dpo config example` for all settings"


def option_hint(option: str) -> str | None:
    """Suggest how a setting is written that was given as an option, `--learning_rate`; None if it is no setting."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    named = sorted((path for path in _SETTINGS if name in (path, path.rpartition(".")[2])), key=_depth)
    if advice := translations.advice(name):
        return f"settings are written without dashes, as in `training.learning_rate=1e-5`; {advice}"
    return f"settings are written without dashes: `{named[0]}=…`" if named else None


def _depth(name: str) -> int:
    return name.count(".")


def _tags(path: Sequence[str]) -> list[str]:
    """Return the `type`s that may stand at a path."""
    return [str(model.model_fields["type"].default) for model in _UNIONS[_name(path[:-1])]]


def _unions(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[type[BaseModel]]]]:
    """Yield every dotted path at which there is a choice of groups by type, with the groups."""
    for name, info in model.model_fields.items():
        members = list(dict.fromkeys(groups_in(info.annotation)))
        if any("type" in member.model_fields for member in members):
            yield f"{prefix}{name}", members
        for member in members:
            yield from _unions(member, f"{prefix}{name}.")


_KNOWN = "known here: "
_OF_SHARES = (
    "write the share of `train` that is held out, as in `eval: 0.1`; or name pairs of their own, as in `eval: FILE`"
)
_QUOTED = re.compile("'([^']*)'")
_FIELDS = dict(all_settings(Config))
_SETTINGS = {path: field.description or "" for path, field in _FIELDS.items()}
_UNIONS = dict(_unions(Config))
_TAGS = {str(model.model_fields["type"].default) for models in _UNIONS.values() for model in models}

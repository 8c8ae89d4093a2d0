"""What is wrong with a configuration and what it names, as far as it can be said before anything slow is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dpo_cli.config.launched import launch_errors
from dpo_cli.config.outputs import json_file_errors
from dpo_cli.config.schema import Config, changeable
from dpo_cli.config.start_adapter import changed_start
from dpo_cli.data.pairs.sources import Source, as_sources, check_source, look_up_source, paths_of
from dpo_cli.errors import UserError, raise_all
from dpo_cli.modeling.adapters.files import holds_adapter, is_adapter_id, may_be_start, read_start
from dpo_cli.modeling.extras import missing_package
from dpo_cli.modeling.folders.model_names import (
    check_model,
    look_up_model,
    missing_weights,
    same_model,
    whole_model,
)
from dpo_cli.reporting.console import STANDARD_OUTPUT
from dpo_cli.reporting.trackers import check_trackers
from dpo_cli.settings import located
from dpo_cli.system.hub import is_hub_id
from dpo_cli.system.storage import MANIFEST, DamagedFolder, verify, why_no_folder
from dpo_cli.training.run_folder import RunFolder


def check_new_file(out: Path, model: str | None, data: str | None) -> None:
    """Check what `dpo init` is given: the file to write, the model and the data.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    problems = []
    if out != STANDARD_OUTPUT and out.exists():
        problems.append(UserError(f"{located(out)} exists already", "--out", "choose another file"))
    if not out.parent.is_dir():
        problems.append(UserError(f"there is no folder {located(out.parent)}", "--out", "create it"))
    if model is not None and (problem := check_model(model, "--model")):
        problems.append(problem)
    for source in as_sources(data):
        if problem := check_source(source, "--data"):
            problems.append(problem)
        elif (Path(source.path) / MANIFEST).is_file():
            hint = "name the data that it was prepared from"
            problems.append(UserError(f"`{source.path}` is a prepared folder", "--data", hint))
    raise_all(problems)


def check_preparation(config: Config, report: Path | None) -> None:
    """Check what is read, and the folder of the report.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    problems = check_inputs(config)
    if report is not None and (obstacle := why_no_folder(report)):
        what = f"the folder of the report cannot be created: {obstacle}"
        problems.append(UserError(what, f"--report {report}", "choose another with --report"))
    raise_all(problems)


def check_training(config: Config, *, resume: bool, overwrite: bool, dry_run: bool, weights: bool = True) -> None:
    """Check what is read, the trackers, and whether the run's folder can be used as asked.

    Args:
        config: What to do.
        resume: Whether the run goes on from what is there.
        overwrite: Whether it replaces an older run.
        dry_run: Whether it is only looked at.
        weights: Whether the model's weights have to be there.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    if not config.output_dir:
        hint = "name the run's folder, as in `output_dir: runs/my`"
        raise UserError("`output_dir` is missing", "the configuration", hint)
    folder = RunFolder(Path(config.output_dir))
    unusable = folder.check(resume=resume, overwrite=overwrite, beside=dry_run and not resume and not overwrite)
    if overwrite and not unusable:
        unusable = folder.check_inputs(_named_inputs(config))
    untracked = check_trackers(config.trackers, "`tracking`")
    missing = missing_weights(config.model.name, "`model.name`") if weights else None
    found = (one for one in (unusable, missing) if one)
    raise_all([*check_inputs(config), *_check_alone(config), *launch_errors(config), *untracked, *found])
    if resume:
        settings = config.model_dump(mode="json")
        folder.recorded.check_unchanged(settings, changeable(), lambda changes: changed_start(config, changes))


def _check_alone(config: Config) -> Iterator[UserError]:
    """Refuse an adapter to be trained on another one."""
    name = config.model.name
    # What is wrong with that one is reported elsewhere.
    if config.adapter is not None and holds_adapter(name) and not check_model(name, trust=config.model.trust):
        merge = f"to train another adapter, merge it first: `dpo export {name} --to DIR --merge`"
        go_on = f"to go on with it, set `model` to `{whole_model(name)}` and `adapter.start: {name}`; "
        hint = go_on + merge if may_be_start(name) else merge
        yield UserError(f"`{name}` is an adapter itself, beside which no other is trained", "`model.name`", hint)


def check_evaluation(config: Config, models: Sequence[str], data: str | None, json_file: Path | None) -> None:
    """Check what is read, the models that are scored, and the file of the figures.

    Args:
        config: Names the reference and the held-out pairs.
        models: The models that are named; none: what the run has trained is scored.
        data: Pairs that are named in place of the held-out ones, or None.
        json_file: Where figures are written, or None.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    problems = [*check_inputs(config, needs_train=data is None), *check_scored(config, models)]
    problems += [problem for source in as_sources(data) if (problem := check_source(source, "--data"))]
    if data is None and config.data.eval is None:
        hint = "set `data.eval`, or name pairs with --data"
        problems.append(UserError("the configuration has no held-out pairs", "`data.eval`", hint))
    raise_all([*problems, *launch_errors(config), *json_file_errors(json_file)])


def scored_models(config: Config, models: Sequence[str]) -> list[str]:
    """Return the models that are scored: those that are named, or what the run has trained."""
    return list(models) or [str(RunFolder(Path(config.output_dir)).final)]


def check_scored(config: Config, models: Sequence[str]) -> Iterator[UserError]:
    """Yield what is wrong with the models that are scored."""
    for number, scored in enumerate(scored_models(config, models)):
        if problem := _check_model_to_score(config, scored, is_named=bool(models)):
            yield problem
        elif again := next((other for other in models[:number] if same_model(scored, other)), None):
            also = "" if again == scored else f", also as `{again}`"
            hint = "name each model once; what is compared are different models"
            yield UserError(f"the model `{scored}` is named twice{also}", "--model", hint)


def _check_model_to_score(config: Config, scored: str, *, is_named: bool) -> UserError | None:
    """Say what is wrong with a model that is scored."""
    if not is_named and not Path(scored).is_dir():
        what = f"the run has no trained model yet: there is no folder {located(scored)}"
        return UserError(what, "`output_dir`", "train first, or name a model with --model")
    if problem := _check_adapter_to_score(scored, config):
        return problem
    if not is_named or (Path(scored) / MANIFEST).is_file():
        try:
            verify(Path(scored))
        except DamagedFolder as damage:
            return UserError(f"the model is damaged: {damage}", scored, "take another checkpoint, or train again")
    return None


def _check_adapter_to_score(name: str, config: Config) -> UserError | None:
    """Say what is wrong with the name of a model that is scored, or with what is there of an adapter."""
    missing = missing_package("peft", "adapters", "--model") if holds_adapter(name) else None
    return check_model(name, "--model", config.model.trust) or missing


def check_inputs(config: Config, *, needs_train: bool = True) -> list[UserError]:
    """Say what the configuration names and is missing or unusable: models, packages, template, data."""
    problems = [check_model(config.model.name, "`model.name`", config.model.trust)]
    if config.reference.model is not None:
        problems.append(_check_reference(config.reference.model, config))
    if config.adapter is not None:
        problems.append(missing_package("peft", "adapters", "`adapter`"))
        problems.append(_check_start(config.adapter.start))
    elif holds_adapter(config.model.name):
        problems.append(missing_package("peft", "adapters", "`model.name`"))
    if config.model.quantize is not None:
        problems.append(missing_package("bitsandbytes", "quantize", "`model.quantize`"))
    if config.training.optimizer.type == "adamw_8bit":
        problems.append(missing_package("bitsandbytes", "8bit", "`training.optimizer`"))
    template = config.model.chat_template
    if template is not None and template != "plain" and not is_file(template) and not _may_be_named(config):
        problems.append(no_template(template, ()))
    if config.data.train is None and needs_train:
        hint = "name a data file: `data: {train: pairs.jsonl}`"
        problems.append(UserError("`data.train` is missing", "the configuration", hint))
    for setting, named in (("train", config.data.train), ("eval", config.data.eval)):
        if named is not None and not isinstance(named, float):
            problems += [check_source(source, f"`data.{setting}`") for source in as_sources(named)]
            if not as_sources(named):
                problems.append(UserError(f"`data.{setting}` is empty", None, "name at least one source"))
    return [problem for problem in problems if problem]


def _check_reference(name: str, config: Config) -> UserError | None:
    """Say what is wrong with a reference that is a model of its own."""
    problem = check_model(name, "`reference.model`", config.model.trust)
    if problem or not holds_adapter(name):
        return problem
    hint = f"merge it: `dpo export {name} --to DIR --merge`, and name that folder"
    if may_be_start(name) and same_model(whole_model(name), config.model.name):
        hint = (
            f"to train on from it, set `adapter.start: {name}` and leave `reference.model` out: the reference is then "
            f"the base with that adapter; else {hint}"
        )
    return UserError(f"`{name}` is an adapter, and a reference is a whole model", "`reference.model`", hint)


def _check_start(name: str | None) -> UserError | None:
    """Say what is wrong with an adapter that training is to go on from, if there is one."""
    try:
        if name is not None:
            asked = is_adapter_id(name) and not holds_adapter(name)
            if asked and (problem := look_up_model(name, "`adapter.start`", "adapter")):
                return problem
            read_start(name, "`adapter.start`")
            if (Path(name) / MANIFEST).is_file():
                verify(Path(name))
    except DamagedFolder as damage:
        hint = "choose another checkpoint, or train the adapter again"
        return UserError(f"the adapter `{name}` is damaged: {damage}", "`adapter.start`", hint)
    except UserError as error:
        return error
    return None


def look_up_on_hub(config: Config, *, models: Sequence[str] = (), data: Mapping[str, str] | None = None) -> None:
    """Ask the Hub for every model and dataset that is named and is not on this disk, before any work is done.

    Args:
        config: What the configuration names was checked before.
        models: What `--model` names.
        data: What options name in place of the configuration's data, by option; None: nothing does.

    Raises:
        UserError: The Hub has something not, or cannot be reached and it was not downloaded before.
    """
    settings = [("`model.name`", config.model.name), ("`reference.model`", config.reference.model)]
    asked = [(where, name) for where, name in settings if name] + [("--model", name) for name in models]
    problems = [look_up_model(name, where) for where, name in asked if is_hub_id(name)]
    if not any(problems) and any(is_hub_id(name) and holds_adapter(name) for _, name in asked):
        # What is there of these could not be checked before.
        problems += [*check_inputs(config, needs_train=False), *_check_alone(config)]
        problems += [_check_adapter_to_score(name, config) for name in models]
    bases = [(where, whole_model(name)) for where, name in asked if holds_adapter(name)]
    problems += [look_up_model(name, where) for where, name in bases if is_hub_id(name)]
    sources = {"`data.train`": as_sources(config.data.train), "`data.eval`": held_out_sources(config)}
    if data is not None:
        sources = {where: as_sources(named) for where, named in data.items()}
    problems += [look_up_source(source, where) for where, named in sources.items() for source in named]
    raise_all(problem for problem in problems if problem)


def held_out_sources(config: Config) -> list[Source]:
    """Return where the held-out pairs come from, if they have sources of their own."""
    return [] if isinstance(config.data.eval, float) else as_sources(config.data.eval)


def no_template(name: str, known: Sequence[str]) -> UserError:
    """Say that there is no such chat template, of those that are known."""
    own = f"one of the tokenizer's own ({', '.join(f'`{one}`' for one in known)}), " if known else ""
    hint = f"name {own}a Jinja file, `plain`, or null for the tokenizer's own"
    # A template's own text, say, is no path.
    shown = located(name) if len(name) <= 255 else f"`{name[:57]}…`"
    return UserError(f"there is no chat template {shown}", "`model.chat_template`", hint)


def is_file(name: str) -> bool:
    """Tell whether there is such a file; a template's own text, say, is too long for a name."""
    try:
        return Path(name).is_file()
    except OSError:
        return False


def _may_be_named(config: Config) -> bool:
    """Tell whether `model.chat_template` may be the name of one of the model's own; the Hub's are not known yet."""
    name, folder = str(config.model.chat_template), Path(config.model.name)
    if not name.isidentifier() or folder.is_file():
        return False
    if not folder.is_dir() or name == "default" or (folder / "additional_chat_templates" / f"{name}.jinja").is_file():
        return True
    listing = folder / "tokenizer_config.json"
    return listing.is_file() and f'"{name}"' in listing.read_text(encoding="utf-8", errors="replace")


def _named_inputs(config: Config) -> list[str]:
    """Return what the configuration names as a model, an adapter, a template or data."""
    named = [config.model.name, whole_model(config.model.name), config.model.chat_template, config.reference.model]
    named += [config.adapter.start] if config.adapter else []
    for source in (*as_sources(config.data.train), *held_out_sources(config)):
        named += paths_of(source)
    return [name for name in named if name]

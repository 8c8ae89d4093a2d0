"""What `dpo export` can take: a model or an adapter, of a run or of none, checked before anything slow is imported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

from dpo_cli.config.inputs import check_inputs
from dpo_cli.config.loading import as_config, load_config
from dpo_cli.config.schema import Config
from dpo_cli.errors import UserError
from dpo_cli.evaluation.best import best_step
from dpo_cli.modeling.adapters.files import ADAPTER_CONFIG, base_of, holds_adapter
from dpo_cli.modeling.extras import missing_package
from dpo_cli.modeling.folders.model_files import CONFIG, stored_types
from dpo_cli.modeling.folders.model_names import check_model, is_gguf, look_up_model, missing_weights, model_inside
from dpo_cli.modeling.held import Dtype
from dpo_cli.reporting.row_log import rows_in
from dpo_cli.settings import located, nearest_file
from dpo_cli.system.hub import is_hub_id
from dpo_cli.system.storage import MANIFEST, DamagedFolder, verify
from dpo_cli.training.recorded_settings import differing
from dpo_cli.training.run_folder import RunFolder, RunState, checkpoints_in

_WHERE = "the command line"
_WHAT_TO_NAME = "name the `output_dir` of a run, one of its checkpoints, an adapter's folder, or a model"
_RUNS = (RunState.STARTED, RunState.FINISHED)

_PACKAGES = ("`adapter`", "`model.quantize`")
"""Settings that need packages, which are not named by a path."""

_MOVED = ("model.name", "model.chat_template", "data.train", "data.eval", "adapter.start", "reference.model")
"""Settings of a run that name files, which may be elsewhere now."""

_LOADED = ("model.attention", "model.allow_pickle", "model.trust_remote_code")
"""Settings of a run that say how a model is loaded, which this machine or user may want otherwise."""


@dataclass(frozen=True)
class TrainedModel:
    """A model of a run that trained all weights.

    Attributes:
        run: The run.
        config: What it did.
        folder: Its `final`, or one of its checkpoints.
        unscored: Why the run's pairs cannot be scored; None: they can.
    """

    run: RunFolder
    config: Config
    folder: Path
    unscored: str | None = None
    is_adapter: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What it is called."""
        return self.run.path.resolve().name


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter that a run has trained.

    Attributes:
        run: The run.
        config: What it did.
        folder: Its `final`, or one of its checkpoints.
    """

    run: RunFolder
    config: Config
    folder: Path
    is_adapter: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """What it is called."""
        return self.run.path.resolve().name


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter that is in no run: another program has trained it, or it was taken out of its run.

    Attributes:
        config: All defaults, with the base that it names.
        folder: Its folder, or its id on the Hub.
    """

    config: Config
    folder: Path
    is_adapter: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """What it is called."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class PlainModel:
    """A whole model that is in no run.

    Attributes:
        config: All defaults, with the model: a folder, a .gguf file or a Hub id.
    """

    config: Config
    is_adapter: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What it is called."""
        named = Path(self.config.model.name).resolve()
        return named.stem if is_gguf(named) else named.name


Source = TrainedModel | TrainedAdapter | ForeignAdapter | PlainModel
"""The closed union of all that is exported."""


def find_source(named: Path, overrides: Sequence[str], dtype: str | None) -> tuple[Source, list[UserError]]:
    """Return what is exported, and what is wrong with it.

    Args:
        named: A run's folder, or in it `final` or a checkpoint; an adapter's folder; or a model.
        overrides: `KEY=VALUE` each: settings of the run that are others now.
        dtype: The dtype that its weights are written in, as the command line says it; None: as they are.

    Raises:
        UserError: There is nothing to export; or a setting of the run is wrong, or several are.
    """
    run, folder = _found(named)
    if run is None:
        return _without_run(named, overrides)
    config = load_config(run.config, overrides)
    if overrides:
        _check_overrides(run, config)
    if config.adapter is not None:
        adapter = TrainedAdapter(run, config, folder)
        return adapter, _check_adapter(adapter)
    return _trained_model(run, named, config, overrides, dtype)


def _check_overrides(run: RunFolder, config: Config) -> None:
    """Refuse settings that are not those of the run: its card and its held-out pairs would be those of another one.

    Raises:
        UserError: Settings differ that say neither where something is nor how it is loaded.
    """
    trained = load_config(run.config)
    names = [*_MOVED, *_LOADED]
    if any(one is None or isinstance(one, float) for one in (trained.data.eval, config.data.eval)):
        names.remove("data.eval")
    if changed := differing(trained.model_dump(mode="json"), config.model_dump(mode="json"), names):
        hint = f"leave that out: of a run's settings only these may be others: {', '.join(names)}"
        raise UserError(f"the run has other settings: {'; '.join(changed.values())}", _WHERE, hint)


def _found(named: Path) -> tuple[RunFolder | None, Path]:
    """Return the run that is meant, if there is one, and the folder of what it has trained.

    Raises:
        UserError: There is nothing of that name, or the run is not finished.
    """
    if not named.exists() and not is_gguf(named):
        if is_hub_id(str(named)):
            if problem := look_up_model(str(named), _WHERE):
                raise problem
            return None, named
        near = nearest_file(named)
        hint = f"did you mean `{near}`?" if near and near.is_dir() else _WHAT_TO_NAME
        raise UserError(f"there is no run, adapter or model {located(named)}", _WHERE, hint)
    if not named.is_dir():
        return None, named
    if (run := RunFolder(named)).state() in _RUNS:
        return run, _trained(run)
    if damage := run.damage():
        raise damage
    absolute = named.absolute()
    for above in (absolute.parent, absolute.parent.parent):
        if (run := RunFolder(above)).state() in _RUNS:
            return run, named
    return None, named


def _trained(run: RunFolder) -> Path:
    """Return the folder of the trained model.

    Raises:
        UserError: The run has none yet.
    """
    if run.final.is_dir():
        return run.final
    hint = "wait until it has ended" if run.at_work() else f"finish it: `dpo train {run.config} --resume`"
    if saved := checkpoints_in(run.checkpoints):
        hint += f"; or export a checkpoint, such as `{saved[-1]}`"
    raise UserError(f"the run is not finished: there is no folder {located(run.final)}", str(run.path), hint)


def _without_run(named: Path, overrides: Sequence[str]) -> tuple[Source, list[UserError]]:
    """Return an adapter or a model that has no run, and what is wrong with it or its base.

    Raises:
        UserError: It is neither.
    """
    problems: list[UserError | None] = []
    if holds_adapter(named):
        base = base_of(named, _WHERE)
        problems += [missing_package("peft", "adapters", _WHERE), check_model(base, str(named))]
        if is_hub_id(base):
            problems.append(look_up_model(base, str(named)))
        source: Source = ForeignAdapter(as_config({"model": base}), named)
    else:
        if not _is_model(named):
            kinds = "the folder of a run, of an adapter or of a model"
            what = f"`{named}` is not {kinds}" if named.is_dir() else f"`{named}` is a file, not {kinds}"
            raise UserError(what, _WHERE, model_inside(named) or _model_around(named) or _WHAT_TO_NAME)
        problems.append(check_model(str(named), _WHERE) or missing_weights(str(named), _WHERE))
        if is_gguf(named):
            problems.append(missing_package("gguf", "gguf", _WHERE))
        source = PlainModel(as_config({"model": named}))
    if (named / MANIFEST).is_file():
        problems.append(_check_whole(named, "export it again, or copy it again"))
    if overrides:
        what = f"`{overrides[0]}` overrides a setting of a run, but `{named}` is in none"
        problems.append(UserError(what, _WHERE, "leave it out"))
    return source, [problem for problem in problems if problem]


def _model_around(file: Path) -> str | None:
    """Suggest the folder that people mean who name a file in it."""
    folder = file.parent
    if (folder / CONFIG).is_file() or holds_adapter(folder) or RunFolder(folder).state() in _RUNS:
        return f"did you mean `{folder}`?"
    return None


def _is_model(named: Path) -> bool:
    """Tell whether a name is that of a model, right or wrong."""
    return (named / CONFIG).is_file() or is_gguf(named) or not named.exists()


def _trained_model(
    run: RunFolder, named: Path, config: Config, overrides: Sequence[str], dtype: str | None
) -> tuple[TrainedModel, list[UserError]]:
    """Return the model of a run of all weights, and what is wrong with it.

    It is complete without the run's data and base. Where they are not there any more, its pairs are not scored, unless
    settings say where they should be.
    """
    folder, problems = _trained_folder(run, named, config, dtype)
    missing = [_of_run(problem, run, config) for problem in check_inputs(config)]
    if overrides:
        return TrainedModel(run, config, folder), [*problems, *missing]
    return TrainedModel(run, config, folder, missing[0].what if missing else None), problems


def _trained_folder(run: RunFolder, named: Path, config: Config, dtype: str | None) -> tuple[Path, list[UserError]]:
    """Return the folder of a run's model that is meant, and what is wrong with it.

    Where the run is named it is `final`; or, where another dtype than that one's is asked for, the checkpoint of the
    same step, whose weights were not rounded.
    """
    if named.resolve() != run.path.resolve():
        rounded = named.resolve() == run.final.resolve() and _may_be_rounded(named, dtype)
        checked = [_check_trained(named), _rounded_already(run, named) if rounded else None]
        return named, [problem for problem in checked if problem]
    if not _may_be_rounded(run.final, dtype):
        return run.final, [problem for problem in [_check_trained(run.final)] if problem]
    saved = checkpoints_in(run.checkpoints)
    if not saved:
        hint = "leave `--dtype` out; `checkpoints.at_end: true` keeps a checkpoint"
        what = "the run has no checkpoint, which would have all weights in float32"
        return run.final, [UserError(what, str(named), hint)]
    by = config.evaluation.best_by
    best = best_step(rows_in(run.metrics), by) if by else None
    meant = saved[-1] if best is None else run.checkpoint(best)
    return meant, [problem for problem in [_check_trained(meant)] if problem]


def _may_be_rounded(folder: Path, dtype: str | None) -> bool:
    """Tell whether a dtype is asked for that the weights in a folder would have to be rounded to twice."""
    if dtype not in get_args(Dtype):
        return False
    return not stored_types(folder) <= {"float32", dtype}


def _rounded_already(run: RunFolder, named: Path) -> UserError:
    hint = f"name the run's folder, `{run.path}`, or one of its checkpoints, which have all weights in float32"
    kinds = ", ".join(sorted(stored_types(named)))
    return UserError(f"the weights of `{named}` are rounded already, to {kinds}", _WHERE, hint)


def _check_trained(folder: Path) -> UserError | None:
    """Say why a folder of a run holds no whole model."""
    if not (folder / CONFIG).is_file():
        hint = "name the run's folder, its `final`, or one of its checkpoints"
        return UserError(f"there is no model: `{folder}` has no {CONFIG}", _WHERE, hint)
    is_checkpoint = folder.name.startswith("step-")
    return _check_whole(folder, "name another checkpoint of the run" if is_checkpoint else "export a checkpoint")


def _check_whole(folder: Path, hint: str) -> UserError | None:
    """Say which file of a folder that this program has written is not as it was."""
    try:
        verify(folder)
    except DamagedFolder as damage:
        return UserError(f"`{folder}` is damaged: {damage}", str(folder), hint)
    return None


def _check_adapter(adapter: TrainedAdapter) -> list[UserError]:
    """Say what is wrong with an adapter of a run, its base and its data."""
    run, config, folder = adapter.run, adapter.config, adapter.folder
    if not holds_adapter(folder):
        hint = "name the run's folder, its `final`, or one of its checkpoints"
        return [UserError(f"there is no adapter: `{folder}` has no {ADAPTER_CONFIG}", _WHERE, hint)]
    damaged = _check_whole(folder, "export a checkpoint of the run, or train again")
    if moved := _moved_base(folder, config):
        missing = [moved]
    else:
        missing = [_of_run(problem, run, config) for problem in check_inputs(config)]
    return [*([damaged] if damaged else []), *missing]


def _moved_base(adapter: Path, config: Config) -> UserError | None:
    """Say where the base was, if it was a folder: a relative name that leads nowhere could be the Hub's as well."""
    try:
        said = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if not isinstance(said, str) or not Path(said).is_absolute() or Path(config.model.name).exists():
        return None
    hint = f"name it where it is now, as in `model.name={said if Path(said).exists() else 'PATH'}`"
    return UserError(
        f"the base is not there: there is no model folder {located(config.model.name)}", str(adapter), hint
    )


def _of_run(problem: UserError, run: RunFolder, config: Config) -> UserError:
    """Say of what the run was given and is gone that it is named in the run's own configuration."""
    if problem.where in _PACKAGES:
        return problem
    start = " or `adapter.start=PATH`" if config.adapter and config.adapter.start else ""
    moved = f"name what moved, as in `data.train=PATH`{start}"
    hint = f"{problem.hint}; or start the command where the run was started, or {moved}"
    return UserError(problem.what, f"{problem.where or 'the configuration'}, {run.config}", hint)

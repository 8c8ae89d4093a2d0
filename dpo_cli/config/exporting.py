"""What `dpo export` is given, checked before anything slow is imported: the source, the form, where it goes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast, get_args

from dpo_cli.config.inputs import check_inputs
from dpo_cli.config.loading import as_config, load_config
from dpo_cli.config.publishing import Publishing, publishing_errors
from dpo_cli.config.schema import Config
from dpo_cli.errors import UserError, raise_all
from dpo_cli.evaluation.best import best_step
from dpo_cli.modeling.adapters.files import ADAPTER_CONFIG, base_of, holds_adapter
from dpo_cli.modeling.extras import missing_package
from dpo_cli.modeling.folders.model_files import CONFIG, stored_types
from dpo_cli.modeling.folders.model_names import check_model, look_up_model, missing_weights
from dpo_cli.modeling.gguf.architectures import gguf_problem
from dpo_cli.modeling.gguf.types import GGUF_TYPES, GgufType
from dpo_cli.modeling.held import Dtype
from dpo_cli.reporting.row_log import rows_in
from dpo_cli.settings import located, nearest_file
from dpo_cli.system.hub import cached_file, is_hub_id
from dpo_cli.system.locks import Locked, lock_beside, locked
from dpo_cli.system.storage import MANIFEST, DamagedFolder, verify, why_no_folder
from dpo_cli.training.run_folder import RunFolder, RunState, checkpoints_in

_WHERE = "the command line"

_PACKAGES = ("`adapter`", "`model.quantize`")
"""Settings that need packages, which are not named by a path."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", re.IGNORECASE)


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
        return named.stem if named.suffix.lower() == ".gguf" else named.name


Source = TrainedModel | TrainedAdapter | ForeignAdapter | PlainModel
"""The closed union of all that is exported."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder that transformers reads.

    Attributes:
        dtype: The dtype of its weights; None: those of the source's own files, or of its base's.
        largest_bytes: The most bytes of a file of its weights; None: as `final/` has.
    """

    dtype: Dtype | None = None
    largest_bytes: int | None = None


@dataclass(frozen=True)
class PeftFolder:
    """An adapter by itself, in a folder that PEFT reads."""


@dataclass(frozen=True)
class GgufFolder:
    """A folder with a GGUF file, which llama.cpp and Ollama read.

    Attributes:
        kind: The type of its weights.
    """

    kind: GgufType


Form = ModelFolder | PeftFolder | GgufFolder
"""The closed union of all that is written."""


@dataclass(frozen=True)
class Options:
    """What the command line says of an export beside source and target, as it says it.

    Attributes:
        merge: Whether an adapter becomes part of its base.
        dtype: The dtype of the weights that are written; None: as they are.
        max_shard_size: The largest file of weights; None: 5 GB.
        gguf: The type of the weights in a GGUF file; None: a folder is written.
    """

    merge: bool = False
    dtype: str | None = None
    max_shard_size: str | None = None
    gguf: str | None = None

    @property
    def given(self) -> list[str]:
        """The options that are given."""
        values = {
            "--merge": self.merge,
            "--dtype": self.dtype,
            "--max-shard-size": self.max_shard_size,
            "--gguf": self.gguf,
        }
        return [option for option, value in values.items() if value]


@dataclass(frozen=True)
class Export:
    """What is exported.

    Attributes:
        source: From what.
        form: As what.
        to: The folder to be written.
    """

    source: Source
    form: Form
    to: Path

    @property
    def merges(self) -> bool:
        """Whether an adapter becomes part of its base."""
        return self.source.is_adapter and not isinstance(self.form, PeftFolder)

    @property
    def reads_inputs(self) -> bool:
        """Whether the models and data are read that a run's configuration names."""
        unscored = isinstance(self.source, TrainedModel) and self.source.unscored is not None
        return not unscored and not isinstance(self.source, PlainModel)


def check_export(
    named: Path, to: Path, overrides: Sequence[str], options: Options, publishing: Publishing | None = None
) -> Export:
    """Check what is exported, as what, and where to.

    Args:
        named: A run's folder, or in it `final` or a checkpoint; an adapter's folder; or a model.
        to: The folder to be written.
        overrides: `KEY=VALUE` each: settings of the run that are others now, such as where the base is.
        options: The rest.
        publishing: Where it is published then, or None.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    source, problems = _source(named, overrides, options)
    form, wrong = _form(source, options)
    if publishing:
        base = source.config.model.name if isinstance(form, PeftFolder) else None
        wrong = [*wrong, *publishing_errors(publishing, to, base)]
    raise_all([*_check_target(to, *_taken(named, source)), *wrong, *problems])
    return Export(source, form, to)


def _source(named: Path, overrides: Sequence[str], options: Options) -> tuple[Source, list[UserError]]:
    """Return what is exported, and what is wrong with it.

    Raises:
        UserError: There is nothing to export; or a setting of the run is wrong, or several are.
    """
    run, folder = _found(named)
    if run is None:
        return _without_run(named, overrides)
    config = load_config(run.config, overrides)
    if config.adapter is not None:
        adapter = TrainedAdapter(run, config, folder)
        return adapter, _check_adapter(adapter)
    return _trained_model(run, named, config, overrides, options)


def _found(named: Path) -> tuple[RunFolder | None, Path]:
    """Return the run that is meant, if there is one, and the folder of what it has trained.

    Raises:
        UserError: There is nothing of that name, or the run is not finished.
    """
    if not named.exists():
        if is_hub_id(str(named)):
            if problem := look_up_model(str(named), _WHERE):
                raise problem
            return None, named
        near = nearest_file(named)
        hint = f"did you mean `{near}`?" if near and near.is_dir() else "name a run's folder, or one of its checkpoints"
        raise UserError(f"there is no run {located(named)}", _WHERE, hint)
    if not named.is_dir():
        return None, named
    if (run := RunFolder(named)).state() in (RunState.STARTED, RunState.FINISHED):
        return run, _trained(run)
    if damage := run.damage():
        raise damage
    absolute = named.absolute()
    for above in (absolute.parent, absolute.parent.parent):
        if (run := RunFolder(above)).state() in (RunState.STARTED, RunState.FINISHED):
            return run, named
    return None, named


def _trained(run: RunFolder) -> Path:
    """Return the folder of the trained model.

    Raises:
        UserError: The run has none yet.
    """
    if run.final.is_dir():
        return run.final
    hint = f"finish it: `dpo train {run.config} --resume`"
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
            what = f"`{named}` is {'not a run' if named.is_dir() else 'a file, not a run'}'s folder"
            hint = "name the `output_dir` of a run, an adapter's folder, or a model"
            raise UserError(what, _WHERE, hint)
        problems.append(check_model(str(named), _WHERE) or missing_weights(str(named), _WHERE))
        if named.suffix.lower() == ".gguf":
            problems.append(missing_package("gguf", "gguf", _WHERE))
        source = PlainModel(as_config({"model": named}))
    if (named / MANIFEST).is_file():
        problems.append(_check_whole(named, "export it again, or copy it again"))
    if overrides:
        what = f"`{overrides[0]}` overrides a setting of a run, but `{named}` is in none"
        problems.append(UserError(what, _WHERE, "leave it out"))
    return source, [problem for problem in problems if problem]


def _is_model(named: Path) -> bool:
    """Tell whether a name is that of a model, right or wrong."""
    return (named / CONFIG).is_file() or named.suffix.lower() == ".gguf" or not named.exists()


def _trained_model(
    run: RunFolder, named: Path, config: Config, overrides: Sequence[str], options: Options
) -> tuple[TrainedModel, list[UserError]]:
    """Return the model of a run of all weights, and what is wrong with it.

    It is complete without the run's data and base. Where they are not there any more, its pairs are not scored, unless
    settings say where they should be.
    """
    folder, problems = _trained_folder(run, named, config, options)
    missing = [_of_run(problem, run, config) for problem in check_inputs(config)]
    if overrides:
        return TrainedModel(run, config, folder), [*problems, *missing]
    return TrainedModel(run, config, folder, missing[0].what if missing else None), problems


def _trained_folder(run: RunFolder, named: Path, config: Config, options: Options) -> tuple[Path, list[UserError]]:
    """Return the folder of a run's model that is meant, and what is wrong with it.

    Where the run is named it is `final`; or, where another dtype than that one's is asked for, the checkpoint of the
    same step, whose weights were not rounded.
    """
    if named.resolve() != run.path.resolve():
        rounded = named.resolve() == run.final.resolve() and _may_be_rounded(named, options)
        checked = [_check_trained(named), _rounded_already(run, named) if rounded else None]
        return named, [problem for problem in checked if problem]
    if not _may_be_rounded(run.final, options):
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


def _may_be_rounded(folder: Path, options: Options) -> bool:
    """Tell whether a dtype is asked for that the weights in a folder would have to be rounded to twice."""
    if options.dtype not in get_args(Dtype):
        return False
    return not stored_types(folder) <= {"float32", options.dtype}


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


def _form(source: Source, options: Options) -> tuple[Form, list[UserError]]:
    """Return as what something is written, and which options are wrong or have no effect."""
    problems = []
    if options.dtype not in (None, *get_args(Dtype)):
        hint = f"choose one of {', '.join(get_args(Dtype))}"
        problems.append(UserError(f"`{options.dtype}` is not a dtype that weights are written in", "--dtype", hint))
    if options.merge and not source.is_adapter:
        what = f"`{source.name}` is a whole model: it has no adapter to merge"
        problems.append(UserError(what, "--merge", "leave `--merge` out"))
    largest, wrong = _largest_bytes(options.max_shard_size)
    problems += wrong
    if options.gguf is not None:
        problems += [*_without_effect(options, "a GGUF file, whose type `--gguf` names", "leave it out")]
        return _gguf_form(source, options, problems)
    if not source.is_adapter or options.merge:
        return ModelFolder(cast(Dtype | None, options.dtype), largest), problems
    on = "an adapter, whose weights are written in float32, in a single file"
    return PeftFolder(), [*problems, *_without_effect(options, on, "add `--merge`, or leave it out")]


def _without_effect(options: Options, on: str, hint: str) -> Iterator[UserError]:
    """Yield the options that have no effect on a form."""
    for option, value in (("--dtype", options.dtype), ("--max-shard-size", options.max_shard_size)):
        if value is not None:
            yield UserError(f"`{option}` has no effect on {on}", option, hint)


def _gguf_form(source: Source, options: Options, problems: list[UserError]) -> tuple[Form, list[UserError]]:
    """Return the form of a GGUF file, and what is wrong with it beside some problems that are known."""
    kind = str(options.gguf).lower()
    if kind not in GGUF_TYPES:
        what = f"`{options.gguf}` is not a type that weights are written in as GGUF"
        problems.append(UserError(what, "--gguf", f"choose one of {', '.join(GGUF_TYPES)}"))
        kind = GGUF_TYPES[0]
    if source.is_adapter and not options.merge:
        what = "an adapter by itself is not written as GGUF"
        problems.append(UserError(what, "--gguf", "add `--merge`, which makes one model of it and its base"))
    if missing := missing_package("gguf", "gguf", "--gguf"):
        problems.append(missing)
    if problem := _gguf_problem(source):
        hint = "export it as a model folder, without `--gguf`"
        problems.append(UserError(problem, "--gguf", hint))
    return GgufFolder(kind), problems


def _gguf_problem(source: Source) -> str | None:
    """Say why there is no GGUF of an architecture, where its settings are here; the rest is left until it is loaded."""
    if isinstance(source, TrainedModel):
        file: Path | None = source.folder / CONFIG
    else:
        name = source.config.model.name
        file = cached_file(name, CONFIG) if is_hub_id(name) else Path(name) / CONFIG
    try:
        said = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError, RecursionError):
        return None
    return gguf_problem(said) if isinstance(said, dict) else None


def _largest_bytes(size: str | None) -> tuple[int | None, list[UserError]]:
    """Return the largest file of weights, and what is wrong with how it is written."""
    if size is None:
        return None, []
    found = _SIZE.fullmatch(size.strip())
    base = 1024 if found and found[3] else 1000
    num_bytes = int(float(found[1]) * base ** (1 + "KMGT".index(found[2].upper()))) if found else 0
    if num_bytes > 0:
        return num_bytes, []
    hint = "write a number and a unit, as in `500MB`, `5GB` or `2GiB`"
    return None, [UserError(f"`{size}` is not a size of a file", "--max-shard-size", hint)]


def _taken(named: Path, source: Source) -> list[Path]:
    """Return the folders that nothing is written into: what is exported, and its run."""
    run = [source.run.path] if isinstance(source, (TrainedModel, TrainedAdapter)) else []
    return [*([named] if named.is_dir() else []), *run]


def _check_target(to: Path, *taken: Path) -> Iterator[UserError]:
    """Say why the model cannot be written there, if so: what is there stays, and a run keeps its folder."""
    where = f"--to {to}"
    if to.exists() or to.is_symlink():
        yield _exists(to)
    elif any(to.resolve().is_relative_to(inside.resolve()) for inside in taken):
        yield UserError("the folder to write is inside what is exported", where, "choose a folder outside of it")
    elif obstacle := why_no_folder(to):
        yield UserError(f"the folder cannot be created: {obstacle}", where, "choose another folder")


def _exists(to: Path) -> UserError:
    return UserError(f"{located(to)} exists already", f"--to {to}", "choose another folder, or remove that one")


@contextlib.contextmanager
def reserved(to: Path) -> Iterator[None]:
    """Keep other exports away from the folder to be written while the context lasts.

    Raises:
        UserError: Another one is writing it, or has written it meanwhile; or the disk refuses.
    """
    try:
        with locked(lock_beside(to), "locking the folder to write"):
            if to.exists():
                raise _exists(to)
            yield
    except Locked as holder:
        hint = "wait until it has ended, or choose another folder"
        raise UserError(f"another export is writing the same folder: {holder}", f"--to {to}", hint) from None


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

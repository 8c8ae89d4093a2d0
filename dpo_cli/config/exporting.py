"""What `dpo export` is given, checked before anything slow is imported: the run, its weights, where the model goes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from dpo_cli.config.inputs import check_inputs
from dpo_cli.config.loading import as_config, load_config
from dpo_cli.config.schema import Config
from dpo_cli.errors import UserError, raise_all
from dpo_cli.evaluation.best import best_step
from dpo_cli.modeling.adapters.files import ADAPTER_CONFIG, base_of, holds_adapter
from dpo_cli.modeling.extras import missing_package
from dpo_cli.modeling.folders.model_names import check_model
from dpo_cli.modeling.held import Dtype
from dpo_cli.reporting.row_log import rows_in
from dpo_cli.settings import located, nearest_file
from dpo_cli.system.locks import Locked, lock_beside, locked
from dpo_cli.system.storage import DamagedFolder, verify, why_no_folder
from dpo_cli.training.run_folder import RunFolder, RunState, checkpoints_in

_RETYPED = "`--dtype float32`, without `--merge`, writes one in another dtype"

_PACKAGES = ("`adapter`", "`model.quantize`")
"""Settings that need packages, which are not named by a path."""


@dataclass(frozen=True)
class Merging:
    """An adapter that is to be merged.

    Attributes:
        run: The run that it is of; None: another program has trained it.
        config: What that run did; else all defaults, with the adapter's base.
        adapter: The folder of the adapter.
        to: The folder to be written.
        dtype: The dtype of its weights; None: those of the base's files.
    """

    run: RunFolder | None
    config: Config
    adapter: Path
    to: Path
    dtype: Dtype | None = None


@dataclass(frozen=True)
class Rewriting:
    """A checkpoint of a run of all weights that is to be a model folder in a dtype.

    Attributes:
        run: The run.
        config: What it did.
        checkpoint: The checkpoint.
        to: The folder to be written.
        dtype: The dtype of its weights.
    """

    run: RunFolder
    config: Config
    checkpoint: Path
    to: Path
    dtype: Dtype


def check_export(
    named: Path, to: Path, overrides: Sequence[str], *, merge: bool, dtype: str | None = None
) -> Merging | Rewriting:
    """Check what is exported, and where to.

    Args:
        named: A run's folder, or that of an adapter in it: `final`, or a checkpoint; or an adapter of another program.
        to: The folder to be written.
        overrides: `KEY=VALUE` each: settings of the run that are others now, such as where the base is.
        merge: Whether the adapter becomes part of the base.
        dtype: The dtype of the weights that are written; None: that of the base's files.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    if dtype not in (None, *get_args(Dtype)):
        hint = f"choose one of {', '.join(get_args(Dtype))}"
        raise UserError(f"`{dtype}` is not a dtype that weights are written in", "--dtype", hint)
    kind = cast(Dtype | None, dtype)
    run, adapter = _found(named)
    if run is None:
        return replace(_check_foreign(adapter, to, overrides, merge=merge), dtype=kind)
    config = load_config(run.config, overrides)
    if config.adapter is None and kind and not merge:
        checkpoint, problem = _check_checkpoint(run, named, config)
        raise_all(one for one in (problem, _check_target(to, named, run.path)) if one)
        return Rewriting(run, config, checkpoint, to, kind)
    problems = [_check_target(to, named, run.path), *_check_adapter(adapter, config)]
    if config.adapter is not None:
        problems.append(_check_merges(adapter, merge=merge))
        moved = _moved_base(adapter, config)
        problems += [moved] if moved else [_of_run(problem, run, config) for problem in check_inputs(config)]
    raise_all(problem for problem in problems if problem)
    return Merging(run, config, adapter, to, kind)


def _found(named: Path) -> tuple[RunFolder | None, Path]:
    """Return the run that is meant, if there is one, and the folder of what it has trained.

    Raises:
        UserError: There is none, or it is not finished.
    """
    if not named.exists():
        near = nearest_file(named)
        hint = f"did you mean `{near}`?" if near and near.is_dir() else "name a run's folder, or one of its checkpoints"
        raise UserError(f"there is no run {located(named)}", "the command line", hint)
    if not named.is_dir():
        hint = "name the run's folder: the `output_dir` of its configuration"
        raise UserError(f"`{named}` is a file, not a run", "the command line", hint)
    if (run := RunFolder(named)).state() in (RunState.STARTED, RunState.FINISHED):
        return run, _trained(run)
    absolute = named.absolute()
    for above in (absolute.parent, absolute.parent.parent):
        if (run := RunFolder(above)).state() in (RunState.STARTED, RunState.FINISHED):
            return run, named
    if holds_adapter(named):
        return None, named
    raise UserError(f"`{named}` is not a run's folder", "the command line", "name the `output_dir` of a run")


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


def _check_foreign(adapter: Path, to: Path, overrides: Sequence[str], *, merge: bool) -> Merging:
    """Check an adapter that has no run, and its base.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    base = base_of(adapter, "the command line")
    problems = [_check_target(to, adapter, adapter), _check_merges(adapter, merge=merge)]
    problems += [missing_package("peft", "adapters", "the command line"), check_model(base, str(adapter))]
    if overrides:
        what = f"`{overrides[0]}` overrides a setting of a run, but `{adapter}` is in none"
        problems.append(UserError(what, "the command line", "leave it out"))
    raise_all(problem for problem in problems if problem)
    return Merging(None, as_config({"model": base}), adapter, to)


def _check_target(to: Path, *taken: Path) -> UserError | None:
    """Say why the model cannot be written there, if so: what is there stays, and a run keeps its folder."""
    where = f"--to {to}"
    if to.exists() or to.is_symlink():
        return _exists(to)
    if any(to.resolve().is_relative_to(inside.resolve()) for inside in taken):
        return UserError("the folder to write is inside what is exported", where, "choose a folder outside of it")
    if obstacle := why_no_folder(to):
        return UserError(f"the folder cannot be created: {obstacle}", where, "choose another folder")
    return None


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


def _check_merges(adapter: Path, *, merge: bool) -> UserError | None:
    """Say that nothing else is done with an adapter, if so."""
    hint = f"add `--merge`; without it, `{adapter}` is what there is: a folder that PEFT reads"
    return None if merge else UserError("only merged models are exported", "the command line", hint)


def _check_adapter(adapter: Path, config: Config) -> list[UserError]:
    """Say why there is nothing to merge, if so."""
    if config.adapter is None:
        what = "the run trained all weights: it has no adapter to merge"
        return [
            UserError(what, str(adapter), f"use `{adapter}` as it is: it is a plain model folder already; {_RETYPED}")
        ]
    if not holds_adapter(adapter):
        what = f"there is no adapter: `{adapter}` has no {ADAPTER_CONFIG}"
        hint = "name the run's folder, its `final`, or one of its checkpoints"
        return [UserError(what, "the command line", hint)]
    try:
        verify(adapter)
    except DamagedFolder as damage:
        hint = "export a checkpoint of the run, or train again"
        return [UserError(f"the adapter is damaged: {damage}", str(adapter), hint)]
    return []


def _check_checkpoint(run: RunFolder, named: Path, config: Config) -> tuple[Path, UserError | None]:
    """Return the checkpoint that is meant, and why it cannot be used, if so.

    Where the run is named, it is the newest, or the best where `final/` is that.
    """
    if named.resolve() == run.final.resolve():
        hint = f"name the run's folder, `{run.path}`, or one of its checkpoints, which have all weights in float32"
        return named, UserError(f"`{named}` may be rounded already", "the command line", hint)
    of_run = named.resolve() == run.path.resolve()
    saved = checkpoints_in(run.checkpoints) if of_run else [named]
    if not saved:
        hint = f"use `{run.final}` as it is; `checkpoints.at_end: true` keeps one"
        return named, UserError("the run has no checkpoint, which would have all weights in float32", str(named), hint)
    by = config.evaluation.best_by
    best = best_step(rows_in(run.metrics), by) if of_run and by else None
    meant = saved[-1] if best is None else run.checkpoint(best)
    try:
        verify(meant)
    except DamagedFolder as damage:
        hint = "name another checkpoint of the run"
        return meant, UserError(f"the checkpoint is damaged: {damage}", str(meant), hint)
    return meant, None


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

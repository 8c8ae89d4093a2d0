"""What `dpo export` is given, checked before anything slow is imported: the source, the form, where it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_cli.config.export_forms import Form, Options, PeftFolder, find_form
from dpo_cli.config.export_sources import PlainModel, Source, TrainedAdapter, TrainedModel, find_source
from dpo_cli.config.inputs import look_up_on_hub
from dpo_cli.config.publishing import Publishing, publishing_errors
from dpo_cli.errors import USAGE, UserError, from_os_error, raise_all
from dpo_cli.settings import located
from dpo_cli.system.locks import Locked, lock_beside, locked
from dpo_cli.system.storage import why_no_folder


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
    source, problems = find_source(named, overrides, options.dtype)
    form, wrong = find_form(source, options)
    if publishing:
        base = source.config.model.name if isinstance(form, PeftFolder) else None
        wrong = [*wrong, *publishing_errors(publishing, to, base)]
    raise_all([*_check_target(to, *_taken(named, source)), *wrong, *problems])
    return Export(source, form, to)


def look_up(asked: Export, overrides: Sequence[str]) -> Export:
    """Ask the Hub for what is read that is not on this disk; return what is exported then.

    A model of all weights is complete without that. Where it is not there, the run's pairs are not scored, unless
    settings say where it should be.

    Raises:
        UserError: The Hub has something not, or cannot be reached; an `ExceptionGroup` where that holds of several.
    """
    if not asked.reads_inputs:
        return asked
    try:
        look_up_on_hub(asked.source.config)
    except (UserError, ExceptionGroup) as error:
        if overrides or not isinstance(asked.source, TrainedModel):
            raise
        first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        return replace(asked, source=replace(asked.source, unscored=str(getattr(first, "what", first))))
    return asked


def _taken(named: Path, source: Source) -> list[Path]:
    """Return the folders that nothing is written into: what is exported, and its run."""
    run = [source.run.path] if isinstance(source, (TrainedModel, TrainedAdapter)) else []
    return [*([named] if named.is_dir() else []), *run]


def _check_target(to: Path, *taken: Path) -> Iterator[UserError]:
    """Say why the model cannot be written there, if so: what is there stays, and a run keeps its folder."""
    where = f"--to {to}"
    try:
        there = to.exists() or to.is_symlink()
    except OSError as error:
        yield from_os_error(error, "looking for the folder to write", where, status=USAGE)
        return
    if there:
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

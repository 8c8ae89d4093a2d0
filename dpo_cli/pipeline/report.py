"""`dpo report`, and the report at the end of a run: what a run has recorded, as a page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpo_cli.config.changed import changed_settings
from dpo_cli.config.loading import load_config
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.json_file import write_results
from dpo_cli.reporting.pages.run.page import Known, notes_of, run_page
from dpo_cli.reporting.pages.run.runs_page import runs_page
from dpo_cli.reporting.run_record import RunRecord, read_run
from dpo_cli.system.signals import Interrupted
from dpo_cli.system.text import several
from dpo_cli.training.run_folder import RunFolder


def write_report(folders: Sequence[RunFolder], out: Path | None = None, console: Console | None = None) -> Path:
    """Write the page of a run, or of several; return its file.

    Args:
        folders: The runs, which may be at work.
        out: Where to write it; None: into the folder of the run, which is one.
        console: Where to say what of the runs' files cannot be read; None: the page says it alone.

    Raises:
        UserError: A file cannot be read or written, or nothing is recorded.
    """
    runs = [_read(folder) for folder in folders]
    if console:
        for note in (note for run in runs for note in notes_of(run, inside=False)):
            console.warning(note)
    page = run_page(runs[0], known_of(runs[0])) if len(runs) == 1 else runs_page(runs, [known_of(run) for run in runs])
    file = out or folders[0].report
    write_results(file, page, "writing the report")
    return file


def _read(folder: RunFolder) -> RunRecord:
    """Read a run.

    Raises:
        UserError: A file cannot be read, or nothing is recorded.
    """
    try:
        run = read_run(folder)
    except OSError as error:
        raise from_os_error(error, "reading the run", str(error.filename or folder.path)) from error
    if not run.steps and not run.evaluations:
        if unreadable := run.unreadable.get(folder.metrics.name):
            what = f"none of the {several(unreadable, 'line')} of {folder.metrics.name} can be read"
            raise UserError(what, str(folder.metrics), "put the run's own file back in place")
        what = "the run has recorded nothing yet: no step and no evaluation"
        raise UserError(what, str(folder.metrics), "wait for its first step")
    return run


def known_of(run: RunRecord) -> Known:
    """Return what the run's configuration says, where this version of the program understands it."""
    try:
        config = load_config(run.folder.config)
    except (UserError, ExceptionGroup, OSError):
        return Known()
    return Known(changed_settings(config))


def report_at_end(folder: RunFolder, console: Console) -> Path | None:
    """Write the page of a run that is done, which does not fail where the page cannot be written; return its file."""
    try:
        return write_report([folder])
    except Exception as error:
        what = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        console.warning(f"the report was not written: {what}; `dpo report {folder.path}` writes it later")
        return None


@contextlib.contextmanager
def report_if_broken_off(folder: RunFolder, *, writes: bool) -> Iterator[None]:
    """Write the page of a run that is interrupted or fails while the context lasts.

    Args:
        folder: The run.
        writes: Whether this process is the one that writes.
    """
    try:
        yield
    except (Interrupted, UserError, ExceptionGroup):
        if writes:
            # What ended the run, such as a full disk, is reported; it may keep the page from being written, too.
            with contextlib.suppress(Exception):
                write_report([folder])
        raise

"""What `dpo report` is given, checked before anything is read: the runs, and where the page goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dpo_cli.config.outputs import page_errors
from dpo_cli.errors import UserError, from_os_error, raise_all
from dpo_cli.settings import located, nearest_file
from dpo_cli.training.run_folder import RunFolder, RunState

_WHERE = "the command line"


def check_report(named: Sequence[Path], out: Path | None) -> list[RunFolder]:
    """Check the runs and the file to be written; return the runs.

    Args:
        named: The runs' folders.
        out: The file to be written; None: `report.html` in the folder of the run.

    Raises:
        UserError: Something is wrong; an `ExceptionGroup` where several things are.
    """
    if not named:
        raise UserError("no run is given", _WHERE, "give its folder, as in `dpo report runs/my`")
    problems = [problem for path in named if (problem := _not_a_run(path))]
    raise_all([*problems, *_given_twice(named), *_check_out(out, several=len(named) > 1)])
    return [RunFolder(path) for path in named]


def _not_a_run(path: Path) -> UserError | None:
    """Say why a path names no run that has recorded anything, if so."""
    try:
        if not path.exists():
            near = nearest_file(path)
            hint = f"did you mean `{near}`?" if near and near.is_dir() else "name the `output_dir` of a run"
            return UserError(f"there is no run {located(path)}", _WHERE, hint)
        if not path.is_dir():
            return UserError(f"`{path}` is a file, not a run", _WHERE, "name the run's folder: its `output_dir`")
        run = RunFolder(path)
        if run.state() not in (RunState.STARTED, RunState.FINISHED):
            if damage := run.damage():
                return damage
            above = next((one for one in (path.absolute().parent, path.absolute().parent.parent) if _is_run(one)), None)
            hint = f"did you mean `{above}`?" if above else "name the `output_dir` of a run"
            return UserError(f"`{path}` is not a run's folder", _WHERE, hint)
        if not run.metrics.exists():
            what = f"the run has recorded nothing yet: there is no {run.metrics.name}"
            return UserError(what, str(path), "wait for its first evaluation or step")
        # Reading later must not be refused.
        for file in (run.config, run.metrics):
            file.open("rb").close()
    except OSError as error:
        return from_os_error(error, "reading the run", str(error.filename or path))
    return None


def _is_run(path: Path) -> bool:
    return RunFolder(path).state() in (RunState.STARTED, RunState.FINISHED)


def _given_twice(named: Sequence[Path]) -> Iterator[UserError]:
    """Say which run is given more than once, under whatever names."""
    seen: dict[Path, Path] = {}
    for path in named:
        if (first := seen.setdefault(path.resolve(), path)) is not path:
            other = "" if str(first) == str(path) else f", as `{first}` and as `{path}`"
            yield UserError(f"the run `{first}` is given twice{other}", _WHERE, "name each run once")


def _check_out(out: Path | None, *, several: bool) -> Iterator[UserError]:
    """Say why the page cannot be written there, if so."""
    if out is None and several:
        what = "several runs have no folder of their own for their page"
        yield UserError(what, _WHERE, "name its file, as in `--out comparison.html`")
    yield from page_errors(out, "--out")

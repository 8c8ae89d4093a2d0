"""A run's folder: which files are in it, and who may write into it."""

from __future__ import annotations

import contextlib
import enum
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from dpo_cli.errors import USAGE, UserError, from_os_error
from dpo_cli.system.locks import Locked, locked
from dpo_cli.system.storage import MANIFEST, DamagedFolder, remove_strays_of, strays, verify, why_no_folder
from dpo_cli.training.recorded_settings import LENGTH, RecordedSettings

FIRST_DAY = "first_day"
"""Under which name a run's environment.json has the day on which the run began."""

METRICS, SAMPLES, HELD_OUT = "metrics", "samples", "held_out"
ROW_FILES = (METRICS, SAMPLES, HELD_OUT)
"""The files to which a run adds rows, without their ending, each row with the step that it is of."""

PLAN, STARTS, DATA_CHECK = "plan", "starts", "data_check"
"""Under which names it has what the run set out to do; after which step, and when, it was started or resumed; and the
folder in which `dpo prepare-data` keeps the check of its data."""

_LOCK = ".lock"


class RunState(enum.Enum):
    """What a folder holds."""

    FREE = "free"
    STARTED = "started"
    FINISHED = "finished"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Args:
        path: The folder, `output_dir`.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The configuration as resolved."""
        return self.path / "config.yaml"

    @property
    def recorded(self) -> RecordedSettings:
        """The settings in it."""
        return RecordedSettings(self.config)

    @property
    def environment(self) -> Path:
        """Versions, device, command line, commit."""
        return self.path / "environment.json"

    @property
    def row_files(self) -> dict[str, Path]:
        """The files to which a run adds rows, by their names in `ROW_FILES`."""
        return {name: self.path / f"{name}.jsonl" for name in ROW_FILES}

    @property
    def metrics(self) -> Path:
        """A row for each logged step and each evaluation."""
        return self.row_files[METRICS]

    @property
    def samples(self) -> Path:
        """A row for each answer to a held-out prompt, before step 1 and at each evaluation."""
        return self.row_files[SAMPLES]

    @property
    def held_out(self) -> Path:
        """A row for each held-out pair and evaluation."""
        return self.row_files[HELD_OUT]

    @property
    def facts(self) -> Path:
        """What the diagnosis knows of the run beside its rows."""
        return self.path / "facts.json"

    @property
    def report(self) -> Path:
        """The page of the run."""
        return self.path / "report.html"

    @property
    def recuts(self) -> Path:
        """From which steps on forward passes have fewer tokens, where memory ran out."""
        return self.path / "smaller_passes.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step, whether it is there or not."""
        return self.checkpoints / checkpoint_name(step)

    @property
    def final(self) -> Path:
        """The trained model."""
        return self.path / "final"

    @property
    def trackers(self) -> Path:
        """What trackers write to disk."""
        return self.path / "trackers"

    @property
    def _own_folders(self) -> tuple[Path, ...]:
        """What `clear` removes with all that is in it."""
        return self.final, self.checkpoints, self.trackers

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder while the context lasts.

        Raises:
            UserError: Another run is at work in it, or the disk refuses.
        """
        try:
            with locked(self.path / _LOCK, "locking the output folder"):
                yield
        except Locked as holder:
            raise self._taken(holder) from None

    def _taken(self, holder: Locked) -> UserError:
        hint = "wait until it has ended, or choose another `output_dir`"
        return UserError(f"another run is writing to the output folder: {holder}", str(self.path), hint)

    def state(self) -> RunState:
        """Tell what the folder holds now."""
        # Another rank may make the folder meanwhile: what is seen is what a listing has.
        try:
            others = set(self.path.iterdir()) - strays(self.path) - {self.path / _LOCK}
        except FileNotFoundError:
            return RunState.FREE
        except NotADirectoryError:
            return RunState.FOREIGN if self.path.exists() else RunState.FREE
        if self.recorded.exist():
            return RunState.FINISHED if (self.final / MANIFEST).is_file() else RunState.STARTED
        return RunState.FOREIGN if others else RunState.FREE

    def check(self, *, resume: bool, overwrite: bool, beside: bool = False) -> UserError | None:
        """Say why a run may not write here, if so; nothing is changed.

        Args:
            resume: Whether it goes on with a run that is here.
            overwrite: Whether it replaces one.
            beside: Whether it writes nothing, so that one may be here.
        """
        where = str(self.path)
        if "\0" in where:
            return UserError("the name of the output folder contains a NUL", repr(where), "choose another `output_dir`")
        try:
            state, obstacle = self.state(), why_no_folder(self.path)
        except OSError as error:
            return from_os_error(error, "looking at the output folder", where, status=USAGE)
        if state is RunState.FREE and obstacle:
            hint = "choose another `output_dir`, or remove what is in the way"
            return UserError(f"the output folder cannot be created: {obstacle}", where, hint)
        if state is RunState.FOREIGN:
            if damage := self.damage():
                return damage
            what = "the output folder contains other files" if self.path.is_dir() else "the output folder is a file"
            return UserError(what, where, "choose another `output_dir`; a run never writes among other files")
        if resume and self.checkpoints.exists() and not self.checkpoints.is_dir():
            hint = "remove it, or start again with `--overwrite`"
            return UserError("a file is in the place of the run's checkpoints", str(self.checkpoints), hint)
        if overwrite and (link := next((path for path in self._own_folders if path.is_symlink()), None)):
            what = f"`--overwrite` does not remove what a link leads to: {link.resolve()}"
            return UserError(what, str(link), "remove the link, or choose another `output_dir`")
        if state is not RunState.FREE and not (resume or overwrite or beside):
            if at_work := self.at_work():
                return at_work
            hint = "continue it with `--resume`, replace it with `--overwrite`, or choose another `output_dir`"
            return UserError("the output folder contains another run", where, hint)
        return None

    def damage(self) -> UserError | None:
        """Say so where the folder has the rows of a run, but not the settings as a run writes them."""
        if not (self.metrics.is_file() and self.environment.is_file()) or self.recorded.exist():
            return None
        return self.recorded.damage()

    def at_work(self) -> UserError | None:
        """Say which process is writing to the folder, if one is; where none has been, nothing is written to see it."""
        if not (self.path / _LOCK).exists():
            return None
        try:
            # Where the disk refuses a lock, nobody is known to be at work.
            with contextlib.suppress(UserError), locked(self.path / _LOCK, "locking the output folder"):
                pass
        except Locked as holder:
            return self._taken(holder)
        return None

    def check_moved(self, file: Path) -> None:
        """Refuse to begin anew a run that is to be resumed by its own config.yaml and whose folder was moved.

        Args:
            file: The configuration, of which `output_dir` is this folder.

        Raises:
            UserError: Beside the file is a run, and none is here.
        """
        run = RunFolder(file.parent)
        is_a_run = file.name == run.config.name and run.checkpoints.is_dir() and run.recorded.exist()
        if is_a_run and not self.path.exists():
            what = f"the run was moved: its `output_dir` is {self.path}, and there is no such folder"
            raise UserError(what, str(file), f"add `output_dir={run.path}` to continue it, or leave `--resume` out")

    def check_inputs(self, inputs: Sequence[str]) -> UserError | None:
        """Say which input `clear` would remove, if one."""
        doomed = [path.resolve() for path in self._own_folders]
        for name in inputs:
            if any(Path(name).resolve().is_relative_to(path) for path in doomed):
                what = f"`--overwrite` would remove `{name}`, which the run needs"
                return UserError(what, str(self.path), "choose another `output_dir`")
        return None

    def nothing_left(self, settings: dict[str, Any], *, extend: bool) -> list[str]:
        """Check that the trained model of a finished run is as it was saved; say that nothing is left to do.

        What was left of a page that was being written when the run ended is removed.

        Args:
            settings: Those of now, which have no effect any more where they are others.
            extend: Whether the run was to be extended.

        Raises:
            UserError: The model is damaged, or the run's settings cannot be read.
        """
        try:
            verify(self.final)
        except DamagedFolder as damage:
            hint = f"remove {self.final} and `--resume` writes it again, or start again with `--overwrite`"
            raise UserError(f"the trained model is damaged: {damage}", str(self.final), hint) from None
        remove_strays_of(self.report)
        more = ["to extend it, raise `training.epochs` or `training.max_steps`"] if extend else []
        if changed := self.recorded.changes(settings, ("output_dir", *LENGTH)):
            anew = "start again with `--overwrite`, or in another `output_dir`, to train with them"
            more.append(f"settings of a finished run cannot change: {'; '.join(changed.values())}; {anew}")
        return [f"the run in {self.path} is finished: {self.final}", *more]

    def first_day(self) -> date | None:
        """Return the day on which the run in the folder began, or None where that is not known."""
        try:
            found = json.loads(self.environment.read_bytes())
            return date.fromisoformat(found[FIRST_DAY]) if self.recorded.exist() else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def clear(self) -> None:
        """Remove an older run's files, and only those."""
        for folder in self._own_folders:
            if folder.is_dir():
                shutil.rmtree(folder)
            else:
                folder.unlink(missing_ok=True)
        for file in (*self.row_files.values(), self.environment, self.config, self.recuts, self.facts, self.report):
            file.unlink(missing_ok=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder of them, by their names, the oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=step_of)


def checkpoint_name(step: int) -> str:
    """Return what the checkpoint of a step is called."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint is of, by its name."""
    return int(checkpoint.name.removeprefix("step-"))

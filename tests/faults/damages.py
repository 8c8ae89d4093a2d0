"""Ways to damage a file, which of them are tried on which files, and what must then become of a run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.conftest import FULL
from tests.faults.trials import NUM_STEPS, Trial, require_error, require_on_from, require_same

TOKENIZER_FILES = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
STATE_FILES = ("optimizer.safetensors", "random_states.safetensors", "training_state.json")

Damage = Callable[[Path, Path], None]
"""Damages a file; the other is the file of the same name of another run."""


def _truncate(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(file: Path, other: Path) -> None:
    file.write_bytes(b"")


def _flip(file: Path, other: Path) -> None:
    flip(file, file.stat().st_size // 2)


def _remove(file: Path, other: Path) -> None:
    file.unlink()


def _put_folder(file: Path, other: Path) -> None:
    file.unlink()
    file.mkdir()


def _put_other(file: Path, other: Path) -> None:
    shutil.copy(other, file)


FLIPPED, MISSING, FOLDER, OTHERS = "a flipped byte", "missing", "a folder in its place", "another run's"
DAMAGES: dict[str, Damage] = {
    "truncated": _truncate,
    "emptied": _empty,
    FLIPPED: _flip,
    MISSING: _remove,
    FOLDER: _put_folder,
    OTHERS: _put_other,
}


def named(file: str, damage: str = MISSING) -> str:
    """Match a line that names a damaged file; with a manifest of other digests it is other files that are damaged."""
    return "" if file == "manifest.json" and damage in (FLIPPED, OTHERS) else f".*{re.escape(file)}"


def flip(file: Path, place: int) -> None:
    """Flip a bit of one byte."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cases(*files: str, same_in_every_run: tuple[str, ...] = (), few: int = len(DAMAGES)) -> list[tuple[str, str]]:
    """Return every file with every damage; in the short bench a few, with one file after the other.

    Args:
        files: The names of the files.
        same_in_every_run: Those that cannot be told from another run's.
        few: How many are tried in the short bench.
    """
    if FULL:
        return [(f, d) for f in files for d in DAMAGES if d != OTHERS or f not in same_in_every_run]
    differing = [file for file in files if file not in same_in_every_run]
    every = [(differing[place % len(differing)], damage) for place, damage in enumerate(DAMAGES)]
    return every[-few:]


def require_passed_over(trial: Trial, whole: Trial, other: Trial, file: str, damage: str) -> None:
    """Damage a file of the newest checkpoint: the run goes on from the one before, names it, and ends the same."""
    newest = f"step-{NUM_STEPS:06d}"
    DAMAGES[damage](trial.checkpoints / newest / file, other.checkpoints / newest / file)
    require_on_from(trial.train("--resume"), NUM_STEPS - 2, rf"^warning: .*{newest}{named(file, damage)}")
    require_same(trial, whole)


def require_refused_or_saved_again(trial: Trial, whole: Trial, other: Trial, file: str, damage: str) -> None:
    """Damage a file of what a run has trained: it is refused; without a manifest the run is not finished, and ends."""
    DAMAGES[damage](trial.final / file, other.final / file)
    ended = trial.train("--resume")
    if file == "manifest.json" and damage in (MISSING, FOLDER):
        require_on_from(ended, NUM_STEPS)
        require_same(trial, whole)
    else:
        require_error(ended, f"the trained model is damaged{named(file, damage)}", status=2)

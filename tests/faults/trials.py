"""Runs that something happens to, held against one that nothing disturbed.

A trial has a folder of its own with the run's output folder and a cache in it. Its configuration names the output
folder relatively, so that two trials that went alike have the same bytes in every file.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.system.storage import DamagedFolder, verify
from tests.conftest import differing_rows, make_config, write_rows
from tests.faults.disk_faults import OPEN, REACHED
from tests.faults.ledger import Ledger, Outcome
from tests.faults.zygote import Ended, Running, Zygote
from tests.waiting import wait_until

NUM_STEPS = 6

Fault = tuple[str, Mapping[str, Any]]
"""A function of `disk_faults`, by name, and its keyword arguments."""


def named(fault: Fault) -> Fault:
    """Return a fault as a zygote takes it."""
    return f"tests.faults.disk_faults:{fault[0]}", fault[1]


class Broken(AssertionError):
    """A promise was broken.

    Attributes:
        outcome: What that is called in the ledger.
    """

    def __init__(self, outcome: Outcome, what: str) -> None:
        super().__init__(f"{outcome.value}: {what}")
        self.outcome = outcome


@contextlib.contextmanager
def judged(ledger: Ledger, kind: str) -> Iterator[None]:
    """Take down what becomes of a case."""
    try:
        yield
    except Broken as broken:
        ledger.record(kind, broken.outcome)
        raise
    except Exception:
        ledger.record(kind, Outcome.LOST)
        raise
    ledger.record(kind)


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        zygote: Starts its processes.
        config: Its configuration.
        folder: Where it takes place.
    """

    zygote: Zygote
    config: Path
    folder: Path

    @property
    def run(self) -> Path:
        """The output folder."""
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        """The folder of prepared data and reference log-probabilities."""
        return self.folder / "cache"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.run / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained model."""
        return self.run / "final"

    def start(self, *arguments: str, fault: Fault | None = None) -> Running:
        """Start training."""
        where, arranged = {"DPO_CACHE_DIR": str(self.cache)}, fault and named(fault)
        return self.zygote.start(
            "train", "--config", self.config, *arguments, env=where, cwd=self.folder, fault=arranged
        )

    def train(self, *arguments: str, fault: Fault | None = None) -> Ended:
        """Train."""
        return self.start(*arguments, fault=fault).wait()

    def another(self, folder: Path, *parts: str) -> Trial:
        """Return a trial of the same configuration elsewhere that starts with some of this one's folders."""
        for part in parts:
            shutil.copytree(self.folder / part, folder / part)
        folder.mkdir(exist_ok=True)
        return replace(self, folder=folder)

    def unfinished(self, folder: Path) -> Trial:
        """Return a copy elsewhere that has all but the trained model, and the same cache."""
        trial = self.another(folder, "run", "cache")
        shutil.rmtree(trial.final)
        return trial

    def with_cache_only(self, folder: Path) -> Trial:
        """Return a trial elsewhere that finds everything prepared."""
        return self.another(folder, "cache")


@dataclass(frozen=True)
class Gate:
    """A place at which a run stands still until it may go on.

    Attributes:
        folder: A folder by which the run and the test tell each other.
    """

    folder: Path

    def at_flush(self, part: str) -> Fault:
        """Return the fault that stops a run where it keeps a file whose path holds a text."""
        return self._fault("held_at_flush", part=part)

    def at_step(self, step: int) -> Fault:
        """Return the fault that stops a run after a step."""
        return self._fault("held_at_step", step=step)

    def wait_for(self, running: Running) -> None:
        """Wait until the run stands there.

        Raises:
            TimeoutError: It does not get there.
        """

        def is_reached() -> bool:
            if not running.runs:
                raise TimeoutError(f"ended without coming to the gate:\n{running.said}")
            return (self.folder / REACHED).exists()

        wait_until(is_reached, lambda: f"has not come to the gate:\n{running.said}")

    def open(self) -> None:
        """Let the run go on."""
        (self.folder / OPEN).touch()

    def _fault(self, name: str, **keywords: Any) -> Fault:
        self.folder.mkdir(exist_ok=True)
        return name, {**keywords, "gate": str(self.folder)}


def configured(folder: Path, zygote: Zygote, model: Path, rows: Sequence[dict[str, Any]], **groups: Any) -> Trial:
    """Return a trial in `folder / "whole"` whose configuration, and data, stand beside it.

    With 28 rows it has `NUM_STEPS`, evaluations after some of them and checkpoints after others.

    Args:
        folder: Where the trial, its data and its configuration are put.
        zygote: Starts its processes.
        model: What is trained.
        rows: The preference pairs.
        groups: Settings, or groups of them, other than the usual ones.
    """
    pairs = write_rows(folder / "pairs.jsonl", rows)
    training = {
        "pairs_per_step": 4,
        "learning_rate": 1e-3,
        "shuffle": False,
        "micro_batch_tokens": 4096,
        "layout": "padded",
    }
    data = {"eval": 0.15} | groups.get("data", {})
    settings = {
        "checkpoints": {"every_steps": 2, "keep": 100},
        "evaluation": {"every_steps": 3 if data["eval"] else None},
        "output_dir": "run",
        **groups,
        "data": data,
        "training": training | groups.get("training", {}),
    }
    config = make_config(folder, model, pairs, "trial", **settings)
    whole = folder / "whole"
    whole.mkdir()
    return Trial(zygote, config, whole)


def undisturbed(folder: Path, zygote: Zygote, model: Path, rows: Sequence[dict[str, Any]], **groups: Any) -> Trial:
    """Return a trial that has been trained to its end."""
    trial = configured(folder, zygote, model, rows, **groups)
    ended = trial.train()
    assert ended.status == 0, ended.said
    return trial


@contextlib.contextmanager
def disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a small disk on a folder; the test is skipped where that is not allowed."""
    folder.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a disk takes privileges")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def change_disk(folder: Path, options: str) -> None:
    """Make a mounted disk larger or smaller (`size=…`), read-only (`ro`) or not (`rw`)."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def require_error(ended: Ended, what: str, *, status: int | tuple[int, ...] = 1) -> None:
    """Require one clear error: what went wrong, where, and a hint."""
    require_no_traceback(ended)
    statuses = (status,) if isinstance(status, int) else status
    _require(ended.status in statuses, f"status {ended.status} instead of {status}:\n{ended.said}")
    errors = re.split(r"^error: ", ended.said, flags=re.MULTILINE)[1:]
    _require(len(errors) == 1, f"{len(errors)} errors instead of one:\n{ended.said}")
    _require(re.search(what, errors[0]) is not None, f"an error that does not say {what!r}:\n{ended.said}")
    _require(re.search(r"^  in \S", errors[0], re.MULTILINE) is not None, f"an error without a place:\n{ended.said}")
    _require(re.search(r"^hint: \S", errors[0], re.MULTILINE) is not None, f"an error without a hint:\n{ended.said}")


def require_said(ended: Ended, *lines: str) -> None:
    """Require a good end, and lines that match."""
    require_no_traceback(ended)
    _require(ended.status == 0, f"status {ended.status}:\n{ended.said}")
    for line in lines:
        _require(re.search(line, ended.said, re.MULTILINE) is not None, f"not said: {line!r}\n{ended.said}")


def require_on_from(ended: Ended, step: int, *lines: str) -> None:
    """Require a good end of a run that went on after a step, and lines that match."""
    require_said(ended, *lines, f"^resuming after step {step}: ")


def require_no_traceback(ended: Ended) -> None:
    """Require that the user was not shown one."""
    if "Traceback" in ended.said:
        raise Broken(Outcome.TRACEBACK, ended.said)


def require_kept(trial: Trial) -> None:
    """Require that every checkpoint is whole, and that nothing lies about that was never finished."""
    for path in sorted(trial.checkpoints.glob("step-*")):
        _require_whole(path)
    if trial.final.exists():
        _require_whole(trial.final)
    require_no_strays(trial)


def require_no_strays(trial: Trial) -> None:
    """Require that no temporary file or lock is left."""
    left = [str(path) for path in trial.folder.rglob(".*")]
    _require(not left, f"left behind: {left}")


def require_same(trial: Trial, whole: Trial) -> None:
    """Require the result of the undisturbed run, and nothing left behind."""
    require_result(trial, whole)
    require_kept(trial)


def require_result(trial: Trial, whole: Trial) -> None:
    """Require every byte of the trained model, and every row of metrics but for the clock."""
    ours, theirs = content(trial.final), content(whole.final)
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        raise Broken(Outcome.WRONG, f"other bytes in {differing}")
    if differing := differing_rows(trial.run, whole.run):
        raise Broken(Outcome.WRONG, f"other rows in {differing}")


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _require_whole(folder: Path) -> None:
    try:
        verify(folder)
    except DamagedFolder as damage:
        raise Broken(Outcome.LOST, f"{folder} is not whole: {damage}") from None


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(Outcome.LOST, what)

"""Checkpoints: written whole or not at all, verified before they are believed, the oldest pruned.

    step-000100/
      config.json, model.safetensors, tokenizer.json …    a Hugging Face folder
      optimizer.safetensors                               the optimizer's state: AdamW's moments, say
      random_states.safetensors                           one for each rank
      reference.safetensors                               the reference's weights, where it moves
      training_state.json                                 step, schedule, scaler, what the run stands on
      manifest.json                                       sizes and digests of all of them

Nothing in it is pickled, so loading one executes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from dpo_cli.errors import UserError, from_os_error
from dpo_cli.modeling.saving import saved_folder, write_model
from dpo_cli.system.storage import DamagedFolder, discard, make_folder, remove_strays, verify
from dpo_cli.training.loop import NotFinite
from dpo_cli.training.state import State, TrainingParts, random_states, read_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes a run's checkpoints, of which the newest stay.

    Args:
        folder: The folder of checkpoints.
        keep: How many of the newest stay.
        background: Whether a copy in memory is written while training goes on. At most one is being written; where
            that fails, the next call says so.
        newest: The step of the newest checkpoint that there is, or 0.

    Attributes:
        newest: The same, at any moment; the main process knows.
    """

    def __init__(self, folder: Path, keep: int, *, background: bool, newest: int = 0) -> None:
        self.folder, self.keep, self._background, self.newest = folder, keep, background, newest
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def save(self, step: int, parts: TrainingParts, metrics: str = "") -> Path:
        """Save the state after `step`; every rank calls it, the main process writes.

        Args:
            step: Optimizer steps taken.
            parts: What is saved.
            metrics: The digest of all rows of metrics.jsonl.

        Raises:
            UserError: The disk refuses this checkpoint, or refused the one before. The older ones are untouched.
        """
        states = gather_object([random_states(parts.accelerator.process_index)])
        target = self.folder / f"step-{step:06d}"
        if parts.accelerator.is_main_process:
            self.finish()
            state = State.of(step, parts, states, metrics)
            if self._background:
                self._thread = threading.Thread(target=self._try_to_write, args=(target, state.copied()), daemon=True)
                self._thread.start()
            else:
                self._write(target, state)
        if not self._background:
            parts.accelerator.wait_for_everyone()
        return target

    def finish(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            UserError: The disk refused it.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._failed:
            failed, self._failed = self._failed, None
            raise failed

    def _try_to_write(self, target: Path, state: State) -> None:
        try:
            self._write(target, state)
        except BaseException as error:
            self._failed = error

    def _write(self, target: Path, state: State) -> None:
        try:
            make_folder(self.folder)
            remove_strays(self.folder)
        except OSError as error:
            raise from_os_error(error, "saving a checkpoint", str(target)) from error
        with saved_folder(target, "saving a checkpoint") as temporary:
            write_model(temporary, state.policy, state.tokenizer, state.weights)
            state.write_beside_model(temporary)
        self.newest = state.facts.step
        _prune(self.folder, self.keep, state.facts.step)


def newest_whole(folder: Path, stands_on: Mapping[str, str]) -> Path | None:
    """Return the newest checkpoint of this run whose every byte is as it was saved; say which were passed over.

    Args:
        folder: The folder of checkpoints.
        stands_on: What the run stands on.

    Raises:
        UserError: There are checkpoints, and none is whole and of this run.
    """
    found = _checkpoints(folder)
    refusal = None
    for path in reversed(found):
        try:
            verify(path)
            facts = read_facts(path)
        except DamagedFolder as damage:
            _log.warning("passing over the damaged checkpoint %s: %s", path, damage)
            continue
        other = _difference(facts.stands_on, stands_on)
        if other is None:
            return path
        _log.warning("passing over the checkpoint %s: the %s is not this run's", path, other)
        same = " (another version of the program may prepare the same data otherwise)" * (other == "data")
        hint = f"bring back the {other} that the run was started with{same}, or start again with `--overwrite`"
        what = f"the {other} is not the one that the run was started with"
        refusal = refusal or UserError(what, str(path), hint)
    if refusal:
        raise refusal
    if found:
        hint = "bring one back from elsewhere, or start again with `--overwrite`"
        raise UserError("every checkpoint is damaged: there is nothing to go on from", str(folder), hint)
    return None


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint by its name, whole or not; 0 where there is none."""
    return max(map(_step_of, _checkpoints(folder)), default=0)


def check_finite(step: int, pairs: tuple[int, ...], policy: PreTrainedModel) -> None:
    """Refuse to save weights that are NaN or infinite.

    Raises:
        NotFinite: Some are.
    """
    if not all(bool(torch.isfinite(weights).all()) for weights in policy.parameters()):
        raise NotFinite(step, pairs, "weights")


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return the first thing that a run stands on and that is another, or None."""
    return next((name for name, digest in now.items() if before.get(name) != digest), None)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(found, key=_step_of)


def _prune(folder: Path, keep: int, step: int) -> None:
    """Remove all but the newest checkpoints up to a step: later ones were passed over."""
    for path in [path for path in _checkpoints(folder) if _step_of(path) <= step][:-keep]:
        discard(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))

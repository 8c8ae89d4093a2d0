"""Checkpoints: written whole or not at all, verified before they are believed, the oldest pruned.

    step-000100/
      config.json, model.safetensors, tokenizer.json …    a Hugging Face folder; of an adapter, PEFT's
      optimizer.safetensors                               the optimizer's state: AdamW's moments, say
      random_states.safetensors                           one for each rank
      reference.safetensors                               the reference's weights, where it moves
      training_state.json                                 step, schedule, scaler, what the run started from
      manifest.json                                       sizes and digests of all of them

Where weights are sharded over processes, each writes what it has into the same folder, and shards.json says where
what is (`modeling/folders/shard_files.py`):

    step-000100/
      config.json, tokenizer.json …                       a Hugging Face folder without weights; of an adapter, with
      weights-00001-of-00002.safetensors                  one for each process, as for optimizer and reference
      optimizer-00001-of-00002.safetensors
      shards.json

Nothing in it is pickled, so loading one executes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from dpo_cli.errors import UserError
from dpo_cli.modeling.digests import SCHEME
from dpo_cli.modeling.folders.saving import disk_refusals, saved_folder
from dpo_cli.settings import located
from dpo_cli.system.storage import (
    DamagedFolder,
    discard,
    finish_folder,
    make_folder,
    read_manifest,
    remove,
    remove_strays,
    started_folder,
    verify,
)
from dpo_cli.training.learner import Learner, NotFinite
from dpo_cli.training.run_folder import checkpoint_name, checkpoints_in, step_of
from dpo_cli.training.sharded_state import ShardedSnapshot
from dpo_cli.training.state import STATE, RunNotes, Snapshot, random_states, read_copied_state, read_state
from dpo_cli.training.together import Together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpo_cli.modeling.policy import Policy

FINGERPRINTS, HELD = "fingerprints", "held"
"""Under which names the manifest of a trained adapter has digests of what the run began with, and how that was held."""

PRECISION = "precision of the base"
"""What a run that trains an adapter says of its base beside its digest."""

_REASONS = {
    "data": "another version of the program may prepare the same data differently",
    PRECISION: "`model.dtype: auto` is bfloat16 on GPUs that have it, and float32 elsewhere",
}
"""Why something may be another although nobody has changed it."""

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes a run's checkpoints, of which the newest and the best stay.

    Args:
        folder: The folder of checkpoints.
        tokenizer: Saved with every model.
        keep: How many of the newest stay.
        background: Whether a copy in memory is written while training goes on. At most one is being written; where
            that fails, the next call says so.
        together: The processes that write, where weights are sharded over them; None: the main process does.
        newest: The step of the newest checkpoint that there is, or 0.

    Attributes:
        newest: The same, at any moment; the main process knows.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        keep: int,
        *,
        background: bool,
        newest: int = 0,
        together: Together | None = None,
    ) -> None:
        self.folder, self.keep, self.newest = folder, keep, newest
        self._tokenizer, self._background, self._together = tokenizer, background, together
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def save(self, learner: Learner, notes: RunNotes, best: Collection[int] = ()) -> Path:
        """Save the state after the learner's last step; every rank calls it, the main process or all of them write.

        Args:
            learner: What is saved.
            notes: What is said of the run.
            best: The steps of checkpoints that stay beside the newest; the main process has to know them.

        Raises:
            UserError: The disk refuses this checkpoint, or refused the one before. The older ones are untouched.
        """
        accelerator = learner.accelerator
        states = gather_object([random_states(accelerator.process_index)])
        target = self.folder / checkpoint_name(learner.done)
        if self._together or accelerator.is_main_process:
            self.finish()
            kind = ShardedSnapshot if self._together else Snapshot
            snapshot = kind.of(learner, self._tokenizer, states, notes)
            if self._background:
                written = snapshot.copied()
                self._thread = threading.Thread(target=self._try_to_write, args=(target, written, best), daemon=True)
                self._thread.start()
            else:
                self._write(target, snapshot, best)
        if not self._background:
            accelerator.wait_for_everyone()
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

    def _try_to_write(self, target: Path, snapshot: Snapshot | ShardedSnapshot, best: Collection[int]) -> None:
        try:
            self._write(target, snapshot, best)
        except BaseException as error:
            self._failed = error

    def _write(self, target: Path, snapshot: Snapshot | ShardedSnapshot, best: Collection[int]) -> None:
        doing = "saving a checkpoint"
        if isinstance(snapshot, ShardedSnapshot):
            assert self._together is not None
            self._write_together(target, snapshot, self._together, doing)
        else:
            with disk_refusals(doing, target):
                self._make_room()
            with saved_folder(target, doing) as temporary:
                snapshot.write(temporary)
        self.newest = snapshot.record.step
        if self._together is None or self._together.is_main:
            prune(self.folder, self.keep, self.newest, best)

    def _write_together(self, target: Path, snapshot: ShardedSnapshot, together: Together, doing: str) -> None:
        """Write what each process has into one folder, which the main process seals and renames."""

        def begin() -> Path:
            self._make_room()
            return started_folder(target)

        def finish() -> None:
            snapshot.write_rest(temporary, parts, together.num_ranks)
            finish_folder(temporary, target, {part.file: (part.num_bytes, part.digest) for part in parts})

        temporary = together.done_by_main(begin, doing, target)
        try:
            own = together.done(lambda: snapshot.write_own(temporary, together.rank, together.num_ranks), doing, target)
            parts = [part for each in own for part in each]
            together.done_by_main(finish, doing, target)
        except BaseException:
            if together.is_main:
                remove(temporary)
            raise

    def _make_room(self) -> None:
        """Make the folder of checkpoints, without what interrupted writers left there."""
        make_folder(self.folder)
        remove_strays(self.folder)


def prune(folder: Path, keep: int, step: int, best: Collection[int] = ()) -> None:
    """Remove all but the newest checkpoints up to a step, and those of the best steps: later ones were passed over."""
    for path in [path for path in checkpoints_in(folder) if step_of(path) <= step][:-keep]:
        if step_of(path) not in best:
            discard(path)


def check_whole(path: Path, fingerprints: Mapping[str, str]) -> None:
    """Check a checkpoint whose weights are going to be read.

    Raises:
        DamagedFolder: It is missing, not as it was saved, or of another run.
    """
    verify(path)
    if other := _difference(read_state(path).fingerprints, fingerprints):
        raise DamagedFolder(f"the {other} is not this run's")


def newest_whole(
    folder: Path, fingerprints: Mapping[str, str], sources: Mapping[str, str | None] | None = None
) -> Path | None:
    """Return the newest checkpoint of this run whose every byte is as it was saved; say which were passed over.

    Args:
        folder: The folder of checkpoints.
        fingerprints: Digests of what the run needs to find unchanged.
        sources: Where some of that was read from, by the names of the digests.

    Raises:
        UserError: There are checkpoints, and none is whole and of this run.
    """
    found = checkpoints_in(folder)
    refusal = None
    for path in reversed(found):
        try:
            verify(path)
            record = read_state(path)
        except DamagedFolder as damage:
            _log.warning("skipping the damaged checkpoint %s: %s", path, damage)
            continue
        other = _difference(record.fingerprints, fingerprints)
        if other is None:
            return path
        if _is_older(record.fingerprints.get(other, ""), fingerprints[other]):
            _log.warning("skipping the checkpoint %s: another version of dpo wrote it", path)
            hint = "resume the run with the version that began it, or start again with `--overwrite`"
            what = f"another version of dpo wrote the checkpoint: it identifies the {other} in another way"
            refusal = refusal or UserError(what, str(path), hint)
            continue
        _log.warning("skipping the checkpoint %s: the %s is not this run's", path, other)
        about = f" ({_REASONS[other]})" if other in _REASONS else ""
        hint = f"restore the {other} that the run was started with{about}, or start again with `--overwrite`"
        source = (sources or {}).get(other)
        what = f"the {other}{f' {located(source)}' if source else ''} is not the one that the run was started with"
        refusal = refusal or UserError(what, str(path), hint)
    if refusal:
        raise refusal
    if found:
        hint = "restore one from elsewhere, or start again with `--overwrite`"
        raise UserError("every checkpoint is damaged: there is nothing to continue from", str(folder), hint)
    return None


def beginning_of(folder: Path) -> Mapping[str, str]:
    """Return digests of what the run began with, by a checkpoint or by its trained adapter, wherever they are now.

    They are empty where none are kept, or another version of the program made them, which can be compared with nothing.

    Raises:
        DamagedFolder: It is neither.
    """
    kept, _ = _noted(folder)
    if not isinstance(kept, dict) or not str(kept.get("model")).startswith(SCHEME):
        return {}
    return kept


def held_at_beginning(folder: Path) -> str | None:
    """Return how the model was held of which `beginning_of` has a digest; None: that is not known.

    Raises:
        DamagedFolder: As `beginning_of`.
    """
    _, held = _noted(folder)
    return held if isinstance(held, str) and held else None


def _noted(folder: Path) -> tuple[object, object]:
    """Return what a folder says of what the run began with, and of how that was held."""
    if (folder / STATE).is_file():
        state = read_copied_state(folder)
        return state.fingerprints, state.held
    manifest = read_manifest(folder)
    return manifest.get(FINGERPRINTS), manifest.get(HELD)


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint by its name, whole or not; 0 where there is none."""
    return max(map(step_of, checkpoints_in(folder)), default=0)


def check_finite(step: int, pairs: tuple[int, ...], policy: Policy) -> None:
    """Refuse to save weights that are NaN or infinite.

    Raises:
        NotFinite: Some are.
    """
    if not policy.weights.finite():
        raise NotFinite(step, pairs, "weights")


def _is_older(before: str, now: str) -> bool:
    """Tell whether another version of the program made a digest of weights."""
    return now.startswith(SCHEME) and not before.startswith(SCHEME)


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return the first thing that is another than when the run was started, or None."""
    return next((name for name, digest in now.items() if before.get(name) != digest), None)

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

import dataclasses
import importlib.metadata
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.backends import cpu

from dpo_cli.errors import UserError
from dpo_cli.modeling.loading import load_weights, saved_model
from dpo_cli.storage import DamagedFolder, discard, make_folder, remove_strays, verify
from dpo_cli.training.loop import NotFinite, Skips

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_cli.preference.terms import Memory

_STATE, _OPTIMIZER, _RANDOM = "training_state.json", "optimizer.safetensors", "random_states.safetensors"
_REFERENCE = "reference.safetensors"
_FACTS = {"step", "stands_on", "surroundings", "memory", "skipped", "optimizer", "schedule", "scaler"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingParts:
    """Everything a checkpoint saves and restores.

    Attributes:
        policy: The model inside whatever Accelerate wrapped.
        tokenizer: Saved beside the model, so that the folder stands alone.
        optimizer: The prepared optimizer.
        schedule: The learning rate's schedule.
        accelerator: Knows the ranks and the gradient scaler.
        reference: The reference, where it moves, or None.
        memory: What the objective keeps from step to step; changed in place.
        skips: The steps that were not taken; changed in place.
        stands_on: Digests of what a resumed run must find unchanged: the model before step 1, data, settings.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: Any
    schedule: LambdaLR
    accelerator: Accelerator
    reference: PreTrainedModel | None
    memory: Memory
    skips: Skips
    stands_on: dict[str, str]


class CheckpointWriter:
    """Writes a run's checkpoints, of which the newest stay.

    Args:
        folder: The folder of checkpoints.
        keep: How many of the newest stay.
        background: Whether a copy in memory is written while training goes on. At most one is being written; where
            that fails, the next call says so.
    """

    def __init__(self, folder: Path, keep: int, *, background: bool) -> None:
        self.folder, self.keep, self._background = folder, keep, background
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def save(self, step: int, parts: TrainingParts) -> Path:
        """Save the state after `step`; every rank calls it, the main process writes.

        Raises:
            UserError: The disk refuses this checkpoint, or refused the one before. The older ones are untouched.
        """
        random_states = gather_object([_random_states(parts.accelerator.process_index)])
        target = self.folder / f"step-{step:06d}"
        if parts.accelerator.is_main_process:
            self.finish()
            state = _State.of(step, parts, random_states)
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

    def _try_to_write(self, target: Path, state: _State) -> None:
        try:
            self._write(target, state)
        except BaseException as error:
            self._failed = error

    def _write(self, target: Path, state: _State) -> None:
        make_folder(self.folder)
        remove_strays(self.folder)
        with saved_model(target, state.policy, state.tokenizer, "saving a checkpoint", state.weights) as temporary:
            for name, tensors in state.tensors.items():
                save_file(tensors, temporary / name)
            (temporary / _STATE).write_text(json.dumps(state.facts, indent=1) + "\n", encoding="utf-8")
        _prune(self.folder, self.keep)


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds.

    Attributes:
        policy: The model, whose weights go on changing.
        tokenizer: Saved beside it.
        weights: The policy's weights by name, tied ones under each of their names.
        tensors: All else that is made of tensors, by file and name.
        facts: The content of training_state.json.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, Tensor]
    tensors: dict[str, dict[str, Tensor]]
    facts: dict[str, Any]

    @classmethod
    def of(cls, step: int, parts: TrainingParts, random_states: Sequence[dict[str, Tensor]]) -> _State:
        """Look at the state as it is now, without copying it."""
        accelerator = parts.accelerator
        optimizer, groups = _optimizer_to_tensors(parts.optimizer.state_dict())
        tensors = {_OPTIMIZER: optimizer, _RANDOM: {k: v for states in random_states for k, v in states.items()}}
        if parts.reference is not None:
            tensors[_REFERENCE] = _weights(parts.reference)
        facts = {
            "step": step,
            "stands_on": parts.stands_on,
            "surroundings": surroundings(accelerator),
            "memory": dict(parts.memory),
            "skipped": parts.skips.count,
            "optimizer": groups,
            "schedule": {"last_epoch": parts.schedule.last_epoch},
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        return cls(parts.policy, parts.tokenizer, parts.policy.state_dict(), tensors, facts)

    def copied(self) -> _State:
        """Return the same in memory of its own, which no step changes."""
        copies: dict[tuple[int, torch.Size], Tensor] = {}

        def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for tensor in tensors.values():
                # Tied weights stay tied, so that they are written once.
                if (at := (tensor.data_ptr(), tensor.shape)) not in copies:
                    copies[at] = tensor.detach().to("cpu", copy=True)
            return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in tensors.items()}

        tensors = {name: copy(named) for name, named in self.tensors.items()}
        facts: dict[str, Any] = json.loads(json.dumps(self.facts))
        return dataclasses.replace(self, weights=copy(self.weights), tensors=tensors, facts=facts)


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
            state = _read_state(path)
        except DamagedFolder as damage:
            _log.warning("passing over the damaged checkpoint %s: %s", path, damage)
            continue
        other = _difference(state["stands_on"], stands_on)
        if other is None:
            return path
        _log.warning("passing over the checkpoint %s: the %s is not this run's", path, other)
        hint = f"bring back the {other} that the run was started with, or start again with `--overwrite`"
        what = f"the {other} is not the one that the run was started with"
        refusal = refusal or UserError(what, str(path), hint)
    if refusal:
        raise refusal
    if found:
        hint = "bring one back from elsewhere, or start again with `--overwrite`"
        raise UserError("every checkpoint is damaged: there is nothing to go on from", str(folder), hint)
    return None


def load_checkpoint(path: Path, parts: TrainingParts) -> int:
    """Restore everything from a checkpoint that `newest_whole` found; return the steps that were taken.

    Raises:
        UserError: It does not fit the model.
    """
    try:
        state = _read_state(path)
        tensors, random_states = load_file(path / _OPTIMIZER), load_file(path / _RANDOM)
        reference = load_file(path / _REFERENCE) if parts.reference is not None else {}
    except (OSError, DamagedFolder, SafetensorError) as error:
        hint = "remove that folder to go on from an older checkpoint, or start again with `--overwrite`"
        raise UserError(f"not a checkpoint of a run: {error}", str(path), hint) from error
    load_weights(parts.policy, path)
    if parts.reference is not None:
        for name, weights in _weights(parts.reference).items():
            weights.copy_(reference[name])
    parts.memory.update(state["memory"])
    parts.skips.count = state["skipped"]
    parts.optimizer.load_state_dict(_optimizer_from_tensors(tensors, state["optimizer"]))
    # The schedule is a function of the step; its rate stands in the optimizer's groups already.
    parts.schedule.last_epoch = state["schedule"]["last_epoch"]
    parts.schedule._last_lr = [group["lr"] for group in parts.optimizer.param_groups]
    if parts.accelerator.scaler and state["scaler"]:
        parts.accelerator.scaler.load_state_dict(state["scaler"])
    now = surroundings(parts.accelerator)
    if state["surroundings"].get("processes") == now["processes"]:
        _restore_random_states(random_states, parts.accelerator.process_index)
    if parts.accelerator.is_main_process and (other := _changes(state["surroundings"], now)):
        _log.warning("the run goes on at the right pair, but maybe not bit for bit: %s", "; ".join(other))
    return int(state["step"])


def surroundings(accelerator: Accelerator) -> dict[str, Any]:
    """Return what decides how numbers are rounded: a run is the same to the last bit only where all of it is."""
    device = accelerator.device
    on_cuda = device.type == "cuda"
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_cuda else f"{device.type} {cpu.get_cpu_capability()}",
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def check_finite(step: int, pairs: tuple[int, ...], policy: PreTrainedModel) -> None:
    """Refuse to save weights that are NaN or infinite.

    Raises:
        NotFinite: Some are.
    """
    if not all(bool(torch.isfinite(weights).all()) for weights in policy.parameters()):
        raise NotFinite(step, pairs, "weights")


def _read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's training_state.json.

    Raises:
        DamagedFolder: It is not what was written there, or another step's.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFolder(f"{_STATE} cannot be read: {error}") from None
    lacking = sorted(_FACTS - state.keys()) if isinstance(state, dict) else sorted(_FACTS)
    if lacking:
        raise DamagedFolder(f"{_STATE} lacks {', '.join(lacking)}")
    if path.name != f"step-{state['step']:06d}":
        raise DamagedFolder(f"it is the checkpoint of step {state['step']}")
    return cast("dict[str, Any]", state)


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return the first thing that a run stands on and that is another, or None."""
    return next((name for name, digest in now.items() if before.get(name) != digest), None)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs: `threads 2 → 1`."""
    return [f"{name} {before.get(name)} → {value}" for name, value in now.items() if before.get(name) != value]


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints."""
    for path in _checkpoints(folder)[:-keep]:
        discard(path)


def _optimizer_to_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split an optimizer's state into named tensors and the groups' plain settings."""
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def _optimizer_from_tensors(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _random_states(rank: int) -> dict[str, Tensor]:
    states = {f"cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda.{rank}"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Tensor], rank: int) -> None:
    torch.set_rng_state(states[f"cpu.{rank}"])
    if torch.cuda.is_available() and f"cuda.{rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{rank}"])

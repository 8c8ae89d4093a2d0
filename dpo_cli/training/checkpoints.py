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

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpo_cli.errors import UserError
from dpo_cli.modeling.loading import load_weights, saved_model
from dpo_cli.storage import DamagedFolder, remove_strays, verify

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_cli.preference.terms import Memory

_STATE, _OPTIMIZER, _RANDOM = "training_state.json", "optimizer.safetensors", "random_states.safetensors"
_REFERENCE = "reference.safetensors"
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
        stands_on: Digests of what a resumed run must find unchanged: the model before step 1, the data.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: Any
    schedule: LambdaLR
    accelerator: Accelerator
    reference: PreTrainedModel | None
    memory: Memory
    stands_on: dict[str, str]


def save_checkpoint(folder: Path, step: int, parts: TrainingParts, keep: int) -> Path:
    """Save the state after `step`; afterwards only the `keep` newest checkpoints stay.

    Every rank calls it; the main process writes.

    Args:
        folder: The folder of checkpoints.
        step: Optimizer steps taken.
        parts: What is saved.
        keep: How many checkpoints stay, this one included.

    Raises:
        UserError: The disk refuses. The older checkpoints are untouched then.
    """
    accelerator = parts.accelerator
    random_states = gather_object([_random_states(accelerator.process_index)])
    target = folder / f"step-{step:06d}"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        remove_strays(folder)
        with saved_model(target, parts.policy, parts.tokenizer, "saving a checkpoint") as temporary:
            tensors, settings = _optimizer_to_tensors(parts.optimizer.state_dict())
            save_file(tensors, temporary / _OPTIMIZER)
            if parts.reference is not None:
                save_file(_weights(parts.reference), temporary / _REFERENCE)
            save_file({k: v for states in random_states for k, v in states.items()}, temporary / _RANDOM)
            state = {
                "step": step,
                "num_ranks": accelerator.num_processes,
                "stands_on": parts.stands_on,
                "memory": parts.memory,
                "optimizer": settings,
                "schedule": {"last_epoch": parts.schedule.last_epoch},
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            }
            (temporary / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        _prune(folder, keep)
    accelerator.wait_for_everyone()
    return target


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint whose every byte is as it was saved; say which were passed over.

    Raises:
        UserError: There are checkpoints and none is whole.
    """
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            verify(path)
            return path
        except DamagedFolder as damage:
            _log.warning("passing over the damaged checkpoint %s: %s", path, damage)
    if found:
        hint = "bring one back from elsewhere, or start again with `--overwrite`"
        raise UserError("every checkpoint is damaged: there is nothing to go on from", str(folder), hint)
    return None


def load_checkpoint(path: Path, parts: TrainingParts) -> int:
    """Restore everything from a checkpoint; return the steps that were taken.

    Raises:
        UserError: The checkpoint stands on another model or other data, or does not fit.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        tensors, random_states = load_file(path / _OPTIMIZER), load_file(path / _RANDOM)
        reference = load_file(path / _REFERENCE) if parts.reference is not None else {}
        if missing := {"step", "num_ranks", "stands_on", "memory", "optimizer", "schedule", "scaler"} - state.keys():
            raise ValueError(f"{_STATE} lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        hint = "remove that folder to go on from an older checkpoint, or start again with `--overwrite`"
        raise UserError(f"not a checkpoint of a run: {error}", str(path), hint) from error
    for name, digest in parts.stands_on.items():
        if state["stands_on"].get(name) != digest:
            hint = f"bring back the {name} that the run was started with, or start again with `--overwrite`"
            raise UserError(f"the {name} is not the one that the run was started with", str(path), hint)
    load_weights(parts.policy, path)
    if parts.reference is not None:
        for name, weights in _weights(parts.reference).items():
            weights.copy_(reference[name])
    parts.memory.update(state["memory"])
    parts.optimizer.load_state_dict(_optimizer_from_tensors(tensors, state["optimizer"]))
    # The schedule is a function of the step; its rate stands in the optimizer's groups already.
    parts.schedule.last_epoch = state["schedule"]["last_epoch"]
    parts.schedule._last_lr = [group["lr"] for group in parts.optimizer.param_groups]
    if parts.accelerator.scaler and state["scaler"]:
        parts.accelerator.scaler.load_state_dict(state["scaler"])
    if state["num_ranks"] == parts.accelerator.num_processes:
        _restore_random_states(random_states, parts.accelerator.process_index)
    elif parts.accelerator.is_main_process:
        _log.warning(
            "the run had %d processes and now has %d: it goes on at the right pair, but not bit for bit",
            state["num_ranks"],
            parts.accelerator.num_processes,
        )
    return int(state["step"])


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints."""
    for path in _checkpoints(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


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

"""The state of a run: what a checkpoint holds of it, and how it comes back."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.backends import cpu

from dpo_cli.errors import UserError
from dpo_cli.modeling.loading import load_weights
from dpo_cli.system.storage import DamagedFolder
from dpo_cli.training.loop import Skips

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo_cli.preference.losses.base import Memory

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
        skips: The steps that were not taken; changed in place.
        stands_on: Digests of what a resumed run must find unchanged: the model before step 1, data, settings.
        before: The held-out figures before step 1; filled in place, empty where nothing is held out.
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
    before: dict[str, Any] = field(default_factory=dict)


class _Schedule(BaseModel):
    last_epoch: int


class Facts(BaseModel):
    """The content of training_state.json; all of it is what was written, and none of it is made to fit.

    Attributes:
        step: Optimizer steps taken.
        stands_on: As in `TrainingParts`.
        surroundings: What decides how numbers are rounded.
        memory: What the objective kept.
        skipped: Steps that were not taken.
        metrics: The digest of all rows of metrics.jsonl.
        before: As in `TrainingParts`.
        optimizer: The settings of its groups.
        schedule: Where it stands.
        scaler: The gradient scaler's state, where there is one.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: Annotated[int, Field(ge=0)]
    stands_on: dict[str, str]
    surroundings: dict[str, int | str]
    memory: dict[str, float]
    skipped: Annotated[int, Field(ge=0)]
    metrics: str
    before: dict[str, Any] = Field(default_factory=dict)
    optimizer: list[dict[str, Any]]
    schedule: _Schedule
    scaler: dict[str, Any] | None


@dataclass(frozen=True)
class State:
    """What a checkpoint holds.

    Attributes:
        policy: The model, whose weights go on changing.
        tokenizer: Saved beside it.
        weights: The policy's weights by name, tied ones under each of their names.
        tensors: All else that is made of tensors, by file and name.
        facts: All else.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, Tensor]
    tensors: dict[str, dict[str, Tensor]]
    facts: Facts

    @classmethod
    def of(cls, step: int, parts: TrainingParts, random_states: Sequence[dict[str, Tensor]], metrics: str) -> State:
        """Look at the state as it is now, without copying it."""
        accelerator = parts.accelerator
        optimizer, groups = _optimizer_to_tensors(parts.optimizer.state_dict())
        tensors = {_OPTIMIZER: optimizer, _RANDOM: {k: v for states in random_states for k, v in states.items()}}
        if parts.reference is not None:
            tensors[_REFERENCE] = _weights(parts.reference)
        facts = Facts(
            step=step,
            stands_on=parts.stands_on,
            surroundings=surroundings(accelerator),
            memory=dict(parts.memory),
            skipped=parts.skips.count,
            metrics=metrics,
            before=parts.before,
            optimizer=groups,
            schedule=_Schedule(last_epoch=parts.schedule.last_epoch),
            scaler=accelerator.scaler.state_dict() if accelerator.scaler else None,
        )
        return cls(parts.policy, parts.tokenizer, parts.policy.state_dict(), tensors, facts)

    def copied(self) -> State:
        """Return the same in memory of its own, which no step changes."""
        copies: dict[tuple[int, torch.Size], Tensor] = {}

        def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for tensor in tensors.values():
                # Tied weights stay tied, so that they are written once.
                if (at := (tensor.data_ptr(), tensor.shape)) not in copies:
                    copies[at] = tensor.detach().to("cpu", copy=True)
            return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in tensors.items()}

        tensors = {name: copy(named) for name, named in self.tensors.items()}
        facts = self.facts.model_copy(deep=True)
        return dataclasses.replace(self, weights=copy(self.weights), tensors=tensors, facts=facts)

    def write_beside_model(self, folder: Path) -> None:
        """Write all but the model and its tokenizer."""
        for name, tensors in self.tensors.items():
            save_file(tensors, folder / name)
        (folder / _STATE).write_text(self.facts.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_checkpoint(path: Path, parts: TrainingParts) -> tuple[int, str]:
    """Restore everything from a checkpoint that `newest_whole` found.

    Returns:
        The steps that were taken, and the digest of their rows in metrics.jsonl.

    Raises:
        UserError: It does not fit the model.
    """
    try:
        facts = read_facts(path)
        tensors, states = load_file(path / _OPTIMIZER), load_file(path / _RANDOM)
        reference = load_file(path / _REFERENCE) if parts.reference is not None else {}
        moments = _optimizer_from_tensors(tensors, facts.optimizer)
        _check_fits(moments["state"], parts.optimizer)
        parts.optimizer.load_state_dict(moments)
        # The schedule is a function of the step; one of more steps than it was saved under goes on at its own rate.
        rates = _rates(parts.schedule, facts.step)
        for group, rate in zip(parts.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if parts.reference is not None:
            _check_same(reference, _weights(parts.reference))
            for name, weights in _weights(parts.reference).items():
                weights.copy_(reference[name])
        now = surroundings(parts.accelerator)
        if facts.surroundings.get("processes") == now["processes"]:
            _restore_random_states(states, parts.accelerator.process_index)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, DamagedFolder, SafetensorError) as error:
        hint = "remove that folder to go on from an older checkpoint, or start again with `--overwrite`"
        raise UserError(f"`{path.name}` is not a checkpoint of this run: {error}", str(path), hint) from error
    load_weights(parts.policy, path)
    parts.memory.update(facts.memory)
    parts.before.update(facts.before)
    parts.skips.count = facts.skipped
    parts.schedule.last_epoch, parts.schedule._last_lr = facts.schedule.last_epoch, rates
    if parts.accelerator.scaler and facts.scaler:
        parts.accelerator.scaler.load_state_dict(facts.scaler)
    if parts.accelerator.is_main_process and (other := _changes(facts.surroundings, now)):
        _log.warning("the run goes on at the right pair, but maybe not bit for bit: %s", "; ".join(other))
    return facts.step, facts.metrics


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


def read_facts(path: Path) -> Facts:
    """Read a checkpoint's training_state.json.

    Raises:
        DamagedFolder: It is not what was written there, or another step's.
    """
    try:
        facts = Facts.model_validate_json((path / _STATE).read_bytes())
    except OSError as error:
        raise DamagedFolder(f"{_STATE} cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise DamagedFolder(f"{_STATE} is not a checkpoint's: {place}: {first['msg'].lower()}") from None
    if facts.schedule.last_epoch != facts.step:
        raise DamagedFolder(f"{_STATE} is not a checkpoint's: its schedule is at step {facts.schedule.last_epoch}")
    if path.name != f"step-{facts.step:06d}":
        raise DamagedFolder(f"it is the checkpoint of step {facts.step}")
    return facts


def _rates(schedule: LambdaLR, step: int) -> list[float | Tensor]:
    """Return the learning rates after a step, by group."""
    return [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs: `threads 2 → 1`."""
    return [f"{name} {before.get(name)} → {value}" for name, value in now.items() if before.get(name) != value]


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


def _check_fits(state: Mapping[int, Mapping[str, Tensor]], optimizer: Any) -> None:
    """Compare what an optimizer is to remember of its parameters with their shapes: its kernels trust them.

    Raises:
        ValueError: Something has another shape.
    """
    weights = [weights for group in optimizer.param_groups for weights in group["params"]]
    for index, moments in state.items():
        for name, tensor in moments.items():
            fits = 0 <= index < len(weights) and tensor.shape == _shape_of(name, weights[index].shape)
            if not fits or not tensor.is_floating_point():
                raise ValueError(f"{_OPTIMIZER}: {index}.{name} fits no weights of the model")


def _shape_of(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of what an optimizer of torch calls so, for weights of some shape."""
    match name:
        case "step":
            return ()
        case "row_var":
            return (*shape[:-1], 1)
        case "col_var":
            return (*shape[:-2], 1, shape[-1])
    return tuple(shape)


def _check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of weights.

    Raises:
        ValueError: They are others.
    """
    if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in wanted.items()}:
        raise ValueError(f"{_REFERENCE}: the weights are another model's")


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's parameters by name, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def random_states(rank: int) -> dict[str, Tensor]:
    """Return the states of this process's random generators, by device and rank."""
    states = {f"cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda.{rank}"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Tensor], rank: int) -> None:
    torch.set_rng_state(states[f"cpu.{rank}"])
    if torch.cuda.is_available() and f"cuda.{rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{rank}"])

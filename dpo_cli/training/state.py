"""The state of a run: what a checkpoint holds of it, and how it comes back."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.backends import cpu
from torch.distributed.tensor import DTensor

from dpo_cli.errors import UserError
from dpo_cli.modeling.determinism import gpu_software
from dpo_cli.modeling.eight_bits import IN_8_BITS, SCALE, num_blocks
from dpo_cli.modeling.folders.shard_files import Shards
from dpo_cli.modeling.folders.streams import load_tensors, save_tensors
from dpo_cli.modeling.out_of_memory import is_out_of_memory
from dpo_cli.modeling.split import whole_value
from dpo_cli.modeling.stepping import OneByOne
from dpo_cli.system.storage import DamagedFolder
from dpo_cli.training.resharding import OPTIMIZER, REFERENCE, kept_tensors
from dpo_cli.training.run_folder import checkpoint_name

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedTokenizerBase

    from dpo_cli.modeling.policy import Policy
    from dpo_cli.training.learner import Learner

STATE, RANDOM = "training_state.json", "random_states.safetensors"
_UNSPLIT = {"shards": 1}
"""What surroundings do not say where every process has whole weights."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearnerState:
    """What steps change, the policy's weights aside.

    Attributes:
        step: Optimizer steps taken.
        tensors: By file and name: what the optimizer keeps of each parameter, and the reference's weights, if it moves.
        groups: The settings of the optimizer's groups.
        statistics: What the objective kept.
        skipped: Steps that were not taken.
        scaler: The gradient scaler's state, where there is one.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    groups: list[dict[str, Any]]
    statistics: dict[str, float]
    skipped: int
    scaler: dict[str, Any] | None

    def moments(self) -> dict[str, Any]:
        """Return the optimizer's state as it loads it."""
        return optimizer_from_tensors(self.tensors[OPTIMIZER], self.groups)


class _Schedule(BaseModel):
    last_epoch: int


class TrainingState(BaseModel):
    """The content of training_state.json; all of it is what was written, and none of it is made to fit.

    Attributes:
        step: Optimizer steps taken.
        fingerprints: Digests of what a resumed run must find unchanged: the model before step 1, data, settings.
        held: How the model was held, of which they are; empty: an older version has not noted it.
        surroundings: What decides how numbers are rounded.
        statistics: What the objective kept.
        skipped: Steps that were not taken.
        metrics: The digest of all rows of metrics.jsonl.
        rows: The digests of all rows of the other files of rows, by their names.
        before: The held-out figures before step 1; empty where nothing is held out.
        optimizer: The settings of its groups.
        schedule: Where it is.
        scaler: The gradient scaler's state, where there is one.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, populate_by_name=True, serialize_by_alias=True)

    step: Annotated[int, Field(ge=0)]
    fingerprints: Annotated[dict[str, str], Field(alias="stands_on")]
    held: str = ""
    surroundings: dict[str, int | str]
    statistics: Annotated[dict[str, float], Field(alias="memory")]
    skipped: Annotated[int, Field(ge=0)]
    metrics: str
    rows: dict[str, str] = Field(default_factory=dict)
    before: dict[str, Any] = Field(default_factory=dict)
    optimizer: list[dict[str, Any]]
    schedule: _Schedule
    scaler: dict[str, Any] | None


@dataclass(frozen=True)
class RunNotes:
    """What a checkpoint says of its run beside what the learner knows.

    Attributes:
        fingerprints: As in `TrainingState`.
        metrics: As in `TrainingState`.
        before: As in `TrainingState`.
        rows: As in `TrainingState`.
    """

    fingerprints: Mapping[str, str]
    metrics: str = ""
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds.

    Attributes:
        policy: The policy, whose weights go on changing.
        tokenizer: Saved beside it, so that the folder is complete.
        weights: The policy's state.
        tensors: All else that is made of tensors, by file and name.
        record: All else.
    """

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, Tensor]
    tensors: dict[str, dict[str, Tensor]]
    record: TrainingState

    @classmethod
    def of(
        cls,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        random_states: Sequence[Mapping[str, Tensor]],
        notes: RunNotes,
    ) -> Snapshot:
        """Look at the state as it is now, without copying it."""
        state = learner.state()
        random = {name: state for states in random_states for name, state in states.items()}
        return cls(
            learner.policy,
            tokenizer,
            learner.policy.weights.state(),
            {**state.tensors, RANDOM: random},
            record_of(learner, state, notes),
        )

    def copied(self) -> Snapshot:
        """Return the same in memory of its own, which no step changes."""
        copies: dict[tuple[int, torch.Size], Tensor] = {}

        def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for tensor in tensors.values():
                # Tied weights stay tied, so that they are written once.
                if (at := (tensor.data_ptr(), tensor.shape)) not in copies:
                    copies[at] = whole_value(tensor).to("cpu", copy=True)
            return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in tensors.items()}

        tensors = {name: copy(named) for name, named in self.tensors.items()}
        record = self.record.model_copy(deep=True)
        return dataclasses.replace(self, weights=copy(self.weights), tensors=tensors, record=record)

    def write(self, folder: Path) -> None:
        """Write all of it into a folder that exists."""
        self.policy.weights.write(folder, self.tokenizer, self.weights)
        for name, tensors in self.tensors.items():
            save_tensors(tensors, folder / name)
        write_record(folder, self.record)


def record_of(learner: Learner, state: LearnerState, notes: RunNotes) -> TrainingState:
    """Return what a checkpoint says of a run, its tensors aside."""
    return TrainingState(
        step=state.step,
        fingerprints=dict(notes.fingerprints),
        held=learner.policy.held_as,
        surroundings=surroundings(learner.accelerator) | learner.policy.passes_through,
        statistics=state.statistics,
        skipped=state.skipped,
        metrics=notes.metrics,
        rows=dict(notes.rows),
        before=dict(notes.before),
        optimizer=state.groups,
        schedule=_Schedule(last_epoch=state.step),
        scaler=state.scaler,
    )


def write_record(folder: Path, record: TrainingState) -> None:
    """Write training_state.json."""
    (folder / STATE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def restore_checkpoint(path: Path, learner: Learner) -> TrainingState:
    """Go on from a checkpoint that `newest_whole` found; return what it says of the run.

    Raises:
        UserError: It does not fit the model.
    """
    accelerator = learner.accelerator
    try:
        record, random = read_state(path), load_file(path / RANDOM)
        tensors = _tensors(path, learner)
        state = LearnerState(record.step, tensors, record.optimizer, record.statistics, record.skipped, record.scaler)
        learner.restore(state)
        now = surroundings(accelerator) | learner.policy.passes_through
        if record.surroundings.get("processes") == now["processes"]:
            restore_random_states(random, accelerator.process_index)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, DamagedFolder, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        hint = "remove that folder to continue from an older checkpoint, or start again with `--overwrite`"
        raise UserError(f"`{path.name}` is not a checkpoint of this run: {error}", str(path), hint) from error
    learner.policy.weights.restore(path)
    if accelerator.is_main_process and (other := _changes(record.surroundings, now)):
        _log.warning("the run continues at the right pair, but perhaps not bit for bit: %s", "; ".join(other))
    return record


def _tensors(path: Path, learner: Learner) -> dict[str, dict[str, Tensor]]:
    """Return what this process needs of the tensors of a checkpoint, the policy's weights aside."""
    if learner.policy.sharded or Shards.are_in(path):
        return kept_tensors(path, learner)
    files = [OPTIMIZER, *([REFERENCE] if learner.reference.moving else [])]
    optimizer, device = getattr(learner.optimizer, "optimizer", learner.optimizer), learner.accelerator.device
    # What is kept on the host has no room on the device.
    kept_on = {OPTIMIZER: optimizer.kept_on(device)} if isinstance(optimizer, OneByOne) else {}
    return {file: load_tensors(path / file, kept_on.get(file, device)) for file in files}


def surroundings(accelerator: Accelerator) -> dict[str, Any]:
    """Return what decides how numbers are rounded: a run is the same to the last bit only where all of it is."""
    device = accelerator.device
    on_cuda = device.type == "cuda"
    kernels = "deterministic" if torch.are_deterministic_algorithms_enabled() else "any"
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_cuda else f"{device.type} {cpu.get_cpu_capability()}",
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        **({**gpu_software(), "kernels": kernels} if on_cuda else {}),
    }


def read_state(path: Path) -> TrainingState:
    """Read a checkpoint's training_state.json.

    Raises:
        DamagedFolder: It is not what was written there, or another step's.
    """
    state = read_copied_state(path)
    if path.name != checkpoint_name(state.step):
        raise DamagedFolder(f"it is the checkpoint of step {state.step}")
    return state


def read_copied_state(folder: Path) -> TrainingState:
    """Read the training_state.json of a checkpoint that may have another name by now.

    Raises:
        DamagedFolder: It is not what was written there.
    """
    try:
        state = TrainingState.model_validate_json((folder / STATE).read_bytes())
    except OSError as error:
        raise DamagedFolder(f"{STATE} cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise DamagedFolder(f"{STATE} is not a checkpoint's: {place}: {first['msg'].lower()}") from None
    if state.schedule.last_epoch != state.step:
        raise DamagedFolder(f"{STATE} is not a checkpoint's: its schedule is at step {state.schedule.last_epoch}")
    return state


def rates_at(schedule: LambdaLR, step: int) -> list[float | Tensor]:
    """Return the learning rates after a step, by group."""
    return [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say what differs: `threads 2 → 1`. Of what an older version did not note, nothing is known."""
    before, now = _UNSPLIT | before, now | {name: now.get(name, one) for name, one in _UNSPLIT.items()}
    return [f"{name} {before[name]} → {now[name]}" for name in now if name in before and before[name] != now[name]]


def optimizer_to_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Split an optimizer's state into named tensors and the groups' plain settings."""
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def optimizer_from_tensors(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Undo `optimizer_to_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def check_fits(state: Mapping[int, Mapping[str, Tensor]], optimizer: Any) -> None:
    """Compare what an optimizer is to remember of its parameters with their shapes: its kernels trust them.

    Raises:
        ValueError: Something has another shape.
    """
    weights = [weights for group in optimizer.param_groups for weights in group["params"]]
    for index, moments in state.items():
        for name, tensor in moments.items():
            fits = 0 <= index < len(weights) and tensor.shape in _shapes_of(name, tensor, weights[index])
            of_numbers = tensor.dtype == torch.uint8 if name.endswith(IN_8_BITS) else tensor.is_floating_point()
            if not fits or not of_numbers:
                raise ValueError(f"{OPTIMIZER}: {index}.{name} matches no weights of the model")


def _shapes_of(name: str, kept: Tensor, weights: Tensor) -> set[tuple[int, ...]]:
    """Return the shapes that what is kept of a weight may have: that of the whole, or that of what is here of it."""
    if isinstance(weights, DTensor) and not isinstance(kept, DTensor):
        here = tuple(weights.to_local().shape)
        return {_shape_of(name, here), *([_shape_of(name, weights.shape)] if name == "col_var" else [])}
    return {_shape_of(name, weights.shape)}


def _shape_of(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of what an optimizer of torch calls so, for weights of some shape."""
    match name:
        case "step":
            return ()
        case _ if name.endswith(SCALE):
            return (num_blocks(math.prod(shape)),)
        case "row_var":
            return (*shape[:-1], 1)
        case "col_var":
            return (*shape[:-2], 1, shape[-1])
    return tuple(shape)


def random_states(rank: int) -> dict[str, Tensor]:
    """Return the states of this process's random generators, by device and rank."""
    states = {f"cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda.{rank}"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor], rank: int) -> None:
    """Bring this process's random generators back to what `random_states` returned."""
    torch.set_rng_state(states[f"cpu.{rank}"])
    if torch.cuda.is_available() and f"cuda.{rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{rank}"])

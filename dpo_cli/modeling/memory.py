"""What training a model takes in memory, part by part, found without computing anything.

Activations are counted on tensors that have shapes and no content: what the forward pass would keep for the
backward pass is added up, storage by storage.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from transformers.integrations import moe

from dpo_cli.modeling.attention.trees import reading
from dpo_cli.modeling.batch import PairBatch
from dpo_cli.modeling.depths import extrapolated
from dpo_cli.modeling.layouts import Layout
from dpo_cli.modeling.logps import chunk_bytes_on
from dpo_cli.modeling.scorer import model_inputs
from dpo_cli.modeling.sizes import NOTHING_GATHERED, Gathered

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from dpo_cli.modeling.policy import Policy

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes at its peak, in bytes.

    Attributes:
        program: The process before the model is loaded; nothing on a GPU.
        weights: The policy, the weights that do not train included.
        reference: What a reference takes beside it.
        optimizer: What the optimizer keeps of each parameter that trains.
        gradients: One of each parameter that trains.
        activations: What the largest forward pass keeps for its backward pass.
        logits: The chunk of logits at hand, the vocabulary matrix in lower precision, and its gradient if it trains.
        copy: The state that is written in the background while training goes on.
        counted: Whether the activations could be counted: not where what a model computes depends on the values.
        several: Whether a step has several forward passes, so that gradients stand while activations are made.
        exchanged: What processes keep of the gradients to average them.
        gathered: What a process holds for a time of weights that are sharded.
        keeps_freed: Whether a CPU keeps what is freed for the next pass.
        gaps: What then lies between tensors and is of no use to others.
    """

    program: int
    weights: int
    reference: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    copy: int
    counted: bool
    several: bool
    exchanged: int = 0
    gathered: Gathered = NOTHING_GATHERED
    keeps_freed: bool = False
    gaps: int = 0

    @property
    def standing(self) -> int:
        """What is there all the time."""
        held = self.program + self.weights + self.reference + self.optimizer
        return held + self.exchanged + self.copy + self.gaps

    @property
    def peak(self) -> int:
        """The most that is there at once.

        The first forward pass of a step finds no gradients; they grow while its activations are let go. Logits are gone
        when layers are gathered again for the backward pass.
        """
        whole = self.gathered
        computing = whole.root + max(self.logits, whole.layers)
        passing = self.activations + computing + (self.gradients if self.several else 0)
        return self.standing + max(passing, self.gradients + max(whole.root + whole.layers, whole.ending))

    @property
    def needed(self) -> int:
        """The most that is taken beside what the program holds already."""
        return self.peak - self.program

    def parts(self) -> dict[str, int]:
        """Return the parts by the names they are shown under."""
        return {
            "program and libraries": self.program,
            "weights": self.weights,
            "reference model": self.reference,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "activations": self.activations,
            "logits": self.logits,
            "gradients being averaged": self.exchanged,
            "gathered from other processes": self.gathered.root + self.gathered.layers,
            "copy being saved": self.copy,
            "gaps between tensors": self.gaps,
        }


def activation_bytes(
    policy: Policy,
    layout: Layout,
    batch: PairBatch,
    dtype: torch.dtype,
    *,
    recomputed: bool,
    gathered: bool = False,
) -> int:
    """Return what a forward pass keeps for the backward pass, in bytes, logits aside.

    Args:
        policy: The policy, of which the settings are looked at: weights that do not train keep less.
        layout: The batch's layout.
        batch: Pairs, on the CPU.
        dtype: What is computed in.
        recomputed: Whether layers keep their inputs alone and compute the rest again (gradient checkpointing).
        gathered: Whether weights are gathered in that dtype, as split ones are that are sharded.
    """
    states = 0

    def count(settings: PreTrainedConfig) -> int:
        nonlocal states
        size, states = _kept_bytes(policy.sketched(settings), layout, batch, dtype, gathered=gathered)
        return size

    size = extrapolated(policy.model, count)
    num_layers = policy.model.config.get_text_config().num_hidden_layers
    return int(num_layers * states + size // num_layers) if recomputed else size


def _kept_bytes(
    sketch: Policy, layout: Layout, batch: PairBatch, dtype: torch.dtype, *, gathered: bool
) -> tuple[int, int]:
    """Return what all layers keep for the backward pass, and what one is handed, in bytes."""
    with _experts_on_paper(), FakeTensorMode(allow_non_fake_inputs=True):
        empty = _with_shapes_alone(sketch.model, dtype if gathered else None)
        layout.prepare(empty)
        lower = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
        with _kept() as kept, lower, sketch.weights.of(empty).training_pass(), reading(batch.tree):
            states = empty.base_model(**model_inputs(batch))[0]
    weights = {parameter.untyped_storage()._cdata for parameter in empty.parameters()}
    size = sum(int(storage.nbytes()) for key, storage in kept.items() if key not in weights)
    return size, states.numel() * states.element_size()


def logits_bytes(
    model: PreTrainedModel,
    batch: PairBatch,
    dtype: torch.dtype,
    device: str,
    *,
    collisions: bool = False,
    gathered: bool = False,
) -> int:
    """Return what the vocabulary projection takes while it works, in bytes.

    Args:
        model: Its vocabulary matrix is looked at.
        batch: The scored pairs.
        dtype: What is computed in.
        device: The kind of device that computes, as torch names it.
        collisions: As in `token_logps`.
        gathered: As in `activation_bytes`.
    """
    weight = model.get_output_embeddings().weight
    rows = len(torch.unique(batch.positions))
    chunk = min(rows * weight.shape[0] * _FLOAT_BYTES, chunk_bytes_on(device))
    # The matrix is there once more in what is computed in, and so are a chunk's logits; on a CPU the product that is
    # added to the gradient too.
    lower = dtype.itemsize if dtype.itemsize < _FLOAT_BYTES else 0
    matrix = weight.numel() * dtype.itemsize if weight.dtype != dtype and not gathered else 0
    product = weight.numel() * lower if device != "cuda" else 0
    gradient = weight.numel() * _FLOAT_BYTES + product if weight.requires_grad else 0
    # Log-probabilities stand beside their doubles and the doubles' powers, or beside the projection's gradient.
    return int(matrix + chunk + max(2 * collisions * chunk, chunk * lower // _FLOAT_BYTES + gradient))


def resident_bytes() -> int:
    """Return what this process holds in main memory now."""
    return int(psutil.Process().memory_info().rss)


def used_bytes(device: torch.device) -> int:
    """Return how much memory this process uses: on a GPU the most that its tensors took at once so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()


def free_bytes(device: torch.device) -> int:
    """Return what may still be taken on a device: on the CPU the limits of container and job count as well."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_group_bytes()])


def _with_shapes_alone(sketch: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return a copy of a model without weights whose tensors are on the CPU for whoever asks, with no content.

    Args:
        sketch: The model.
        dtype: That of its float32 weights in the copy; None: as they are.
    """

    def shaped(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Parameter):
            return torch.empty_like(tensor, device="cpu")
        cast = dtype if tensor.dtype == torch.float32 else None
        return Parameter(torch.empty_like(tensor, device="cpu", dtype=cast), tensor.requires_grad)

    tensors = [value for module in sketch.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    tensors += [*sketch.parameters(), *sketch.buffers()]
    copied: PreTrainedModel = copy.deepcopy(sketch, {id(tensor): shaped(tensor) for tensor in tensors})
    return copied


@contextlib.contextmanager
def _kept() -> Iterator[dict[int, Any]]:
    """Note the storages of all tensors that are kept for a backward pass."""
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


@contextlib.contextmanager
def _experts_on_paper() -> Iterator[None]:
    """Let experts be multiplied by what needs no content, and keep to ourselves what still cannot be computed so.

    torch's grouped product of float32 matrices cannot tell its shape; the one that transformers has beside it can.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level, grouped = log.level, moe._can_use_grouped_mm
    log.setLevel(logging.CRITICAL)
    moe._can_use_grouped_mm = lambda *tensors, **others: False
    try:
        yield
    finally:
        log.setLevel(level)
        moe._can_use_grouped_mm = grouped


def _group_bytes(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield what each control group that this process is in may still take, where it has a limit.

    A container sees its own as the root; that of a batch job or a service lies deeper, and limits hold all the way up.

    Args:
        groups: Where control groups are mounted; of version 1, memory has a folder of its own there.
        own: Names those of the process.
    """
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, names = groups, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                root, names = (
                    groups / "memory",
                    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                )
            else:
                continue
            deepest = root / path.lstrip("/")
            for group in (deepest, *deepest.parents[: len(deepest.parts) - len(root.parts)]):
                yield from _left_in(group, *names)


def _left_in(group: Path, limit: str, used: str, given_up: str) -> Sequence[int]:
    """Return what a control group may still take; nothing where it has no limit or does not exist."""
    try:
        most, now = (int((group / name).read_text()) for name in (limit, used))
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # What files were read into is given up when it is needed.
        return [most - now + int(facts[given_up])]
    except (OSError, ValueError, KeyError):
        return []

"""Whether an adapter on disk fits a model, seen in the model itself, and its weights once it does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import ADAPTER_WEIGHTS, PREFIX, AdapterFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_layers(model: PreTrainedModel, found: AdapterFolder) -> None:
    """Refuse an adapter of another base.

    Args:
        model: The base, without an adapter.
        found: The adapter.

    Raises:
        UserError: The model lacks a layer that the adapter has, or it has another size there.
    """
    layers = dict(model.named_modules())
    for name in found.layers:
        module = layers.get(name)
        if module is None or (sizes := _sizes(module)) is None:
            raise _of_another_base(found, f"the model has no linear layer `{name}`")
        a, b = (found.shapes[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        if (theirs := (a[1], b[0])) != sizes:
            shown = "{} inputs and {} outputs"
            problem = f"`{name}` has {shown.format(*sizes)} in the model, and {shown.format(*theirs)} in the adapter"
            raise _of_another_base(found, problem)


def check_head(model: PreTrainedModel, found: AdapterFolder, *, tied: bool = False) -> None:
    """Refuse an adapter of the vocabulary projection, which is computed in chunks.

    Args:
        model: The base, without an adapter.
        found: The adapter, which fits it.
        tied: Whether it is only refused where the projection is the embedding as well.

    Raises:
        UserError: It is one.
    """
    head = model.get_output_embeddings()
    if any(model.get_submodule(name) is head for name in found.layers) and (
        not tied or head.weight is model.get_input_embeddings().weight
    ):
        what = f"the adapter `{found.path}` changes the vocabulary projection"
        what += ", which is the embedding as well" if tied else ", which can have no adapter here"
        raise UserError(what, None, "merge it in PEFT (`merge_and_unload`), save the whole model, and name that")


def check_rank(model: PreTrainedModel, names: Sequence[str], rank: int) -> None:
    """Refuse a rank beyond any sense: it leaves little memory, and has no effect from the smaller side of a layer on.

    Args:
        model: The base, without an adapter.
        names: The layers that are to have the adapter.
        rank: The rank.

    Raises:
        UserError: It is above the larger side of every layer.
    """
    sizes = [found for name in names if (found := _sizes(model.get_submodule(name)))]
    if sizes and rank > max(map(max, sizes)):
        what = (
            f"`adapter.rank` {rank} is above both sides of every layer, of which the largest is {max(map(max, sizes))}"
        )
        hint = f"set it to {max(map(min, sizes))} at most, above which it has no effect; 8 to 64 are usual"
        raise UserError(what, "`adapter.rank`", hint)


def check_targets(found: AdapterFolder, chosen: Collection[str]) -> None:
    """Refuse targets that are other layers of the model than those of the adapter to go on from.

    Args:
        found: That adapter.
        chosen: The whole names of the layers that the targets are.

    Raises:
        UserError: They differ.
    """
    more, fewer = sorted(set(chosen) - set(found.layers)), sorted(set(found.layers) - set(chosen))
    if more or fewer:
        differing = f"`{more[0]}`, which it has not" if more else f"not `{fewer[0]}`, which it has"
        what = f"the targets are other layers than those of the adapter that training goes on from: {differing}"
        hint = f"leave `adapter.targets` out: they are taken from `{found.path}`"
        if fewer and not more:
            hint += "; text does not reach every layer, and a head has no adapter"
        raise UserError(what, "`adapter.targets`", hint)


def adapter_weights(found: AdapterFolder) -> dict[str, Tensor]:
    """Read the weights of an adapter in float32, by the names that they have in the file.

    Raises:
        UserError: One of them is not finite.
    """
    weights = {name: one.float() for name, one in load_file(found.path / ADAPTER_WEIGHTS).items()}
    for name, one in weights.items():
        if not bool(torch.isfinite(one).all()):
            hint = "choose an earlier checkpoint, or train the adapter again"
            raise UserError(f"`{name}` of the adapter `{found.path}` is NaN or infinite", None, hint)
    return weights


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return how many inputs and outputs a linear layer has; None: it is none."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def _of_another_base(found: AdapterFolder, problem: str) -> UserError:
    named = f"it names `{found.base}`" if found.base else "it names none"
    hint = f"choose the model that it was trained beside ({named}), or an adapter of this one"
    return UserError(f"the adapter `{found.path}` belongs to another base: {problem}", None, hint)

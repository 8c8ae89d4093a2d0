"""Weights are read from files one at a time, by transformers, into a new model or over the weights of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from dpo_cli.modeling.folders.model_files import WEIGHTS, weights_files
from dpo_cli.modeling.folders.saved_weights import saved_state
from dpo_cli.modeling.folders.shard_files import Shards, sharded_like
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.modeling.shards import rows_of
from dpo_cli.modeling.split import set_whole_value, state_of, whole_dtype

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_AT_ONCE = "HF_DEACTIVATE_ASYNC_LOAD"
"""What keeps transformers from reading ahead, which would hold all weights beside those that are loaded."""


@contextlib.contextmanager
def one_at_a_time(*, mapped: bool = False) -> Iterator[None]:
    """Let transformers read one tensor at a time, and keep none longer than it takes to place it.

    Args:
        mapped: Whether the weights are pages of their files, without a copy: for a model that is as its files are.
            Of another one, pages that were read would stay in memory beside what was made of them.
    """
    before, ahead = modeling_utils.safe_open, os.environ.get(_AT_ONCE)

    def opened(file: Any, **how: Any) -> Any:
        return before(file, **how) if mapped else _Read(file, **how)

    modeling_utils.safe_open, os.environ[_AT_ONCE] = opened, "1"
    try:
        yield
    finally:
        modeling_utils.safe_open = before
        if ahead is None:
            del os.environ[_AT_ONCE]
        else:
            os.environ[_AT_ONCE] = ahead


def are_as_held(sketch: PreTrainedModel, types: WeightTypes, dtype: torch.dtype) -> bool:
    """Tell whether a model that is held in a dtype has its weights as they are in its files.

    Args:
        sketch: The model without its weights.
        types: The types in the files.
        dtype: What the model is held in.
    """
    converted = any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(sketch))
    return not converted and {types.other, *types.named.values()} == {dtype}


def read_over(model: PreTrainedModel, folder: Path, own_name: Callable[[str], str | None] = str) -> dict[str, Any]:
    """Replace the content of a model's weights by that of the safetensors files in a folder, whatever they are part of.

    Of weights that are sharded over processes, those are read that this process has.

    Args:
        model: The model.
        folder: Where the files are.
        own_name: Returns the name that a weight has in the model by itself; None for one that was added to it.

    Returns:
        What was missing, not used, or of another shape, as `from_pretrained` says it with `output_loading_info`.
    """
    if Shards.are_in(folder):
        return _read_shards_over(model, folder, own_name)
    config = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model), ignore_mismatched_sizes=True)
    with contextlib.ExitStack() as opened, one_at_a_time(), torch.no_grad():
        slices: dict[str, Any] = {}
        for path in weights_files(folder):
            file = opened.enter_context(_Read(path, framework="pt"))
            slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        report, _ = convert_and_load_state_dict_in_model(_Overwritten(model, own_name), slices, config)
    report.missing_keys -= model.all_tied_weights_keys.keys()
    model._adjust_missing_and_unexpected_keys(report)
    found: dict[str, Any] = report.to_dict()
    return found


def _read_shards_over(
    model: PreTrainedModel, folder: Path, own_name: Callable[[str], str | None]
) -> dict[str, set[Any]]:
    """Do what `read_over` does with a folder in which several processes have written the weights."""
    state = saved_state(model)
    ours = {own: (name, tensor) for name, tensor in state.items() if (own := own_name(name)) is not None}
    few = {own: layer for own, (name, _) in ours.items() if (layer := _quantizing(model, name))}
    shards = Shards.in_folder(folder)
    theirs = shards.shapes(WEIGHTS)
    asked = {own: few[own].matrix.shape if own in few else tensor.shape for own, (_, tensor) in ours.items()}
    differing = {(name, shape, tuple(asked[name])) for name, shape in theirs.items() if name in asked}
    report: dict[str, set[Any]] = {
        "missing_keys": set(ours.keys() - theirs.keys()),
        "unexpected_keys": set(theirs.keys() - ours.keys()),
        "mismatched_keys": {one for one in differing if one[1] != one[2]},
    }
    if not any(report.values()):
        for name, layer in few.items():
            layer.take_matrix(shards.whole(WEIGHTS, name))
        for name, (_, tensor) in ours.items():
            if name in few:
                continue
            rows = shards.rows(WEIGHTS, name, *rows_of(tensor))
            set_whole_value(tensor, sharded_like(tensor, rows.to(tensor.device)))
    return report


class _Read:
    """A safetensors file that is read and not mapped, in place of `safe_open`."""

    def __init__(self, file: Any, **how: Any) -> None:
        self._file: Any = safe_open(file, **{**how, "backend": "pread"})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Read:
        return self

    def __exit__(self, *about: object) -> None:
        self._file.__exit__(*about)

    def get_slice(self, name: str) -> _Slice:
        """Return a tensor that is read when it is asked for."""
        return _Slice(self._file, name)


class _Slice:
    """A tensor of a file; what safetensors has for that takes its memory twice where all of it is read."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file.get_slice(self._name), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        whole = index is Ellipsis
        found: torch.Tensor = self._file.get_tensor(self._name) if whole else self._file.get_slice(self._name)[index]
        return found


class _Overwritten:
    """A module, as transformers sees it, whose tensors are written over where it would put others in their place."""

    def __init__(self, module: nn.Module, own_name: Callable[[str], str | None] = str) -> None:
        self.__dict__.update(_module=module, _own_name=own_name)

    def __getattr__(self, name: str) -> Any:
        layer = _quantizing(self._module, name)
        return layer.matrix if layer else getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What else is set says how the weights were read, which the module knows of its own.
        if not isinstance(value, torch.Tensor):
            return
        if layer := _quantizing(self._module, name):
            layer.take_matrix(value)
        else:
            set_whole_value(getattr(self._module, name), value)

    def get_submodule(self, target: str) -> _Overwritten:
        """Return a module within, seen in the same way."""
        return _Overwritten(self._module.get_submodule(target))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what there is, by name; of a weight that is sharded, what its whole value looks like."""
        return {
            own: self._as_read(name, tensor)
            for name, tensor in state_of(self._module).items()
            if (own := self._own_name(name)) is not None
        }

    def _as_read(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if layer := _quantizing(self._module, name):
            matrix: torch.Tensor = layer.matrix
            return matrix
        if whole_dtype(tensor) == tensor.dtype:
            return tensor
        return torch.empty_like(tensor, dtype=whole_dtype(tensor), device="meta")


def _quantizing(module: nn.Module, name: str) -> Any:
    """Return the layer within a module that quantizes what is read under a name itself; None: what is read is kept."""
    path, _, last = name.rpartition(".")
    if last != "weight":
        return None
    layer = module.get_submodule(path)
    layer = getattr(layer, "base_layer", layer)
    return layer if hasattr(layer, "take_matrix") else None

"""Which layers of a model an adapter is put beside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapter_files import AdapterFolder
from dpo_cli.modeling.adapters import ALL_LINEAR

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LINEAR = (nn.Linear, Conv1D)
_SHOWN = 12


def target_names(model: PreTrainedModel, asked: str | Sequence[str]) -> list[str]:
    """Return the whole names of the layers that an adapter is put beside, in the order of the model.

    Args:
        model: The model, without an adapter.
        asked: `all-linear`, the last parts of their names, or a regular expression of whole names.

    Raises:
        UserError: A name is that of no layer, or of one that can have no adapter.
    """
    head, layers = model.get_output_embeddings(), _text_layers(model)
    linear = [name for name, module in layers.items() if isinstance(module, _LINEAR) and module is not head]
    if asked == ALL_LINEAR:
        return _some(linear, asked, linear)
    if isinstance(asked, str):
        return _checked(model, [name for name in layers if re.fullmatch(asked, name)], asked, linear)
    found: list[str] = []
    for one in asked:
        found += _checked(model, [name for name in layers if f".{name}".endswith(f".{one}")], one, linear)
    return [name for name in layers if name in set(found)]


def check_layers(model: PreTrainedModel, found: AdapterFolder) -> None:
    """Refuse an adapter with weights for layers that a model has not, or in other sizes.

    Raises:
        UserError: It is of another base; one of these layers is named.
    """
    modules = dict(model.named_modules())
    for layer in found.layers:
        module = modules.get(layer)
        if module is None or module is model.get_output_embeddings():
            what = f"the adapter `{found.path}` has weights for `{layer}`, "
            what += "which the model has not" if module is None else "the vocabulary projection, which can have none"
            raise UserError(what, model.name_or_path, "choose an adapter of this model")


def stores_transposed(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Tell whether layers keep their matrices transposed, as GPT-2's do."""
    return all(isinstance(model.get_submodule(name), Conv1D) for name in names)


def _text_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers that text reaches, and the vocabulary projection, by their whole names."""
    reached = {id(module) for module in model.get_decoder().modules()} | {id(model.get_output_embeddings())}
    return {name: module for name, module in model.named_modules() if id(module) in reached and name}


def _checked(model: PreTrainedModel, names: list[str], asked: str, linear: Sequence[str]) -> list[str]:
    """Refuse what can have no adapter; of a pattern, what it matches beside layers is left out.

    Raises:
        UserError: The vocabulary projection is among them, or none is a linear layer.
    """
    if any(model.get_submodule(name) is model.get_output_embeddings() for name in names):
        what = f"`{asked}` names the vocabulary projection, which is computed in chunks and can have no adapter"
        raise UserError(what, "`adapter.targets`", "leave it out, or train all weights with `adapter: null`")
    return _some([name for name in names if name in set(linear)], asked, linear)


def _some(names: list[str], asked: str, linear: Sequence[str]) -> list[str]:
    """Refuse an empty list of layers."""
    if names:
        return names
    known = sorted({name.rpartition(".")[2] for name in linear})
    what = f"`{asked}` is no linear layer of the model"
    hint = f"its linear layers are {', '.join(known[:_SHOWN])}" if known else "train all weights with `adapter: null`"
    raise UserError(what, "`adapter.targets`", hint)

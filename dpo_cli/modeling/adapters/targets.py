"""Which layers of a model an adapter is put beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.settings import ALL_LINEAR, is_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BYPASSED = ("dt_proj", "out_proj")
"""Layers of state-space mixers whose weights are used without calling them, by kernels or always."""
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
    linear = [name for name, module in layers.items() if module is not head and _takes_adapter(model, name)]
    renamed = {last for last in {name.rpartition(".")[2] for name in linear} if _renamed(model, last)}
    linear = [name for name in linear if name.rpartition(".")[2] not in renamed]
    if asked == ALL_LINEAR:
        return _some([name for name in linear if not _routes(model, name)], asked, linear)
    if isinstance(asked, str):
        return _checked(model, [name for name in layers if is_named(name, asked, pattern=True)], asked, linear)
    found: list[str] = []
    for one in asked:
        found += _checked(model, [name for name in layers if is_named(name, one, pattern=False)], one, linear)
    return [name for name in layers if name in set(found)]


def left_out(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return the last parts of the names of what multiplies by weights beside the layers of an adapter.

    Args:
        model: The model, with or without the adapter.
        names: The layers of the adapter.
    """
    head, within = model.get_output_embeddings(), tuple(f"{name}." for name in names)
    others: dict[str, None] = {}
    for name, module in _text_layers(model).items():
        if f"{name}.".startswith(within) or module is head or isinstance(module, nn.Embedding):
            continue
        matrices = [one for one, weights in module.named_parameters(recurse=False) if weights.ndim > 1]
        # A state-space mixer's decays are no product, nor are the factors of a norm by heads.
        if matrices not in ([], ["A_log"]) and "Norm" not in type(module).__name__:
            others[name.rpartition(".")[2]] = None
    return list(others)


def stores_transposed(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Tell whether layers keep their matrices transposed, as GPT-2's do."""
    return all(isinstance(model.get_submodule(name), Conv1D) for name in names)


def _text_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers that text reaches, and the vocabulary projection, by their whole names."""
    reached = {id(module) for module in model.get_decoder().modules()} | {id(model.get_output_embeddings())}
    return {name: module for name, module in model.named_modules() if id(module) in reached and name}


def _takes_adapter(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a layer is linear, and is called wherever its weights are used."""
    return not is_bypassed(model, name) and _is_linear(model.get_submodule(name))


def is_bypassed(model: nn.Module, name: str) -> bool:
    """Tell whether the weights of a layer are used without calling it."""
    parent, _, last = name.rpartition(".")
    mixer = model.get_submodule(parent)
    return last in _BYPASSED and hasattr(mixer, "A_log") and hasattr(mixer, "D")


def _is_linear(module: nn.Module) -> bool:
    """Tell whether a layer takes one tensor and answers with one, however it computes it."""
    if not isinstance(module, nn.Linear):
        return isinstance(module, Conv1D)
    if type(module) is nn.Linear or any(one.__module__.startswith("bitsandbytes.") for one in type(module).__mro__):
        return True
    # A subclass may be a router, or a product by groups; without memory it is tried.
    weights = {name: torch.empty_like(one, device="meta") for name, one in module.named_parameters()}
    try:
        answer = functional_call(module, weights, (torch.empty(1, 1, module.in_features, device="meta"),))
    except (RuntimeError, TypeError):
        return False
    return isinstance(answer, Tensor) and answer.shape == (1, 1, module.out_features)


def _renamed(model: PreTrainedModel, last_name: str) -> bool:
    """Tell whether PEFT takes the layers of a name for experts, as older models of a type had them."""
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:
        # Then PEFT, whose import takes a second, need not be asked.
        return False
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    settings = LoraConfig(target_modules=[last_name])
    try:
        convert_peft_config_for_transformers(settings, model, None)
    except ValueError:
        return True
    return last_name not in settings.target_modules


def _routes(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a layer chooses among experts; elsewhere routers are parameters, which have no adapter either."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        beside = model.get_submodule(".".join(parts[:place]))
        if "router" in part or (part == "gate" and hasattr(beside, "experts")):
            return True
    return False


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
    what = f"`{asked}` names no layer that can have an adapter"
    hint = f"the layers that can are {', '.join(known[:_SHOWN])}" if known else "train all weights with `adapter: null`"
    raise UserError(what, "`adapter.targets`", hint)

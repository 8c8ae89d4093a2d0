"""A folder, a GGUF file or a Hub id becomes a policy.

Nothing is executed that a model brings along, unless the configuration says so by name (`Trust`), and what it asks
for is compared with what it holds before memory is taken.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import read_adapter
from dpo_cli.modeling.adapters.merging import merge
from dpo_cli.modeling.folders.completeness import check_complete, load_complete, say_untied, untied
from dpo_cli.modeling.folders.hub import fetch_weights
from dpo_cli.modeling.folders.identities import stamp_of
from dpo_cli.modeling.folders.model_files import CONFIG, NO_TRUST, Trust, check_folder, weights_files
from dpo_cli.modeling.folders.model_names import is_gguf, whole_model
from dpo_cli.modeling.folders.quantization import check_pickles
from dpo_cli.modeling.folders.reading import are_as_held, read_over
from dpo_cli.modeling.folders.refusals import explained
from dpo_cli.modeling.folders.resolving import load_named
from dpo_cli.modeling.folders.saving import logits_alone, remember, remember_adapter
from dpo_cli.modeling.folders.size_checks import check_model_elements, check_size
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.modeling.gguf.requantizing import load_requantized
from dpo_cli.modeling.held import FLOAT32, Held
from dpo_cli.modeling.shards import placeholders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


def load_policy(
    name: str, trust: Trust = NO_TRUST, held: Held = FLOAT32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a causal language model, in float32 unless it is to be held otherwise, in evaluation mode (dropout off).

    The name of an adapter folder is that of its base with the adapter merged into it.

    Raises:
        UserError: It cannot be found or read, is not a causal language model, is quantized, lacks weights or has others
            than it uses, does not fit into memory, or brings along what it is not trusted with.
    """
    base = whole_model(name)
    if base != name and held != FLOAT32:
        # Merged in float32, and rounded once.
        return held.take_over(load_policy(name, trust), device)
    requantized = held.quantized and is_gguf(name)
    read = functools.partial(_read, base, trust, held, device)
    model = load_named(name, "model", read, trust, weights=not requantized)
    if not requantized and any(path.suffix == ".bin" for path in weights_files(Path(model.name_or_path))):
        _log.warning("`model.allow_pickle`: the weights of %s are read from a pickle, as bare tensors", name)
    _warn_of_another_name(model, name)
    _warn_of_untied(model, name)
    if base != name:
        adapter = read_adapter(Path(name))
        merge(model, adapter)
        with explained(name, "adapter"):
            remember_adapter(model, adapter.path)
        # No file has these weights.
        model.origin = replace(model.origin, read_from=None, stamp={})
    return model


def _read(base: str, trust: Trust, held: Held, device: torch.device | str, folder: str) -> PreTrainedModel:
    """Load a model from the folder that its name stands for, after what it says was compared with what it has."""
    path, empty = Path(folder), _empty(folder, trust, held)
    check_size(empty, path, held, device)
    if not Path(base).exists():
        fetch_weights(base, path, trust)
        if problem := check_folder(path, trust):
            raise problem
        check_size(empty, path, held, device)
    check_pickles([file for file in weights_files(path) if file.suffix == ".bin"])
    types, source = WeightTypes.of_files(path), weights_of(base, folder)
    stamp = stamp_of(source)
    # Else transformers lets a service of the Hub convert pickled weights, and takes what comes back.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    if held.quantized and is_gguf(base):
        model = load_requantized(Path(base), empty, held, device, **_how(trust))
    else:
        told = {"use_safetensors": None if trust.pickle else True, **held.loaded_as(empty, device), **_how(trust)}
        mapped = torch.device(device).type == "cpu" and are_as_held(empty, types, held.torch_dtype)
        model = held.settle(load_complete(AutoModelForCausalLM, folder, mapped=mapped, **told), device)
    remember(model, path, trust, types, source, stamp)
    return model


def load_onto_shards(
    name: str, trust: Trust, held: Held, lay_out: Callable[[PreTrainedModel], Callable[[str], str | None]]
) -> None:
    """Load a causal language model of which each process reads the part that it has.

    Args:
        name: The model.
        trust: What it may bring along.
        held: How the part is held that a process has.
        lay_out: Splits the weights of the model, which are placeholders, and may add others to them; returns the name
            that a weight has in the model by itself, or None for one that was added.

    Raises:
        UserError: As `load_policy`; or its weights cannot be read in parts.
    """
    base = whole_model(name)
    if base != name:
        hint = "merge it with `dpo export --merge` first; or name the base, and the adapter in `adapter.start`"
        raise UserError("an adapter is not merged into weights that are sharded over processes", name, hint)

    def load(folder: str) -> None:
        model = _empty(folder, trust, held, with_buffers=True)
        check_model_elements(model, Path(folder), held)
        if not Path(base).exists():
            fetch_weights(base, Path(folder), trust)
        if problem := check_folder(Path(folder), trust):
            raise problem
        if any(file.suffix == ".bin" for file in weights_files(Path(folder))):
            hint = "load the model in transformers and save it, which writes safetensors"
            raise UserError("pickled weights cannot be read in parts", folder, hint)
        source = weights_of(base, folder)
        stamp = stamp_of(source)
        remember(model, Path(folder), trust, WeightTypes.of_files(Path(folder)), source, stamp)
        model.config._name_or_path = model.name_or_path = folder
        placeholders(model)
        held.lay_out_shards(model)
        own_name = lay_out(model)
        check_complete(model, read_over(model, Path(folder), own_name), folder)
        _warn_of_another_name(model, name)

    load_named(name, "model", load, trust, weights=True)


def _warn_of_another_name(model: PreTrainedModel, name: str) -> None:
    """Say where settings name an architecture of another type than theirs: other programs go by that name."""
    kind = model.config.model_type
    named = model.config.architectures
    for other in named if isinstance(named, list) else []:
        kinds = {known for known, called in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if called == other}
        if kinds and kind not in kinds and other != type(model).__name__:
            told = f"config.json of {name} says `model_type: {kind}` but names `{other}`, which is of another type"
            _log.warning("%s: it is trained as %s, and saved as that", told, type(model).__name__)


def _warn_of_untied(model: PreTrainedModel, name: str) -> None:
    """Say what settings tie to the embedding whose weights differ from it, and let them say that it is not tied."""
    if others := untied(model):
        say_untied(model)
        _log.warning(
            "config.json of %s ties %s to the embedding, but its weights have other values there: they are trained as "
            "they are, and what is saved says `tie_word_embeddings: false`",
            name,
            ", ".join(others),
        )


def weights_of(name: str, folder: str) -> Path:
    """Return where the weights of a model are, given the folder that it is loaded from: its GGUF file, or that."""
    return Path(name) if is_gguf(name) else Path(folder)


def empty_policy(name: str, trust: Trust = NO_TRUST, held: Held = FLOAT32) -> PreTrainedModel:
    """Build a model without its weights, which takes no time and no memory: its shapes and settings alone."""

    def build(folder: str) -> PreTrainedModel:
        empty = _empty(folder, trust, held)
        check_model_elements(empty, Path(folder), held)
        return empty

    return load_named(name, "model", build, trust)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Replace a model's weights by those that `save_pretrained` wrote into a folder.

    Of the folder, nothing but safetensors files is read: code and settings are the model's own.

    Raises:
        UserError: They are another model's.
    """
    if problem := check_folder(folder, NO_TRUST):
        raise problem
    with explained(str(folder), "model"):
        report = read_over(model, folder)
    try:
        check_complete(model, report, str(folder))
    except UserError as problem:
        problem.hint = "the checkpoint belongs to another model: start again with `--overwrite`"
        raise


def _empty(folder: str, trust: Trust, held: Held, *, with_buffers: bool = False) -> PreTrainedModel:
    """Build a model whose weights are on the meta device; and so are its buffers, unless they are asked for."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
    with init_empty_weights(include_buffers=False) if with_buffers else torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **held.built_as(), **_how(trust))
    # Inside, what is tied would be given a parameter of its own.
    model.eval().tie_weights()
    if model.config._attn_implementation == "flex_attention" and not torch.cuda.is_available():
        hint = "set `model.attention` to `eager` or `sdpa`"
        raise UserError("FlexAttention, which it asks for, computes no gradient without a GPU", None, hint)
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    # Where a model does not use its window, transformers may write 0.
    if window is not None and window < 1 and getattr(text, "use_sliding_window", True):
        what = f"{CONFIG} says `sliding_window: {window}`: no token would attend to any"
        raise UserError(what, None, "set it to null in config.json if tokens attend to all earlier tokens")
    logits_alone(model)
    held.lay_out(model)
    return model


def _how(trust: Trust) -> dict[str, Any]:
    """Return how transformers is told what a model may bring along."""
    told: dict[str, Any] = {"trust_remote_code": trust.remote_code}
    return {**told, "attn_implementation": trust.attention} if trust.attention else told

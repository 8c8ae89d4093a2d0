"""Whether the weights in a model's files are those that its settings describe: none missing, none left over."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.model_files import GENERATION
from dpo_cli.modeling.folders.reading import one_at_a_time
from dpo_cli.modeling.folders.shard_files import Shards, slices_of_weights
from dpo_cli.modeling.held import FLOAT32
from dpo_cli.system.text import several

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$"
    r"|\.(attn|attention|self_attn)\.(masked_bias|bias_mask|causal_mask)$|(^|\.)mtp\."
)
"""Constants that older versions of libraries saved, and layers that predict further tokens, which are no part of a
causal language model."""

_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|base_layer)\."
)
"""What is left in the names of weights that were saved with what training had put around the model."""

_SHOWN = 3


def load_complete(loader: Any, folder: str, *, mapped: bool = False, **settings: Any) -> PreTrainedModel:
    """Load a model of which every weight is there, and no other; `mapped` as in `one_at_a_time`."""
    model: PreTrainedModel
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if Shards.are_in(Path(folder)):
        return _load_shards(loader, Path(folder), {**FLOAT32.built_as(), **told, **settings})
    with one_at_a_time(mapped=mapped):
        model, report = loader.from_pretrained(folder, **{**FLOAT32.built_as(), **told, **settings})
    check_complete(model, report, str(Path(folder, settings.get("gguf_file", ""))))
    return model.eval()


def _load_shards(loader: Any, folder: Path, settings: dict[str, Any]) -> PreTrainedModel:
    """Load a model whose weights several processes have written, one at a time."""
    trusted = settings.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    with torch.device("meta"):
        # What chooses among classes asks for a folder with weights.
        kind = type(loader.from_config(config, trust_remote_code=trusted))
    with one_at_a_time():
        model, report = kind.from_pretrained(None, config=config, state_dict=slices_of_weights(folder), **settings)
    model.name_or_path = str(folder)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    check_complete(model, report, str(folder))
    loaded: PreTrainedModel = model.eval()
    return loaded


def check_complete(model: PreTrainedModel, report: Mapping[str, Any], folder: str) -> None:
    """Compare what transformers found in a model's files with what the model needs.

    Args:
        model: The model.
        report: What `from_pretrained` says with `output_loading_info`, sizes that differ included.
        folder: Where the weights are.

    Raises:
        UserError: Weights are missing, have other shapes, or are not used.
    """
    if differing := sorted(report["mismatched_keys"]):
        raise _other_shape(model, differing[0], len(differing), folder)
    if missing := sorted(report["missing_keys"]):
        raise _missing(missing, sorted(report["unexpected_keys"]), folder)
    if unused := sorted(name for name in report["unexpected_keys"] if not _may_be_there(model, name)):
        are = several(len(unused), "weight in the files is", "weights in the files are")
        what = f"{are} not part of {_described(model)}: {shown(unused)}"
        hint = "correct config.json if it is wrong; or load the model in transformers and save it, which drops them"
        raise UserError(what, folder, hint)


def untied(model: PreTrainedModel) -> list[str]:
    """Return the weights that the settings tie to others and the files hold with values of their own."""
    return sorted(set(model.get_expanded_tied_weights_keys(all_submodels=True)) - set(model.all_tied_weights_keys))


def say_untied(model: PreTrainedModel) -> None:
    """Let a model's settings say that nothing is tied, so that what is saved is read as it was trained."""
    for _, config in configs(model):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def configs(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Yield a model's settings under the name "", then those of the models within a composite one under theirs."""
    yield "", model.config
    for name in model.config.sub_configs:
        if (inner := getattr(model.config, name, None)) is not None:
            yield name, inner


def _may_be_there(model: PreTrainedModel, name: str) -> bool:
    """Tell what no model of this architecture uses, though its files have it."""
    if _HARMLESS.search(name):
        return True
    text = model.config.get_text_config()
    further = getattr(text, "num_nextn_predict_layers", None) or 0
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return layer is not None and 0 <= int(layer[1]) - text.num_hidden_layers < further


def _missing(missing: list[str], unused: list[str], folder: str) -> UserError:
    """Say which weights are not there, and which are in their place, under the names that a wrapper left."""
    what = f"the weights of {several(len(missing), 'parameter')} are missing: {shown(missing)}"
    if unused:
        what += (
            f"; {several(len(unused), 'other in the files is', 'others in the files are')} not used: {shown(unused)}"
        )
    hint = "check that the folder is complete, and that its config.json belongs to this model"
    if left := sorted({part for name in unused for part in _WRAPPER.findall(name)}):
        parts = ", ".join(f"`{part}`" for part in left)
        hint = f"save the model without its wrapper: the names of its weights contain {parts}"
    return UserError(what, folder, hint)


def _other_shape(
    model: PreTrainedModel, differing: tuple[str, tuple[int, ...], tuple[int, ...]], number: int, folder: str
) -> UserError:
    """Say which weights have another shape than the settings ask for."""
    name, found, wanted = differing
    words = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    if id(model.get_parameter(name)) in words and found[1:] == wanted[1:]:
        what = f"config.json says `vocab_size: {wanted[0]}`, but the weights have {found[0]} (`{name}`)"
    else:
        more = f", and those of {several(number - 1, 'other')} differ as well" if number > 1 else ""
        what = f"`{name}` has the shape {list(found)}, but config.json asks for {list(wanted)}{more}"
    return UserError(what, folder, "check that config.json and the weights belong to the same model")


def _described(model: PreTrainedModel) -> str:
    """Name a model by its architecture and the number that is most often wrong."""
    return f"{type(model).__name__} with {several(model.config.get_text_config().num_hidden_layers, 'layer')}"


def shown(names: Collection[str]) -> str:
    """Name the first few of some weights."""
    return ", ".join(list(names)[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")

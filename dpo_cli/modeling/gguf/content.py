"""What a GGUF file holds that transformers passes over: some of its settings, and weights without a place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dpo_cli.errors import UserError
from dpo_cli.modeling.gguf.architecture import Architecture
from dpo_cli.modeling.gguf.architectures import ARCHITECTURES
from dpo_cli.system.text import several

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PretrainedConfig, PreTrainedModel

_TABLES = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")
"""Constants among the weights."""

_SIZES_OF_EXPERTS = {
    "moe_intermediate_size": ".ffn_up_exps.weight", "shared_expert_intermediate_size": ".ffn_up_shexp.weight",
}  # fmt: skip
"""By which tensor a setting of transformers is known."""

DAMAGED = "the model is incomplete or damaged: save or download it again"
HINT = "train the model that the file was made of: a folder with config.json and .safetensors files"


@dataclass(frozen=True)
class GgufContent:
    """What is asked of a GGUF file beside what transformers reads; its vocabulary takes far more memory.

    Attributes:
        architecture: What it calls the kind of model.
        sizes: How many numbers each of its tensors has, by name.
        tables: Those of them that are constants.
        settings: What it says of the model, without the architecture in front.
        about: What it says of itself (`general.*`), without that in front.
    """

    architecture: str
    sizes: Mapping[str, int]
    tables: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, reader: GGUFReader) -> GgufContent:
        """Take it from a reader, of which nothing is kept."""
        named = reader.fields["general.architecture"].contents()
        tables = [tensor for tensor in reader.tensors if _TABLES.fullmatch(tensor.name)]
        fields = reader.fields.items()
        return cls(
            named,
            {tensor.name: int(tensor.n_elements) for tensor in reader.tensors},
            {tensor.name: torch.tensor(tensor.data) for tensor in tables},
            {key.removeprefix(f"{named}."): said.contents() for key, said in fields if key.startswith(f"{named}.")},
            {key.removeprefix("general."): said.contents() for key, said in fields if key.startswith("general.")},
        )


def settle_settings(config: PretrainedConfig, content: GgufContent) -> None:
    """Set in a model's configuration what its file says of it, which transformers reads a part of."""
    described = _described(content.architecture, config.model_type)
    if described is None:
        return
    for key, name in described.settings.items():
        if key in content.settings:
            value = content.settings[key]
            # No window, which an older llama.cpp would make up.
            setattr(config, name, None if key == "attention.sliding_window" and value == 0 else value)
    for name, tensor in described.flags.items():
        setattr(config, name, tensor in content.sizes)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # A default of transformers, where the file names no such token.
        if isinstance(token := getattr(config, name, None), int) and token >= config.vocab_size:
            setattr(config, name, None)
    for name, value in described.derived.items():
        setattr(config, name, value(config))


def _described(name: str, kind: str) -> Architecture | None:
    """Return what is known of an architecture of files, read as a kind of model."""
    known = ARCHITECTURES.get(kind)
    return known if known and known.name == name else None


def check_all_read(model: PreTrainedModel, content: GgufContent) -> None:
    """Refuse a file that holds more weights than the model that was read from it; a head that is tied counts once.

    Raises:
        UserError: It does.
    """
    left_out = {*content.tables, *(["output.weight"] if model.all_tied_weights_keys else [])}
    held = sum(size for name, size in content.sizes.items() if name not in left_out)
    # Buffers among them: by one, routers choose experts. What is tied is the same tensor twice.
    used = sum({id(one): one.numel() for one in model.state_dict(keep_vars=True).values()}.values())
    if held > used:
        layers = several(model.config.get_text_config().num_hidden_layers, "layer")
        what = f"the file has {held:,} weights, but {type(model).__name__} with {layers} uses {used:,}"
        raise UserError(what, None, HINT)


def settle_experts(config: PretrainedConfig, content: GgufContent) -> None:
    """Let a model's settings give its experts the size that they have in the file, which transformers does not read."""
    for setting, name in _SIZES_OF_EXPERTS.items():
        found = [size for tensor, size in content.sizes.items() if tensor.endswith(name)]
        if found and hasattr(config, setting):
            together = config.num_experts if "_exps" in name else 1
            setattr(config, setting, found[0] // together // config.hidden_size)

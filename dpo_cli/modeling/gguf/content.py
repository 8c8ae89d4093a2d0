"""What a GGUF file holds that transformers passes over: how positions are scaled, and weights without a place."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpo_cli.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PretrainedConfig, PreTrainedModel

_FREQUENCIES = "rope_freqs.weight"
"""By what each frequency of the positions is divided."""

_TABLES = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")
"""Constants among the weights."""

_LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA_3_POSITIONS = 8192
"""What Llama 3.1 and later scale positions by, which such files hold as a table alone."""

_SIZES_OF_EXPERTS = {
    "moe_intermediate_size": ".ffn_up_exps.weight", "shared_expert_intermediate_size": ".ffn_up_shexp.weight",
}  # fmt: skip
"""By which tensor a setting of transformers is known."""

_HINT = "train the model that the file was made of: a folder with config.json and .safetensors files"


@dataclass(frozen=True)
class GgufContent:
    """What is asked of a GGUF file beside what transformers reads; its vocabulary takes far more memory.

    Attributes:
        sizes: How many numbers each of its tensors has, by name.
        tables: Those of them that are constants.
        scaling: What it says of how positions are scaled.
    """

    sizes: Mapping[str, int]
    tables: Mapping[str, torch.Tensor]
    scaling: Mapping[str, Any]

    @classmethod
    def of(cls, reader: GGUFReader) -> GgufContent:
        """Take it from a reader, of which nothing is kept."""
        tables = [tensor for tensor in reader.tensors if _TABLES.fullmatch(tensor.name)]
        fields = reader.fields.items()
        return cls(
            {tensor.name: int(tensor.n_elements) for tensor in reader.tensors},
            {tensor.name: torch.tensor(tensor.data) for tensor in tables},
            {key.partition(".rope.")[2]: field.contents() for key, field in fields if ".rope.scal" in key},
        )


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
        layers = model.config.get_text_config().num_hidden_layers
        what = f"the file has {held:,} weights, but {type(model).__name__} with {layers} layers uses {used:,}"
        raise UserError(what, None, _HINT)


def settle_experts(config: PretrainedConfig, content: GgufContent) -> None:
    """Let a model's settings give its experts the size that they have in the file, which transformers does not read."""
    for setting, name in _SIZES_OF_EXPERTS.items():
        found = [size for tensor, size in content.sizes.items() if tensor.endswith(name)]
        if found and hasattr(config, setting):
            together = config.num_experts if "_exps" in name else 1
            setattr(config, setting, found[0] // together // config.hidden_size)


def settle_positions(model: PreTrainedModel, content: GgufContent) -> None:
    """Let a model's settings scale its positions as the file says.

    Raises:
        UserError: It says it in a way that is not known here.
    """
    config = model.config.get_text_config()
    known = getattr(config, "rope_parameters", None)
    if known and known.get("rope_type", "default") != "default":
        return  # transformers has read it.
    kind, factor = _scaling(content)
    tables = dict(content.tables)
    divided = tables.pop(_FREQUENCIES, torch.ones(1))
    if kind == "none" and not tables and bool((divided == 1).all()):
        return
    found: dict[str, Any] | None = None
    if kind == "linear" and not tables:
        found = {"rope_type": "linear", "factor": factor}
    elif kind == "none" and not tables:
        found = {**_LLAMA_3, "factor": float(divided.max()), "original_max_position_embeddings": _LLAMA_3_POSITIONS}
    if found is None or not known or "rope_type" not in known or not _divides(config, found, divided):
        what = (
            f"the positions are scaled ({kind if kind != 'none' else 'by a table'}) in a way transformers does not know"
        )
        raise UserError(what, None, _HINT)
    config.rope_parameters = {**known, **found}


def _scaling(content: GgufContent) -> tuple[str, float]:
    """Return how positions are scaled by the settings of a file, and by how much; "none": not at all."""
    said = content.scaling
    factor = float(said.get("scaling.factor", said.get("scale_linear", 1.0)))
    kind = str(said.get("scaling.type", "linear"))
    return ("none" if factor == 1 and kind == "linear" else kind), factor


def _divides(config: PretrainedConfig, scaling: dict[str, Any], divided: torch.Tensor) -> bool:
    """Tell whether settings divide the frequencies by what a file's table says; linear ones come without a table."""
    if scaling["rope_type"] == "linear":
        return bool((divided == 1).all())
    scaled = copy.deepcopy(config)
    scaled.rope_parameters = {**config.rope_parameters, **scaling}
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(divided)) / len(divided))
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    return frequencies.shape == plain.shape and torch.allclose(frequencies * divided, plain, rtol=1e-4)

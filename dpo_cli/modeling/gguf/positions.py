"""How positions are turned and scaled, in the words of a GGUF file and in those of a model's configuration."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dpo_cli.errors import UserError
from dpo_cli.modeling.gguf.architectures import rotary_settings
from dpo_cli.modeling.gguf.content import HINT, GgufContent

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

_FREQUENCIES = "rope_freqs.weight"
"""By what each frequency of the positions is divided."""

_LLAMA_3_POSITIONS = 8192
_LLAMA_3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": _LLAMA_3_POSITIONS,
}  # fmt: skip
"""What Llama 3.1 and later scale positions by, which such files hold as a table alone."""

_YARN = {
    "scaling.factor": "factor", "scaling.original_context_length": "original_max_position_embeddings",
    "scaling.yarn_beta_fast": "beta_fast", "scaling.yarn_beta_slow": "beta_slow",
}  # fmt: skip
"""How a file calls what YaRN scales positions by, and how a configuration does."""


def written_positions(config: PretrainedConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the keys by which a file says how a model's positions are turned, after "rope.", and its tables."""
    kinds = rotary_settings({"rope_parameters": getattr(config, "rope_parameters", None)})
    said = kinds.get("", kinds.get("full_attention", {}))
    keys: dict[str, Any] = {"freq_base": float(said["rope_theta"])} if "rope_theta" in said else {}
    if "partial_rotary_factor" in said:
        keys["dimension_count"] = int(_head_size(config) * said["partial_rotary_factor"])
    if local := kinds.get("sliding_attention"):
        keys["freq_base_swa"] = float(local["rope_theta"])
    kind = said.get("rope_type", "default")
    if kind == "linear":
        keys |= {"scaling.type": "linear", "scaling.factor": float(said["factor"])}
    if kind == "yarn":
        keys |= {"scaling.type": "yarn", **{key: said[name] for key, name in _YARN.items() if said.get(name)}}
    if kind == "llama3":
        return keys, {_FREQUENCIES: _divisors(config, said)}
    return keys, {}


def settle_positions(config: PretrainedConfig, content: GgufContent) -> None:
    """Let a model's settings turn and scale its positions as its file says.

    Raises:
        UserError: The file says it in a way that is not known here.
    """
    known = getattr(config, "rope_parameters", None) or {}
    layers = [inner for inner in known.values() if isinstance(inner, dict)] or [known]
    if any(one.get("rope_type", "default") != "default" for one in layers):
        return  # transformers has read it.
    said, found = _rope(content), _found_scaling(config, content)
    turned = {"rope_theta": said["freq_base"]} if "freq_base" in said else {}
    if "partial_rotary_factor" in known and "dimension_count" in said:
        turned["partial_rotary_factor"] = said["dimension_count"] / _head_size(config)
    if "full_attention" in known:
        local = {"rope_theta": said["freq_base_swa"]} if "freq_base_swa" in said else {}
        config.rope_parameters = {
            "sliding_attention": {**known["sliding_attention"], **local},
            "full_attention": {**known["full_attention"], **turned, **found},
        }
    elif known:
        config.rope_parameters = {**known, **turned, **found}


def _found_scaling(config: PretrainedConfig, content: GgufContent) -> dict[str, Any]:
    """Return how positions are scaled by a file; nothing if they are not.

    Raises:
        UserError: The file says it in a way that is not known here.
    """
    kind, factor = _scaling(content)
    tables, said = dict(content.tables), _rope(content)
    divided = tables.pop(_FREQUENCIES, torch.ones(1))
    by_table = not bool((divided == 1).all())
    if kind == "none" and not tables and not by_table:
        return {}
    found: dict[str, Any] = {}
    if kind == "linear":
        found = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and "scaling.original_context_length" in said:
        found = {"rope_type": "yarn", **{name: said[key] for key, name in _YARN.items() if key in said}}
    elif kind == "none" and (scaling := _llama_3(config, divided)):
        found, by_table = scaling, False
    if not found or tables or by_table or not getattr(config, "rope_parameters", None):
        what = (
            f"the positions are scaled ({kind if kind != 'none' else 'by a table'}) in a way transformers does not know"
        )
        raise UserError(what, None, HINT)
    return found


def _rope(content: GgufContent) -> dict[str, Any]:
    """Return what a file says of positions, without "rope." in front."""
    said = content.settings.items()
    return {key.removeprefix("rope."): value for key, value in said if key.startswith("rope.")}


def _scaling(content: GgufContent) -> tuple[str, float]:
    """Return how positions are scaled by the settings of a file, and by how much; "none": not at all."""
    said = _rope(content)
    factor = float(said.get("scaling.factor", said.get("scale_linear", 1.0)))
    kind = str(said.get("scaling.type", "linear"))
    return ("none" if factor == 1 and kind == "linear" else kind), factor


def _llama_3(config: PretrainedConfig, divided: Tensor) -> dict[str, Any]:
    """Return the settings of Llama 3 that divide the frequencies by what a file's table says; nothing if none do."""
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if theta is None or not len(divided):
        return {}
    # Of the longest wave, which is divided by all of the factor if it is longer than all positions, and by less if not.
    turns = _LLAMA_3_POSITIONS / (2 * math.pi * theta ** (1 - 1 / len(divided)))
    share, by = min(max((turns - 1) / 3, 0.0), 1.0), float(divided[-1])
    if not 1 / by > share:
        return {}
    found = {**_LLAMA_3, "factor": float(f"{(1 - share) / (1 / by - share):.6g}")}
    expected = _divisors(config, found)
    return found if expected.shape == divided.shape and torch.allclose(expected, divided, rtol=1e-4) else {}


def _divisors(config: PretrainedConfig, scaling: Mapping[str, Any]) -> Tensor:
    """Return by what each frequency is divided."""
    scaled = copy.deepcopy(config)
    scaled.rope_parameters = {**config.rope_parameters, **scaling}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(frequencies)) / len(frequencies))
    divisors: Tensor = plain / frequencies
    return divisors


def _head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

"""How positions are turned and scaled, in the words of a GGUF file and in those of a model's configuration."""

from __future__ import annotations

import copy
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

_LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA_3_POSITIONS = 8192
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
    """Let a model's settings scale its positions as its file says.

    Raises:
        UserError: The file says it in a way that is not known here.
    """
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
    elif kind == "yarn" and not tables and "scaling.original_context_length" in _rope(content):
        found = {
            "rope_type": "yarn",
            **{name: _rope(content)[key] for key, name in _YARN.items() if key in _rope(content)},
        }
    elif kind == "none" and not tables:
        found = {**_LLAMA_3, "factor": float(divided.max()), "original_max_position_embeddings": _LLAMA_3_POSITIONS}
    if found is None or not known or "rope_type" not in known or not _divides(config, found, divided):
        what = (
            f"the positions are scaled ({kind if kind != 'none' else 'by a table'}) in a way transformers does not know"
        )
        raise UserError(what, None, HINT)
    config.rope_parameters = {**known, **found}


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


def _divides(config: PretrainedConfig, scaling: dict[str, Any], divided: Tensor) -> bool:
    """Tell whether settings divide the frequencies by what a file's table says; others come without a table."""
    if scaling["rope_type"] != "llama3":
        return bool((divided == 1).all())
    expected = _divisors(config, scaling)
    return expected.shape == divided.shape and torch.allclose(expected, divided, rtol=1e-4)


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

"""How a GGUF file holds models of one kind: a row of the table of architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]
"""A config.json."""


@dataclass(frozen=True)
class Architecture:
    """How a GGUF file holds models of a kind.

    Attributes:
        name: What the file calls it.
        settings: Keys of the file, without the name in front, and what the model's configuration calls them. What the
            package transformers passes over when it reads the file is set from here.
        only: Settings that the file has no key for, each with the values that it means, the usual one first; settings
            that are not there have them.
        flags: Settings that follow from which tensors there are, each with the tensor that it adds.
        constants: Keys of the file that are the same for all such models, or follow from their configuration.
        names: By how a weight's name ends in the model, what the file calls it within its layer, where the package
            `gguf` does not know: several where the model keeps them as one.
        aside: Settings that the file says in other words, so that they may be others when it is read.
        derived: Settings that the file has no key for, and what llama.cpp computes in their place.
        transforms: By the end of a tensor's name in the file, how the model's weight is changed for it.
        rotary: How positions may be scaled: `rope_type` of the configuration. Empty: there is no rotary embedding.
        partial: Whether a part of each head may be turned by positions.
        head: Whether the output projection is the embedding ("tied"), is not ("untied"), or may be either.
        problem: Finds what else of a configuration a file cannot say.
    """

    name: str
    settings: Mapping[str, str]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any | Callable[[Any], Any]] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aside: tuple[str, ...] = ()
    derived: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    transforms: Mapping[str, Callable[[Tensor, Any], Tensor]] = field(default_factory=dict)
    rotary: tuple[str, ...] = ("default", "linear")
    partial: bool = False
    head: str = "either"
    problem: Callable[[Config], str | None] = lambda config: None


COMMON = {
    "context_length": "max_position_embeddings", "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "vocab_size": "vocab_size",
}  # fmt: skip
RMS = {**COMMON, "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
HEAD_DIM = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
SILU = {"hidden_act": ("silu", "swish")}
FULL = "full_attention"

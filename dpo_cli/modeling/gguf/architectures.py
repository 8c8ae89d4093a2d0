"""Which models a GGUF file can hold, and how: one table, from which files are written, checked and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_cli.modeling.gguf.transforms import add_one, pair_keys, pair_queries, transpose

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
    transforms: Mapping[str, Callable[[Tensor, Any], Tensor]] = field(default_factory=dict)
    rotary: tuple[str, ...] = ("default", "linear")
    partial: bool = False
    head: str = "either"
    problem: Callable[[Config], str | None] = lambda config: None


_LINEAR = ("default", "linear")
_YARN = (*_LINEAR, "yarn")

_COMMON = {
    "context_length": "max_position_embeddings", "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "vocab_size": "vocab_size",
}  # fmt: skip
_RMS = {**_COMMON, "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_HEAD_DIM = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
_BIAS = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}

_PAIRED = {
    "attn_q.weight": pair_queries, "attn_q.bias": pair_queries, "attn_k.weight": pair_keys, "attn_k.bias": pair_keys,
}  # fmt: skip
_FROM_ONE = {"norm.weight": add_one}
_GPT = {f"{name}.weight": transpose for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}

_SILU = {"hidden_act": ("silu", "swish")}
_GEMMA = {
    "hidden_activation": ("gelu_pytorch_tanh", None), "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
}  # fmt: skip


def _no_short_window(config: Config) -> str | None:
    """Find a window that is shorter than the longest text."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if window is not None and (longest is None or window < longest):
        return f"`sliding_window: {window}`, which the file has no key for"
    return None


def _scaled_by_heads(large: int) -> Callable[[Config], str | None]:
    """Return what finds scores of attention that are scaled otherwise than llama.cpp does.

    Args:
        large: The number of layers of the model that scales them by its width.
    """

    def problem(config: Config) -> str | None:
        scalar, heads = config.get("query_pre_attn_scalar", 256), config.get("num_attention_heads", 8)
        by = config.get("head_dim", 256)
        if config.get("num_hidden_layers", 26) == large:
            by = config.get("hidden_size", 2304) // heads
        return None if scalar == by else f"`query_pre_attn_scalar: {scalar}`, where the file means {by}"

    return problem


_LLAMA = Architecture(
    name="llama",
    settings={**_RMS, **_HEAD_DIM, "rope.dimension_count": "head_dim"},
    only=_SILU,
    flags=_BIAS,
    transforms=_PAIRED,
    rotary=(*_YARN, "llama3"),
    problem=_no_short_window,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
}
"""By `model_type` of a configuration."""


def gguf_problem(config: Config) -> str | None:
    """Return why a model cannot be written as a GGUF file; None: it can.

    Args:
        config: Its config.json.
    """
    kind = config.get("model_type")
    architecture = ARCHITECTURES.get(str(kind))
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        return f"a GGUF file cannot be written of `model_type: {kind}`; it can of: {known}"
    found = [
        f"`{name}: {config[name]}`, where the file means {values[0]}"
        for name, values in architecture.only.items()
        if name in config and config[name] not in values
    ]
    more = (architecture.problem(config), _head_problem(architecture, config), _rotary_problem(architecture, config))
    found += [problem for problem in more if problem]
    return f"a GGUF file cannot say what config.json says: {'; '.join(found)}" if found else None


def _head_problem(architecture: Architecture, config: Config) -> str | None:
    tied = config.get("tie_word_embeddings")
    if architecture.head == "either" or tied is None or tied == (architecture.head == "tied"):
        return None
    return f"`tie_word_embeddings: {tied}`, where the file means {not tied}"


def _rotary_problem(architecture: Architecture, config: Config) -> str | None:
    """Find positions that are scaled in a way which the file has no words for."""
    problems = [_scaling_problem(architecture, layers) for layers in rotary_settings(config).values()]
    return next((problem for problem in problems if problem), None)


def rotary_settings(config: Config) -> dict[str, dict[str, Any]]:
    """Return how positions are turned by the kind of layer, as config.json says it now or said it before; "" is all."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {kind: inner for kind, inner in said.items() if isinstance(inner, Mapping)}
    return {kind: dict(inner) for kind, inner in kinds.items()} or ({"": dict(said)} if said else {})


_MEANT: Mapping[str, Mapping[str, Any]] = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True},
}
"""What a file means by how positions are scaled, beside what it says."""


def _scaling_problem(architecture: Architecture, said: Mapping[str, Any]) -> str | None:
    kind = said.get("rope_type", said.get("type", "default"))
    if architecture.rotary and kind not in architecture.rotary:
        known = ", ".join(architecture.rotary)
        return f"`rope_type: {kind}`, where a file of the architecture `{architecture.name}` knows: {known}"
    for name, meant in _MEANT.get(kind, {}).items():
        if said.get(name, meant) != meant:
            return f"`{name}: {said[name]}` of `rope_type: {kind}`, where the file means {meant}"
    if kind == "yarn" and not said.get("original_max_position_embeddings"):
        return "`rope_type: yarn` without `original_max_position_embeddings`"
    partial = said.get("partial_rotary_factor", 1.0)
    if partial != 1 and not architecture.partial:
        return f"`partial_rotary_factor: {partial}`, where the file means 1"
    return None

"""Which models a GGUF file can hold, and how: one table, from which files are written, checked and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dpo_cli.modeling.gguf.transforms import (
    add_one,
    as_it_is,
    decay,
    decay_of_value_heads,
    gates,
    kernel,
    mixed_kernel,
    mixed_rows,
    only_row,
    pair_keys,
    pair_queries,
    transpose,
    ups,
    value_columns,
    value_heads,
    value_rows,
)

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

_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_EXPERT_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}
_SHARED_SIZE = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_EXPERT_NAMES = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
}  # fmt: skip
_EXPERT_PARTS = {"ffn_gate_exps.weight": gates, "ffn_up_exps.weight": ups, "ffn_gate_inp_shexp.weight": only_row}
_FULL = "full_attention"
_ALL_SPARSE = {**_SILU, "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


def _unlike(name: str, usual: Any, meant: Any) -> Callable[[Config], str | None]:
    """Return what finds a setting that is not what a file means; `usual` is what it is where it is not there."""
    return lambda config: (
        None if (said := config.get(name, usual)) == meant else f"`{name}: {said}`, where the file means {meant}"
    )


def _full_every(kinds: Sequence[str]) -> int:
    """Return after how many layers, itself included, there is one that attends to all tokens."""
    return kinds.index(_FULL) + 1 if _FULL in kinds else len(kinds) + 1


def _gated_delta_problem(config: Config) -> str | None:
    """Find layers in another order than every few, and heads that blocks of quantized numbers would be parted by."""
    kinds = config.get("layer_types") or []
    every = _full_every(kinds)
    if kinds != [_FULL if layer % every == 0 else "linear_attention" for layer in range(1, len(kinds) + 1)]:
        return f"`layer_types: {kinds}`, where the file means one with full attention after every few others"
    size, key_size = config.get("linear_value_head_dim", 128), config.get("linear_key_head_dim", 128)
    if size != key_size:
        return f"`linear_value_head_dim: {size}`, where llama.cpp takes the size of keys, {key_size}"
    return None if size % 32 == 0 else f"`linear_value_head_dim: {size}`, where the file means a multiple of 32"


def _adjusted_width(config: Any) -> int:
    """Return how wide the feed-forward layers of LFM2 are, of which the configuration may say what it follows from."""
    width: int = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int((config.block_ffn_dim_multiplier or 1) * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return width


_GATED_DELTA = Architecture(
    name="qwen35",
    settings={**_RMS, **_HEAD_DIM},
    only={**_SILU, "attention_bias": (False,), "attn_output_gate": (True,)},
    constants={
        "ssm.conv_kernel": lambda config: config.linear_conv_kernel_dim,
        "ssm.state_size": lambda config: config.linear_key_head_dim,
        "ssm.group_count": lambda config: config.linear_num_key_heads,
        "ssm.time_step_rank": lambda config: config.linear_num_value_heads,
        "ssm.inner_size": lambda config: config.linear_num_value_heads * config.linear_value_head_dim,
        "full_attention_interval": lambda config: _full_every(config.layer_types),
        "rope.dimension_sections": lambda config: [*config.rope_parameters.get("mrope_section", [11, 11, 10]), 0],
    },
    names={"linear_attn.dt_bias": ("ssm_dt.bias",)},
    transforms={
        "ssm_norm.weight": as_it_is, "norm.weight": add_one, "ssm_a": decay_of_value_heads, "ssm_dt.bias": value_heads,
        "ssm_alpha.weight": value_heads, "ssm_beta.weight": value_heads, "ssm_conv1d.weight": mixed_kernel,
        "attn_qkv.weight": mixed_rows, "attn_gate.weight": value_rows, "ssm_out.weight": value_columns,
    },
    rotary=("default",),
    partial=True,
    problem=_gated_delta_problem,
)  # fmt: skip
_QWEN2_MOE = Architecture(
    name="qwen2moe",
    settings={**_RMS, **_EXPERTS, **_EXPERT_SIZE, **_SHARED_SIZE},
    only={**_ALL_SPARSE, "norm_topk_prob": (False,), "use_sliding_window": (False,), "qkv_bias": (True,)},
    names=_EXPERT_NAMES,
    transforms=_EXPERT_PARTS,
)
_QWEN3_MOE = Architecture(
    name="qwen3moe",
    settings={**_RMS, **_HEAD_DIM, **_EXPERTS, **_EXPERT_SIZE},
    only={**_ALL_SPARSE, "use_sliding_window": (False,), "attention_bias": (False,)},
    names=_EXPERT_NAMES,
    transforms=_EXPERT_PARTS,
    problem=_unlike("norm_topk_prob", False, True),
)
_MINIMAX_M2 = Architecture(
    name="minimax-m2",
    settings={**_RMS, **_HEAD_DIM, **_EXPERTS, "expert_count": "num_local_experts"},
    only=_SILU,
    constants={"expert_gating_func": 2, "expert_feed_forward_length": lambda config: config.intermediate_size},
    names={**_EXPERT_NAMES, "mlp.e_score_correction_bias": ("exp_probs_b.bias",)},
    transforms=_EXPERT_PARTS,
    rotary=("default",),
    partial=True,
)
_MAMBA = Architecture(
    name="mamba",
    settings={
        "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "vocab_size": "vocab_size",
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon", "ssm.conv_kernel": "conv_kernel",
        "ssm.inner_size": "intermediate_size", "ssm.state_size": "state_size", "ssm.time_step_rank": "time_step_rank",
    },
    only={**_SILU, "use_bias": (False,), "use_conv_bias": (True,), "expand": (2,)},
    # It has no positions; readers look for some of the keys that attention has.
    constants={
        "context_length": 2**20, "feed_forward_length": 0, "attention.head_count": 0, "ssm.dt_b_c_rms": False,
    },
    transforms={"ssm_a": decay, "ssm_conv1d.weight": kernel},
    rotary=(),
)  # fmt: skip
_LFM2 = Architecture(
    name="lfm2",
    settings={
        "context_length": "max_position_embeddings", "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size", "attention.head_count": "num_attention_heads", "vocab_size": "vocab_size",
        "attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache",
    },
    only={"conv_bias": (False,)},
    constants={
        "feed_forward_length": _adjusted_width,
        # A layer that has no heads of keys is a convolution.
        "attention.head_count_kv": lambda config: [
            config.num_key_value_heads if kind == _FULL else 0 for kind in config.layer_types
        ],
    },
    transforms={"shortconv.conv.weight": kernel},
    rotary=("default",),
)  # fmt: skip

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "minimax_m2": _MINIMAX_M2,
    "mamba": _MAMBA,
    "lfm2": _LFM2,
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_5_moe_text": replace(
        _GATED_DELTA,
        name="qwen35moe",
        settings={**_GATED_DELTA.settings, **_EXPERTS, **_EXPERT_SIZE, **_SHARED_SIZE},
        names={**_GATED_DELTA.names, **_EXPERT_NAMES},
        transforms={**_GATED_DELTA.transforms, **_EXPERT_PARTS},
    ),
}
"""By `model_type` of a configuration."""

REFUSED: Mapping[str, str] = {
    "gemma4": "transformers reads it with end tokens and kinds of layers of its own, whatever it says",
    "gemma4_text": "transformers reads it with end tokens and kinds of layers of its own, whatever it says",
    "gpt_oss": "transformers does not read the experts in it, nor how positions are scaled",
    "mixtral": "transformers reads it as a Llama without experts",
}
"""Models whose files llama.cpp reads, but which cannot be proved: why, by `model_type`."""

_TEXT_ALONE = ("qwen3_5", "qwen3_5_moe")
"""Models for images and text of which the language model is taken for the whole."""


def gguf_problem(config: Config) -> str | None:
    """Return why a model cannot be written as a GGUF file; None: it can.

    Args:
        config: Its config.json.
    """
    if config.get("model_type") in _TEXT_ALONE:
        config = config.get("text_config", {})
    kind = config.get("model_type")
    architecture = ARCHITECTURES.get(str(kind))
    if kind in REFUSED:
        return f"a GGUF file of `model_type: {kind}` cannot be proved: {REFUSED[str(kind)]}"
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

"""How GGUF files hold models with experts, with states in place of attention, or with convolutions beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_cli.modeling.gguf.architecture import FULL, HEAD_DIM, RMS, SILU, Architecture, Config
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
    ups,
    value_columns,
    value_heads,
    value_rows,
)

_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_EXPERT_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}
_SHARED_SIZE = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_EXPERT_NAMES = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
}  # fmt: skip
_EXPERT_PARTS = {"ffn_gate_exps.weight": gates, "ffn_up_exps.weight": ups, "ffn_gate_inp_shexp.weight": only_row}
_ALL_SPARSE = {**SILU, "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


def _unlike(name: str, usual: Any, meant: Any) -> Callable[[Config], str | None]:
    """Return what finds a setting that is not what a file means; `usual` is what it is where it is not there."""
    return lambda config: (
        None if (said := config.get(name, usual)) == meant else f"`{name}: {said}`, where the file means {meant}"
    )


def _full_every(kinds: Sequence[str]) -> int:
    """Return after how many layers, itself included, there is one that attends to all tokens."""
    return kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1


def _gated_delta_problem(config: Config) -> str | None:
    """Find layers in another order than every few, and heads that blocks of quantized numbers would be parted by."""
    kinds = config.get("layer_types") or []
    every = _full_every(kinds)
    if kinds != [FULL if layer % every == 0 else "linear_attention" for layer in range(1, len(kinds) + 1)]:
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
    settings={**RMS, **HEAD_DIM},
    only={**SILU, "attention_bias": (False,), "attn_output_gate": (True,)},
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
    settings={**RMS, **_EXPERTS, **_EXPERT_SIZE, **_SHARED_SIZE},
    only={**_ALL_SPARSE, "norm_topk_prob": (False,), "use_sliding_window": (False,), "qkv_bias": (True,)},
    names=_EXPERT_NAMES,
    transforms=_EXPERT_PARTS,
)
_QWEN3_MOE = Architecture(
    name="qwen3moe",
    settings={**RMS, **HEAD_DIM, **_EXPERTS, **_EXPERT_SIZE},
    only={**_ALL_SPARSE, "use_sliding_window": (False,), "attention_bias": (False,)},
    names=_EXPERT_NAMES,
    transforms=_EXPERT_PARTS,
    problem=_unlike("norm_topk_prob", False, True),
)
_MINIMAX_M2 = Architecture(
    name="minimax-m2",
    settings={**RMS, **HEAD_DIM, **_EXPERTS, "expert_count": "num_local_experts"},
    only=SILU,
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
    only={**SILU, "use_bias": (False,), "use_conv_bias": (True,), "expand": (2,)},
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
    aside=("intermediate_size", "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"),
    constants={
        "feed_forward_length": _adjusted_width,
        # A layer that has no heads of keys is a convolution.
        "attention.head_count_kv": lambda config: [
            config.num_key_value_heads if kind == FULL else 0 for kind in config.layer_types
        ],
    },
    transforms={"shortconv.conv.weight": kernel},
    rotary=("default",),
)  # fmt: skip

MIXED: Mapping[str, Architecture] = {
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

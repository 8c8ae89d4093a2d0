"""How GGUF files hold models with one feed-forward layer for all tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpo_cli.modeling.gguf.architecture import COMMON, FULL, HEAD_DIM, RMS, SILU, Architecture, Config
from dpo_cli.modeling.gguf.transforms import add_one, pair_keys, pair_queries, part_heads, transpose

_YARN = ("default", "linear", "yarn")

_BIAS = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}

_PAIRED = {
    "attn_q.weight": pair_queries, "attn_q.bias": pair_queries, "attn_k.weight": pair_keys, "attn_k.bias": pair_keys,
}  # fmt: skip
_FROM_ONE = {"norm.weight": add_one}
_GPT = {f"{name}.weight": transpose for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}

_GEMMA = {
    "hidden_activation": ("gelu_pytorch_tanh", None), "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
}  # fmt: skip


_MISTRAL = 4096
"""The window of a Mistral that does not say it."""


def _no_short_window(config: Config) -> str | None:
    """Find a window that is shorter than the longest text."""
    usual = _MISTRAL if config.get("model_type") == "mistral" else None
    window, longest = config.get("sliding_window", usual), config.get("max_position_embeddings")
    if window is not None and (longest is None or window < longest):
        return f"`sliding_window: {window}`, which the file has no key for"
    return None


def _scaled_by(large: int) -> Callable[[Any], Any]:
    """Return what computes by what llama.cpp scales the scores of attention.

    Args:
        large: The number of layers of the model that scales them by its width.
    """
    return lambda config: (
        config.hidden_size // config.num_attention_heads if config.num_hidden_layers == large else config.head_dim
    )


def _gemma_2(config: Config) -> str | None:
    """Find what Gemma 2 has and this model does not."""
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if cap in config and config[cap] is None:
            return f"`{cap}: null`"
    return _other_layers(2)(config)


def _other_layers(period: int) -> Callable[[Config], str | None]:
    """Return what finds windows in other layers than all but every so manieth."""

    def problem(config: Config) -> str | None:
        types = config.get("layer_types") or []
        meant = ["sliding_attention" if (place + 1) % period else FULL for place in range(len(types))]
        return None if list(types) == meant else f"`layer_types`, where in the file each {period}th is `full_attention`"

    return problem


_LLAMA = Architecture(
    name="llama",
    settings={**RMS, **HEAD_DIM, "rope.dimension_count": "head_dim"},
    only=SILU,
    flags=_BIAS,
    transforms=_PAIRED,
    rotary=(*_YARN, "llama3"),
    problem=_no_short_window,
)

DENSE: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(
        name="qwen2", settings={**RMS, **HEAD_DIM}, only={**SILU, "use_sliding_window": (False,)}, rotary=_YARN
    ),
    "qwen3": Architecture(
        name="qwen3",
        settings={**RMS, **HEAD_DIM},
        only={**SILU, "use_sliding_window": (False,), "attention_bias": (False,)},
        rotary=_YARN,
    ),
    "gemma2": Architecture(
        name="gemma2",
        settings={
            **RMS, **HEAD_DIM, "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
        },
        only=_GEMMA,
        derived={"query_pre_attn_scalar": _scaled_by(46)},
        transforms=_FROM_ONE,
        head="tied",
        problem=_gemma_2,
    ),
    "gemma3_text": Architecture(
        name="gemma3",
        settings={**RMS, **HEAD_DIM, "attention.sliding_window": "sliding_window"},
        only={**_GEMMA, "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
        derived={"query_pre_attn_scalar": _scaled_by(62)},
        transforms=_FROM_ONE,
        problem=_other_layers(6),
    ),
    "phi3": Architecture(
        name="phi3",
        settings={
            **RMS, "attention.sliding_window": "sliding_window",
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
        only=SILU,
        # Without the key, some versions of llama.cpp take the window of the first such models.
        constants={"attention.sliding_window": lambda config: config.sliding_window or 0},
        partial=True,
    ),
    "starcoder2": Architecture(
        name="starcoder2",
        settings={**COMMON, "attention.layer_norm_epsilon": "norm_epsilon"},
        only={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
        problem=_no_short_window,
    ),
    "stablelm": Architecture(
        name="stablelm",
        settings={**COMMON, "attention.layer_norm_epsilon": "layer_norm_eps"},
        only={**SILU, "qk_layernorm": (False,)},
        partial=True,
        head="untied",
    ),
    "nemotron": Architecture(
        name="nemotron",
        # transformers looks for the one, llama.cpp for the other.
        settings={
            **COMMON, **HEAD_DIM, "attention.layer_norm_epsilon": "norm_eps",
            "attention.layer_norm_rms_epsilon": "norm_eps",
        },
        only={"hidden_act": ("relu2",)},
        flags=_BIAS,
        transforms=_FROM_ONE,
        partial=True,
        head="untied",
    ),
    "gpt2": Architecture(
        name="gpt2",
        settings={
            "context_length": "n_positions", "block_count": "n_layer", "embedding_length": "n_embd",
            "attention.head_count": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "feed_forward_length": "n_inner", "vocab_size": "vocab_size",
        },
        only={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        },
        aside=("reorder_and_upcast_attn",),
        constants={"feed_forward_length": lambda config: config.n_inner or 4 * config.n_embd},
        transforms=_GPT,
        rotary=(),
    ),
    "falcon": Architecture(
        name="falcon",
        settings={
            **{key: name for key, name in COMMON.items() if key != "attention.head_count_kv"},
            "feed_forward_length": "ffn_hidden_size", "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        only={
            "multi_query": (True,), "new_decoder_architecture": (False,), "alibi": (False,), "parallel_attn": (True,),
            "bias": (False,), "activation": ("gelu",),
        },
        aside=("num_kv_heads", "num_ln_in_parallel_attn"),
        constants={"attention.head_count_kv": 1, "tensor_data_layout": "jploski"},
        rotary=("default",),
        head="tied",
    ),
    "bloom": Architecture(
        name="bloom",
        settings={
            "block_count": "n_layer", "embedding_length": "hidden_size", "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon", "vocab_size": "vocab_size",
        },
        only={"apply_residual_connection_post_layernorm": (False,)},
        aside=("slow_but_exact",),
        constants={
            "context_length": lambda config: getattr(config, "seq_length", 2048),
            "feed_forward_length": lambda config: 4 * config.hidden_size,
            "attention.head_count_kv": lambda config: config.n_head,
        },
        transforms={"attn_qkv.weight": part_heads, "attn_qkv.bias": part_heads},
        rotary=(),
        head="tied",
    ),
}  # fmt: skip
"""By `model_type` of a configuration."""

"""Tiny random models of many architectures, in which everything that an architecture has comes into play.

Weights are large, biases are not zero and norms not one; windows are shorter than the pairs, and soft caps are
small enough to bend what they cap. `KINDS` at the end lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_cli.data.records import TokenizedPair

VOCABULARY = 97
_SPREAD = 0.3
"""Standard deviation of the weights: of the tens of a trained model's, so that attention is far from uniform."""

_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    **_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": _SPREAD,
}  # fmt: skip
_GPT = {**_COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": _SPREAD}
_HEAD = {"head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_WINDOW = {"sliding_window": 5}
_NO_WINDOW = {"sliding_window": None}
_MIXED = ["sliding_attention", "full_attention"]
_FULL = ["full_attention", "full_attention"]
_WINDOW_IN_TURN = {**_WINDOW, "layer_types": _MIXED}
_ALL_FULL = {"layer_types": _FULL}


@dataclass(frozen=True)
class Kind:
    """An architecture with the settings that make it small.

    Attributes:
        config: Its configuration's class in transformers.
        settings: What it is built with.
        without: What an architecture adds to plain attention, each with the settings that switch it off.
    """

    config: str
    settings: Mapping[str, Any]
    without: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def features(self) -> list[str]:
        """Name what goes beyond plain attention and one feed-forward layer."""
        grouped = self.settings.get("num_key_value_heads", 4) < 4 or self.settings.get("multi_query", False)
        experts = any("experts" in name for name in self.settings)
        shared = (["grouped heads"] if grouped else []) + (["experts"] if experts else [])
        return shared + [name.replace("_", " ") for name in self.without]


def build(name: str, **changes: Any) -> PreTrainedModel:
    """Build one of `KINDS` in float32; the same name gives the same weights, whatever the changed settings."""
    kind = KINDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind.config)(**{**kind.settings, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(_SPREAD * noise)
            elif path.endswith("weight"):
                parameter.add_(_SPREAD * noise)
            else:
                parameter.copy_(_SPREAD * noise)
    return model.eval()


KINDS = {
    "llama": Kind("LlamaConfig", {**SMALL, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen2": Kind(
        "Qwen2Config", {**SMALL, **_WINDOW_IN_TURN, "use_sliding_window": True},
        {"window": {**_ALL_FULL, "use_sliding_window": False}},
    ),
    "qwen3": Kind("Qwen3Config", {**SMALL, **_HEAD}),
    "qwen3_moe": Kind("Qwen3MoeConfig", {**SMALL, **_HEAD, **_EXPERTS}),
    "mistral": Kind("MistralConfig", {**SMALL, **_NO_WINDOW}),
    "mistral with a window": Kind("MistralConfig", {**SMALL, **_WINDOW}, {"window": _NO_WINDOW}),
    "ministral": Kind("MinistralConfig", {**SMALL, **_HEAD, **_WINDOW_IN_TURN}, {"window": _ALL_FULL}),
    "mixtral": Kind("MixtralConfig", {**SMALL, **_WINDOW, "num_local_experts": 4}, {"window": _NO_WINDOW}),
    "phi": Kind("PhiConfig", {**SMALL, "qk_layernorm": True}),
    "phi3": Kind("Phi3Config", {**SMALL, **_WINDOW}, {"window": _NO_WINDOW}),
    "gemma": Kind("GemmaConfig", {**SMALL, **_HEAD}),
    "gemma2": Kind(
        "Gemma2Config",
        {**SMALL, **_HEAD, **_WINDOW_IN_TURN, "query_pre_attn_scalar": 3, "attn_logit_softcapping": 3.0,
         "final_logit_softcapping": 4.0},
        {"window": _ALL_FULL, "scaling": {"query_pre_attn_scalar": 8},
         "soft cap of attention": {"attn_logit_softcapping": None},
         "soft cap of logits": {"final_logit_softcapping": None}},
    ),
    "gemma3": Kind(
        "Gemma3TextConfig",
        {**SMALL, **_HEAD, **_WINDOW_IN_TURN, "query_pre_attn_scalar": 3, "final_logit_softcapping": 4.0},
        {"window": _ALL_FULL, "scaling": {"query_pre_attn_scalar": 8},
         "soft cap of logits": {"final_logit_softcapping": None}},
    ),
    "granite": Kind(
        "GraniteConfig",
        {**SMALL, "attention_multiplier": 0.3, "residual_multiplier": 0.6, "embedding_multiplier": 3.0,
         "logits_scaling": 2.0},
        {name: {name: 1.0}
         for name in ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling")},
    ),
    "granitemoe": Kind(
        "GraniteMoeConfig", {**SMALL, "num_local_experts": 4, "attention_multiplier": 0.3},
        {"attention_multiplier": {"attention_multiplier": 1.0}},
    ),
    "cohere": Kind(
        "CohereConfig", {**SMALL, "logit_scale": 0.25, "use_qk_norm": True}, {"logit_scale": {"logit_scale": 1.0}}
    ),
    "cohere2": Kind(
        "Cohere2Config", {**SMALL, **_HEAD, **_WINDOW_IN_TURN, "logit_scale": 0.25}, {"window": {"sliding_window": 99}}
    ),
    "gpt2": Kind(
        "GPT2Config", {**_GPT, "scale_attn_by_inverse_layer_idx": True},
        {"scaling": {"scale_attn_by_inverse_layer_idx": False}},
    ),
    "gpt_bigcode": Kind("GPTBigCodeConfig", {**_GPT, "multi_query": True}),
    "gpt_neox": Kind("GPTNeoXConfig", {name: SMALL[name] for name in SMALL if name != "num_key_value_heads"}),
    "opt": Kind(
        "OPTConfig",
        {**_COMMON, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    ),
    "olmo2": Kind("Olmo2Config", SMALL),
    "olmo3": Kind("Olmo3Config", {**SMALL, **_WINDOW_IN_TURN}, {"window": _ALL_FULL}),
    "olmoe": Kind("OlmoeConfig", {**SMALL, "num_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": Kind(
        "SmolLM3Config",
        {**SMALL, **_WINDOW_IN_TURN, "use_sliding_window": True, "no_rope_layers": [1, 0]},
        {"window": {**_ALL_FULL, "use_sliding_window": False}, "layer without positions": {"no_rope_layers": [1, 1]}},
    ),
    "starcoder2": Kind("Starcoder2Config", {**SMALL, **_WINDOW}, {"window": _NO_WINDOW}),
    "stablelm": Kind("StableLmConfig", {**SMALL, "use_qkv_bias": True, "qk_layernorm": True}),
    "glm": Kind("GlmConfig", {**SMALL, **_HEAD}),
    "glm4": Kind("Glm4Config", {**SMALL, **_HEAD}),
    "exaone4": Kind("Exaone4Config", {**SMALL, **_WINDOW_IN_TURN}, {"window": _ALL_FULL}),
    "helium": Kind("HeliumConfig", {**SMALL, **_HEAD}),
    "ernie4_5": Kind("Ernie4_5Config", {**SMALL, **_HEAD, "use_bias": True}),
    "deepseek_v3": Kind(
        "DeepseekV3Config",
        {**SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
         "qk_nope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
         "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 24},
    ),
    "afmoe": Kind("AfmoeConfig", {**SMALL, **_HEAD, **_EXPERTS, **_WINDOW_IN_TURN}, {"window": _ALL_FULL}),
    "falcon": Kind(
        "FalconConfig",
        {**_COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48},
    ),
    "bloom": Kind("BloomConfig", {**_COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": Kind("MptConfig", {**_COMMON, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "mamba": Kind(
        "MambaConfig", {**_COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
    ),
    "gpt_oss": Kind(
        "GptOssConfig", {**SMALL, **_HEAD, **_WINDOW_IN_TURN, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "lfm2": Kind("Lfm2Config", {**SMALL, "layer_types": ["conv", "full_attention"]}),
    "qwen3_next": Kind(
        "Qwen3NextConfig",
        {**SMALL, **_HEAD, **_EXPERTS, "layer_types": ["linear_attention", "full_attention"],
         "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "shared_expert_intermediate_size": 24},
    ),
}  # fmt: skip
"""Tiny models by name, those that the packed layout cannot have among them."""


def example_pairs() -> list[TokenizedPair]:
    """Return pairs that have much in common, so that a prefix tree of them branches in every way.

    Prompts of their own, prompts that begin alike, one prompt for several pairs, responses that begin alike, that are
    one token long, and one that begins as another goes on.
    """
    generator = np.random.default_rng(0)

    def draw(length: int) -> list[int]:
        return generator.integers(3, VOCABULARY, length).tolist()

    opening, question, answer, tail = draw(12), draw(9), draw(8), draw(7)
    parts = [
        (opening + question, answer + tail, answer + draw(5)),
        (opening + question, draw(11), answer + tail[:4]),
        (opening + draw(6), draw(1), draw(10)),
        (opening, question + answer, draw(1)),
        (draw(5), draw(17), draw(3)),
        (draw(1), draw(1), draw(1)),
    ]
    return [
        TokenizedPair(*(np.array(part, np.int32) for part in pair), origin=f"example:{place}")
        for place, pair in enumerate(parts)
    ]

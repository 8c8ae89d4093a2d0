"""Experts that a GGUF file has stacked are read as those of the model that it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import load_policy

EXPERTS, USED, HIDDEN, EACH, SHARED = 4, 2, 32, 24, 40
_SMALL = {
    "hidden_size": HIDDEN, "intermediate_size": EACH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "num_experts_per_tok": USED,
}  # fmt: skip
KINDS = {
    "qwen2moe": (
        "Qwen2MoeConfig",
        {"num_experts": EXPERTS, "moe_intermediate_size": EACH, "shared_expert_intermediate_size": SHARED},
    ),
    "qwen3moe": (
        "Qwen3MoeConfig", {"num_experts": EXPERTS, "moe_intermediate_size": EACH, "norm_topk_prob": True}
    ),
    "minimax-m2": ("MiniMaxM2Config", {"num_local_experts": EXPERTS, "rotary_dim": 4}),
}  # fmt: skip
"""Architectures by their name in GGUF: a configuration's class in transformers, and what it is built with."""


def random(kind: str, words: int) -> PreTrainedModel:
    config, settings = KINDS[kind]
    built = getattr(transformers, config)(**_SMALL, **settings, vocab_size=words)
    return random_model(built)


@torch.no_grad()
def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model none of whose weights is what it would be by itself: not even a norm is 1, or a buffer 0."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for tensor in model.state_dict().values():
        tensor.add_(0.3 * torch.randn(tensor.shape))
    return model.eval()


def tensors_of(kind: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a model's weights by their names in GGUF, where gate and up are apart and experts together."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[kind], 2)
    found = {}
    for name, tensor in model.state_dict().items():
        inside, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            found[f"{names.get_name(inside + '.gate_proj')}.weight"] = tensor[:, :EACH]
            found[f"{names.get_name(inside + '.up_proj')}.weight"] = tensor[:, EACH:]
        elif last == "e_score_correction_bias":
            found[f"{names.get_name(inside + '.e_score_correction')}.bias"] = tensor
        elif last in ("weight", "bias"):
            # What a gate of shared experts has is one row.
            found[f"{names.get_name(inside)}.{last}"] = tensor[0] if tensor.shape[0] == 1 else tensor
        else:
            found[f"{names.get_name(name)}.weight"] = tensor
    return found


def add_words(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    """Add what a file says of a byte-level tokenizer."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    known = tokenizer.get_vocab()
    writer.add_token_list(sorted(known, key=lambda word: known[word]))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])


def write(file: Path, kind: str, tensors: dict[str, torch.Tensor], tokenizer: Any) -> Path:
    """Write a GGUF file by the words of its format."""
    writer = gguf.GGUFWriter(file, kind)
    numbers = {
        "block_count": 2, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": EACH,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8, "rope.dimension_count": 4,
        "vocab_size": len(tokenizer), "expert_count": EXPERTS, "expert_used_count": USED,
    }  # fmt: skip
    for name, number in numbers.items():
        writer.add_uint32(f"{kind}.{name}", number)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5e6 if kind == "minimax-m2" else 1e4)
    add_words(writer, tokenizer)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 203)[None]).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_stacked_experts_is_read_as_the_model_that_it_was_made_of(
    tmp_path: Path, tokenizer: Any, kind: str
) -> None:
    model = random(kind, len(tokenizer))
    read = load_policy(str(write(tmp_path / "model.gguf", kind, tensors_of(kind, model), tokenizer)))
    assert torch.allclose(logits(read), logits(model), atol=1e-5)


@pytest.mark.parametrize("left_out", ["blk.1.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"])
def test_a_file_that_lacks_a_part_of_its_experts_is_refused(tmp_path: Path, tokenizer: Any, left_out: str) -> None:
    tensors = tensors_of("qwen3moe", random("qwen3moe", len(tokenizer)))
    del tensors[left_out]
    file = write(tmp_path / "model.gguf", "qwen3moe", tensors, tokenizer)
    with pytest.raises(UserError):
        load_policy(str(file))

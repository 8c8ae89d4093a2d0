"""GGUF files are read as the model that they were made of, or refused: nothing is made up, nothing passed over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import load_policy
from tests.conftest import build_llama

THETA = 500_000.0
HEADS, GROUPS, SIZE = 4, 2, 8
_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    **{f"model.layers.{i}.{a}.weight": f"blk.{i}.{b}.weight" for i in range(2) for a, b in _LAYER.items()},
}  # fmt: skip

Arrays = dict[str, NDArray[np.float32]]


def llama(folder: Path, tokenizer: Any, **scaling: Any) -> Path:
    rope = {"rope_type": "default", "rope_theta": THETA, **scaling}
    return build_llama(folder, tokenizer, seed=0, rope_parameters=rope)


def tensors_of(folder: Path) -> Arrays:
    """Return a model's weights under the names and in the order of GGUF, where heads are turned in pairs."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        array, heads = tensor.numpy(), {"q_proj": HEADS, "k_proj": GROUPS}.get(name.split(".")[-2], 0)
        if heads:
            array = array.reshape(heads, 2, SIZE // 2, -1).swapaxes(1, 2).reshape(array.shape)
        found[NAMES[name]] = np.ascontiguousarray(array)
    return found


def write(file: Path, folder: Path, tensors: Arrays, layers: int = 2, **scaling: Any) -> Path:
    """Write a GGUF file by the words of its format, with the tokenizer of a folder."""
    words = json.loads((folder / "tokenizer.json").read_text())
    known = {**words["model"]["vocab"], **{token["content"]: token["id"] for token in words["added_tokens"]}}
    writer = gguf.GGUFWriter(file, "llama")
    numbers = {
        "block_count": layers, "context_length": 512, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": HEADS, "attention.head_count_kv": GROUPS, "rope.dimension_count": SIZE,
        "vocab_size": len(known),
    }  # fmt: skip
    for name, number in numbers.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(THETA)
    for name, value in scaling.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.rope.{name.replace('__', '.')}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(known, key=lambda word: known[word]))
    writer.add_token_merges([" ".join(merge) for merge in words["model"]["merges"]])
    writer.add_eos_token_id(known["<|im_end|>"])
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(3, 203)[None]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=tokens).logits
    return found


def check_reads(file: Path, folder: Path) -> None:
    """Compare what a file is read as with the model that it was made of."""
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert torch.allclose(logits(load_policy(str(file))), expected, atol=1e-4)


def frequencies_divided(factor: float) -> NDArray[np.float32]:
    """Return what Llama 3 divides its frequencies by: long waves by `factor`, short ones by 1, those between smoothly.

    Waves count as long beyond 8192 positions, as short below a quarter of that.
    """
    divided = []
    for place in range(SIZE // 2):
        turns = 8192 / (2 * math.pi * THETA ** (2 * place / SIZE))
        share = min(max((turns - 1) / 3, 0.0), 1.0)
        divided.append(1 / ((1 - share) / factor + share))
    return np.array(divided, np.float32)


@pytest.mark.parametrize(
    ("scaling", "written", "tables"),
    [
        ({}, {}, {}),
        ({}, {"scaling__type": "none"}, {"rope_freqs.weight": np.ones(4, np.float32)}),
        ({}, {"scaling__type": "linear", "scaling__factor": 1.0}, {}),
        ({"rope_type": "linear", "factor": 4.0}, {"scaling__type": "linear", "scaling__factor": 4.0}, {}),
        ({"rope_type": "linear", "factor": 2.0}, {"scale_linear": 2.0}, {}),
        *(
            (
                {
                    "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                {}, {"rope_freqs.weight": frequencies_divided(factor)},
            )
            for factor in (8.0, 32.0)
        ),
    ],
    ids=["plain", "none", "by one", "linear", "linear as it was written first", "Llama 3.1", "Llama 3.2"],
)  # fmt: skip
def test_a_file_is_read_as_the_model_that_it_was_made_of(
    tmp_path: Path, tokenizer: Any, scaling: Mapping[str, Any], written: Mapping[str, Any], tables: Arrays
) -> None:
    folder = llama(tmp_path / "model", tokenizer, **scaling)
    check_reads(write(tmp_path / "model.gguf", folder, {**tensors_of(folder), **tables}, **written), folder)


@pytest.mark.parametrize("left_out", ["blk.1.ffn_up.weight", "token_embd.weight", "output_norm.weight"])
def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, tokenizer: Any, left_out: str) -> None:
    folder = llama(tmp_path / "model", tokenizer)
    tensors = tensors_of(folder)
    del tensors[left_out]
    file = write(tmp_path / "model.gguf", folder, tensors)
    with pytest.raises(UserError, match="1 parameter are missing") as found:
        load_policy(str(file))
    assert found.value.where == str(file)


def test_a_head_that_is_missing_is_the_embedding(tmp_path: Path, tokenizer: Any) -> None:
    folder = llama(tmp_path / "model", tokenizer)
    tensors = tensors_of(folder)
    del tensors["output.weight"]
    model = load_policy(str(write(tmp_path / "model.gguf", folder, tensors)))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("more", "layers", "told"),
    [
        ({"cls.weight": np.ones((1, 32), np.float32)}, 2, "44,224 weights"),
        ({"blk.0.attn_q.bias": np.ones(32, np.float32)}, 2, "7 parameters are missing"),
        ({}, 1, "with 1 layer"),
    ],
)
def test_weights_without_a_place_are_not_passed_over(
    tmp_path: Path, tokenizer: Any, more: Arrays, layers: int, told: str
) -> None:
    folder = llama(tmp_path / "model", tokenizer)
    file = write(tmp_path / "model.gguf", folder, {**tensors_of(folder), **more}, layers)
    with pytest.raises(UserError, match=told):
        load_policy(str(file))


@pytest.mark.parametrize(
    ("written", "tables"),
    [
        ({"scaling__type": "yarn", "scaling__factor": 4.0}, {}),
        ({}, {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}),
        ({"scaling__type": "linear", "scaling__factor": 4.0}, {"rope_freqs.weight": np.full(4, 2, np.float32)}),
        ({}, {"rope_factors_long.weight": np.ones(4, np.float32)}),
    ],
)
def test_positions_that_are_scaled_in_an_unknown_way_are_refused(
    tmp_path: Path, tokenizer: Any, written: Mapping[str, Any], tables: Arrays
) -> None:
    folder = llama(tmp_path / "model", tokenizer)
    file = write(tmp_path / "model.gguf", folder, {**tensors_of(folder), **tables}, **written)
    with pytest.raises(UserError, match="positions are scaled"):
        load_policy(str(file))

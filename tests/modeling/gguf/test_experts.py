"""Mixtures of experts, and models without attention in every layer, come back from GGUF files as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFReader, GGUFWriter
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.gguf.architectures import REFUSED, gguf_problem
from dpo_cli.modeling.gguf.llama_cpp import available, opened
from dpo_cli.modeling.gguf.tensors import round_as_in_file
from dpo_cli.modeling.gguf.types import GgufType
from dpo_cli.modeling.gguf.writing import write_gguf
from tests.conftest import ROOT
from tests.modeling.gguf.test_reading_experts import add_words, logits, random_model

WIDTH = 64
EXACT = 5e-5
"""How far apart, in nats, float32 may be: Mamba's decays are logarithms in the model, and none in the file."""

_SMALL = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_HYBRID = {
    "head_dim": 64, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
# The sizes that transformers takes experts to have, since it does not read them.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2MoeConfig", {**_SMALL, **_EXPERTS, "num_hidden_layers": 1}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_SMALL, **_EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "minimax_m2": (
        "MiniMaxM2Config",
        {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "rotary_dim": 16},
    ),
    "mamba": ("MambaConfig", {"hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}),
    "lfm2": ("Lfm2Config", {**_SMALL, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_5_text": ("Qwen3_5TextConfig", {**_SMALL, **_HYBRID}),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeTextConfig",
        {**_SMALL, **_HYBRID, **_EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    ),
}  # fmt: skip
"""Models by `model_type`: a configuration's class in transformers, and what it is built with."""


def build(kind: str, words: int, **changes: Any) -> PreTrainedModel:
    config, settings = KINDS[kind]
    built = getattr(transformers, config)(**{**settings, **changes}, vocab_size=words, pad_token_id=0)
    return random_model(built)


@pytest.fixture
def vocabulary(tokenizer: Any) -> Callable[[GGUFWriter], None]:
    return lambda writer: add_words(writer, tokenizer)


def read_by_transformers(file: Path) -> PreTrainedModel:
    """Let transformers read a file by itself."""
    whole = GgufConfig(gguf_file=file.name, dequantize=True)
    told = {"gguf_file": file.name, "quantization_config": whole, "output_loading_info": True}
    model, report = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **told)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    read: PreTrainedModel = model.eval()
    return read


def logps(model: PreTrainedModel) -> torch.Tensor:
    return logits(model).log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", ["f32", "f16", "q8_0"])
def test_a_model_comes_back_from_a_file_as_rounding_alone_leaves_it(
    tmp_path: Path, tokenizer: Any, vocabulary: Callable[[GGUFWriter], None], kind: str, held: GgufType
) -> None:
    model = build(kind, len(tokenizer))
    assert gguf_problem(model.config.to_dict()) is None
    before = logps(model)
    write_gguf(model, file := tmp_path / "model.gguf", held, "tiny", vocabulary)
    round_as_in_file(model, held)
    rounded = logps(model)
    for read in (read_by_transformers(file), load_policy(str(file))):
        assert (logps(read) - rounded).abs().max() < EXACT
    # Else nothing would have been compared.
    assert before.std() > 0.5 and (held == "f32") == bool((rounded - before).abs().max() < EXACT)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2_moe", {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 160}),
        ("qwen3_moe", {"moe_intermediate_size": 160, "tie_word_embeddings": True}),
    ],
)
def test_experts_have_the_size_that_they_had_which_transformers_alone_does_not_read(
    tmp_path: Path, tokenizer: Any, vocabulary: Callable[[GGUFWriter], None], kind: str, changes: dict[str, int]
) -> None:
    model = build(kind, len(tokenizer), **changes)
    write_gguf(model, file := tmp_path / "model.gguf", "f32", "tiny", vocabulary)
    read = load_policy(str(file))
    assert (logps(read) - logps(model)).abs().max() < EXACT
    assert all(getattr(read.config, name) == size for name, size in changes.items())


def test_experts_are_in_the_type_of_the_file_and_what_chooses_among_them_in_float32(
    tmp_path: Path, tokenizer: Any, vocabulary: Callable[[GGUFWriter], None]
) -> None:
    model = build("qwen2_moe", len(tokenizer))
    write_gguf(model, file := tmp_path / "model.gguf", "q8_0", "tiny", vocabulary)
    types = {tensor.name.removeprefix("blk.0."): tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_up_shexp", "attn_q"):
        assert types[f"{name}.weight"] == "Q8_0"
    for name in ("ffn_gate_inp", "ffn_gate_inp_shexp", "ffn_norm"):
        assert types[f"{name}.weight"] == "F32"


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "`norm_topk_prob: True`, where the file means False"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "`mlp_only_layers: [0]`"),
        ("qwen3_moe", {"norm_topk_prob": False}, "`norm_topk_prob: False`, where the file means True"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "`decoder_sparse_step: 2`"),
        (
            "minimax_m2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "`rope_type: linear`",
        ),
        ("mamba", {"use_bias": True}, "`use_bias: True`"),
        ("lfm2", {"conv_bias": True}, "`conv_bias: True`"),
        ("qwen3_5_text", {"layer_types": ["full_attention", "linear_attention"]}, "`layer_types: "),
        ("qwen3_5_text", {"linear_key_head_dim": 24, "linear_value_head_dim": 24}, "a multiple of 32"),
        ("qwen3_5_text", {"linear_key_head_dim": 16}, "takes the size of keys, 16"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say_is_refused(kind: str, changes: dict[str, Any], told: str) -> None:
    config, settings = KINDS[kind]
    problem = gguf_problem(getattr(transformers, config)(**{**settings, **changes}).to_dict())
    assert problem is not None
    assert told in problem


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_no_reader_can_prove_is_refused_with_the_reason(kind: str) -> None:
    problem = gguf_problem({"model_type": kind})
    assert problem is not None
    assert "transformers" in problem
    assert f"| `{kind}` | {REFUSED[kind]} |" in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


def test_the_language_model_of_a_model_for_images_and_text_is_asked() -> None:
    inner = transformers.Qwen3_5TextConfig(**KINDS["qwen3_5_text"][1])
    assert gguf_problem({"model_type": "qwen3_5", "text_config": inner.to_dict()}) is None
    assert gguf_problem({"model_type": "qwen3_5", "text_config": {**inner.to_dict(), "attention_bias": True}})


@pytest.mark.llama_cpp
@pytest.mark.program
@pytest.mark.skipif(not available(), reason="the package llama-cpp-python is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_the_model_does(
    tmp_path: Path, tokenizer: Any, vocabulary: Callable[[GGUFWriter], None], kind: str
) -> None:
    """What program and transformers read alike might be wrong alike; llama.cpp shares no line with either."""
    model = build(kind, len(tokenizer))
    write_gguf(model, file := tmp_path / "model.gguf", "f32", "tiny", vocabulary)
    tokens = list(range(3, 63))
    with opened(file, 128) as reader:
        found = reader.logps(tokens[:1], tokens[1:])
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    apart = (logps.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0] - found).abs()
    assert apart.max() < 1e-3, apart

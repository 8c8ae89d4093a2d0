"""A model that is written as a GGUF file is read back as it is: by the program, and by transformers where it can."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tiny_models import KINDS, SMALL, Kind, build
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_cli.errors import UserError
from dpo_cli.modeling.gguf.architectures import ARCHITECTURES, gguf_problem
from dpo_cli.modeling.gguf.dense import DENSE
from dpo_cli.modeling.gguf.tensors import round_as_in_file
from dpo_cli.modeling.gguf.types import GGUF_TYPES, GgufType
from dpo_cli.modeling.gguf.writing import GgufFile, write_gguf
from dpo_cli.modeling.policy import Policy
from tests.conftest import ROOT

_FULL = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False}
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_PARTLY = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}


_LEFT_OUT = {"rope_type: longrope": ["rope_parameters"], "sliding_window: 4096": ["sliding_window"]}
"""By what is said of it, settings that a config.json does not have."""


@dataclass(frozen=True)
class Case:
    """A model that a file can hold.

    Attributes:
        kind: One of `KINDS`.
        changes: What of it is otherwise, so that the file can.
        alone: Whether transformers by itself reads all of the file.
    """

    kind: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False


CASES = {
    "biases, a tied head": Case("llama"),
    "an untied head": Case("llama", {"attention_bias": False, "tie_word_embeddings": False}, alone=True),
    "wide heads": Case("llama", {"attention_bias": False, "mlp_bias": True, "head_dim": 16}),
    "Llama 3's positions": Case("llama", {"rope_parameters": _LLAMA_3}),
    "mistral": Case("mistral", alone=True),
    "a window as long as all": Case("mistral", {"sliding_window": 128}, alone=True),
    "qwen2": Case("qwen2", _FULL, alone=True),
    "linear positions": Case(
        "qwen2", {**_FULL, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}
    ),
    "qwen3": Case("qwen3"),
    "qwen3 as it is": Case("qwen3", {"head_dim": 128}, alone=True),
    "YaRN": Case("qwen3", {"rope_parameters": _YARN}),
    "gemma2": Case("gemma2", {"query_pre_attn_scalar": 8}),
    "gemma3": Case(
        "gemma3",
        {
            "query_pre_attn_scalar": 8, "final_logit_softcapping": None, "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 30000.0},
            },
        },
    ),
    "phi3": Case("phi3"),
    "heads turned in part": Case("phi3", {"sliding_window": None, "rope_parameters": _PARTLY}),
    "starcoder2": Case("starcoder2", {"sliding_window": None, "tie_word_embeddings": False}, alone=True),
    "a base of its own": Case(
        "starcoder2", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    ),
    "stablelm": Case("stablelm", {"qk_layernorm": False}, alone=True),
    "parallel layers": Case(
        "stablelm", {"qk_layernorm": False, "use_parallel_residual": True, "use_qkv_bias": False}, alone=True
    ),
    "nemotron": Case("nemotron"),
    "gpt2": Case("gpt2", {"scale_attn_by_inverse_layer_idx": False}),
    "gpt2, untied": Case(
        "gpt2", {"scale_attn_by_inverse_layer_idx": False, "n_inner": 48, "tie_word_embeddings": False}
    ),
    "falcon": Case("falcon"),
    "bloom": Case("bloom", alone=True),
}  # fmt: skip

NEMOTRON = Kind("NemotronConfig", {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 8})


@pytest.fixture(autouse=True)
def _nemotron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "nemotron", NEMOTRON)


def vocabulary(writer: gguf.GGUFWriter) -> None:
    """Add the tokens of `KINDS`: 97, of which two are joined to a third."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["t", "1", *(f"t{i}" for i in range(95))])
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def written(model: PreTrainedModel, folder: Path, kind: GgufType) -> GgufFile:
    assert gguf_problem(model.config.to_dict()) is None
    return write_gguf(model, folder / "model.gguf", kind, "tiny", vocabulary)


def rounded(model: PreTrainedModel, kind: GgufType) -> PreTrainedModel:
    other = copy.deepcopy(model)
    round_as_in_file(other, kind)
    return other


@torch.no_grad()
def logps(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.arange(3, 63)[None]
    found: torch.Tensor = model.eval()(input_ids=tokens).logits.log_softmax(-1)
    return found


def check_same(read: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Compare weights and answers; norms that a file counts from 0 are sums in 32 bits."""
    ours = expected.state_dict()
    assert read.state_dict().keys() == ours.keys()
    for name, weight in read.state_dict().items():
        tolerance = 2e-7 if name.endswith("norm.weight") else 0.0
        torch.testing.assert_close(weight, ours[name], rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(logps(read), logps(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_written_model_is_read_back_as_it_was_rounded(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model = build(case.kind, **case.changes)
    found = written(model, tmp_path, "f16")
    expected = rounded(model, "f16")
    check_same(Policy.load(str(found.path)).model, expected)
    assert bool(found.passed_over) != case.alone
    if case.alone:
        alone = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        check_same(alone, expected)


def test_a_name_by_which_transformers_takes_a_llama_for_a_mistral_is_not_written(tmp_path: Path) -> None:
    """It would have no biases, and a window."""
    model = build("llama")
    found = write_gguf(model, tmp_path / "model.gguf", "f32", "mistral", vocabulary)
    check_same(Policy.load(str(found.path)).model, model)


def test_every_architecture_is_among_the_cases() -> None:
    kinds = {getattr(transformers, KINDS[case.kind].config).model_type for case in CASES.values()}
    assert kinds == DENSE.keys()


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("name", ["biases, a tied head", "gpt2, untied"])
def test_every_type_is_read_back_as_it_was_rounded(tmp_path: Path, name: str, kind: GgufType) -> None:
    model = build(CASES[name].kind, **CASES[name].changes)
    found = written(model, tmp_path, kind)
    check_same(Policy.load(str(found.path)).model, rounded(model, kind))
    in_file = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(found.path).tensors}
    assert {name: in_file[name] for name in found.others} == found.others
    # Rows of 48 are no blocks of 32, which all other rows are.
    rows = {"f16": ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]} if kind not in ("f32", "f16", "bf16") else {}
    assert [name for name, other in found.others.items() if other == "f16"] == rows.get("f16", [])
    assert all(in_file[name] == "f32" for name in in_file if "norm" in name or name.endswith("bias"))


def test_what_is_otherwise_than_was_asked_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(build("gpt2", **CASES["gpt2, untied"].changes), tmp_path, "q8_0")
    wide, passed_over = (record.getMessage() for record in caplog.records if record.name.startswith("dpo_cli"))
    assert "2 weights" in wide and "kept in f16: blk.0.ffn_down.weight, blk.1.ffn_down.weight" in wide
    assert "does not read n_inner, n_positions;" in passed_over
    caplog.clear()
    written(build("qwen2", **CASES["qwen2"].changes), tmp_path, "f16")
    assert not [record for record in caplog.records if record.name.startswith("dpo_cli")]


def test_the_page_lists_every_model_and_every_type() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    section = page.partition("\n## GGUF\n")[2].partition("\n## ")[0]
    first = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    listed = [name for cell in first for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted([*ARCHITECTURES, *GGUF_TYPES])


def test_a_file_says_what_llama_cpp_looks_for(tmp_path: Path) -> None:
    found = written(build("gemma2", **CASES["gemma2"].changes), tmp_path, "q8_0")
    fields = {name: one.contents() for name, one in gguf.GGUFReader(found.path).fields.items()}
    expected = {
        "general.architecture": "gemma2", "general.name": "tiny", "general.file_type": 7,
        "general.quantization_version": 2, "gemma2.context_length": 128, "gemma2.embedding_length": 32,
        "gemma2.block_count": 2, "gemma2.feed_forward_length": 48, "gemma2.attention.head_count": 4,
        "gemma2.attention.head_count_kv": 2, "gemma2.attention.key_length": 8, "gemma2.attention.value_length": 8,
        "gemma2.attention.sliding_window": 5, "gemma2.attn_logit_softcapping": 3.0,
        "gemma2.final_logit_softcapping": 4.0, "gemma2.vocab_size": 97, "gemma2.rope.freq_base": 10000.0,
        "gemma2.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }  # fmt: skip
    assert {name: fields.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("opt", {}, "model_type: opt"),
        ("cohere", {}, "model_type: cohere"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: dynamic"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_type: longrope"),
        ("llama", {"rope_parameters": {**_LLAMA_3, "low_freq_factor": 2.0}}, "low_freq_factor: 2.0"),
        ("qwen2", {"use_sliding_window": False, "rope_parameters": _LLAMA_3}, "rope_type: llama3"),
        ("qwen3", {"rope_parameters": {**_YARN, "attention_factor": 2.0}}, "attention_factor: 2.0"),
        ("mistral with a window", {}, "sliding_window: 5"),
        ("mistral", {"max_position_embeddings": 32768}, "sliding_window: 4096"),
        ("qwen2", {}, "use_sliding_window: True"),
        ("qwen3", {"attention_bias": True}, "attention_bias: True"),
        ("gemma2", {}, "query_pre_attn_scalar: 3"),
        ("gemma2", {"query_pre_attn_scalar": 8, "attn_logit_softcapping": None}, "attn_logit_softcapping: null"),
        ("gemma2", {"query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma3", {"query_pre_attn_scalar": 8}, "final_logit_softcapping: 4.0"),
        ("starcoder2", {}, "sliding_window: 5"),
        ("stablelm", {}, "qk_layernorm: True"),
        ("stablelm", {"qk_layernorm": False, "tie_word_embeddings": True}, "tie_word_embeddings: True"),
        ("gpt2", {}, "scale_attn_by_inverse_layer_idx: True"),
        ("falcon", {"new_decoder_architecture": True}, "new_decoder_architecture: True"),
        ("falcon", {"tie_word_embeddings": False}, "tie_word_embeddings: False"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say_is_refused_before_work_begins(
    tmp_path: Path, kind: str, changes: dict[str, Any], told: str
) -> None:
    config = getattr(transformers, KINDS[kind].config)(**KINDS[kind].settings)
    config.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    for name in _LEFT_OUT.get(told, ()):
        del said[name]
    found = gguf_problem({**said, **changes})
    assert found is not None and told in found


def test_settings_are_read_back_before_weights_are_written(tmp_path: Path) -> None:
    """Whatever was not known of them before."""
    with pytest.raises(UserError, match="cannot say: query_pre_attn_scalar"):
        write_gguf(build("gemma2"), tmp_path / "model.gguf", "f16", "tiny", vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_without_a_place_is_not_dropped(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[1].mlp.more = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"no place for `model\.layers\.1\.mlp\.more\.weight`"):
        write_gguf(model, tmp_path / "model.gguf", "f16", "tiny", vocabulary)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "size"), [("f16", 7e4), ("q4_0", 6e5), ("q8_0", float("nan"))])
def test_weights_that_a_type_cannot_hold_are_refused(tmp_path: Path, kind: GgufType, size: float) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = size
    told = f"{kind} cannot hold `.*up.*weight`"
    with pytest.raises(UserError, match=told) as found:
        round_as_in_file(copy.deepcopy(model), kind)
    assert (found.value.hint is not None and "bf16" in found.value.hint) == (size == size)
    with pytest.raises(UserError, match=told):
        write_gguf(model, tmp_path / "model.gguf", kind, "tiny", vocabulary)


def test_a_full_disk_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="no space left"):
        write_gguf(build("llama"), Path("/dev/full"), "f16", "tiny", vocabulary)

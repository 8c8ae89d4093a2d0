"""Models as they are found: trained as what they are, or refused by what is wrong with them, before memory is taken."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import SMALL

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.folders.model_files import Trust
from dpo_cli.modeling.folders.model_names import check_model
from dpo_cli.modeling.folders.tokenizers import load_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change_settings(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, **changes: torch.Tensor) -> None:
    """Add weights to a file, or replace some."""
    save_file({**load_file(folder / WEIGHTS), **changes}, folder / WEIGHTS, metadata={"format": "pt"})


def refused(folder: Path) -> UserError:
    with pytest.raises(UserError) as found:
        load_policy(str(folder))
    assert found.value.hint
    return found.value


QUANTIZED = [
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "mxfp4"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "compressed-tensors", "config_groups": {}},
    {"quant_method": "of next year"},
    {"bits": 4},
    {},
]


@pytest.mark.parametrize("quantization", QUANTIZED, ids=str)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_what_its_settings_call_quantized_is_refused_before_anything_is_loaded(model, quantization, place):
    inner = {"quantization_config": quantization} if place == "text_config" else quantization
    change_settings(model, **{place: inner})
    (model / WEIGHTS).write_bytes(b"never looked at")
    problem = check_model(str(model), "`model.name`")
    assert problem is not None
    assert "quantized" in problem.what
    assert quantization.get("quant_method", "unnamed") in problem.what
    assert "unquantized original" in problem.hint
    assert refused(model).what == problem.what


def test_a_quantization_of_null_is_none(model):
    change_settings(model, quantization_config=None)
    load_policy(str(model))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 32).to(torch.float8_e4m3fn)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 32).to(torch.float8_e5m2)),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(4, 32, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.weight.absmax", torch.ones(4)),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.zeros(4, 4, dtype=torch.uint8)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.dtype),
)
def test_what_only_its_weights_call_quantized_is_refused_by_their_headers(model, name, tensor):
    change_weights(model, **{name: tensor})
    problem = check_model(str(model), "`model.name`")
    assert problem is not None
    assert "quantized" in problem.what
    assert name in problem.what


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "v_head.summary.weight",
        "score.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_weights_that_the_model_does_not_use_are_named(model, name):
    change_weights(model, **{name: torch.ones(4, 4)})
    problem = refused(model)
    assert name in problem.what
    assert "not part of LlamaForCausalLM with 2 layers" in problem.what


def test_fewer_layers_in_the_settings_than_in_the_file_are_refused(model):
    change_settings(model, num_hidden_layers=1)
    assert "model.layers.1.input_layernorm.weight" in refused(model).what


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.masked_bias", "mtp.fc.weight"]
)
def test_constants_and_parts_that_no_causal_model_uses_are_left_aside(model, name):
    change_weights(model, **{name: torch.ones(4)})
    load_policy(str(model))


def test_layers_that_predict_further_tokens_are_left_aside_and_those_beyond_them_are_not(model):
    change_settings(model, num_nextn_predict_layers=1)
    change_weights(model, **{"model.layers.2.eh_proj.weight": torch.ones(4)})
    load_policy(str(model))
    change_weights(model, **{"model.layers.3.eh_proj.weight": torch.ones(4)})
    assert "model.layers.3" in refused(model).what


def test_a_vocabulary_of_another_size_is_told_by_both_numbers(model):
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    change_settings(model, vocab_size=size + 3)
    problem = refused(model)
    assert f"vocab_size: {size + 3}" in problem.what
    assert f"the weights have {size}" in problem.what


def test_weights_of_another_shape_are_told_by_both_shapes(model):
    change_settings(model, intermediate_size=48)
    problem = refused(model)
    assert "[64, 32]" in problem.what.replace("[32, 64]", "[64, 32]")
    assert "others differ as well" in problem.what


def test_a_head_that_is_tied_by_the_settings_alone_is_said_trained_and_saved_untied(model, tmp_path, caplog):
    change_settings(model, tie_word_embeddings=True)
    head = load_file(model / WEIGHTS)["lm_head.weight"]
    with caplog.at_level(logging.WARNING, "dpo_cli"):
        policy = load_policy(str(model))
    assert "tie_word_embeddings: false" in caplog.text
    assert "lm_head.weight" in caplog.text
    policy.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.lm_head.weight, head)
    assert not torch.equal(again.model.embed_tokens.weight, head)


def test_a_head_that_is_the_embedding_twice_is_tied(model, caplog):
    change_settings(model, tie_word_embeddings=True)
    change_weights(model, **{"lm_head.weight": load_file(model / WEIGHTS)["model.embed_tokens.weight"].clone()})
    with caplog.at_level(logging.WARNING, "dpo_cli"):
        policy = load_policy(str(model))
    assert not caplog.text
    assert policy.lm_head.weight is policy.model.embed_tokens.weight


BERT = {**SMALL, "type_vocab_size": 1}
OTHERS = {
    "BertForMaskedLM": ("BertConfig", BERT),
    "BertForSequenceClassification": ("BertConfig", BERT),
    "BartForConditionalGeneration": (
        "BartConfig",
        {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    ),
    "T5ForConditionalGeneration": (
        "T5Config", {"vocab_size": 97, "d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 32, "d_kv": 8}
    ),
    "LlamaForSequenceClassification": ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "Qwen2ForTokenClassification": ("Qwen2Config", {**SMALL, "tie_word_embeddings": True}),
    "LlamaModel": ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_causal_language_model_is_refused_by_its_name_before_it_is_loaded(tmp_path, name):
    config, settings = OTHERS[name]
    getattr(transformers, name)(getattr(transformers, config)(**settings)).save_pretrained(tmp_path / "model")
    problem = check_model(str(tmp_path / "model"), "`reference.model`")
    assert problem is not None
    assert f"`{name}` is not a causal language model" in problem.what
    assert problem.where == "`reference.model`"


@pytest.mark.parametrize(
    ("changes", "shown", "hint"),
    [
        ({"attn_implementation": "flash_attention_2"}, '"flash_attention_2"', "`model.attention`"),
        ({"attn_implementation": "fast"}, '`attn_implementation: "fast"`', "`model.attention`"),
        ({"hidden_act": "gleu2"}, '`hidden_act: "gleu2"`', "correct config.json"),
        ({"dtype": "bfloat15"}, '`dtype: "bfloat15"`', "correct config.json"),
        ({"hidden_size": "big"}, '`hidden_size: "big"`', "correct config.json"),
        ({"num_attention_heads": 5}, "`num_attention_heads: 5`", "correct config.json"),
        ({"num_attention_heads": 0}, "`num_attention_heads: 0`", "correct config.json"),
        ({"head_dim": 7}, "`head_dim: 7`", "correct config.json"),
        ({"pad_token_id": 10_000}, "`pad_token_id: 10000`", "correct config.json"),
        ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1.0}}, '`rope_type: "odd"`', "correct config.json"),
        ({"model_type": "of_next_year"}, '`model_type: "of_next_year"`', "update transformers"),
    ],
    ids=str,
)
def test_a_value_that_is_wrong_is_shown_with_what_changes_it_and_nothing_is_called_damaged(model, changes, shown, hint):
    change_settings(model, **changes)
    problem = refused(model)
    assert f"config.json says {shown}" in problem.what or shown in problem.what
    assert hint in problem.hint
    assert "damaged" not in problem.hint


def test_settings_of_generation_are_shown_with_their_file(model):
    (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": -5}))
    problem = refused(model)
    assert "generation_config.json says `max_new_tokens: -5`" in problem.what
    assert "correct generation_config.json" in problem.hint


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "{"), ("generation_config.json", "{"), (WEIGHTS, "junk"), (WEIGHTS, None)],
    ids=str,
)
def test_only_files_that_cannot_be_read_are_called_damaged(model, file, content):
    (model / file).unlink()
    if content is not None:
        (model / file).write_text(content)
    assert "damaged" in refused(model).hint


@pytest.mark.parametrize("named", ["flash_attention_2", "of_another_program"])
def test_an_attention_that_is_not_there_gives_way_to_the_one_that_is_asked_for(model, named):
    change_settings(model, attn_implementation=named)
    assert load_policy(str(model), Trust(attention="eager")).config._attn_implementation == "eager"


OFFLINE = """
from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import empty_policy, load_policy
print(type(empty_policy("some/body")).__name__)
try:
    print(sorted(load_policy("some/body").origin.files))
except UserError as error:
    print(error.what)
"""


@pytest.mark.program
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda folder: None, "'preprocessor_config.json'"),
        (lambda folder: (folder / WEIGHTS).unlink(), "are not in the Hub's cache"),
        (lambda folder: change_weights(folder, more=torch.ones(4)), "not part of LlamaForCausalLM"),
        (lambda folder: change_weights(folder, weight_scale_inv=torch.ones(4).to(torch.float8_e5m2)), "quantized"),
    ],
)
def test_a_model_in_the_hubs_cache_is_looked_at_as_a_folder_is(model, tmp_path, changes, said):
    cached = tmp_path / "hub/models--some--body"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    (model / "preprocessor_config.json").write_text("{}")
    changes(model)
    shutil.copytree(model, cached / "snapshots/abc")
    told = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", OFFLINE], env=told, capture_output=True, text=True, check=False)
    assert ended.stdout.startswith("LlamaForCausalLM\n"), ended.stderr
    assert said in ended.stdout


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mlp.up_proj.weight", torch.ones(64, 32, dtype=torch.int8)),
        ("mlp.up_proj.weight", torch.ones(64, 32, dtype=torch.uint8)),
        ("mlp.up_proj.weight", torch.ones(64, 32, dtype=torch.int32)),
        ("mlp.up_proj.weight", torch.ones(64, 32, dtype=torch.bool)),
        ("mlp.up_proj.weight", torch.ones(64, 32, dtype=torch.complex64)),
        ("mlp.up_proj.weight_format", torch.tensor(0, dtype=torch.uint8)),
        ("mlp.up_proj.weight._scale", torch.ones(64, 1)),
        ("mlp.up_proj.W_q", torch.ones(64, 32, dtype=torch.uint8)),
        ("mlp.up_proj.codebooks", torch.ones(1, 4, 1, 8)),
        ("mlp.up_proj._weight_qdata", torch.ones(64, 32, dtype=torch.int8)),
        ("mlp.up_proj.weight_scales", torch.ones(64)),
        ("mlp.up_proj.input_scale", torch.ones(1)),
        ("self_attn.k_scale", torch.ones(1)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.dtype),
)
@pytest.mark.parametrize("pickled", [False, True])
def test_whole_numbers_and_parts_of_quantized_weights_are_refused_whatever_file_they_are_in(
    model, name, tensor, pickled
):
    name = f"model.layers.0.{name}"
    change_weights(model, **{name: tensor})
    if pickled:
        torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
        (model / WEIGHTS).unlink()
    with pytest.raises(UserError, match="quantized") as found:
        load_policy(str(model), Trust(pickle=pickled))
    assert f"`{name}`" in found.value.what


def test_weights_of_few_bits_in_a_pickle_are_refused_and_those_of_sixteen_and_sixty_four_are_read(model):
    weights = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    for dtype in (torch.bfloat16, torch.float64):
        torch.save({name: tensor.to(dtype) for name, tensor in weights.items()}, model / "pytorch_model.bin")
        read = load_policy(str(model), Trust(pickle=True)).state_dict()
        assert all(torch.equal(read[name], tensor.to(dtype).float()) for name, tensor in weights.items())
    torch.save({name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="quantized"):
        load_policy(str(model), Trust(pickle=True))


def test_a_quantization_is_found_however_deep_it_stands(model):
    inner = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    change_settings(model, thinker_config=inner)
    assert "quantized (awq)" in refused(model).what


def part_weights(folder: Path) -> list[Path]:
    """Part the weights of a folder among two files."""
    weights, files = load_file(folder / WEIGHTS), [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in part}, file, metadata={"format": "pt"})
    listed = {name: files[place % 2].name for place, name in enumerate(names)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return files


def test_one_weight_with_two_contents_is_refused_and_one_that_is_there_twice_is_read(model):
    whole = load_policy(str(model)).state_dict()
    first, second = part_weights(model)
    name = min(load_file(first))
    for more in (0.0, 1.0):
        again = {**load_file(second), name: load_file(first)[name] + more}
        save_file(again, second, metadata={"format": "pt"})
        if not more:
            assert torch.equal(load_policy(str(model)).state_dict()[name], whole[name])
    problem = refused(model)
    assert f"`{name}` is in {first.name} and, with other values, in {second.name}" in problem.what


@pytest.mark.parametrize(
    ("wrapper", "place"),
    [
        ("module.", 0),
        ("_orig_mod.", 0),
        ("base_model.model.", 0),
        ("_fsdp_wrapped_module.", 0),
        ("_checkpoint_wrapped_module.", len("model.layers.0.")),
    ],
)
def test_names_that_a_wrapper_left_are_told_with_what_it_left(model, wrapper, place):
    weights = load_file(model / WEIGHTS)
    renamed = {
        name[:place] + wrapper + name[place:] if name.startswith("model.layers.0.") else name: tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, model / WEIGHTS, metadata={"format": "pt"})
    problem = refused(model)
    assert "9 parameters are missing" in problem.what
    assert "9 others in the files are not used" in problem.what
    assert f"`{wrapper}`" in problem.hint


def test_flex_attention_is_refused_where_it_has_no_gradient(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    change_settings(model, attn_implementation="flex_attention")
    problem = refused(model)
    assert "FlexAttention" in problem.what
    assert "`model.attention`" in problem.hint
    assert load_policy(str(model), Trust(attention="sdpa")).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "tokenizer.model"])
def test_a_pointer_in_place_of_a_file_is_told_with_what_fetches_the_file(model, name):
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 131\n")
    problem = check_model(str(model), "`model.name`")
    assert problem is not None
    assert f"`{name}` is a Git LFS pointer" in problem.what
    assert "git lfs pull" in problem.hint


def test_an_architecture_that_is_written_without_brackets_is_named_whole(model):
    change_settings(model, architectures="LlamaForTokenClassification")
    assert "`LlamaForTokenClassification` is not a causal language model" in refused(model).what
    change_settings(model, architectures="LlamaForCausalLM")
    load_policy(str(model))


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_through_which_nothing_is_seen_is_refused(model, window):
    change_settings(model, model_type="mistral", sliding_window=window)
    assert f"`sliding_window: {window}`" in refused(model).what
    change_settings(model, sliding_window=None)
    load_policy(str(model))


def test_a_name_of_another_architecture_than_that_of_the_type_is_told(model, caplog):
    load_policy(str(model))
    assert not caplog.messages
    change_settings(model, model_type="mistral")
    assert type(load_policy(str(model))).__name__ == "MistralForCausalLM"
    (message,) = caplog.messages
    assert "`model_type: mistral` but names `LlamaForCausalLM`" in message


def test_a_tokenizer_reads_a_text_the_same_each_time(model):
    text = "The quick brown fox jumps over the lazy dog. " * 20
    expected = load_tokenizer(str(model))(text)["input_ids"]
    file = model / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"]["dropout"] = 0.5
    file.write_text(json.dumps(words))
    tokenizer = load_tokenizer(str(model))
    for reader in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert reader(text)["input_ids"] == expected

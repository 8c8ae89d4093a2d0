"""An adapter folder is a model: its base with the adapter merged into it, with the tokenizer of whichever has one."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.errors import UserError
from dpo_cli.modeling.folders.loading import empty_policy, load_policy
from dpo_cli.modeling.folders.saving import saved_model
from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from dpo_cli.modeling.held import Bfloat16
from tests.builders import save_adapter
from tests.conftest import build_llama

TOKENS = torch.arange(3, 40)[None]


def by_peft(adapter: Path) -> torch.Tensor:
    """Return the logits that PEFT gives, with the adapter beside the base."""
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        return model(TOKENS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank": 3},
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"k_proj": 5}},
    ],
    ids=str,
)
def test_a_merged_adapter_answers_as_peft_does_with_the_adapter_beside_its_base(tiny_llama, tmp_path, settings):
    adapter = save_adapter(tiny_llama, tmp_path, **settings)
    model = load_policy(str(adapter))

    with torch.no_grad():
        merged, base = model(TOKENS).logits, load_policy(str(tiny_llama))(TOKENS).logits
    assert merged == pytest.approx(by_peft(adapter), abs=2e-4)
    assert (merged - base).abs().max() > 0.1
    assert model.state_dict().keys() == load_policy(str(tiny_llama)).state_dict().keys()
    assert all(weights.requires_grad for weights in model.parameters())


def test_of_transposed_matrices_the_same_holds(tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 400, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=2)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)

    with torch.no_grad():
        assert load_policy(str(adapter))(TOKENS).logits == pytest.approx(by_peft(adapter), abs=2e-4)


def test_it_is_merged_in_float32_and_rounded_once(tiny_llama, tmp_path):
    adapter = save_adapter(tiny_llama, tmp_path)
    merged, rounded = load_policy(str(adapter)).state_dict(), load_policy(str(adapter), held=Bfloat16()).state_dict()

    assert all(torch.equal(rounded[name], weights.bfloat16()) for name, weights in merged.items())


def test_its_shapes_are_those_of_the_base(tiny_llama, tmp_path):
    sketch = empty_policy(str(save_adapter(tiny_llama, tmp_path)))
    shapes = {name: weights.shape for name, weights in load_policy(str(tiny_llama)).named_parameters()}

    assert {name: weights.shape for name, weights in sketch.named_parameters()} == shapes


@pytest.mark.parametrize("beside", ["nothing", "a template", "a tokenizer", "a tokenizer without a template"])
def test_tokenizer_and_template_are_the_adapters_where_it_has_them(tiny_llama, tokenizer, tmp_path, beside):
    adapter, theirs = save_adapter(tiny_llama, tmp_path / "adapter"), AutoTokenizer.from_pretrained(tiny_llama)
    own = "{{ messages[0].content }}"
    if beside == "a template":
        (adapter / "chat_template.jinja").write_text(own)
    elif beside != "nothing":
        theirs.add_tokens(["<|own|>"])
        theirs.chat_template = own if beside == "a tokenizer" else None
        theirs.save_pretrained(adapter)
    found = load_tokenizer(str(adapter))

    assert found.get_vocab() == theirs.get_vocab()
    assert found.chat_template == (own if beside in ("a template", "a tokenizer") else tokenizer.chat_template)


def test_what_is_saved_of_it_has_the_tokenizer_of_the_adapter(tiny_llama, tmp_path):
    adapter = save_adapter(tiny_llama, tmp_path / "adapter")
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "LICENSE").write_text("Mine.")
    (base / "vocab.json").write_text("{}")
    change(adapter, base_model_name_or_path=str(base))
    theirs = AutoTokenizer.from_pretrained(tiny_llama)
    theirs.add_tokens(["<|own|>"])
    theirs.save_pretrained(adapter)
    with saved_model(tmp_path / "saved", load_policy(str(adapter)), load_tokenizer(str(adapter)), "saving") as folder:
        assert not (folder / "vocab.json").exists()

    assert "<|own|>" in AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab()
    assert (tmp_path / "saved" / "LICENSE").read_text() == "Mine."
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def change(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_an_adapter_of_another_base_is_refused(tiny_llama, tokenizer, tmp_path):
    other = build_llama(tmp_path / "other", tokenizer, seed=0, head_dim=16)
    adapter = save_adapter(tiny_llama, tmp_path / "adapter")
    change(adapter, base_model_name_or_path=str(other))
    with pytest.raises(
        UserError, match=r"another base: `model.layers.0.self_attn.k_proj` has 32 inputs and 32 outputs"
    ):
        load_policy(str(adapter))


def of_the_head(base: Path, folder: Path) -> Path:
    """Save an adapter of the vocabulary projection, without the copy of the projection that PEFT puts beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        file = save_adapter(base, folder, target_modules=["lm_head"]) / "adapter_model.safetensors"
    save_file({name: weights for name, weights in load_file(file).items() if ".lora_" in name}, file)
    return folder


def test_an_adapter_of_the_vocabulary_projection_is_merged_unless_that_is_the_embedding(tokenizer, tmp_path):
    untied = build_llama(tmp_path / "untied", tokenizer, seed=0)
    tied = build_llama(tmp_path / "tied", tokenizer, seed=0, tie_word_embeddings=True)
    head, before = (load_policy(str(name)).lm_head.weight for name in (of_the_head(untied, tmp_path / "a"), untied))

    assert not torch.equal(head, before)
    with pytest.raises(UserError, match="vocabulary projection, which is the embedding as well"):
        load_policy(str(of_the_head(tied, tmp_path / "b")))


def test_an_adapter_that_is_not_finite_is_refused(tiny_llama, tmp_path):
    file = save_adapter(tiny_llama, tmp_path) / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    weights[name][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(UserError, match=f"`{name}` of the adapter `{tmp_path}` is NaN or infinite"):
        load_policy(str(tmp_path))

"""Runs with an adapter of models that have more than text layers and more than dense ones."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import SMALL, build
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import dpo_cli
from dpo_cli.config import load_config

LORA = {"type": "lora", "rank": 2}


def trained(file):
    """Train, and return the names of the layers that have an adapter."""
    rows = [result.metrics for result in dpo_cli.train(file)]
    assert rows[0]["rewards/margins"] == 0.0
    assert rows[-1]["loss"] != rows[0]["loss"]
    final = Path(load_config(file).output_dir) / "final"
    names = load_file(final / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names}


def test_an_adapter_of_a_model_that_reads_images_stays_within_its_text(tmp_path, tokenizer, write_config):
    text = {**SMALL, "vocab_size": len(tokenizer), "head_dim": 8, "max_position_embeddings": 512}
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**seen, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"model": {"name": str(tmp_path / "model")}, "training": {"max_steps": 2}}
    layers = trained(write_config(adapter=LORA, reference="frozen", **settings))
    assert len(layers) == 2 * 7
    assert all("language_model.layers." in name for name in layers)


@pytest.mark.parametrize(("kind", "in_experts", "others"), [("mixtral", 4 * 3 * 32 * 48 * 2, 4), ("llama", 0, 7)])
def test_a_run_says_how_many_weights_of_experts_have_no_adapter(
    tmp_path, tokenizer, write_config, caplog, kind, in_experts, others
):
    """Four experts of three matrices of 32 by 48 in each of two layers; only attention has an adapter beside it."""
    build(kind, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"model": {"name": str(tmp_path / "model")}, "training": {"max_steps": 2}}
    with caplog.at_level(logging.WARNING, "dpo_cli"):
        layers = trained(write_config(adapter=LORA, reference="frozen", **settings))
    assert len(layers) == 2 * others
    weights = sum(tensor.numel() for tensor in load_file(tmp_path / "model" / "model.safetensors").values())
    said = f"{in_experts:,} of the model's {weights:,} weights are in experts that have no adapter"
    assert (said in caplog.text) is bool(in_experts)
    assert ("experts" in caplog.text) is bool(in_experts)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 16}, ""),
        ({"rank": 33}, "q_proj (32), k_proj (16), v_proj (16), o_proj (32), gate_proj (32), up_proj (32), down_proj ("),
        ({"rank": 17, "targets": ["k_proj", "gate_proj"], "dora": True}, "smaller side of a matrix: k_proj (16);"),
        ({"rank": 17, "targets": ["gate_proj"]}, ""),
    ],
)  # fmt: skip
def test_a_rank_that_no_product_can_have_is_warned_of_by_the_names_of_the_layers(
    write_config, tiny_llama, caplog, settings, said
):
    """A product of matrices has no larger rank than the smaller side of either."""
    with caplog.at_level(logging.WARNING, "dpo_cli"):
        list(dpo_cli.train(write_config(adapter=settings), dry_run=True))
    assert said in caplog.text
    assert ("`adapter.rank` is above" in caplog.text) == bool(said)

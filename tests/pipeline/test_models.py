"""How models are opened that read the same batches."""

from __future__ import annotations

import logging

import pytest
from tiny_models import build

import dpo_cli
from tests.conftest import write_rows


def test_a_frozen_reference_that_cannot_be_packed_lets_both_models_read_padded_pairs(
    tmp_path, tiny_llama, tokenizer, demo_rows, caplog
):
    """The figures are then those of the padded layout, bit for bit."""
    reference = tmp_path / "falcon"
    build("falcon", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(reference)
    tokenizer.save_pretrained(reference)
    config = {
        "model": tiny_llama,
        "reference": {"type": "frozen", "model": reference},
        "data": {"train": write_rows(tmp_path / "pairs.jsonl", demo_rows[:8]), "eval": 0.5},
    }
    with caplog.at_level(logging.WARNING, "dpo_cli"):
        chosen = dpo_cli.evaluate(config, model=str(tiny_llama))
    assert "using the padded layout, since the packed one is not exact with this model" in caplog.text
    caplog.clear()
    assert chosen == dpo_cli.evaluate({**config, "training": {"layout": "padded"}}, model=str(tiny_llama))
    assert "padded" not in caplog.text


def test_a_reference_of_another_vocabulary_is_refused_before_any_weights_are_read(
    tmp_path, tiny_llama, tokenizer, pairs_file
):
    """Its weights are damaged, which nothing notices."""
    reference = tmp_path / "other"
    build("llama", vocab_size=len(tokenizer) + 8).save_pretrained(reference)
    (reference / "model.safetensors").write_bytes(b"damaged")
    config = {
        "model": tiny_llama,
        "reference": {"type": "frozen", "model": reference},
        "data": {"train": pairs_file},
        "output_dir": tmp_path / "run",
    }
    for job in (lambda: list(dpo_cli.train(config)), lambda: dpo_cli.evaluate(config, model=str(tiny_llama))):
        with pytest.raises(dpo_cli.UserError, match="vocabulary"):
            job()

"""How models are opened that read the same batches."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
from tiny_models import build

import dpo_cli
from dpo_cli.modeling import policy as policies
from tests.conftest import build_llama, write_rows


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


@pytest.fixture
def named_reference(tmp_path, tiny_llama, tokenizer, demo_rows, monkeypatch):
    """A configuration with a reference of its own, and the models that are loaded, without holding them."""
    reference, loaded, load = build_llama(tmp_path / "other", tokenizer, seed=3), [], policies.load_policy

    def noting(name, *others):
        model = load(name, *others)
        # What is there of those before it is counted while this one is there.
        gc.collect()
        loaded.append((str(name), weakref.ref(model), [other for other, known, _ in loaded if known() is not None]))
        return model

    monkeypatch.setattr(policies, "load_policy", noting)
    config = {
        "model": tiny_llama,
        "reference": {"model": reference},
        "data": {"train": write_rows(tmp_path / "pairs.jsonl", demo_rows[:12]), "eval": 0.5},
        "training": {"max_steps": 1},
        "output_dir": tmp_path / "run",
    }
    return config, reference, loaded


def test_a_reference_whose_answers_are_kept_is_let_go_of_before_the_first_step(named_reference):
    config, reference, loaded = named_reference
    for _ in dpo_cli.train(config):
        gc.collect()
        assert [(name, model() is None) for name, model, _ in loaded] == [
            (str(config["model"]), False), (str(reference), True),
        ]  # fmt: skip


def test_a_reference_whose_answers_are_kept_is_let_go_of_before_the_model_to_score_is_loaded(named_reference):
    config, reference, loaded = named_reference
    dpo_cli.evaluate(config, model=str(config["model"]))
    assert [(name, beside) for name, _, beside in loaded] == [(str(reference), []), (str(config["model"]), [])]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_checkpoint_says_under_which_layout_its_passes_were_made(tmp_path, tiny_llama, demo_rows, layout):
    config = {
        "model": tiny_llama,
        "data": {"train": write_rows(tmp_path / "pairs.jsonl", demo_rows[:8]), "eval": None},
        "training": {"max_steps": 1, "layout": layout},
        "output_dir": tmp_path / "run",
    }
    list(dpo_cli.train(config))
    texts = [file.read_text() for file in (tmp_path / "run" / "checkpoints").rglob("*.json")]
    assert sum(f'"layout": "{layout}' in text for text in texts) == 1

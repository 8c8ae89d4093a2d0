"""What is saved of generation is valid in transformers, ends texts where training did, and loses nothing else."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as hf_logging

from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.folders.model_files import NO_TRUST
from dpo_cli.modeling.folders.saving import end_at, origin_of, remember, saved_model, warn_of_ignored
from dpo_cli.modeling.folders.tokenizers import generation_config, load_tokenizer
from dpo_cli.modeling.folders.weight_types import WeightTypes
from dpo_cli.modeling.policy import Policy
from tests.builders import save_adapter

IM_END, END_OF_TEXT = 2, 0


@pytest.fixture
def folder(tmp_path, tiny_llama) -> Path:
    """A copy of the tiny model, whose files a test may change."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What transformers warns of."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger, level = hf_logging.get_logger("transformers"), hf_logging.get_verbosity()
    hf_logging.set_verbosity_warning()
    hf_logging.warning_once.cache_clear()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    hf_logging.set_verbosity(level)


def say(folder: Path, **said: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(said), encoding="utf-8")


def saved(folder: Path, target: Path) -> dict[str, Any]:
    """Load a model, save it, and return what is saved of generation."""
    with saved_model(target, load_policy(str(folder)), load_tokenizer(str(folder)), "saving"):
        pass
    found: dict[str, Any] = json.loads((target / "generation_config.json").read_text(encoding="utf-8"))
    return found


INVALID: dict[str, dict[str, Any]] = {
    "sampling without saying so": {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
    "sampling, said not to": {"do_sample": False, "temperature": 0.6},
    "beams that are none": {"num_beams": 1, "length_penalty": 0.5, "early_stopping": True},
    "outputs that are not returned": {"output_scores": True},
    "a padding token below 0": {"pad_token_id": -1},
    "a cache that is not used": {"use_cache": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("name", INVALID)
def test_settings_that_transformers_ignores_are_left_out_and_told(folder, tmp_path, tokenizer, caplog, warned, name):
    say(folder, eos_token_id=IM_END, chat_format="chatml", repetition_penalty=1.1, **INVALID[name])
    model = load_policy(str(folder))
    with caplog.at_level(logging.WARNING, "dpo_cli"):
        warn_of_ignored(model)
        Policy(model).weights.prove_saving(tokenizer)
    assert origin_of(model).ignored
    for setting in origin_of(model).ignored:
        assert f"`{setting}: {INVALID[name][setting]}`" in caplog.text
    found = saved(folder, tmp_path / "saved")
    kept = {"eos_token_id": IM_END, "chat_format": "chatml", "repetition_penalty": 1.1}
    assert found.items() >= kept.items(), "all else survives"
    read = GenerationConfig.from_pretrained(tmp_path / "saved")
    read.validate(strict=True)
    read.max_new_tokens = 3
    read.save_pretrained(tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    model.generate(torch.tensor([[1, 5, 9]]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=3)
    model.save_pretrained(tmp_path / "model again")
    assert not warned


def test_what_is_valid_is_kept_to_the_last_word(folder, tmp_path):
    said = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [IM_END, END_OF_TEXT], "pad_token_id": 1,
        "repetition_penalty": 1.05, "chat_format": "chatml", "suppress_tokens": None, "max_length": 300,
    }  # fmt: skip
    say(folder, **said)
    found = saved(folder, tmp_path / "saved")
    del found["transformers_version"]
    assert found == said


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        (END_OF_TEXT, [IM_END, END_OF_TEXT]),
        ([END_OF_TEXT, 7], [IM_END, END_OF_TEXT, 7]),
        (IM_END, IM_END),
        ([7, IM_END], [7, IM_END]),
        (None, IM_END),
    ],
    ids=str,
)
def test_generation_ends_where_the_tokenizer_ends_texts(folder, tmp_path, said, ends):
    """As in many models whose chat template was added later: `generate` would go on behind the end of the turn."""
    say(folder, eos_token_id=said)
    assert saved(folder, tmp_path / "saved")["eos_token_id"] == ends


def test_an_end_that_a_setting_adds_is_saved_although_other_settings_are_invalid(folder, tmp_path):
    """By itself transformers saves invalid settings as they came, and refuses them once one is another."""
    say(folder, eos_token_id=[IM_END, END_OF_TEXT], temperature=0.6)
    model = load_policy(str(folder))
    end_at(model, 7)
    with saved_model(tmp_path / "saved", model, load_tokenizer(str(folder)), "saving"):
        pass
    read = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert read.eos_token_id == [7, IM_END, END_OF_TEXT]
    assert json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == [7, IM_END]


def test_a_model_that_says_nothing_of_generation_gets_an_end_and_padding(folder, tmp_path):
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": END_OF_TEXT}), encoding="utf-8")
    found = saved(folder, tmp_path / "saved")
    assert (found["eos_token_id"], found["pad_token_id"]) == ([IM_END, END_OF_TEXT], IM_END)
    assert found["bos_token_id"] == END_OF_TEXT
    # Older versions would read config.json again, which names one end.
    assert "_from_model_config" not in found


def test_padding_is_the_tokenizers_where_it_has_one(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    say(folder, eos_token_id=IM_END)
    assert saved(folder, tmp_path / "saved")["pad_token_id"] == 1


def test_a_model_that_is_built_before_its_weights_are_read_ends_by_its_file_too(folder):
    """As each process of a sharded run builds it, by config.json alone."""
    say(folder, eos_token_id=[IM_END, 7], repetition_penalty=1.05)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    remember(model, folder, NO_TRUST, WeightTypes({}, torch.float32))
    assert model.generation_config.eos_token_id == [IM_END, 7]
    assert origin_of(model).generation["repetition_penalty"] == 1.05


def test_what_another_thread_generates_by_is_not_saved(folder, tmp_path):
    """Checkpoints are written while held-out prompts are answered, by settings that a model has for that long."""
    say(folder, eos_token_id=[IM_END, 7], repetition_penalty=1.05)
    model = load_policy(str(folder))
    end_at(model, 9)
    model.generation_config = GenerationConfig(max_new_tokens=5)
    with saved_model(tmp_path / "saved", model, load_tokenizer(str(folder)), "saving"):
        pass
    found = json.loads((tmp_path / "saved" / "generation_config.json").read_text(encoding="utf-8"))
    assert found["eos_token_id"] == [9, IM_END, 7]
    assert found["repetition_penalty"] == 1.05
    assert "max_new_tokens" not in found


def test_an_adapter_has_its_own_ends_and_the_model_of_both_has_them(folder, tmp_path):
    adapter = save_adapter(folder, tmp_path / "adapter")
    say(folder, eos_token_id=END_OF_TEXT, repetition_penalty=1.05)
    say(adapter, eos_token_id=[IM_END, END_OF_TEXT], temperature=0.5)
    assert generation_config(str(adapter)).eos_token_id == [IM_END, END_OF_TEXT]
    model = load_policy(str(adapter))
    assert model.generation_config.eos_token_id == [IM_END, END_OF_TEXT]
    assert origin_of(model).ignored == {"temperature": 0.5}
    assert generation_config(str(folder)).eos_token_id == END_OF_TEXT

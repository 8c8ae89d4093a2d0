"""A template that closes turns with another token than the tokenizer's end of sequence: told, settled, and saved so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from dpo_cli.cli import app
from tests.conftest import make_config, write_rows


def dpo(*arguments: object) -> tuple[int, str]:
    """Run the program in this process; return its exit status, and what it said on one line."""
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return ended.exit_code, " ".join(ended.stderr.split())


@pytest.fixture(params=["special", "added"])
def model(request, tmp_path, tiny_llama) -> Path:
    """A model whose tokenizer ends texts with `<|endoftext|>`, while its template closes turns with `<|im_end|>`."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    for name, changed in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("generation_config.json", {"eos_token_id": [0, 7]}),
        ("config.json", {"eos_token_id": 0}),
    ):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(values | changed), encoding="utf-8")
    if request.param == "added":
        values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for token in values["added_tokens"]:
            token["special"] = token["content"] != "<|im_end|>"
        (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_prepare_data_and_train_name_both_tokens_and_the_setting_that_reconciles_them(tmp_path, model, demo_rows):
    pairs = write_rows(tmp_path / "pairs.jsonl", demo_rows[:16])
    config = make_config(tmp_path, model, pairs)
    status, said = dpo("prepare-data", "--config", config, "--report", tmp_path / "report")
    assert status == 0, said
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    (found,) = (finding for finding in report["findings"] if finding["name"] == "no_end_token")
    assert (found["severity"], found["count"]) == ("warning", 16)
    status, said = dpo("train", "--config", config)
    assert status == 2, said
    for text in (found["meaning"] + found["advice"], said):
        assert "`<|im_end|>`" in text
        assert "`<|endoftext|>`" in text
        assert 'model.eos_token: "<|im_end|>"' in text
        assert "generation_config.json" in text


def test_with_the_setting_it_trains_and_all_that_is_saved_ends_there(tmp_path, model, demo_rows):
    pairs = write_rows(tmp_path / "pairs.jsonl", demo_rows[:16])
    config = make_config(tmp_path, model, pairs)
    setting = "model.eos_token=<|im_end|>"
    status, said = dpo("prepare-data", "--config", config, "--report", tmp_path / "report", setting)
    assert status == 0, said
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert "no_end_token" in report["not_found"]
    status, said = dpo("train", "--config", config, setting, "training.max_steps=2")
    assert status == 0, said
    final = tmp_path / "runs" / "run" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.eos_token == "<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(final).eos_token_id == [end, 0, 7]
    assert json.loads((final / "config.json").read_text(encoding="utf-8"))["eos_token_id"] == [end, 0]
    for again in (["train", "--resume"], ["eval"]):
        status, said = dpo(*again, "--config", config, setting, "training.max_steps=2")
        assert status == 0, said


def test_a_token_that_the_tokenizer_lacks_is_refused_with_those_it_has(tmp_path, tiny_llama, pairs_file):
    config = make_config(tmp_path, tiny_llama, pairs_file)
    status, said = dpo("prepare-data", "--config", config, "model.eos_token=<|eot_id|>")
    assert status == 2
    assert "no token `<|eot_id|>`" in said
    assert "`<|im_end|>`" in said

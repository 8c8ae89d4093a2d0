"""What a run does with a model's own chat templates: several of them, and one that asks for the date."""

from __future__ import annotations

import importlib
import json
import shutil
from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dpo_cli.cli import app
from tests.conftest import CHATML, make_config, read_metrics, write_rows

TOOL_USE = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + CHATML
DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.<|im_end|>\n' }}" + CHATML


def dpo(*arguments: object) -> tuple[int, str]:
    """Run the program in this process; return its exit status, and what it said on one line."""
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return ended.exit_code, " ".join(ended.stderr.split())


@pytest.fixture
def model(tmp_path, tiny_llama) -> Path:
    """A model with two chat templates of its own."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOL_USE}
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(demo_rows):
    return [row | {"tools": [{"type": "function", "function": {"name": "f"}}]} for row in demo_rows[:16]]


@pytest.mark.parametrize("named", [None, "default", "tool_use"])
@pytest.mark.parametrize("spelled", ["folder", "list"])
def test_templates_are_chosen_or_named_and_saved_as_they_came(tmp_path, model, rows, named, spelled):
    if spelled == "list":
        shutil.rmtree(model / "additional_chat_templates")
        (model / "chat_template.jinja").unlink()
        file = model / "tokenizer_config.json"
        both = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOL_USE}]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": both}), encoding="utf-8")
    config = make_config(tmp_path, model, write_rows(tmp_path / "pairs.jsonl", rows))
    setting = [f"model.chat_template={named}"] if named else []
    status, said = dpo("prepare-data", "--config", config, "--report", tmp_path / "report", *setting)
    assert status == 0, said
    found = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))["findings"]
    assert ("tools_unwritten" in {finding["name"] for finding in found}) == (named == "default")
    status, said = dpo("train", "--config", config, "training.max_steps=1", *setting)
    assert status == 0, said
    saved = AutoTokenizer.from_pretrained(tmp_path / "runs" / "run" / "final")
    assert saved.chat_template == {"default": CHATML, "tool_use": TOOL_USE}


def test_a_name_that_the_model_lacks_is_refused(tmp_path, model, rows):
    config = make_config(tmp_path, model, write_rows(tmp_path / "pairs.jsonl", rows))
    status, said = dpo("prepare-data", "--config", config, "model.chat_template=rag")
    assert status == 2
    assert "there is no chat template `rag`" in said


class _Day(date):
    """A calendar that shows the day that a test wants."""

    shown = date(2024, 2, 29)

    @classmethod
    def today(cls) -> date:
        return cls.shown


def test_a_run_that_goes_on_another_day_keeps_its_own(tmp_path, tiny_llama, demo_rows, monkeypatch):
    """Its steps are those of a run that was not interrupted, though no prepared data is left."""
    template = tmp_path / "dated.jinja"
    template.write_text(DATED, encoding="utf-8")
    pairs = write_rows(tmp_path / "pairs.jsonl", demo_rows[:16])
    for module in ("pairs", "plan"):
        monkeypatch.setattr(importlib.import_module(f"dpo_cli.pipeline.{module}"), "date", _Day)

    def run(name: str, *arguments: object) -> str:
        config = make_config(tmp_path, tiny_llama, pairs, name, model={"chat_template": str(template)})
        status, said = dpo(*arguments, "--config", config)
        assert status == 0, said
        return said

    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache 1"))
    assert "date: 2024-02-29 (today)" in run("whole", "train", "training.max_steps=4")
    run("stopped", "train", "training.max_steps=4")
    stopped = tmp_path / "runs" / "stopped"
    shutil.rmtree(stopped / "final")
    shutil.rmtree(max((stopped / "checkpoints").glob("*"), key=lambda path: int(path.name.split("-")[-1])))
    monkeypatch.setattr(_Day, "shown", date(2024, 3, 1))
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache 2"))
    said = run("stopped", "train", "training.max_steps=4", "--resume")
    assert "date: 2024-02-29 (the day on which the run began)" in said
    assert "resuming after step 2" in said
    weights = [(tmp_path / "runs" / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    losses = [[row["loss"] for row in read_metrics(tmp_path / "runs" / name)] for name in ("whole", "stopped")]
    assert losses[0] == losses[1]
    assert "date: 2024-02-29" in run("stopped", "eval")
    assert "date: 2024-03-01 (today)" in run("new", "train", "training.max_steps=1")
    assert "date: 2024-03-01 (today)" in run("stopped", "train", "training.max_steps=1", "--overwrite")
    first_day = json.loads((stopped / "environment.json").read_text(encoding="utf-8"))["first_day"]
    assert first_day == "2024-03-01"

"""A model that learned to answer and end does so wherever it is used: in `generate`, and in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from tests.cli.in_process import call
from tests.conftest import build_llama, make_config, write_rows

ANSWER = "Harden it."
QUESTIONS = ["Add 1 and 2.", "Name a colour.", "Say hi.", "Count to ten."]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory, tokenizer) -> Path:
    """A model that was taught to answer every question in the same way and to end its turn, by its template.

    Its generation settings end texts with another token, as those of models that were taught to chat later do.
    """
    folder = build_llama(tmp_path_factory.mktemp("speaker") / "model", tokenizer, seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [tokenizer(f"{chat(tokenizer, question)}{ANSWER}<|im_end|>\n").input_ids for question in QUESTIONS]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        for row in rows:
            model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    said = {"eos_token_id": tokenizer.bos_token_id, "do_sample": False, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


def chat(tokenizer: Any, question: str) -> str:
    asked = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return text


def generated(folder: Path, question: str) -> str:
    """Return what plain `generate` answers, with whatever it ends with."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(chat(tokenizer, question), return_tensors="pt", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    found: str = tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0, inputs.input_ids.shape[1] :])
    return found


def train(folder: Path, model: Path, **groups: Any) -> None:
    """Train for two steps in a folder, so little that the answers stay."""
    rows = [{"instruction": question, "chosen": ANSWER, "rejected": "No."} for question in QUESTIONS * 3]
    pairs = write_rows(folder / "pairs.jsonl", rows)
    training = {"learning_rate": 1e-7, "max_steps": 2, "pairs_per_step": 4}
    make_config(folder, model, pairs, training=training, data={"eval": None}, output_dir="runs/run", **groups)
    assert call(f"train {folder / 'run.yaml'} --quiet") == 0


def test_the_fixture_does_not_stop_by_itself(speaker):
    assert "<|im_end|>\n" in generated(speaker, QUESTIONS[0])


def test_a_trained_model_stops_at_the_end_of_its_turn(tmp_path, monkeypatch, speaker):
    monkeypatch.chdir(tmp_path)
    train(tmp_path, speaker)
    for folder in (Path("runs/run/final"), Path("runs/run/checkpoints/step-000002")):
        assert generated(folder, QUESTIONS[1]) == f"{ANSWER}<|im_end|>"
    ask = pipeline("text-generation", model="runs/run/final", device="cpu")
    asked = [{"role": "user", "content": QUESTIONS[2]}]
    assert ask(asked, max_new_tokens=40)[0]["generated_text"] == [*asked, {"role": "assistant", "content": ANSWER}]


def test_an_adapter_knows_the_end_that_its_base_does_not(tmp_path, monkeypatch, speaker):
    monkeypatch.chdir(tmp_path)
    train(tmp_path, speaker, adapter={"type": "lora", "rank": 2})
    ends = GenerationConfig.from_pretrained("runs/run/final").eos_token_id
    assert ends == [2, 0]
    assert call("export runs/run --merge --to merged --quiet") == 0
    assert generated(Path("merged"), QUESTIONS[1]) == f"{ANSWER}<|im_end|>"

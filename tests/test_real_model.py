"""The real model: lifted out of its GGUF file, trained for a few steps, compared with an independent trainer."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import check_losses
import pytest
from accelerate import Accelerator
from benchmark.runs import run_process

import dpo_cli
from tests.conftest import DEMO_PAIRS, GGUF, dpo_command, make_config, read_metrics, write_rows
from tests.marks import slow_unless

pytestmark = [pytest.mark.real_model, pytest.mark.program]


def test_a_few_steps_log_the_losses_of_an_independent_trainer(tmp_path):
    losses = check_losses.logged_losses("demo", DEMO_PAIRS, tmp_path)
    assert check_losses.largest_difference(*losses) <= check_losses.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("adapter", check_losses.ADAPTERS)
def test_a_few_steps_of_an_adapter_log_the_losses_of_an_independent_trainer(tmp_path, adapter):
    found, expected = check_losses.adapter_losses(DEMO_PAIRS, tmp_path, adapter)
    assert check_losses.largest_difference(found, expected) <= check_losses.TOLERANCE
    # The adapter has learned something that could differ.
    assert found[-1] < found[0] - 10 * check_losses.TOLERANCE


def test_the_gguf_file_becomes_an_ordinary_model_once_and_answers_with_sense():
    import torch

    from dpo_cli.modeling.folders.loading import empty_policy, load_policy
    from dpo_cli.modeling.folders.tokenizers import load_tokenizer

    policy, tokenizer = load_policy(str(GGUF)), load_tokenizer(str(GGUF))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert sum(p.numel() for p in policy.parameters()) == empty_policy(str(GGUF)).num_parameters() == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = policy.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])

    cache = Path(os.environ["DPO_CACHE_DIR"])
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("model.safetensors")}
    assert before
    load_policy(str(GGUF))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("model.safetensors")} == before


@pytest.mark.parametrize(
    ("pairs_per_step", "micro_batch_tokens", "others"),
    slow_unless(
        lambda case: case[0] == 2,
        [
            (2, "auto", {}),
            (4, 150, {}),
            (12, 1024, {"adapter": "lora"}),
            (12, 1024, {"adapter": "lora", "reference": "frozen", "checkpoints": {"background": True}}),
        ],
    ),
)
def test_a_dry_run_tells_the_memory_of_the_run_within_15_percent(tmp_path, pairs_per_step, micro_batch_tokens, others):
    """Two pairs make one forward pass a step; four of few tokens make several, so that gradients stand meanwhile.

    Beside an adapter, twelve pairs make a pass whose activations take more than the weights.
    """
    config = make_config(
        tmp_path,
        GGUF,
        DEMO_PAIRS,
        training={"pairs_per_step": pairs_per_step, "micro_batch_tokens": micro_batch_tokens, "max_steps": 2},
        data={"eval": None},
        **{"checkpoints": {"every_steps": 100}, **others},
    )
    printed = run_process(dpo_command("train", "--config", config, "--dry-run"), dict(os.environ)).output
    estimate = float(re.search(r"at the peak\s+([\d.]+) GiB", printed)[1]) * 2**30
    measured = run_process(dpo_command("train", "--config", config), dict(os.environ)).peak_bytes
    assert estimate == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_an_adapter_of_a_gguf_file_names_that_file_and_is_scored_beside_it(tmp_path, demo_rows, monkeypatch):
    """The file is read once; the cache, where it was converted to, may be emptied at any time."""
    from dpo_cli.modeling import policy

    pairs = write_rows(tmp_path / "pairs.jsonl", demo_rows[:8])
    training = {"pairs_per_step": 4, "max_steps": 1, "learning_rate": 1e-4}
    file = make_config(tmp_path, GGUF, pairs, adapter="lora", training=training, data={"eval": 0.5})
    list(dpo_cli.train(file))
    run, names, load = tmp_path / "runs" / "run", [], policy.load_policy
    said = json.loads((run / "final" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(GGUF)
    monkeypatch.setattr(policy, "load_policy", lambda name, *how: names.append(name) or load(name, *how))
    found = dpo_cli.evaluate(file)
    assert names == [str(GGUF)]
    assert found["loss"] == pytest.approx(read_metrics(run, "eval")[-1]["loss"], abs=1e-5)


@pytest.mark.slow
def test_in_4_bits_it_takes_at_most_three_quarters_of_a_byte_a_weight_and_an_adapter_changes_nothing_yet():
    import torch

    from dpo_cli.modeling.adapters.adapted import Adapted
    from dpo_cli.modeling.adapters.settings import Lora
    from dpo_cli.modeling.held import held_as
    from dpo_cli.modeling.policy import Policy
    from dpo_cli.modeling.quantized_layers import quantized_layers

    how = {"trained": Adapted(Lora()), "held": held_as("nf4", "float32")}
    sketch, policy = Policy.empty(str(GGUF), **how).sizes(), Policy.load(str(GGUF), **how)
    layers = quantized_layers(policy.model).values()
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    others = sum(weights.nbytes for weights in policy.model.parameters() if weights.dtype == torch.float32)
    assert quantized == 30 * (576 * 576 * 2 + 576 * 192 * 2 + 576 * 1536 * 3)
    assert policy.sizes().held - others <= 0.75 * quantized
    assert sketch.held == pytest.approx(policy.sizes().held, rel=0.01)
    ids = torch.arange(1000, 1040)[None]
    with torch.no_grad():
        ours = policy.model(ids).logits
        policy.place(Accelerator(cpu=True), trained=True)
        policy.keep_beginning()
        with policy.at_beginning():
            assert torch.equal(policy.model(ids).logits, ours)

"""The real model: lifted out of its GGUF file, trained for a few steps, compared with an independent trainer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import DEMO_PAIRS, GGUF, ROOT

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def check_losses():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import check_losses
    finally:
        sys.path.pop(0)
    return check_losses


def test_a_few_steps_log_the_losses_of_an_independent_trainer(check_losses, tmp_path):
    assert check_losses.largest_difference("demo", DEMO_PAIRS, tmp_path) <= check_losses.TOLERANCE


def test_the_gguf_file_becomes_an_ordinary_model_once_and_answers_with_sense():
    import torch

    from dpo_cli.modeling import loading

    policy, tokenizer = loading.load_policy(str(GGUF)), loading.load_tokenizer(str(GGUF))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert (
        sum(p.numel() for p in policy.parameters()) == loading.empty_policy(str(GGUF)).num_parameters() == 134_515_008
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = policy.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])

    folder = Path(loading._resolved(str(GGUF)))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    loading.load_policy(str(GGUF))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before

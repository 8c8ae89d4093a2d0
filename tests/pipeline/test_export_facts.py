"""What is compared of tokenizers and answers when an export is proved: a reader is asked everything the model was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dpo_cli import export
from dpo_cli.errors import UserError
from dpo_cli.evaluation.agreement import Difference
from dpo_cli.pipeline.export_facts import Facts
from dpo_cli.pipeline.export_proof import Said, check_merged
from tests.builders import merge_times, save_adapter

SETTINGS = GenerationConfig(eos_token_id=2)
DECOMPOSED = "e\u0301"


def with_normalizer(tokenizer: Any, normalizer: dict[str, Any] | None) -> PreTrainedTokenizerFast:
    """The same tokenizer with another normalizer."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["normalizer"] = normalizer
    ends = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), **ends)


def test_a_reader_that_composes_characters_is_asked_for_those_that_the_model_does_not_compose(tokenizer: Any) -> None:
    """By itself it would be asked for none of them: llama.cpp composes none."""
    ours, theirs = with_normalizer(tokenizer, None), with_normalizer(tokenizer, {"type": "NFC"})
    facts = Facts.of(ours, SETTINGS, [DECOMPOSED], chats_alone=True)
    assert DECOMPOSED in facts.tokens
    (told,) = facts.differences(facts.read_again(theirs, SETTINGS))
    assert "the tokens of" in told
    assert not list(facts.differences(facts.read_again(ours, SETTINGS)))


def test_texts_that_a_reader_cannot_have_alike_are_not_compared(tokenizer: Any) -> None:
    composing = with_normalizer(tokenizer, {"type": "NFC"})
    assert DECOMPOSED not in Facts.of(composing, SETTINGS, [DECOMPOSED], chats_alone=True).tokens
    assert DECOMPOSED in Facts.of(composing, SETTINGS, [DECOMPOSED]).tokens


@pytest.mark.parametrize(
    ("share", "by", "routes", "alike"),
    [
        (0.01, 0.05, True, True),
        (0.01, 0.05, False, False),
        (0.5, 0.05, True, False),
        (0.5, 0.005, True, False),
        (0.01, float("nan"), True, False),
        (1.0, 1e-6, False, True),
    ],
)
def test_merging_may_exchange_experts_of_a_few_tokens(share: float, by: float, routes: bool, alike: bool) -> None:
    """As measured: of 24,480 tokens of a model of 64 experts and 12 layers, merging changed 225, by up to 0.05."""
    exact = torch.full((2000,), -2.0)
    changed = torch.where(torch.arange(2000) < share * 2000, exact + by, exact)
    ours, theirs = (Said({}, {0: logps}, torch.zeros(0), routes=routes) for logps in (exact, changed))

    def noise() -> Difference:
        """What is measured of a model with experts is large, and not used."""
        return Difference(1.0, 1.0) if routes else Difference(0.0, 0.0)

    if alike:
        check_merged(ours, theirs, "--to out", noise)
    else:
        with pytest.raises(UserError, match="the merged model is not the adapter's"):
            check_merged(ours, theirs, "--to out", noise)


@pytest.mark.parametrize(
    ("measured", "alike"),
    [((1e-3, 1e-3), True), ((1e-3, 1e-4), False), ((1e-4, 1e-3), False), ((float("inf"), float("inf")), False)],
)
def test_merging_may_change_what_sums_in_another_order_do(measured: tuple[float, float], alike: bool) -> None:
    exact = torch.full((100,), -2.0)
    ours, theirs = (Said({}, {0: logps}, torch.zeros(0)) for logps in (exact, exact + 2e-3))
    if alike:
        assert check_merged(ours, theirs, "--to out", lambda: Difference(*measured)).largest == pytest.approx(
            2e-3, 0.01
        )
    else:
        with pytest.raises(UserError, match="the merged model is not the adapter's"):
            check_merged(ours, theirs, "--to out", lambda: Difference(*measured))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_adapter_of_a_model_with_experts_is_merged_once(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    model = build("qwen3_moe", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    adapter = save_adapter(tmp_path / "model", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    monkeypatch.chdir(tmp_path)
    merge_times(scale, monkeypatch)
    if scale == 1:
        assert export(adapter, "out", merge=True)["exactness"]["largest"] == 0
    else:
        with pytest.raises(UserError, match="the merged model is not the adapter's"):
            export(adapter, "out", merge=True)
        assert not Path("out").exists()

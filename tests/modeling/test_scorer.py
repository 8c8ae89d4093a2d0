"""The scorer against each architecture's own logits, padded or alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import KINDS, SMALL, build, example_pairs

from dpo_cli.errors import UserError
from dpo_cli.modeling.layouts import Padded
from dpo_cli.modeling.scorer import Scorer, recompute_activations


@pytest.fixture(scope="module")
def pairs():
    return example_pairs()


def alone(model, prompt, response):
    """A response's token log-probabilities by the model's own logits, without padding or chunks."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    logps = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(prompt) - 1 :]


@pytest.mark.parametrize("name", KINDS)
def test_log_probabilities_are_the_models_own_for_every_response_of_a_padded_batch(name, pairs):
    model = build(name)
    batch = Padded().batch(range(len(pairs)), pairs)
    with torch.no_grad():
        found = Scorer(model)(batch).split(list(batch.lengths))
        expected = [alone(model, p.prompt, p.chosen) for p in pairs] + [
            alone(model, p.prompt, p.rejected) for p in pairs
        ]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert Scorer(model).largest_difference(batch) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_recomputed_activations_give_the_same_gradients_without_dropout(name, pairs):
    batch = Padded().batch(range(len(pairs)), pairs)
    gradients = []
    for recompute in (False, True):
        model = build(name)
        if recompute:
            recompute_activations(model)
            assert any(module.training for module in model.modules())
        Scorer(model)(batch).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_that_treats_its_logits_in_a_way_of_its_own_is_noticed(pairs):
    model = build("llama")
    forward = model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    assert Scorer(model).largest_difference(Padded().batch(range(len(pairs)), pairs)) > 0.1


def test_a_model_without_a_vocabulary_projection_is_refused():
    from transformers import AutoModel, LlamaConfig

    with pytest.raises(UserError, match="vocabulary projection"):
        Scorer(AutoModel.from_config(LlamaConfig(**SMALL)))

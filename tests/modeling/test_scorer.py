"""The scorer against each architecture's own logits, padded or alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dpo_cli.data.records import TokenizedPair
from dpo_cli.errors import UserError
from dpo_cli.modeling.batch import Padded
from dpo_cli.modeling.scorer import Scorer, recompute_activations

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3,
       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ARCHITECTURES = {
    "llama": ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 8}),
    "mistral with a window": ("MistralConfig", {**SMALL, "sliding_window": 4}),
    "gemma2, soft-capped logits": ("Gemma2Config", {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0}),
    "granite, scaled logits": ("GraniteConfig", {**SMALL, "logits_scaling": 3.0}),
    "cohere, scaled logits": ("CohereConfig", {**SMALL, "logit_scale": 0.25}),
    "phi, biased head": ("PhiConfig", SMALL),
    "gpt2": ("GPT2Config", GPT),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "opt": ("OPTConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32,
                          "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 4}),
}  # fmt: skip


def build(name):
    config_class, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def pairs():
    generator = np.random.default_rng(0)

    def tokens(length):
        return generator.integers(3, VOCABULARY, length).astype(np.int32)

    sizes = [(5, 7, 3), (12, 1, 9), (3, 4, 4)]
    return [TokenizedPair(*(tokens(n) for n in lengths), origin=f"f:{i}") for i, lengths in enumerate(sizes)]


def alone(model, prompt, response):
    """A response's token log-probabilities by the model's own logits, without padding or chunks."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    logps = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(prompt) - 1 :]


@pytest.mark.parametrize("name", ARCHITECTURES)
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

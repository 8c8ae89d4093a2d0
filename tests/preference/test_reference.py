"""Cached and frozen references: the same numbers, written once, keyed by everything that decides them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dpo_cli.errors import UserError
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.digests import weights_digest
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.layouts import LAYOUTS, Padded
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference import cache
from dpo_cli.preference.losses import CPO
from dpo_cli.preference.reference import Cached, Frozen, Synced
from dpo_cli.preference.reference_work import ReferenceWork, reference_model
from tests.builders import prepare_pairs, silent, train_in_process
from tests.conftest import build_llama


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def pairs(tmp_path, pairs_file, tokenizer):
    return prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")


def open_reference(strategy, model, pairs, needed=None, progress=silent, layout="padded"):
    policy, accelerator = model if isinstance(model, Policy) else Policy.load(str(model)), Accelerator(cpu=True)
    indices = np.arange(len(pairs)) if needed is None else np.array(needed)
    reference = reference_model(strategy.model, policy)
    reference.read(LAYOUTS[layout])
    for placed in {policy, reference}:
        placed.place(accelerator, trained=placed is policy)
    batches = Batches(pairs, LAYOUTS[layout], 2000, torch.device("cpu"))
    return strategy.open(ReferenceWork(reference, policy, accelerator, indices, batches, progress))


def answers(logps, pairs, cut=5):
    parts = []
    for start in range(0, len(pairs), cut):
        indices = range(start, min(start + cut, len(pairs)))
        parts.append(logps(Padded().batch(indices, [pairs[i] for i in indices])))
    return torch.cat(parts)


def test_cached_and_frozen_agree_to_a_ten_thousandth_of_a_nat_per_response(tiny_llama, pairs):
    frozen, cached = (open_reference(strategy, tiny_llama, pairs) for strategy in (Frozen(), Cached()))
    for index in range(len(pairs)):
        batch = Padded().batch([index], [pairs[index]])
        ours, theirs = (tokens(batch).split(list(batch.lengths)) for tokens in (cached, frozen))
        for one, other in zip(ours, theirs, strict=True):
            assert float(one.sum() - other.sum()) == pytest.approx(0, abs=1e-4)


def test_both_train_to_the_same_losses(tiny_llama, pairs):
    frozen, _ = train_in_process(tiny_llama, pairs, reference=Frozen())
    cached, _ = train_in_process(tiny_llama, pairs, reference=Cached())
    assert [m["loss"] for m in cached] == pytest.approx([m["loss"] for m in frozen], abs=1e-5)


def test_a_synced_reference_moves_its_share_of_the_way_every_so_many_steps(tiny_llama, pairs):
    """θ_ref ← 0.25·(θ + 1) + 0.75·θ = θ + 0.25, after the second step and not after the first."""
    policy = Policy.load(str(tiny_llama))
    reference = open_reference(Synced(every_steps=2, alpha=0.25), policy, pairs)
    before = {name: weights.clone() for name, weights in policy.weights.tensors().items()}
    for weights in policy.weights.tensors().values():
        weights += 1
    reference.after_step(1)
    for name, weights in reference.moving.weights.tensors().items():
        assert torch.equal(weights, before[name])
    reference.after_step(2)
    for name, weights in reference.moving.weights.tensors().items():
        torch.testing.assert_close(weights, before[name] + 0.25)


def test_a_reference_of_another_shape_cannot_follow_the_policy(tiny_llama, pairs, tmp_path, tokenizer):
    other = build_llama(tmp_path / "other", tokenizer, seed=1, tie_word_embeddings=True)
    with pytest.raises(UserError, match="cannot move towards it"):
        open_reference(Synced(model=str(other)), tiny_llama, pairs)


def test_training_against_a_reference_that_becomes_the_policy_starts_anew_each_step(tiny_llama, pairs):
    """With α = 1 after every step the policy is its reference at every step, and so the loss is ln 2."""
    metrics, _ = train_in_process(tiny_llama, pairs, reference=Synced(every_steps=1, alpha=1.0))
    assert [m["loss"] for m in metrics] == pytest.approx([math.log(2)] * len(metrics), abs=1e-5)


def test_without_a_reference_rewards_are_those_of_the_policy_alone(tiny_llama, pairs):
    metrics, _ = train_in_process(tiny_llama, pairs, loss=CPO(beta=0.3), max_steps=1)
    assert metrics[0]["rewards/chosen"] == pytest.approx(0.3 * metrics[0]["logps/chosen"], rel=1e-5)


def test_a_frozen_reference_stays_where_it_was_while_the_policy_moves(tiny_llama, pairs):
    policy = Policy.load(str(tiny_llama))
    logps = open_reference(Frozen(), policy, pairs)
    before = answers(logps, pairs)
    for weights in policy.weights.tensors().values():
        weights += 1
    assert torch.equal(answers(logps, pairs), before)


def test_what_is_cached_is_computed_once_and_read_as_the_same_bytes(tiny_llama, pairs, empty_cache, monkeypatch):
    first = answers(open_reference(Cached(), tiny_llama, pairs), pairs)
    files = {path: path.read_bytes() for path in empty_cache.rglob("*.arrow")}
    assert files
    monkeypatch.setattr(cache.ReferenceCache, "_compute", None)
    again = answers(open_reference(Cached(), tiny_llama, pairs), pairs)
    assert torch.equal(first, again)
    assert {path: path.read_bytes() for path in empty_cache.rglob("*.arrow")} == files


def test_progress_grows_with_every_micro_batch_up_to_the_last_pair(tiny_llama, pairs):
    seen = []
    open_reference(Cached(), tiny_llama, pairs, progress=lambda done, total: seen.append((done, total)))
    counts = [done for done, _ in seen]
    assert len(counts) > 3
    assert counts == sorted(set(counts))
    assert seen[-1] == (len(pairs), len(pairs))


def test_only_new_pairs_are_computed(tiny_llama, pairs, monkeypatch):
    open_reference(Cached(), tiny_llama, pairs, needed=range(30))
    asked = []
    compute = cache.ReferenceCache._compute
    monkeypatch.setattr(
        cache.ReferenceCache, "_compute", lambda self, missing, *a: asked.extend(missing) or compute(self, missing, *a)
    )
    open_reference(Cached(), tiny_llama, pairs)
    assert asked == list(range(30, 40))


def test_an_interrupted_pass_goes_on_to_the_same_bytes(tiny_llama, pairs, empty_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK_PAIRS", 8)
    whole = answers(open_reference(Cached(), tiny_llama, pairs), pairs)
    written = sorted(path.name for path in empty_cache.rglob("*.arrow"))
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "other"))

    def stop_half_way(done, total):
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_reference(Cached(), tiny_llama, pairs, progress=stop_half_way)
    assert len(list((tmp_path / "other").rglob("*.arrow"))) == 2
    assert torch.equal(answers(open_reference(Cached(), tiny_llama, pairs), pairs), whole)
    assert sorted(path.name for path in (tmp_path / "other").rglob("*.arrow")) == written


def test_weights_that_no_gradient_moves_count_for_the_digest():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 8}
    dims = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "vocab_size": 50, "pad_token_id": 0}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**small, **heads, **dims, **experts, first_k_dense_replace=1))
    digest = weights_digest(model)
    [biases] = [tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    biases[3] += 1
    assert weights_digest(model) != digest


def test_another_model_another_row_another_precision_miss(
    tiny_llama, pairs, tmp_path, pairs_file, tokenizer, demo_rows
):
    model, accelerator = load_policy(str(tiny_llama)), Accelerator(cpu=True)
    identity = cache.reference_identity(weights_digest(model), accelerator)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 3] += 1e-6
    assert cache.reference_identity(weights_digest(model), accelerator) != identity
    model = load_policy(str(tiny_llama))
    model.config.rms_norm_eps *= 2
    assert cache.reference_identity(weights_digest(model), accelerator) != identity
    accelerator.state._mixed_precision = "bf16"
    assert cache.reference_identity(weights_digest(load_policy(str(tiny_llama))), accelerator) != identity
    accelerator.state._mixed_precision = "no"

    keys = pairs.keys()
    rows = [dict(row) for row in demo_rows[:40]]
    rows[7]["rejected"] += "!"
    pairs_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = prepare_pairs(pairs_file, tokenizer, tmp_path / "changed").keys()
    assert [i for i in range(40) if keys[i] != changed[i]] == [7]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_noticed_and_computed_again(tiny_llama, pairs, empty_cache, damage, caplog):
    expected = answers(open_reference(Cached(), tiny_llama, pairs), pairs)
    (file,) = empty_cache.rglob("*.arrow")
    data = bytearray(file.read_bytes())
    data[-200] ^= 1
    file.write_bytes(data if damage == "flip" else data[:100] if damage == "truncate" else b"")
    import logging

    logging.getLogger("dpo_cli").propagate = True
    found = answers(open_reference(Cached(), tiny_llama, pairs), pairs)
    assert torch.equal(found, expected)
    assert "damaged" in caplog.text


@pytest.mark.parametrize("strategy", [Cached, Frozen])
def test_another_model_as_reference_answers_for_itself(tiny_llama, pairs, tmp_path, tokenizer, strategy):
    other = build_llama(tmp_path / "other", tokenizer, seed=1)
    found = answers(open_reference(strategy(model=str(other)), tiny_llama, pairs), pairs)
    expected = answers(open_reference(Frozen(), other, pairs), pairs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_reference_with_another_vocabulary_is_refused(tiny_llama, pairs, tmp_path, tokenizer):
    folder = build_llama(tmp_path / "other", tokenizer, seed=1)
    model = load_policy(str(folder))
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="vocabulary"):
        open_reference(Frozen(model=str(folder)), tiny_llama, pairs)

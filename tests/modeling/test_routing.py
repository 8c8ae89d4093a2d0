"""The load of experts and its loss, against transformers' own on a padded batch; packed against padded."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import KINDS, SMALL, build, example_pairs
from transformers import AutoModelForCausalLM

from dpo_cli.errors import UserError
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.routing import balance_loss, check_routers
from dpo_cli.modeling.scorer import Scorer, model_inputs, recompute_activations

ROUTED = ["mixtral", "olmoe", "qwen3_moe", "granitemoe"]


@pytest.fixture(scope="module")
def pairs():
    return example_pairs()


def batch_of(model, layout, pairs):
    LAYOUTS[layout].prepare(model)
    return LAYOUTS[layout].batch(range(len(pairs)), pairs)


def load_of(model, layout, pairs):
    return Scorer(model)(batch_of(model, layout, pairs), with_load=True)[1]


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("kind", ROUTED)
def test_the_loss_and_its_gradient_are_those_of_transformers_with_padding_masked(kind, pairs):
    model = build(kind)
    batch = batch_of(model, "padded", pairs)
    assert not batch.attention_mask.all()
    theirs = model(**model_inputs(batch), output_router_logits=True).aux_loss
    expected = gradients_of(model, theirs)
    load = load_of(model, "padded", pairs)
    ours = balance_loss(load, load.detach())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    found = gradients_of(model, ours)
    assert found.keys() == expected.keys()
    assert any("gate" in name or "router" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ROUTED)
def test_tokens_that_sequences_share_count_as_often_as_if_they_were_padded(kind, pairs):
    padded, packed = build(kind), build(kind)
    one, other = load_of(padded, "padded", pairs), load_of(packed, "packed", pairs)
    assert len(batch_of(packed, "packed", pairs).counts) < one[0].sum() / 4
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-4)
    expected = gradients_of(padded, balance_loss(one, one.detach()))
    found = gradients_of(packed, balance_loss(other, other.detach()))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shares_of_batches_add_up_to_the_loss_of_all_and_so_do_their_gradients(layout, pairs):
    model = build("qwen3_moe").double()
    # The faster ones know no float64.
    model.set_experts_implementation("eager")
    together = load_of(model, layout, pairs)
    whole = together.detach()
    expected = gradients_of(model, balance_loss(together, whole))
    shares = [balance_loss(load_of(model, layout, part), whole) for part in (pairs[:1], pairs[1:4], pairs[4:])]
    torch.testing.assert_close(sum(shares), balance_loss(whole, whole))
    for name, gradient in gradients_of(model, sum(shares)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_experts_that_all_get_the_same_cost_as_much_as_each_token_has_experts():
    """For each of E experts f = k / E and P = 1 / E: E · E · k / E² = k."""
    load = torch.tensor([[30.0] * 4, [15.0] * 4])
    assert balance_loss(load, load) == 2
    assert balance_loss(*[torch.tensor([[60.0, 60.0, 0.0, 0.0], [30.0, 30.0, 0.0, 0.0]])] * 2) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ROUTED)
def test_recomputed_activations_have_the_same_loss_and_gradient(kind, layout, pairs):
    found = []
    for recompute in (False, True):
        model = build(kind)
        if recompute:
            recompute_activations(model)
        load = load_of(model, layout, pairs)
        found.append(gradients_of(model, balance_loss(load, load.detach())))
    kept, recomputed = found
    assert kept and kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ROUTED)
def test_asking_for_the_load_changes_no_log_probability(kind, pairs):
    model = build(kind)
    batch = batch_of(model, "packed", pairs)
    assert torch.equal(Scorer(model)(batch, with_load=True)[0], Scorer(model)(batch))


@pytest.mark.parametrize("kind", [*ROUTED, "gpt_oss", "qwen3_next"])
def test_models_with_routers_pass(kind):
    check_routers(build(kind))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "experts" not in KINDS[kind].features])
def test_models_without_experts_are_refused(kind):
    with pytest.raises(UserError, match="has no experts"):
        check_routers(build(kind))


def test_a_model_that_could_have_experts_and_has_none_is_refused():
    config = transformers.Qwen3MoeConfig(**SMALL, mlp_only_layers=[0, 1])
    with pytest.raises(UserError, match="Qwen3MoeForCausalLM has no experts"):
        check_routers(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("kind", ["deepseek_v3", "afmoe"])
def test_models_that_are_balanced_in_another_way_are_refused(kind):
    with pytest.raises(UserError, match="transformers has no load-balancing loss for"):
        check_routers(build(kind))

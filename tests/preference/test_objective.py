"""Several losses in one, weights of pairs, and what the policy itself is likely to say."""

from __future__ import annotations

import pytest
import torch

from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.layouts import Padded
from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.modeling.responses import Responses
from dpo_cli.modeling.scorer import Scorer
from dpo_cli.preference.losses import BCO, CPO, DPO, IPO, ORPO, SFT, SimPO
from dpo_cli.preference.losses.base import StepInfo
from dpo_cli.preference.objective import Objective
from tests.builders import prepare_pairs, train_in_process
from tests.conftest import write_rows

LENGTHS = (2, 3, 4, 1)
STEP = StepInfo(2, 5)


@pytest.fixture
def sequences():
    torch.manual_seed(0)
    return [SequenceLogps(-torch.rand(10, dtype=torch.float64), Responses.of(LENGTHS)) for _ in range(2)]


def test_a_list_is_the_weighted_sum_of_its_losses(sequences):
    found = Objective((DPO(weight=2.0), SFT(weight=0.5)))(*sequences, STEP).losses
    expected = 2 * DPO()(*sequences, STEP).losses + SFT()(*sequences, STEP).losses / 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [SimPO(), ORPO(), CPO()])
def test_a_loss_without_a_reference_is_the_same_beside_one_that_needs_it(sequences, loss):
    policy, reference = sequences
    none = SequenceLogps(torch.zeros_like(reference.tokens), Responses.of(LENGTHS))
    found = Objective((DPO(), loss))(policy, reference, STEP).losses
    expected = DPO()(policy, reference, STEP).losses + loss(policy, none, STEP).losses
    torch.testing.assert_close(found, expected)


def test_the_rewards_of_a_list_are_those_of_the_loss_that_keeps_statistics_else_that_has_a_reference():
    assert Objective((SFT(), IPO(), DPO())).reward_source.type == "ipo"
    assert Objective((SFT(), IPO(), BCO())).reward_source.type == "bco"
    assert Objective((SFT(), SimPO())).reward_source.type == "sft"


def test_a_list_says_what_it_is():
    assert str(Objective.of(DPO())) == "dpo"
    assert str(Objective.of([DPO(), SFT(weight=0.005)])) == "1 · dpo + 0.005 · sft"


def test_wpo_weighs_a_pair_by_equation_2_written_out(tiny_llama, pairs_file, tokenizer, tmp_path):
    """exp(1/|y| Σ log(π(token) / Σ π²)) of both responses, from the model's own logits over the whole vocabulary."""
    pairs = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    policy = load_policy(str(tiny_llama)).double()
    weights = []
    for pair in pairs[:4]:
        weight = 1.0
        for response in (pair.chosen, pair.rejected):
            ids = torch.tensor([[*pair.prompt, *response]])
            p = policy(ids).logits[0, len(pair.prompt) - 1 : -1].softmax(-1)
            said = p.gather(-1, ids[0, len(pair.prompt) :, None]).squeeze(-1)
            weight *= (said / p.square().sum(-1)).log().mean().exp()
        weights.append(weight.item())
    batch = Padded().batch(range(4), pairs[:4])
    answer = SequenceLogps.of(Scorer(policy, collisions=True)(batch), batch.responses)
    reference = SequenceLogps(-torch.rand(len(batch.targets)).double(), batch.responses)
    step = StepInfo(4, sum(batch.lengths[:4]))
    plain, weighed = (Objective((DPO(wpo=wpo),))(answer, reference, step).losses for wpo in (False, True))
    torch.testing.assert_close(weighed, plain * torch.tensor(weights).double())


def test_wpo_weights_are_constants_to_the_gradient(tiny_llama, pairs_file, tokenizer, tmp_path):
    pairs = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    policy = load_policy(str(tiny_llama)).double()
    batch = Padded().batch([0], pairs[:1])
    step = StepInfo(1, batch.lengths[0])
    gradients, losses = [], []
    for wpo in (False, True):
        scored = Scorer(policy, collisions=wpo)(batch)
        answer = SequenceLogps.of(scored, batch.responses)
        reference = SequenceLogps(torch.full((len(batch.targets),), -2.0).double(), batch.responses)
        loss = Objective((DPO(wpo=wpo),))(answer, reference, step).losses.sum()
        policy.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0] * (losses[1] / losses[0]))


def test_a_pair_of_weight_2_counts_as_that_pair_twice_and_one_of_weight_0_not_at_all(
    tiny_llama, demo_rows, tokenizer, tmp_path
):
    """Four pairs with weights 2, 1, 1, 0 give the gradient, and so the weights, of 1, 1, 2, 3 as four pairs."""

    def train(name, rows):
        pairs = prepare_pairs(write_rows(tmp_path / f"{name}.jsonl", rows), tokenizer, tmp_path / name)
        return train_in_process(tiny_llama, pairs, pairs_per_step=4, dtype=torch.float64)

    rows = demo_rows[:4]
    weighed = train("weighed", [{**row, "weight": weight} for row, weight in zip(rows, (2, 1, 1, 0), strict=True)])
    twice = train("twice", [rows[0], rows[0], rows[1], rows[2]])
    assert weighed[0][0]["loss"] == pytest.approx(twice[0][0]["loss"], rel=1e-9)
    for name, weights in weighed[1].items():
        torch.testing.assert_close(weights, twice[1][name], rtol=1e-6, atol=1e-8)

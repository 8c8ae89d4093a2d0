"""The loop: what a step computes does not depend on how it is cut; against a trainer written out plainly."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from dpo_cli.data.prepared.step_plan import MicroBatch, Plan
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.preference.losses import AOT, BCO, DPO, SFT, Loss, SimPO
from dpo_cli.preference.losses.pairwise import AdaptiveBeta
from dpo_cli.preference.objective import Objective
from dpo_cli.settings import members
from dpo_cli.training.learner import NotFinite, Skips
from tests.builders import prepare_pairs, train_in_process
from tests.conftest import ROOT


@pytest.fixture
def pairs(tmp_path, pairs_file, tokenizer):
    return prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")


def assert_same(one, other, rel=1e-7, rtol=1e-9, atol=1e-11):
    for ours, theirs in zip(one[0], other[0], strict=True):
        for name in ours:
            if name != "learning_rate":
                assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=1e-2 * rel), name
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, other[1][name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [1, 400])
def test_neither_the_cut_nor_the_layout_changes_metrics_or_weights(tiny_llama, pairs, layout, budget):
    """In float64, so that what is left of rounding is far below any mistake; 40 pairs make uneven steps of 12.

    Norms round to float32 inside the model whatever is asked, which another order of tokens brings to light.
    """
    settings = {"pairs_per_step": 12, "dtype": torch.float64}
    whole = train_in_process(tiny_llama, pairs, **settings)
    cut = train_in_process(tiny_llama, pairs, layout=layout, micro_batch_tokens=budget, **settings)
    assert_same(cut, whole, **({} if layout == "padded" else {"rel": 1e-6, "rtol": 1e-5, "atol": 1e-6}))


EVERY_LOSS = [
    *(kind() for kind in members(Loss)),
    DPO(adaptive_beta=AdaptiveBeta(alpha=5.0)),
    SimPO(wpo=True),
    [DPO(wpo=True), AOT(weight=0.5), BCO(), SFT(weight=0.2)],
]


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=lambda loss: str(Objective.of(loss)))
def test_no_loss_depends_on_how_a_step_is_cut(tiny_llama, pairs, loss):
    """One pass for all 8 pairs, one for each, and uneven ones; two steps, since some losses remember the first."""
    settings = {"loss": loss, "max_steps": 2, "dtype": torch.float64}
    whole = train_in_process(tiny_llama, pairs, **settings)
    for budget in (1, 700):
        assert_same(train_in_process(tiny_llama, pairs, micro_batch_tokens=budget, **settings), whole)


def trained_by_ranks(model, losses, tmp_path):
    """Train with a list of losses of this module, each on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "tests.training.ranks", model, losses, tmp_path / "prepared", tmp_path / "found.pt"]
    ended = subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return torch.load(tmp_path / "found.pt", weights_only=True)


@pytest.mark.program
def test_no_loss_depends_on_how_many_ranks_share_a_step(tiny_llama, pairs, tmp_path):
    """Steps of five pairs, so that one rank has more of them than the other."""
    from tests.training.ranks import SETTINGS

    by_ranks = trained_by_ranks(tiny_llama, "EVERY_LOSS", tmp_path)
    for loss, found in zip(EVERY_LOSS, by_ranks, strict=True):
        assert_same(found, train_in_process(tiny_llama, pairs, loss=loss, **SETTINGS))


BALANCED = [DPO(router_aux=0.5), [AOT(router_aux=0.5, weight=2), SFT()]]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, tokenizer):
    """A model of four experts a layer, of which a token goes to two."""
    from tiny_models import build  # Other processes import this module, and do not find it.

    folder = tmp_path_factory.mktemp("mixture")
    build("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return folder


ROUTED = {"max_steps": 2, "dtype": torch.float64, "learning_rate": 1e-4}
ROUNDED = {"rel": 1e-6, "rtol": 1e-5, "atol": 1e-6}
"""Routers compute probabilities in float32, whatever is asked."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", BALANCED, ids=lambda loss: str(Objective.of(loss)))
def test_the_load_of_experts_is_balanced_alike_however_a_step_is_cut(mixture, pairs, loss, layout):
    whole = train_in_process(mixture, pairs, loss=loss, **ROUTED)
    for budget in (1, 400, 10_000):
        cut = train_in_process(mixture, pairs, loss=loss, layout=layout, micro_batch_tokens=budget, **ROUTED)
        assert_same(cut, whole, **ROUNDED)


@pytest.mark.program
def test_the_load_of_experts_is_balanced_alike_by_one_rank_and_by_two(mixture, pairs, tmp_path):
    from tests.training.ranks import SETTINGS

    by_ranks = trained_by_ranks(mixture, "BALANCED", tmp_path)
    for loss, found in zip(BALANCED, by_ranks, strict=True):
        assert_same(found, train_in_process(mixture, pairs, loss=loss, **SETTINGS), **ROUNDED)


def test_the_load_of_experts_is_balanced_alike_where_activations_are_recomputed(mixture, pairs):
    kept, recomputed = (
        train_in_process(mixture, pairs, loss=DPO(router_aux=0.5), checkpointing=recomputed, **ROUTED)
        for recomputed in (False, True)
    )
    assert_same(recomputed, kept)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_a_step_goes_along_the_gradient_of_the_mean_loss_and_of_transformers_loss_of_all_tokens(mixture, pairs, budget):
    """At step 1 policy and reference are equal: the pairs' gradient is −β/2 of the margin's mean."""
    coefficient, beta = 0.5, 0.1
    loss = DPO(beta=beta, router_aux=coefficient)
    metrics, _ = train_in_process(mixture, pairs, loss=loss, micro_batch_tokens=budget, max_grad_norm=None, **ROUTED)
    plan = Plan(np.arange(len(pairs)), pairs.sizes.longest, 8, 1, 1, True, 0)
    (step,) = plan.steps(lambda indices: [MicroBatch(tuple(indices))])
    policy = load_policy(str(mixture)).double()
    policy.set_experts_implementation("eager")
    sequences = [[*pairs[i].prompt, *response] for i in step.pairs for response in (pairs[i].chosen, pairs[i].rejected)]
    ids, mask = torch.zeros(2, len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = torch.tensor(sequence), 1
    output = policy(ids, attention_mask=mask, output_router_logits=True)
    logps = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    margin = 0.0
    for row, i in enumerate(index for index in step.pairs for _ in range(2)):
        part = logps[row, len(pairs[i].prompt) - 1 : len(sequences[row]) - 1].sum()
        margin = margin + (part if row % 2 == 0 else -part)
    (-beta / 2 * margin / len(step.pairs) + coefficient * output.aux_loss).backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    assert metrics[0]["router_aux"] == pytest.approx(output.aux_loss.item(), rel=1e-6)
    assert metrics[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_balancing_evens_the_load_out_and_nothing_is_balanced_by_default(mixture, pairs):
    settings = {"max_steps": 5, "learning_rate": 1e-2}
    balanced, _ = train_in_process(mixture, pairs, loss=DPO(router_aux=10.0), **settings)
    assert balanced[-1]["router_aux"] < balanced[0]["router_aux"]
    off, left = train_in_process(mixture, pairs, loss=DPO(router_aux=0.0), **settings)
    plain, weights = train_in_process(mixture, pairs, **settings)
    assert off == plain
    assert "router_aux" not in plain[0]
    assert all(torch.equal(left[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_changes_nothing_but_memory(tiny_llama, pairs, layout):
    settings = {"max_steps": 3, "dtype": torch.float64, "layout": layout}
    kept = train_in_process(tiny_llama, pairs, **settings)
    recomputed = train_in_process(tiny_llama, pairs, checkpointing=True, **settings)
    assert_same(recomputed, kept)


def plain_training(model, pairs, steps, loss, learning_rate, max_grad_norm):
    """DPO as the paper writes it, one sequence at a time, with all logits and torch's own parts."""
    policy = load_policy(str(model)).double()
    reference = load_policy(str(model)).double()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)

    def logp(net, prompt, response):
        ids = torch.tensor([[*prompt, *response]])
        all_logps = net(ids).logits[:, :-1].log_softmax(-1)
        taken = all_logps.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, len(prompt) - 1 :]
        return taken.sum() if loss.logps == "sum" else taken.mean()

    losses = []
    for step in steps:
        total = 0.0
        for index in step:
            pair = pairs[index]
            chosen, rejected = (
                logp(policy, pair.prompt, y) - logp(reference, pair.prompt, y).detach()
                for y in (pair.chosen, pair.rejected)
            )
            delta = loss.beta * (chosen - rejected)
            epsilon = loss.label_smoothing
            total = total - (1 - epsilon) * delta.sigmoid().log() - epsilon * (-delta).sigmoid().log()
        mean = total / len(step)
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(mean.item())
    return losses, policy.state_dict()


@pytest.mark.parametrize(
    "loss", [DPO(), DPO(beta=0.5, label_smoothing=0.2), DPO(beta=5.0, logps="mean")], ids=["dpo", "smoothed", "mean"]
)
def test_losses_and_weights_are_those_of_a_trainer_written_out_plainly(tiny_llama, pairs, loss):
    def one_by_one(indices):
        return [MicroBatch((index,)) for index in indices]

    plan = Plan(np.arange(40), pairs.sizes.longest, 8, 1, 4, True, 0)
    expected, weights = plain_training(tiny_llama, pairs, [s.pairs for s in plan.steps(one_by_one)], loss, 1e-3, 1.0)
    metrics, found = train_in_process(
        tiny_llama, pairs, loss=loss, max_steps=4, micro_batch_tokens=500, dtype=torch.float64
    )
    assert [m["loss"] for m in metrics] == pytest.approx(expected, rel=1e-7)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8)


def test_the_first_loss_is_ln_2_and_then_it_falls(tiny_llama, pairs):
    metrics, _ = train_in_process(tiny_llama, pairs)
    first = metrics[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/accuracies"] == 0.5
    assert metrics[-1]["loss"] < 0.9 * math.log(2)


def test_a_metric_of_a_step_is_the_mean_over_its_pairs(tiny_llama, pairs):
    """Margins are means of differences, so they equal the difference of the means."""
    for metrics in train_in_process(tiny_llama, pairs, micro_batch_tokens=300)[0]:
        difference = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        assert metrics["rewards/margins"] == pytest.approx(difference, abs=1e-6)


def test_the_logged_norm_is_that_before_clipping(tiny_llama, pairs):
    free, _ = train_in_process(tiny_llama, pairs, max_steps=1, max_grad_norm=None)
    clipped, _ = train_in_process(tiny_llama, pairs, max_steps=1, max_grad_norm=0.01)
    assert free[0]["grad_norm"] > 0.01
    assert clipped[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"])


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_its_pairs(tiny_llama, pairs):
    from dpo_cli.preference.reference import Frozen, OpenReference

    class Spoilt:
        """A reference that answers NaN for pair 5."""

        def open(self, *arguments):
            logps = Frozen().open(*arguments)

            def answer(batch):
                tokens = logps(batch).clone()
                if 5 in batch.pairs:
                    parts = tokens.split(list(batch.lengths))
                    parts[batch.pairs.index(5)].fill_(math.nan)
                return tokens

            return OpenReference(answer)

    with pytest.raises(NotFinite) as caught:
        train_in_process(tiny_llama, pairs, reference=Spoilt(), micro_batch_tokens=300)
    assert caught.value.pairs == (5,)
    assert caught.value.what == "loss"


def test_a_gradient_that_is_not_finite_stops_before_the_step(tiny_llama, pairs, monkeypatch):
    from accelerate import Accelerator

    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda self, p, n: clip(self, p, n) * math.inf)
    with pytest.raises(NotFinite) as caught:
        train_in_process(tiny_llama, pairs)
    assert caught.value.what == "gradient"
    assert len(caught.value.pairs) == 8


def test_a_step_that_may_be_skipped_leaves_the_weights_and_the_next_ones_go_on(tiny_llama, pairs, monkeypatch):
    """As if its rate had been 0: the schedule and the order of the pairs go on."""
    from accelerate import Accelerator

    clip, calls = Accelerator.clip_grad_norm_, []

    def broken_once(self, parameters, norm):
        calls.append(None)
        return clip(self, parameters, norm) * (math.inf if len(calls) == 2 else 1)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", broken_once)
    metrics, weights = train_in_process(tiny_llama, pairs, max_steps=2, max_skipped=1)
    assert [math.isfinite(row["grad_norm"]) for row in metrics] == [True, False]
    calls.clear()
    _, after_one = train_in_process(tiny_llama, pairs, max_steps=1)
    assert all(torch.equal(tensor, after_one[name]) for name, tensor in weights.items())


def test_one_step_too_many_to_be_skipped_stops(tiny_llama, pairs, monkeypatch):
    from accelerate import Accelerator

    clip, calls = Accelerator.clip_grad_norm_, []

    def broken_from_the_second_on(self, parameters, norm):
        calls.append(None)
        return clip(self, parameters, norm) * (math.inf if len(calls) > 1 else 1)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", broken_from_the_second_on)
    with pytest.raises(NotFinite) as caught:
        train_in_process(tiny_llama, pairs, max_steps=4, max_skipped=1)
    assert caught.value.step == 3


def test_skips_are_counted_and_limited():
    skips = Skips(allowed=2)
    assert [skips.take() for _ in range(3)] == [True, True, False]
    assert not Skips(allowed=0).take()

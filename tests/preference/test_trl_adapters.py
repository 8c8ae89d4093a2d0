"""Adapters against TRL 1.16 with PEFT: losses and the gradient of every weight of an adapter, on the same pairs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from benchmark.peer import InOrder, conversations
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import set_seed

from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.losses import DPO, IPO
from tests.preference.test_trl_oracle import (
    BETA,
    NUM_ROWS,
    PAIRS,
    OneStep,
    World,
    adamw,
    their_losses,
    their_settings,
    their_step,
    train,
    world,
)

__all__ = ["world"]

# transformers warns of its own name, which TRL reads.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANK, ALPHA, SEED = 4, 12.0, 7
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
LOSSES = {
    "dpo": (DPO(beta=BETA), {"loss_type": ["sigmoid"]}),
    "ipo": (IPO(beta=2.0), {"loss_type": ["ipo"], "beta": 2.0}),
}
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter on both sides.

    Attributes:
        world: The base, its reference where that is a model of its own, and the pairs.
        adapter: Our settings.
    """

    world: World
    adapter: Lora

    def ours(self, loss: Any, *steps: Any, **options: Any) -> tuple[list[float], OneStep]:
        """Take steps, by default one; return every loss, and the last gradients."""
        trained = Adapted(self.adapter, SEED)
        metrics, last = train(self.world, [loss], *(steps or [[PAIRS]]), trained=trained, **options)
        return [entry["loss"] for entry in metrics], last

    def theirs(self, **settings: Any) -> Any:
        """Build TRL's trainer of the same adapter; a fresh one is given our tensors, A's random ones among them."""
        model, given = load_policy(str(self.world.policy)), {}
        if self.adapter.start:
            model = PeftModel.from_pretrained(model, self.adapter.start, is_trainable=True)
        else:
            given["peft_config"] = LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                target_modules="all-linear",
                use_dora=self.adapter.dora,
                use_rslora=self.adapter.rslora,
                task_type="CAUSAL_LM",
            )
        if self.world.reference:
            given["ref_model"] = load_policy(str(self.world.reference))
        trainer = InOrder(
            model=model,
            args=their_settings(self.world, **settings),
            train_dataset=conversations(self.world.rows),
            processing_class=self.world.tokenizer,
            **given,
        )
        if not self.adapter.start:
            state = Policy.load(str(self.world.policy), trained=Adapted(self.adapter, SEED)).weights.state()
            assert not set_peft_model_state_dict(trainer.model, dict(state)).unexpected_keys
        return trainer


BEGINNINGS = ("fresh", "started", "another reference")


@pytest.fixture(scope="module", params=[*itertools.product(KINDS, BEGINNINGS)], ids=" - ".join)
def case(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An adapter of a kind.

    fresh: B is 0, and the reference is the base. started: training goes on from an adapter, and the reference is the
    base with that adapter. another reference: the same with a reference of its own, so that the first losses differ.
    """
    kind, beginning = request.param
    adapter = Lora(rank=RANK, alpha=ALPHA, **KINDS[kind])
    if beginning == "fresh":
        return Case(dataclasses.replace(world, reference=None), adapter)
    policy = Policy.load(str(world.policy), trained=Adapted(adapter, 1))
    generator = torch.Generator().manual_seed(0)
    for weights in policy.weights.tensors().values():
        weights += 0.05 * torch.randn(weights.shape, generator=generator)
    folder = tmp_path_factory.mktemp("start")
    policy.weights.write(folder, world.tokenizer)
    started = adapter.model_copy(update={"start": str(folder)})
    return Case(world if beginning == "another reference" else dataclasses.replace(world, reference=None), started)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_draws_what_peft_draws_after_it(world, kind):
    """So whoever sets the same seed as a script of TRL's begins with the same adapter."""
    ours = Policy.load(
        str(world.policy), trained=Adapted(Lora(rank=RANK, alpha=ALPHA, **KINDS[kind]), SEED)
    ).weights.state()
    set_seed(SEED)
    names = {"dora": "use_dora", "rslora": "use_rslora"}
    settings = {names[name]: value for name, value in KINDS[kind].items()}
    model = load_policy(str(world.policy))
    theirs = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **settings))
    state = get_peft_model_state_dict(theirs)
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in ours)


def assert_same(ours: OneStep, theirs: OneStep, still: str = "") -> None:
    """Compare losses, and gradients by their norms; those of names that contain `still` are 0 on both sides."""
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert {PREFIX + name for name in ours.gradients} == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        expected = theirs.gradients[PREFIX + name]
        assert (float(expected.norm()) == 0) == (bool(still) and still in name), name
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_every_gradient_are_trl_s(case, loss):
    ours, theirs = LOSSES[loss]
    (first,), step = case.ours(ours)
    # Before step 1 A has no part in what B = 0 answers.
    assert_same(step, their_step(case.theirs(**theirs)), "" if case.adapter.start else "lora_A")
    at_reference = {"dpo": math.log(2), "ipo": 1 / (2 * 2.0) ** 2}[loss]
    assert (first == pytest.approx(at_reference, rel=1e-6)) == (case.world.reference is None)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", [*itertools.product(KINDS, BEGINNINGS[:2])], ids=" - ".join, indirect=True)
def test_ten_steps_of_adamw_have_trl_s_losses(case, loss):
    ours, theirs = LOSSES[loss]
    expected = their_losses(case.theirs(per_device_train_batch_size=4, max_steps=10, **theirs))
    steps = [[range(first, first + 4)] for first in range(0, NUM_ROWS, 4)]
    found, _ = case.ours(ours, *steps, optimizer=adamw, max_grad_norm=1.0)
    assert found == pytest.approx(expected, abs=1e-5)
    # The adapter has moved: without learning the losses would be those of the reference.
    assert max(abs(loss - found[0]) for loss in found) > 0.1 * found[0]


@pytest.mark.parametrize("case", [("lora", "started")], ids=" - ".join, indirect=True)
@pytest.mark.parametrize("change", [{"alpha": ALPHA * 1.001}, {"rslora": True}], ids=["alpha", "rslora"])
def test_the_comparison_sees_another_scale(case, change):
    theirs, other = their_step(case.theirs()), Case(case.world, case.adapter.model_copy(update=change))
    off = other.ours(LOSSES["dpo"][0])[1]
    with pytest.raises(AssertionError):
        assert_same(off, theirs)

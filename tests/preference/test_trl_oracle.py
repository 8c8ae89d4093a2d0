"""Losses and gradients against TRL 1.16: its own trainers, on the same two models and the same pairs.

Where TRL differs from a paper or from our table, a test says so: it shows TRL's number, and ours in closed form.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from benchmark.peer import InOrder, conversations
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer
from trl import DPOConfig
from trl.import_utils import TRLExperimentalWarning

from dpo_cli.data.prepared.folder import PreparedPairs
from dpo_cli.data.prepared.step_plan import MicroBatch, Step
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    LDDPO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Robust,
    SimPO,
)
from dpo_cli.preference.losses.divergences import Alpha, ForwardKL, JensenShannon, ReverseKL
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import Frozen, NoReference
from dpo_cli.preference.reference_work import ReferenceWork
from dpo_cli.training.learner import Learner
from dpo_cli.training.optimizer import AdamW, schedule
from tests.builders import prepare_pairs, silent
from tests.conftest import build_llama, write_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

RTOL = 1e-5
ATOL = 1e-4
"""Of the largest entry of a parameter's gradient; the largest deviations that were measured are 1e-5 on one processor
and 4e-5 on another.

A log-ratio is the difference of two sums of some 200 nats, in which float32 rounds to 1.5e-5. That much may each pair's
share in the gradient be off, and where the shares cancel, it is small beside the largest entry but not beside what is
left.
"""

# transformers warns of its own name, which TRL reads.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NEAR, FAR = 0.03, 0.2
"""By what angle, in radians, the two references are turned away from the policy."""
BETA, FAR_BETA = 0.5, 0.05
PAIRS = range(8)
NUM_ROWS = 40
LEARNING_RATE = 1e-3

TEMPLATE = (
    "<|endoftext|>{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Begins with BOS and ends with EOS: the trainers of CPO and ORPO would add what is missing of them."""


@dataclass(frozen=True)
class World:
    """What both sides are given: a policy, a reference near it, by default the policy before step 1, and pairs."""

    folder: Path
    policy: Path
    reference: Path | None
    rows: Path
    pairs: PreparedPairs
    tokenizer: Any


class OneStep(NamedTuple):
    """The loss of a step, and the gradient of every parameter by its name."""

    loss: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tokenizer_folder: Path, demo_rows: list[dict[str, str]]
) -> World:
    folder = tmp_path_factory.mktemp("oracle")
    # Not the other tests' tokenizer, since TRL changes the one that it is given.
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    other = build_llama(folder / "other", tokenizer, seed=1)
    reference = turned(tiny_llama, other, NEAR, folder / "near")
    rows = write_rows(folder / "pairs.jsonl", alike(demo_rows))
    return World(folder, tiny_llama, reference, rows, prepare_pairs(rows, tokenizer, folder / "prepared"), tokenizer)


@pytest.fixture(scope="module")
def far(world: World) -> World:
    """The same with a reference that puts the pairs in another order, without which sorting them shows nothing."""
    reference = turned(world.policy, world.folder / "other", FAR, world.folder / "far")
    return dataclasses.replace(world, reference=reference)


def turned(model: Path, other: Path, angle: float, target: Path) -> Path:
    """Save a model turned towards another, by so much that log-ratios have a size at which no loss is saturated."""
    near, far = load_policy(str(model)), load_policy(str(other))
    with torch.no_grad():
        for ours, theirs in zip(near.parameters(), far.parameters(), strict=True):
            if ours.ndim == 2:
                ours.mul_(math.cos(angle)).add_(theirs, alpha=math.sin(angle))
    near.save_pretrained(target)
    return target


def alike(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Pair the short answers of the demo with each other, so that their lengths are much alike and neither is favoured.

    Every eight pairs go from short to long answers.
    """
    by_length = sorted(rows, key=lambda row: len(row["chosen"]))
    near = list(zip(by_length, by_length[7:], strict=False))[:: len(rows) // NUM_ROWS]
    pairs = []
    for place in range(NUM_ROWS):
        row, other = near[place % 8 * (NUM_ROWS // 8) + place // 8]
        answers = (row["chosen"], other["chosen"])
        pairs.append({**row, "chosen": answers[place % 2], "rejected": answers[1 - place % 2]})
    return pairs


# Their side.


def their_settings(world: World, config: Any = DPOConfig, **settings: Any) -> Any:
    """Build the settings of one of TRL's trainers, under which it does the same work as we do."""
    return config(
        output_dir=str(world.folder / "trl"),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        **{"beta": BETA, **settings},
    )


def peer(world: World, trainer: Any = InOrder, config: Any = DPOConfig, **settings: Any) -> Any:
    """Build one of TRL's trainers."""
    models = {"model": load_policy(str(world.policy))}
    if config is DPOConfig:
        models["ref_model"] = load_policy(str(world.reference))
    arguments, data = their_settings(world, config, **settings), conversations(world.rows)
    return trainer(**models, args=arguments, train_dataset=data, processing_class=world.tokenizer)


def collated(trainer: Any, pairs: Sequence[int] = PAIRS) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[index] for index in pairs])


def backward(trainer: Any, loss: Tensor) -> OneStep:
    loss.backward()
    return OneStep(loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad})


def their_step(trainer: Any) -> OneStep:
    return backward(trainer, trainer.compute_loss(trainer.model, collated(trainer)))


def their_losses(trainer: Any) -> list[float]:
    """Train, and return the loss of every step as TRL reports it."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def their_log_ratios(trainer: Any, pairs: Sequence[int] = PAIRS) -> tuple[Tensor, Tensor]:
    """Return c and r of some pairs as TRL computes them, in float64 for the closed forms."""
    batch = collated(trainer, pairs)
    policy, reference = (trainer.compute_ref_log_probs(m, batch) for m in (trainer.model, trainer.ref_model))
    c, r = (
        of_policy.double() - of_reference.double() for of_policy, of_reference in zip(policy, reference, strict=True)
    )
    return c, r


# Our side.


class Kept(torch.optim.SGD):
    """Keeps the gradients that it is given, and takes no step."""

    def step(self, closure: Any = None) -> None:
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def keep(trained: Sequence[nn.Parameter]) -> Kept:
    return Kept(trained, lr=1.0)


def adamw(trained: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return AdamW().over(trained, LEARNING_RATE, 0.0)


def train(
    world: World,
    losses: Sequence[Any],
    *steps: Sequence[Sequence[int]],
    optimizer: Callable[[Sequence[nn.Parameter]], Any] = keep,
    reference: Any = None,
    max_grad_norm: float | None = None,
    trained: Any = None,
) -> tuple[list[dict[str, float]], OneStep]:
    """Take steps, each given as the pairs of its micro-batches; return all metrics, and the last step's gradients."""
    accelerator, objective = Accelerator(cpu=True), Objective.of(losses)
    policy = Policy.load(str(world.policy), trained=trained)
    policy.place(accelerator, trained=True, collisions=objective.wpo)
    other = Policy.load(str(world.reference)) if world.reference else policy
    if other is not policy:
        other.place(accelerator, trained=False)
    batches = Batches(world.pairs, LAYOUTS["padded"], 10_000, accelerator.device)
    indices = np.arange(len(world.pairs))
    work = ReferenceWork(other, policy, accelerator, indices, batches, silent)
    opened = (reference or (Frozen() if objective.needs_reference else NoReference())).open(work)
    inner = optimizer(policy.weights.trained())
    rates = schedule(inner, "constant", 0.0, len(steps))
    prepared = accelerator.prepare_optimizer(inner)
    learner = Learner(policy, objective, opened, prepared, rates, accelerator, max_grad_norm)
    metrics = [learner.take(as_step(*numbered), batches).metrics for numbered in enumerate(steps, 1)]
    gradients = dict(zip(policy.weights.tensors(), getattr(inner, "gradients", ()), strict=False))
    return metrics, OneStep(metrics[-1]["loss"], gradients)


def as_step(number: int, cut: Sequence[Sequence[int]]) -> Step:
    pairs = tuple(itertools.chain.from_iterable(cut))
    return Step(number, 1.0, len(pairs), pairs, tuple(MicroBatch(tuple(part)) for part in cut))


def our_step(world: World, *losses: Any, **options: Any) -> OneStep:
    return train(world, losses, [PAIRS], **options)[1]


def assert_same(ours: OneStep, theirs: OneStep) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=RTOL)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, expected in theirs.gradients.items():
        largest = float(expected.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(ours.gradients[name], expected, rtol=RTOL, atol=ATOL * largest)


def assert_apart(ours: float, theirs: float) -> None:
    """Say that a difference is one of meaning and not of rounding."""
    assert abs(ours - theirs) > 20 * RTOL * abs(theirs)


# What the comparison rests on.


def test_both_sides_read_the_same_tokens(world):
    trainer = peer(world)
    for ours, theirs in zip(world.pairs, trainer.train_dataset, strict=True):
        assert ours.prompt.tolist() == theirs["prompt_ids"]
        assert ours.chosen.tolist() == theirs["chosen_ids"]
        assert ours.rejected.tolist() == theirs["rejected_ids"]
    ours, theirs = LAYOUTS["padded"].batch(PAIRS, [world.pairs[i] for i in PAIRS]), collated(trainer)
    assert torch.equal(ours.attention_mask, theirs["attention_mask"])
    tokens = ours.attention_mask.bool()
    assert torch.equal(ours.input_ids[tokens], theirs["input_ids"][tokens])
    assert torch.equal(ours.targets, theirs["input_ids"][theirs["completion_mask"].bool()])


@pytest.mark.parametrize(("trainer", "config"), [(CPOTrainer, CPOConfig), (ORPOTrainer, ORPOConfig)])
def test_the_trainers_without_a_reference_read_the_same_tokens_too(world, trainer, config):
    for ours, theirs in zip(world.pairs, peer(world, trainer, config).train_dataset, strict=True):
        for name, response in (("chosen", ours.chosen), ("rejected", ours.rejected)):
            assert [*ours.prompt, *response] == theirs[f"{name}_input_ids"]
            assert [*[-100] * len(ours.prompt), *response] == theirs[f"{name}_labels"]


def test_the_pairs_are_of_all_kinds_and_saturate_no_loss(world):
    """Differences of both signs, on both sides of the hinge, none beyond what a logistic still tells apart."""
    c, r = their_log_ratios(peer(world))
    z = BETA * (c - r)
    assert -3 < z.min() < -0.5
    assert 1 < z.max() < 3
    longer = world.pairs.sizes.chosen[PAIRS] > world.pairs.sizes.rejected[PAIRS]
    assert 0 < longer.sum() < len(PAIRS)


def test_the_comparison_sees_a_beta_that_is_a_thousandth_off_by_loss_and_by_gradients(world):
    theirs, off = their_step(peer(world)), our_step(world, DPO(beta=BETA * 1.001))
    for wrong in (off._replace(gradients=theirs.gradients), off._replace(loss=theirs.loss)):
        with pytest.raises(AssertionError):
            assert_same(wrong, theirs)


# One step.

DIVERGENCES = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "js_divergence": JensenShannon(),
    "alpha_divergence": Alpha(alpha=0.3),
}
BY_DIVERGENCE = {
    "sigmoid": (DPO, {}, {}),
    "hinge": (Hinge, {}, {}),
    "exo_pair": (EXO, {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "robust": (Robust, {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "discopop": (DiscoPOP, {"tau": 0.5}, {"discopop_tau": 0.5}),
}
"""Their name of a loss, ours, our settings and theirs."""


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", BY_DIVERGENCE)
def test_losses_of_a_divergence_are_trl_s(world, name, divergence):
    loss, ours, theirs = BY_DIVERGENCE[name]
    trainer = peer(world, loss_type=[name], f_divergence_type=divergence, f_alpha_divergence_coef=0.3, **theirs)
    assert_same(our_step(world, loss(beta=BETA, divergence=DIVERGENCES[divergence], **ours)), their_step(trainer))


def case(name: str, *losses: Any, **settings: Any) -> Any:
    """Name a case after TRL's losses: ours, and their settings."""
    return pytest.param(losses, {"loss_type": name.split("(")[0].split("+"), **settings}, id=name)


RPO = case("sigmoid+sft", DPO(beta=BETA), SFT(weight=0.7), loss_weights=[1.0, 0.7])
MPO = case(
    "sigmoid+bco_pair+sft",
    DPO(beta=BETA, weight=0.8),
    BCO(beta=BETA, weight=0.2, running_mean=False),
    SFT(weight=1.0),
    loss_weights=[0.8, 0.2, 1.0],
)
MEANS = case("sigmoid_norm", DPO(beta=5.0, logps="mean"), beta=5.0)
SIGMOID, IPO_MEAN = case("sigmoid", DPO(beta=BETA)), case("ipo", IPO(beta=2.0), beta=2.0)
ZERO = case("apo_zero", APOZero(beta=BETA))


@pytest.mark.parametrize(
    ("losses", "settings"),
    [
        MEANS,
        IPO_MEAN,
        ZERO,
        RPO,
        MPO,
        case("nca_pair", NCA(beta=BETA)),
        case("bco_pair", BCO(beta=BETA, running_mean=False)),
        case("bco_pair(running mean, step 1)", BCO(beta=BETA)),
        case("sppo_hard", SPPO(beta=BETA)),
        case("apo_down", APODown(beta=BETA)),
        case("sft", SFT()),
        case("sigmoid(ld_alpha 0.5)", LDDPO(beta=BETA, alpha=0.5), ld_alpha=0.5),
        case("sigmoid(ld_alpha 0)", LDDPO(beta=BETA, alpha=0.0), ld_alpha=0.0),
        case("sigmoid(wpo)", DPO(beta=BETA, wpo=True), use_weighting=True),
        case("ipo(wpo)", IPO(beta=2.0, wpo=True), beta=2.0, use_weighting=True),
    ],
)
def test_loss_and_gradients_are_trl_s(world, losses, settings):
    assert_same(our_step(world, *losses), their_step(peer(world, **settings)))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", [AOT, AOTUnpaired])
def test_losses_that_sort_are_trl_s(far, loss, label_smoothing):
    ours = loss(beta=FAR_BETA, label_smoothing=label_smoothing)
    theirs = their_step(peer(far, loss_type=[ours.type], beta=FAR_BETA, label_smoothing=label_smoothing))
    assert_same(our_step(far, ours), theirs)
    assert_apart(our_step(far, DPO(beta=FAR_BETA, label_smoothing=label_smoothing)).loss, theirs.loss)


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        pytest.param(CPO(beta=0.01, alpha=0.7), {"beta": 0.01, "cpo_alpha": 0.7}, id="cpo"),
        pytest.param(
            SimPO(beta=2.0, gamma=0.6),
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0},
            id="simpo",
        ),
        pytest.param(
            DPO(beta=0.01, label_smoothing=0.2),
            {"beta": 0.01, "label_smoothing": 0.2, "cpo_alpha": 0.0},
            id="smoothed dpo against a uniform reference",
        ),
    ],
)
def test_losses_without_a_reference_are_those_of_trl_s_cpo_trainer(world, loss, settings):
    trainer = peer(world, CPOTrainer, CPOConfig, **settings)
    assert_same(our_step(world, loss, reference=NoReference()), their_step(trainer))


def test_orpo_is_trl_s_odds_ratio_and_the_chosen_responses_likelihood(world):
    trainer = peer(world, ORPOTrainer, ORPOConfig)
    batch = collated(trainer)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
    odds_ratio, *_ = trainer.odds_ratio_loss(chosen, rejected)
    nll = chosen_nll(trainer, batch, batch["chosen_labels"])
    assert_same(our_step(world, ORPO(beta=BETA)), backward(trainer, nll - odds_ratio.mean()))


def chosen_nll(trainer: Any, batch: dict[str, Any], labels: Tensor) -> Tensor:
    """Return the mean over the labelled tokens, as transformers' own loss computes it."""
    inputs = {name: batch[f"chosen_{name}"] for name in ("input_ids", "attention_mask")}
    return trainer.model(**inputs, labels=labels).loss


# Ten steps.


@pytest.mark.parametrize(("losses", "settings"), [SIGMOID, IPO_MEAN, MEANS, ZERO, RPO])
def test_ten_steps_of_adamw_have_trl_s_losses(world, losses, settings):
    expected = their_losses(peer(world, per_device_train_batch_size=4, max_steps=10, **settings))
    steps = [[range(first, first + 4)] for first in range(0, NUM_ROWS, 4)]
    found, _ = train(world, losses, *steps, optimizer=adamw, max_grad_norm=1.0)
    still, _ = train(world, losses, *steps)
    assert [metrics["loss"] for metrics in found] == pytest.approx(expected, rel=3e-5)
    # The weights have moved: without learning the last loss would be another.
    assert abs(still[-1]["loss"] - expected[-1]) > 0.01 * expected[-1]


# Where TRL differs. `HALVES` are the micro-batches of a step that both sides cut alike.

HALVES = (range(4), range(4, 8))


def their_accumulated_loss(world: World, name: str, **settings: Any) -> float:
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    (loss,) = their_losses(peer(world, loss_type=[name], **halves, **settings))
    return loss


def our_accumulated_step(world: World, loss: Any) -> OneStep:
    return train(world, [loss], HALVES)[1]


def test_difference_trl_ignores_label_smoothing_in_sigmoid(world):
    """Theirs is −ls(βΔ); ours, as conservative DPO has it, −(1−ε)·ls(βΔ) − ε·ls(−βΔ)."""
    trainer = peer(world, loss_type=["sigmoid"], label_smoothing=0.3)
    c, r = their_log_ratios(trainer)
    z = BETA * (c - r)
    theirs, ours = their_step(trainer).loss, our_step(world, DPO(beta=BETA, label_smoothing=0.3)).loss
    assert theirs == pytest.approx(float(-logsigmoid(z).mean()), rel=RTOL)
    assert ours == pytest.approx(float((-0.7 * logsigmoid(z) - 0.3 * logsigmoid(-z)).mean()), rel=RTOL)
    assert_apart(ours, theirs)


def aot(trainer: Any, pairs: Sequence[int]) -> float:
    """The policy's k-th difference against the reference's k-th."""
    batch = collated(trainer, pairs)
    policy, reference = (
        (chosen.double() - rejected.double()).sort().values
        for chosen, rejected in (trainer.compute_ref_log_probs(m, batch) for m in (trainer.model, trainer.ref_model))
    )
    return float(-logsigmoid(FAR_BETA * (policy - reference)).mean())


def aot_unpaired(trainer: Any, pairs: Sequence[int]) -> float:
    """The k-th log-ratio of chosen responses against the k-th of rejected ones."""
    c, r = their_log_ratios(trainer, pairs)
    return float(-logsigmoid(FAR_BETA * (c.sort().values - r.sort().values)).mean())


@pytest.mark.parametrize(("loss", "closed_form"), [(AOT, aot), (AOTUnpaired, aot_unpaired)], ids=["aot", "unpaired"])
def test_difference_trl_sorts_within_a_micro_batch(far, loss, closed_form):
    """Theirs is the mean of the losses of micro-batches sorted apart; ours is what theirs is without a cut."""
    settled = loss(beta=FAR_BETA)
    trainer = peer(far, loss_type=[settled.type], beta=FAR_BETA)
    theirs = their_accumulated_loss(far, settled.type, beta=FAR_BETA)
    ours = our_accumulated_step(far, settled)
    assert theirs == pytest.approx(np.mean([closed_form(trainer, half) for half in HALVES]), rel=RTOL)
    assert ours.loss == pytest.approx(closed_form(trainer, PAIRS), rel=RTOL)
    assert_same(ours, their_step(trainer))
    assert_apart(ours.loss, theirs)


def test_difference_trl_averages_the_means_of_micro_batches_in_sft(world):
    """Theirs is the mean of two means over tokens; ours, as theirs without a cut, the mean over the step's tokens."""
    trainer = peer(world, loss_type=["sft"])
    logps = [trainer.compute_ref_log_probs(trainer.model, collated(trainer, half))[0].double() for half in HALVES]
    tokens = [int(world.pairs.sizes.chosen[half].sum()) for half in HALVES]
    theirs, ours = their_accumulated_loss(world, "sft"), our_accumulated_step(world, SFT())
    means = [-float(sums.sum()) / count for sums, count in zip(logps, tokens, strict=True)]
    assert theirs == pytest.approx(np.mean(means), rel=RTOL)
    assert ours.loss == pytest.approx(np.average(means, weights=tokens), rel=RTOL)
    assert_same(ours, their_step(trainer))
    assert_apart(ours.loss, theirs)


def test_difference_trl_has_no_running_mean_in_bco(world):
    """Theirs compares rewards with 0 at every step; ours, as the paper has it, with δ, the mean of those before."""
    trainer, then = peer(world, loss_type=["bco_pair"]), range(8, 16)
    (c, r), (before_c, before_r) = (their_log_ratios(trainer, pairs) for pairs in (then, PAIRS))

    def closed_form(delta: float) -> float:
        return float((-logsigmoid(BETA * c - delta) - logsigmoid(delta - BETA * r)).mean())

    theirs = trainer.compute_loss(trainer.model, collated(trainer, then)).item()
    ours = train(world, [BCO(beta=BETA)], [PAIRS], [then])[1].loss
    assert theirs == pytest.approx(closed_form(0.0), rel=RTOL)
    assert ours == pytest.approx(closed_form(BETA * float(torch.cat([before_c, before_r]).mean())), rel=RTOL)
    assert_apart(ours, theirs)


def test_difference_trl_counts_prompts_in_orpo_s_likelihood(world):
    """Theirs is the mean over prompts and chosen responses together; ours over the chosen responses."""
    trainer = peer(world, ORPOTrainer, ORPOConfig)
    batch = collated(trainer)
    theirs, ours = their_step(trainer).loss, our_step(world, ORPO(beta=BETA)).loss
    whole = batch["chosen_input_ids"].masked_fill(batch["chosen_attention_mask"] == 0, -100)
    with torch.no_grad():
        of_whole, of_responses = (chosen_nll(trainer, batch, labels) for labels in (whole, batch["chosen_labels"]))
    assert theirs - float(of_whole) == pytest.approx(ours - float(of_responses), abs=RTOL)
    assert_apart(ours, theirs)


def test_difference_trl_s_discopop_is_nan_where_its_exponential_overflows(world):
    """At βΔ = −100 and beyond, theirs is 0 · ∞ in float32; ours stays at the equation's value."""
    trainer = peer(world, loss_type=["discopop"], discopop_tau=0.5, beta=50.0)
    c, r = their_log_ratios(trainer)
    z = 50.0 * (c - r)
    m = (z / 0.5).sigmoid()
    ours = our_step(world, DiscoPOP(beta=50.0, tau=0.5)).loss
    assert z.min() < -100
    assert math.isnan(their_step(trainer).loss)
    assert ours == pytest.approx(float(((1 - m) * -logsigmoid(z) + m * (-z).exp()).mean()), rel=RTOL)

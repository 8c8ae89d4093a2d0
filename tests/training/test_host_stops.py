"""A step on a GPU asks the device once, at its end, and a micro-batch gets there by one copy that nobody waits for."""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.modeling import ahead
from dpo_cli.modeling.adapters.adapted import Adapted
from dpo_cli.modeling.adapters.settings import Lora
from dpo_cli.modeling.attention import flex
from dpo_cli.modeling.attention.kernels import KERNELS
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.layouts import PACKED, PADDED
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.losses import AOT, DPO, LDDPO, RDPO, SFT, SimPO
from dpo_cli.preference.losses.pairwise import AdaptiveBeta
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import Cached, Frozen, NoReference, Synced
from dpo_cli.preference.reference_work import ReferenceWork
from dpo_cli.training.learner import Learner
from dpo_cli.training.optimizer import AdamW, schedule
from tests.builders import prepare_pairs, silent
from tests.conftest import write_rows
from tests.marks import slow_unless
from tests.modeling.fake_cuda import CUDA, HostStops, fake_cuda


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, demo_rows, tokenizer):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{**row, "margin": 0.5, "weight": 2.0} for row in demo_rows[:8]]
    return prepare_pairs(write_rows(folder / "pairs.jsonl", rows), tokenizer, folder / "prepared")


def random_model(folder):
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()


@contextlib.contextmanager
def learner_on_cuda(monkeypatch, model, pairs, layout, *, loss=None, reference=None, ways=None, recomputed=False):
    """Open a learner of which model, gradients and moments are on a GPU that is not there, and its steps of 8 pairs."""
    objective, accelerator = Objective.of(loss or DPO()), Accelerator(cpu=True, device_placement=False)
    indices, here = np.arange(len(pairs)), torch.device("cpu")
    reference = reference or (Frozen() if objective.needs_reference else NoReference())
    opened = None
    if reference.type == "cached":
        # What it answers is read from the disk.
        policy = Policy(load_policy(str(model)), **(ways or {}))
        policy.read(LAYOUTS[layout])
        work = ReferenceWork(policy, policy, accelerator, indices, Batches(pairs, LAYOUTS[layout], 700, here), silent)
        opened = reference.open(work)
    monkeypatch.setattr(Accelerator, "device", property(lambda accelerator: CUDA))
    # There is nothing to compile for: the operation that FlexAttention compiles to is called as it is.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "compiled_flex", lambda dtype: flex_attention.flex_attention)
    # Whether a thread is in a mode of torch is up to each thread.
    monkeypatch.setattr(ahead, "IN_TURN", {"cuda"})
    with fake_cuda():
        # PEFT moves the layers that it makes to where they are already: torch cannot move what has no values.
        with CUDA, mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
            policy, other = (Policy(random_model(model), **(ways or {})) for _ in range(2))
        for one in (policy, other):
            one.read(LAYOUTS[layout])
            one.place(accelerator, trained=one is policy, collisions=objective.wpo, recomputed=recomputed)
        batches = Batches(pairs, LAYOUTS[layout], 700, CUDA)
        opened = opened or reference.open(ReferenceWork(other, policy, accelerator, indices, batches, silent))
        optimizer = AdamW().over(policy.weights.trained(), 1e-3, 0.0)
        plan = Plan(indices, pairs.sizes.longest, 8, 2, None, True, 0)
        rates = schedule(optimizer, "constant", 0.0, 2)
        prepared = accelerator.prepare_optimizer(optimizer)
        yield Learner(policy, objective, opened, prepared, rates, accelerator, max_grad_norm=1.0), plan, batches


LAYOUTS = {one.described: one for one in (PADDED, PACKED, *PACKED.with_kernels([KERNELS["flex"]], (None,)))}

WAYS = {
    "dpo": {},
    "a sum": {"loss": (DPO(margin_scale=1.0), SFT())},
    "means": {"loss": SimPO()},
    "lengths": {"loss": RDPO()},
    "tails": {"loss": LDDPO()},
    "the policy's own weights": {"loss": DPO(wpo=True)},
    "ranks in a step": {"loss": AOT()},
    "a step's margin": {"loss": DPO(adaptive_beta=AdaptiveBeta())},
    "cached": {"reference": Cached()},
    "a cache and ranks": {"loss": AOT(), "reference": Cached()},
    "moving": {"reference": Synced(every_steps=1)},
    "adapter": {"ways": {"trained": Adapted(Lora(rank=4))}},
    "recomputed": {"recomputed": True},
}


QUICK = ("dpo", "a cache and ranks")
CASES = [(layout, how) for layout in LAYOUTS for how in WAYS]


@pytest.mark.parametrize("layout, how", slow_unless(lambda case: case[1] in QUICK and "flex" not in case[0], CASES))
def test_a_step_asks_the_device_once_and_a_micro_batch_never(tiny_llama, pairs, monkeypatch, layout, how):
    """Forward, loss and backward pass, clipping, the optimizer: 2 steps of several micro-batches."""
    with learner_on_cuda(monkeypatch, tiny_llama, pairs, layout, **WAYS[how]) as (learner, plan, batches):
        passes = [len(step.micro_batches) * (1 + learner._looks_first(step)) for step in plan.steps(batches.cut)]
        assert min(passes) > 1
        with HostStops() as host:
            for number, _ in enumerate(learner.steps(plan, batches), 1):
                assert host.stops == {"tolist": number}
        # Beside the batches, where all pairs of a step are compared, once which tokens are whose.
        assert host.sent == sum(passes) + len(passes) * learner.objective.compares_pairs
        assert number == 2


def test_what_a_host_waits_for_is_counted():
    """Each of these would be missed by a counter that counts nothing."""
    with fake_cuda(), HostStops() as host:
        here, there = torch.ones(3), torch.ones(3, device=CUDA)
        for ask in (lambda: float(there.sum()), lambda: there.nonzero(), lambda: bool((there > 0).all())):
            with contextlib.suppress(RuntimeError):
                ask()
        there.tolist()
        there.cpu()
        here.to(CUDA)
        here.to(CUDA, non_blocking=True)
        there[torch.tensor([0])]
        there.new_tensor([1.0])
        assert host.stops.total() >= 9
        assert host.sent == 0
        torch.empty(3, pin_memory=True).to(CUDA, non_blocking=True)
        assert host.sent == 1

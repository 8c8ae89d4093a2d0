"""Decoder layers are compiled where that was asked for or pays, and where it fails a run goes on or says why."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_models import build, example_pairs

from dpo_cli.config import Config
from dpo_cli.data.prepared.step_plan import PairSizes, Plan
from dpo_cli.errors import UserError
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.compiled import decoder_layers
from dpo_cli.modeling.layouts import PADDED
from dpo_cli.modeling.placement import Alone
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.modeling.proof import Proof
from dpo_cli.pipeline import compilation
from dpo_cli.pipeline.session import Session
from dpo_cli.system.signals import StopSignals
from dpo_cli.training.ranks import Progress

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PAIRS = example_pairs()


class Held:
    """Pairs in memory, as the pipeline asks for them."""

    def __init__(self):
        counts = [[len(part) for part in (pair.prompt, pair.chosen, pair.rejected, pair.chosen)] for pair in PAIRS]
        self.sizes = PairSizes(*np.array(counts).T, np.arange(len(PAIRS)))

    def __getitem__(self, index):
        return PAIRS[index]


def run(compiles, *, steps=2, device="cpu"):
    """Compile as a run does; return the policy and all that was said."""
    torch._dynamo.reset()
    said, warned = [], []
    console = SimpleNamespace(notice=said.append, warning=warned.append)
    config = Config(model="m", training={"compile": compiles})
    accelerator = Accelerator(cpu=True)
    session = Session(config, console, StopSignals(), accelerator, Progress(), Alone(accelerator))
    pairs, policy = Held(), Policy(build("llama"))
    batches = Batches(pairs, PADDED, 10_000, accelerator.device)
    plan = Plan(np.arange(len(PAIRS)), pairs.sizes.longest, 2, 10_000, steps, True, 0)
    if device != "cpu":
        accelerator = SimpleNamespace(device=torch.device(device), autocast=accelerator.autocast)
        session = Session(config, console, StopSignals(), accelerator, Progress(), Alone(accelerator))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Session, "precision", PRECISIONS["float32"])
        patched.setattr(Session, "of_all", lambda self, found: [found])
        compilation.compile_layers_of(session, policy, batches, plan, backend="eager")
    return policy, said, warned


def compiled(policy):
    return [layer._compiled_call_impl is not None for layer in decoder_layers(policy.model)]


@pytest.mark.parametrize(
    ("asked", "device", "steps"), [(False, "cuda", 5000), ("auto", "cpu", 5000), ("auto", "cuda", 999)]
)
def test_layers_stay_as_they_are_on_a_cpu_in_short_runs_and_where_that_was_asked_for(asked, device, steps):
    policy, said, warned = run(asked, steps=steps, device=device)
    assert not any(compiled(policy))
    assert not said
    assert not warned


@pytest.mark.parametrize(
    ("asked", "device", "steps"), [(True, "cpu", 2), pytest.param("auto", "cuda", 1000, marks=pytest.mark.slow)]
)
def test_compiled_layers_are_proved_and_their_time_is_told(asked, device, steps):
    policy, (before, after), warned = run(asked, steps=steps, device=device)
    assert all(compiled(policy))
    assert before == "compiling 2 decoder layers …"
    assert after.startswith("checked: compiled 2 decoder layers in ")
    assert not warned
    assert all(weight.grad is None for weight in policy.model.parameters())


@pytest.mark.parametrize("failure", ["no C++ compiler", ""])
def test_where_it_fails_auto_goes_on_without_and_true_stops_the_run(failure, monkeypatch):
    found = Proof(refusal=failure) if failure else Proof(0.5, 0.0)
    monkeypatch.setattr(compilation, "prove_compiled", lambda *arguments: found)
    policy, _, (warned,) = run("auto", steps=1000, device="cuda")
    assert "decoder layers are not compiled" in warned
    assert (failure or "log-probabilities differ by 0.5 nats") in warned
    assert not any(compiled(policy))
    with pytest.raises(UserError, match=re.escape(failure) or "differ by 0.5") as refused:
        run(True)
    assert refused.value.where == "`training.compile`"

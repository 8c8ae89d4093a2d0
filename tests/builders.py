"""Parts of a run put together in this process, for tests of the rooms between data and command line."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from dpo_cli.data.pairs.shapes import RankedRule
from dpo_cli.data.pairs.sources import Source
from dpo_cli.data.prepared.folder import PreparedPairs, Reading
from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.data.prepared.writing import prepare
from dpo_cli.data.records import BadRowRule
from dpo_cli.data.tokens.tokenize import PairTokenizer
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.folders.loading import load_policy
from dpo_cli.modeling.held import FLOAT32
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.split import whole_value
from dpo_cli.preference.losses import DPO
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import Frozen, NoReference
from dpo_cli.preference.reference_work import ReferenceWork
from dpo_cli.training.learner import Learner, Skips
from dpo_cli.training.optimizer import AdamW, schedule
from dpo_cli.training.recuts import Recuts


def prepare_pairs(
    source: Path,
    tokenizer: Any,
    folder: Path,
    *,
    data_format: str = "auto",
    on_bad_row: BadRowRule = "error",
    ranked: RankedRule = "extremes",
    **settings: Any,
) -> PreparedPairs:
    """Prepare one source; settings are those of the tokenization."""
    length = {"max_length": 1000, "on_too_long": "drop"}
    tokenize = PairTokenizer(tokenizer, **{"template": None, **length, **settings})
    return prepare([Source(path=str(source))], Reading(data_format, on_bad_row, ranked), tokenize, folder)


def save_adapter(model: Path, folder: Path, *, rank: int = 4, seed: int = 1, **settings: Any) -> Path:
    """Let PEFT save an adapter of a model none of whose weights are 0, as if it had been trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_alpha": 32, **settings}
    base = AutoModelForCausalLM.from_pretrained(model)
    with warnings.catch_warnings():
        # PEFT asks transformers in a way that is deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(base, LoraConfig(r=rank, init_lora_weights=False, **settings)).save_pretrained(folder)
    return folder


def run_card(folder: Path, **where: object) -> dict[str, Any]:
    """Run the Python lines of the model card in a folder; return what they name.

    Args:
        folder: Where the card is, and what it calls `path/to/this/folder`.
        where: What else is replaced in the lines, and by what.
    """
    card = (folder / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^```python\n(.*?)^```$", card, re.M | re.S)
    assert found, card
    lines = found[1]
    for name, place in {"path/to/this/folder": folder, "max_new_tokens=256": "max_new_tokens=8", **where}.items():
        assert name in lines
        lines = lines.replace(name, str(place))
    names: dict[str, Any] = {}
    exec(lines, names)
    return names


def silent(done: int, total: int) -> None:
    pass


@torch.no_grad()
def stirred(policy: Policy, by: float = 0.2, seed: int = 3) -> Policy:
    """Move what trains, each number by another amount, and return the policy."""
    generator = torch.Generator().manual_seed(seed)
    for weights in policy.weights.trained():
        weights += by * torch.randn(weights.shape, generator=generator)
    return policy


def train_in_process(
    model: Path,
    pairs: PreparedPairs,
    *,
    micro_batch_tokens: int = 10_000,
    pairs_per_step: int = 8,
    max_steps: int | None = None,
    loss: Any = None,
    reference: Any = None,
    learning_rate: float = 1e-3,
    max_grad_norm: float | None = 1.0,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    layout: str = "padded",
    max_skipped: int = 0,
    recuts: Recuts | None = None,
    ways: dict[str, Any] | None = None,
    optimizer: Any = None,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train and return the metrics of every step and the weights after the last."""
    accelerator = Accelerator(cpu=True)
    ways = ways or {}
    loaded = load_policy(str(model), held=ways.get("held", FLOAT32))
    loaded = loaded if "held" in ways else loaded.to(dtype)
    if dtype == torch.float64:
        # Faster products of experts know no float64.
        loaded.set_experts_implementation("eager")
    objective = Objective.of(loss or DPO())
    indices = np.arange(len(pairs))
    policy = Policy(loaded, **ways)
    policy.read(LAYOUTS[layout])
    policy.place(accelerator, trained=True, collisions=objective.wpo, recomputed=checkpointing)
    batches = Batches(pairs, LAYOUTS[layout], micro_batch_tokens, accelerator.device)
    work = ReferenceWork(policy, policy, accelerator, indices, batches, silent)
    opened = (reference or (Frozen() if objective.needs_reference else NoReference())).open(work)
    chosen = (optimizer or AdamW()).over(policy.weights.trained(), learning_rate, 0.0)
    plan = Plan(indices, pairs.sizes.longest, pairs_per_step, 1, max_steps, True, 0)
    # Before the optimizer is prepared: a gradient scaler keeps the step that the schedule counts.
    rates = schedule(chosen, "constant", 0.0, plan.num_steps)
    learner = Learner(
        policy=policy,
        objective=objective,
        reference=opened,
        optimizer=accelerator.prepare_optimizer(chosen),
        rates=rates,
        accelerator=accelerator,
        max_grad_norm=max_grad_norm,
        skips=Skips(max_skipped),
        recuts=recuts or Recuts(),
    )
    metrics = [result.metrics for result in learner.steps(plan, batches)]
    return metrics, {name: whole_value(tensor).clone() for name, tensor in policy.weights.state().items()}


class Louder(torch.autograd.Function):
    """Lets everything through, and gradients half as loud again."""

    @staticmethod
    def forward(ctx, states):
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient):
        return 1.5 * gradient


def merge_times(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let adapters be merged that many times."""
    from peft.tuners.lora import LoraLayer

    right = Policy.merge

    def wrong(policy: Policy) -> None:
        for layer in policy.model.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(scale)
        right(policy)

    monkeypatch.setattr(Policy, "merge", wrong)

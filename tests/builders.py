"""Parts of a run put together in this process, for tests of the rooms between data and command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from dpo_cli.data.pairs.shapes import RankedRule
from dpo_cli.data.pairs.sources import Source
from dpo_cli.data.prepared.folder import PreparedPairs, Reading
from dpo_cli.data.prepared.step_plan import Plan
from dpo_cli.data.prepared.writing import prepare
from dpo_cli.data.records import BadRowRule
from dpo_cli.data.tokens.tokenize import PairTokenizer
from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.loading import load_policy
from dpo_cli.modeling.scorer import Scorer, recompute_activations
from dpo_cli.preference.losses import DPO
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import Frozen, NoReference
from dpo_cli.preference.reference_work import ReferenceWork
from dpo_cli.training.loop import train_steps
from dpo_cli.training.optimizer import AdamW, schedule


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


def silent(done: int, total: int) -> None:
    pass


def never() -> bool:
    return False


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
    may_skip: Any = None,
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train and return the metrics of every step and the weights after the last."""
    accelerator = Accelerator(cpu=True)
    policy = load_policy(str(model)).to(dtype)
    if dtype == torch.float64:
        # Faster products of experts know no float64.
        policy.set_experts_implementation("eager")
    objective = Objective.of(loss or DPO())
    indices = np.arange(len(pairs))
    LAYOUTS[layout].prepare(policy)
    batches = Batches(pairs, LAYOUTS[layout], micro_batch_tokens, accelerator.device)
    work = ReferenceWork(policy, policy, accelerator, indices, batches, silent)
    opened = (reference or (Frozen() if objective.needs_reference else NoReference())).open(work)
    if checkpointing:
        recompute_activations(policy)
    optimizer = AdamW().over(policy, learning_rate, 0.0)
    plan = Plan(indices, pairs.sizes.longest, pairs_per_step, 1, max_steps, True, 0)
    rates = schedule(optimizer, "constant", 0.0, plan.num_steps)
    scorer, optimizer = accelerator.prepare(Scorer(policy, collisions=objective.wpo), optimizer)
    # As a run has it: ranks may look ahead at different numbers of micro-batches.
    scorer.broadcast_buffers = False

    results = train_steps(
        scorer,
        objective,
        opened,
        optimizer,
        rates,
        plan.steps(batches.cut, 0, accelerator.process_index, accelerator.num_processes),
        batches,
        accelerator,
        max_grad_norm,
        {},
        never,
        may_skip or (lambda broken: False),
    )
    metrics = [result.metrics for result in results]
    return metrics, {name: tensor.clone() for name, tensor in policy.state_dict().items()}

"""Score held-out pairs; the same code during training and in `dpo eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from dpo_cli.modeling.batch import Batches
from dpo_cli.modeling.scorer import BatchScorer
from dpo_cli.preference.dealing import dealt
from dpo_cli.preference.metrics import held_out_names, held_out_values
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.scoring import score_pairs, score_step, step_info

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairResult:
    """The metrics of one held-out pair.

    Attributes:
        index: The pair's index in the data.
        metrics: A value for each of the `held_out_names`.
    """

    index: int
    metrics: dict[str, float]


def evaluate(
    scorer: BatchScorer,
    objective: Objective,
    reference: BatchScorer,
    indices: Sequence[int],
    batches: Batches,
    accelerator: Accelerator,
    progress: Callable[[int, int], None],
) -> list[PairResult]:
    """Score pairs, their micro-batches dealt to the ranks; return all results, in the order of the data.

    Args:
        scorer: The policy, as Accelerate prepared it or not.
        objective: Loss and rewards of pairs; all pairs count as one step.
        reference: Returns the reference's token log-probabilities.
        indices: The pairs' indices in the data.
        batches: Cuts pairs into micro-batches and lays them out.
        accelerator: Knows the ranks.
        progress: Called with pairs done and pairs in all, by all ranks together.
    """
    mine = dealt(batches.cut(indices), accelerator, lambda done: progress(done, len(indices)))
    # Without statistics of other steps, so that a model gets the same figures from the run that made it and later.
    step = step_info(batches.pairs.sizes, indices, {}, accelerator)
    names, results = held_out_names(reference=objective.needs_reference), list[PairResult]()
    if objective.compares_pairs:
        for part in score_step(scorer, objective, reference, batches, mine, step, accelerator, held_out_values):
            results += _results(part.pairs, part.values, names)
    else:
        for micro_batch in mine:
            with torch.no_grad():
                batch = batches(micro_batch)
                _, values = score_pairs(scorer, objective, reference, batch, step, held_out_values)
            if not micro_batch.filler:
                results += _results(micro_batch.pairs, values, names)
    everywhere = sorted(gather_object(results), key=lambda result: result.index)
    progress(len(everywhere), len(indices))
    return everywhere


def _results(pairs: Sequence[int], values: Tensor, names: Sequence[str]) -> list[PairResult]:
    """Name the values of some pairs."""
    rows = zip(pairs, values.tolist(), strict=True)
    return [PairResult(index, dict(zip(names, row, strict=True))) for index, row in rows]

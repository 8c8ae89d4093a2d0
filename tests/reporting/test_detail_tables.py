"""What is shown of the details: few enough lines, and none of them too wide."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from dpo_cli.evaluation.details import figures_and_details
from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.preference.losses import DPO
from dpo_cli.preference.metrics import held_out_names
from dpo_cli.preference.objective import Objective
from dpo_cli.reporting.detail_tables import detail_blocks
from dpo_cli.reporting.tables import figures_table


def test_with_every_row_that_there_can_be_it_fits_on_a_screen_with_the_figures():
    """Three lines say what is measured, and an empty one is between what is printed: 40 lines of 80 columns in all."""
    draw = np.random.default_rng(3)
    names = held_out_names(reference=True)
    results = [PairResult(index, dict(zip(names, draw.random(len(names)), strict=True))) for index in range(5_000)]
    for result, longer in zip(results, draw.integers(-20_000, 20_000, len(results)) // 3, strict=True):
        margin = float(1e4 * draw.standard_normal())
        accuracy = float(margin > 0)
        lengths = {"chosen_tokens": 30_000.0 + longer * (result.index % 50 > 0), "rejected_tokens": 30_000.0}
        result.metrics.update({"rewards/margins": margin, "rewards/accuracies": accuracy, **lengths})
    found = figures_and_details(results, Objective.of(DPO()))
    console = Console(file=io.StringIO(), width=80, no_color=True)
    for block in (figures_table({"runs/quickstart/final": found}), *detail_blocks(found)):
        console.print("")
        console.print(block)
    lines = console.file.getvalue().splitlines()
    assert 3 + len(lines) <= 40
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert not any("…" in line for line in lines)
    shown = console.file.getvalue()
    for title in ("length-controlled", "as long as rejected", "shorter by", "longer by", "Brier score", "forward k3"):
        assert title in shown

"""Runs as their folders have them, made up for the page: rows, answers, held-out pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.training.recorded_settings import RESOLVED

SETTINGS = """\
model: {name: some/model}
data: {train: pairs.jsonl}
training: {learning_rate: 1.0e-5}
output_dir: runs/made-up
"""


def step_row(step: int, **changed: Any) -> dict[str, Any]:
    """A row of a step in which everything goes well, and no value is another's."""
    gain = 1 - math.exp(-step / 40)
    row = {
        "split": "train", "step": step, "epoch": step / 100, "loss": 0.69 - 0.3 * gain + 0.02 * math.sin(step),
        "rewards/chosen": 0.5 * gain, "rewards/rejected": -0.7 * gain, "rewards/margins": 1.2 * gain,
        "rewards/accuracies": 0.5 + 0.4 * gain, "logps/chosen": -120 + 5 * gain, "logps/rejected": -130 - 7 * gain,
        "logps/accuracies": 0.6, "logps/accuracies_mean": 0.61, "grad_norm": 3 + math.cos(step),
        "learning_rate": 1e-5 * (1 - step / 1e6), "tokens_per_second": 1000.0 + step % 7,
    }  # fmt: skip
    return {**row, **changed}


def eval_row(step: int, **changed: Any) -> dict[str, Any]:
    """A row of an evaluation of the same run."""
    row = {name: value for name, value in step_row(step).items() if name not in ("grad_norm", "learning_rate")}
    del row["tokens_per_second"]
    accuracy = row["rewards/accuracies"]
    more = {"split": "eval", "pairs": 109, "ties": 0, "accuracy_interval": [accuracy - 0.09, accuracy + 0.08]}
    return {**row, **more, **changed}


def write_run(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    *,
    settings: str = SETTINGS,
    samples: Sequence[dict[str, Any]] = (),
    pairs: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write a run's folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(RESOLVED + settings, encoding="utf-8")
    for name, kept in (("metrics", rows), ("samples", samples), ("held_out", pairs)):
        if kept:
            (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
    return folder


def healthy(steps: int = 120, every: int = 20) -> list[dict[str, Any]]:
    """Rows of a run that is evaluated every so many steps."""
    rows = [eval_row(0)]
    for step in range(1, steps + 1):
        rows.append(step_row(step))
        if step % every == 0:
            rows.append(eval_row(step))
    return rows

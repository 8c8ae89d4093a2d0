"""The comparison of losses trains each with the program itself and tells what came of it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from compare_losses import Trained, row

from tests.conftest import ROOT


def trained(before: float, after: float, objective: list[float]) -> Trained:
    figures = {"loss": after, "accuracy_interval": [0.5, 0.75], "rewards/accuracies": 0.625, "rewards/margins": 0.25}
    return Trained("dpo", 0.1, 1.5e-5, objective, before, figures)


def test_a_row_has_the_figures():
    """(3 + 2 + 1) / 3 = 2 and (5 + 0 + 1) / 3 = 2; that they are no less does not matter, being of other pairs."""
    assert "| 2 → 2 | 0.7 → 0.5 |" in row(trained(0.7, 0.5, [3, 2, 1, 9, 5, 0, 1]))


def test_what_did_not_fall_on_the_same_pairs_is_said():
    assert "| 0.7 → 0.7 (did not fall) |" in row(trained(0.7, 0.7, [1, 0]))


@pytest.mark.program
def test_a_loss_is_trained_and_lowers_its_objective(tiny_llama, tmp_path):
    page = tmp_path / "page.md"
    options = ["--losses", "orpo", "--steps", "6", "--model", str(tiny_llama), "--out", str(page)]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "compare_losses.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\]", text, re.M) == ["orpo"]
    assert "What 6 steps of 4 pairs" in text

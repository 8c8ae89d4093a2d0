"""`metrics.jsonl` has each step once, whatever a crash left in it."""

from __future__ import annotations

import json

import pytest
import torch

from dpo_cli.reporting.metrics import PAIR_METRICS, TIE, pair_values
from dpo_cli.reporting.trackers import MetricsLog


def row(step, split="train", **values):
    return {"split": split, "step": step, **values}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.append(row(1, loss=0.5))
    assert read(tmp_path / "m.jsonl") == [row(1, loss=0.5)]
    log.close()


@pytest.mark.parametrize("torn", ["", '{"split": "train", "step": 4, "lo', "{}\n", "[1]\n", "\x00\x00\x00\n"])
def test_on_resume_later_steps_and_torn_lines_are_removed_and_evaluations_kept(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    rows = [row(1), row(2), row(2, "eval"), row(3), row(4), row(4, "eval")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + torn)
    log = MetricsLog(path, 2)
    log.append(row(3, loss=1.0))
    assert read(path) == [row(1), row(2), row(2, "eval"), row(3, loss=1.0)]
    assert log.last("eval") == row(2, "eval")
    assert log.last("other") is None
    log.close()


def test_a_value_that_json_has_no_word_for_is_null(tmp_path):
    """A float16 run may overflow a gradient's norm and go on; the file stays JSON."""
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.append(row(1, loss=0.5, grad_norm=float("inf")))
    assert read(tmp_path / "m.jsonl") == [row(1, loss=0.5, grad_norm=None)]
    log.close()


def test_pair_values_are_columns_in_the_order_of_their_names_and_a_tie_is_half():
    chosen, rejected = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0 + TIE / 2, 3.0])
    values = pair_values(torch.zeros(3), chosen, rejected, torch.ones(3), -torch.ones(3))
    column = {name: values[:, place].tolist() for place, name in enumerate(PAIR_METRICS)}
    assert column["rewards/accuracies"] == [1.0, 0.5, 0.0]
    assert column["rewards/margins"] == pytest.approx([1.0, 0.0, -2.0], abs=TIE)
    assert column["logps/rejected"] == [-1.0] * 3
    assert values.dtype == torch.float64

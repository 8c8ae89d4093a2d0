"""`metrics.jsonl` has each step once, whatever a crash left in it."""

from __future__ import annotations

import json

import pytest
import torch

from dpo_cli.reporting.metrics import PAIR_METRICS, TIE, pair_values
from dpo_cli.reporting.metrics_log import MetricsLog


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


@pytest.mark.parametrize("there", [[], [row(0, "eval", loss=0.7)], [row(0, "eval", loss=9.9)], [row(0), row(0)]])
def test_the_row_that_a_checkpoint_keeps_is_the_first_whatever_became_of_the_file(tmp_path, there):
    path, before, step = tmp_path / "m.jsonl", row(0, "eval", loss=0.7), row(1, loss=0.5)
    whole = MetricsLog(path, 0)
    whole.append(before)
    whole.append(step)
    path.write_text("".join(json.dumps(r) + "\n" for r in [*there, step, row(2)]))
    again = MetricsLog(path, 1, before)
    assert read(path) == [before, step]
    assert again.digest == whole.digest
    whole.close()
    again.close()


def test_before_the_first_step_no_row_of_an_earlier_start_stays(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [row(0, "eval"), row(1)]))
    MetricsLog(path, 0).close()
    assert read(path) == []


def test_a_value_that_json_has_no_word_for_is_null(tmp_path):
    """A float16 run may overflow a gradient's norm and go on; the file stays JSON."""
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.append(row(1, loss=0.5, grad_norm=float("inf")))
    assert read(tmp_path / "m.jsonl") == [row(1, loss=0.5, grad_norm=None)]
    log.close()


def test_pair_values_are_columns_in_the_order_of_their_names_and_a_tie_is_half():
    chosen, rejected = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0 + TIE / 2, 3.0])
    logps = torch.tensor([-4.0, -6.0, -6.0]), torch.tensor([-5.0, -6.0, -4.0])
    lengths = torch.tensor([2.0, 2.0, 6.0]), torch.tensor([5.0, 3.0, 2.0])
    values = pair_values(torch.zeros(3), chosen, rejected, *logps, *lengths)
    column = {name: values[:, place].tolist() for place, name in enumerate(PAIR_METRICS)}
    assert column["rewards/accuracies"] == [1.0, 0.5, 0.0]
    assert column["rewards/margins"] == pytest.approx([1.0, 0.0, -2.0], abs=TIE)
    assert column["logps/rejected"] == [-5.0, -6.0, -4.0]
    # −4 > −5, −6 = −6, −6 < −4; of a token: −2 < −1, −3 < −2, −1 > −2.
    assert column["logps/accuracies"] == [1.0, 0.5, 0.0]
    assert column["logps/accuracies_mean"] == [0.0, 0.0, 1.0]
    assert values.dtype == torch.float64

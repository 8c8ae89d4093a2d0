"""Nothing is found in healthy runs: twelve kept ones, one of them of a pretrained model, and one made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo_cli.evaluation.findings.facts import RunFacts
from dpo_cli.evaluation.findings.watch import found
from dpo_cli.reporting.row_log import rows_in
from tests.evaluation.findings.ill_runs import LARGE_STEPS, Row, trained
from tests.evaluation.findings.test_ill_runs import found_in

KEPT = sorted((Path(__file__).parent / "healthy").glob("*.jsonl"))


def read(file: Path) -> tuple[RunFacts, list[Row]]:
    first, *rows = file.read_text(encoding="utf-8").splitlines()
    return RunFacts.model_validate_json(json.dumps(json.loads(first)["facts"])), [json.loads(row) for row in rows]


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_nothing_is_found_in_a_healthy_run(file):
    facts, rows = read(file)
    assert len(rows) > facts.num_steps
    assert found(facts, rows) == []


def test_there_are_ten_and_more():
    assert len(KEPT) >= 10
    losses = {str(read(file)[0].objective) for file in KEPT}
    assert len(losses) >= 5


@pytest.mark.parametrize("worse", [1.5, 3.0])
def test_what_makes_a_healthy_run_ill_is_found(worse):
    """The kept runs are no rows in which nothing could be found: here the losses of the second half are higher."""
    facts, rows = read(KEPT[0])
    half = facts.num_steps // 2
    ill = [{**row, "loss": row["loss"] + worse} if row["step"] > half else row for row in rows]
    assert {one.name for one in found(facts, ill)} >= {"rate_too_high", "held_out_loss_rose"}


def test_nothing_is_found_in_a_healthy_run_with_answers_and_categories(tmp_path, tiny_llama, demo_rows):
    rows = [{**row, "category": "odd" if number % 3 else "other"} for number, row in enumerate(demo_rows[:160])]
    settings = {**LARGE_STEPS, "learning_rate": 1e-4, "max_steps": 8}
    evaluation = {"every_steps": 4, "samples": 4, "max_new_tokens": 32}
    run, said = trained(tmp_path, tiny_llama, rows, data={"eval": 0.2}, training=settings, evaluation=evaluation)
    assert len(list(rows_in(run / "samples.jsonl"))) == 3 * 4
    assert {row["category"] for row in rows_in(run / "held_out.jsonl")} == {"odd", "other"}
    assert found_in(run) == []
    assert not [line for line in said if "Try: " in line]

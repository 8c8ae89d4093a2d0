"""A file of rows has those of each step once, whatever a crash left in it."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from dpo_cli.errors import UserError
from dpo_cli.pipeline.diagnosis import Tail
from dpo_cli.reporting.row_log import RowLog, digest_in, rows_in


def row(step, split="train", **values):
    return {"split": split, "step": step, **values}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path):
    log = RowLog(tmp_path / "m.jsonl", 0)
    log.append(row(1, loss=0.5))
    assert read(tmp_path / "m.jsonl") == [row(1, loss=0.5)]
    log.close()


@pytest.mark.parametrize("torn", ["", '{"split": "train", "step": 4, "lo', "{}\n", "[1]\n", "\x00\x00\x00\n"])
def test_on_resume_later_steps_and_torn_lines_are_removed_and_evaluations_kept(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    rows = [row(1), row(2), row(2, "eval"), row(3), row(4), row(4, "eval")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + torn)
    log = RowLog(path, 2)
    log.append(row(3, loss=1.0))
    assert read(path) == [row(1), row(2), row(2, "eval"), row(3, loss=1.0)]
    assert log.evaluations == [row(2, "eval")]
    log.append(row(3, "eval", loss=0.25))
    assert log.evaluations == [row(2, "eval"), row(3, "eval", loss=0.25)]
    log.close()


def test_a_whole_row_at_the_end_whose_line_was_not_ended_is_kept_and_the_next_has_a_line_of_its_own(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(f"{json.dumps(row(1))}\r\n{json.dumps(row(2))}")
    log = RowLog(path, 2)
    log.append(row(3))
    assert read(path) == [row(1), row(2), row(3)]
    assert log.digest == digest_in(path)
    log.close()


@pytest.mark.parametrize("there", [[], [row(0, "eval", loss=0.7)], [row(0, "eval", loss=9.9)], [row(0), row(0)]])
def test_the_row_that_a_checkpoint_keeps_is_the_first_whatever_became_of_the_file(tmp_path, there):
    path, before, step = tmp_path / "m.jsonl", row(0, "eval", loss=0.7), row(1, loss=0.5)
    whole = RowLog(path, 0)
    whole.append(before)
    whole.append(step)
    path.write_text("".join(json.dumps(r) + "\n" for r in [*there, step, row(2)]))
    again = RowLog(path, 1, before)
    assert read(path) == [before, step]
    assert again.digest == whole.digest
    whole.close()
    again.close()


def test_before_the_first_step_no_row_of_an_earlier_start_stays(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [row(0, "eval"), row(1)]))
    RowLog(path, 0).close()
    assert read(path) == []


def test_a_value_that_json_has_no_word_for_is_null(tmp_path):
    """A float16 run may overflow a gradient's norm and go on; the file stays JSON."""
    log = RowLog(tmp_path / "m.jsonl", 0)
    log.append(row(1, loss=0.5, grad_norm=float("inf")))
    assert read(tmp_path / "m.jsonl") == [row(1, loss=0.5, grad_norm=None)]
    log.close()


def test_several_rows_of_a_step_are_added_and_removed_together(tmp_path):
    path = tmp_path / "m.jsonl"
    log = RowLog(path, 0)
    log.append({"step": 0, "pair": 1}, {"step": 0, "pair": 2})
    log.append({"step": 3, "pair": 1}, {"step": 3, "pair": 2})
    before = log.digest
    log.forget(3)
    assert read(path) == rows_in(path) == [{"step": 0, "pair": 1}, {"step": 0, "pair": 2}]
    log.append({"step": 3, "pair": 1}, {"step": 3, "pair": 2})
    assert log.digest == before == digest_in(path)
    log.close()


def test_of_a_step_the_rows_of_one_split_alone_are_removed(tmp_path):
    log = RowLog(tmp_path / "m.jsonl", 0)
    log.append(row(1), row(1, "eval"), row(2))
    log.forget(1, "eval")
    assert read(tmp_path / "m.jsonl") == [row(1), row(2)]
    log.close()


def test_a_file_of_very_many_rows_is_taken_up_one_row_at_a_time(tmp_path):
    """A run on many held-out pairs has gigabytes of them, and needs its memory for other things."""
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"step": number, "text": "…" * 100}) + "\n" for number in range(1, 4001)))
    size = path.stat().st_size
    tracemalloc.start()
    try:
        log = RowLog(path, 3990)
        assert sum(1 for _ in Tail(path, bool).rows()) == 3990
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()
    assert log.digest == digest_in(path)
    log.close()


def test_a_tail_yields_each_whole_row_once(tmp_path):
    path = tmp_path / "m.jsonl"
    tail = Tail(path, bool)
    assert list(tail.rows()) == []
    path.write_text('{"step": 1}\nnone\n{"step": 2}\n{"st')
    assert list(tail.rows()) == [{"step": 1}, {"step": 2}]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert list(tail.rows()) == [{"step": 3}]
    assert list(tail.rows()) == []


def test_a_file_that_was_replaced_gets_no_more_rows(tmp_path):
    path = tmp_path / "samples.jsonl"
    log = RowLog(path, 0)
    path.unlink()
    with pytest.raises(UserError, match=r"samples.jsonl was removed or replaced during the run"):
        log.append(row(1))
    log.close()

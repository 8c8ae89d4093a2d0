"""What `make faults` takes down: nothing counts that was tried with other code, and what failed is tried again."""

from __future__ import annotations

import json

from tests.faults import journal


def test_what_was_run_with_other_code_does_not_count_and_the_last_run_of_a_test_does(tmp_path):
    file = "tests/faults/test_journal.py"
    lines = [
        {"test": f"{file}::one", "code": journal.code_digest(file), "cases": [["crash", "lost", 1]]},
        {"test": f"{file}::one", "code": journal.code_digest(file), "cases": [["crash", "survived", 2]]},
        {"test": f"{file}::two", "code": "of another day", "cases": [["crash", "survived", 3]]},
        {"test": f"{file}::three", "code": journal.code_digest(file), "cases": [["crash", "traceback", 4]]},
        {"test": "tests/faults/test_gone.py::one", "code": journal.code_digest(file)},
    ]
    kept = tmp_path / "journal.jsonl"
    kept.write_text("".join(json.dumps({"round": 1, **line}) + "\n" for line in lines), encoding="utf-8")
    found = {tried.test.partition("::")[2]: tried for tried in journal.read_journal(kept)}
    assert {name: tried.is_known for name, tried in found.items()} == {"one": True, "three": False}
    assert found["one"].cases == [["crash", "survived", 2]]


def test_nothing_is_tried_before_the_first_round(tmp_path):
    assert journal.read_journal(tmp_path / "journal.jsonl") == []

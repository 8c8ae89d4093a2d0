"""What `make faults` takes down: nothing counts that was tried with other code, and what failed is tried again."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
from write_faults_page import with_older

from tests.faults import journal, kinds, test_crash
from tests.faults.ledger import table
from tests.faults.zygote import ROUND


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


def test_what_was_skipped_is_taken_down_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv(ROUND, "1")
    file, recorder = "tests/faults/test_journal.py", journal.Recorder(tmp_path / "journal.jsonl")
    for when, outcome, reason in [("setup", "skipped", (file, 1, "Skipped: no disk")), ("teardown", "passed", None)]:
        recorder.pytest_runtest_logreport(
            pytest.TestReport(f"{file}::one", (file, 1, "one"), {}, outcome, reason, when)
        )
    [found] = journal.read_journal(tmp_path / "journal.jsonl")
    assert (found.skipped, found.cases) == ("no disk", [])


def test_fuzzing_counts_for_all_files_that_it_is_made_of():
    assert journal.code_digest("tests/fuzz") != journal.code_digest("tests/fuzz/targets.py")


def test_kinds_of_fault_are_found_without_a_run():
    crash = test_crash.test_a_crash_of_one_process_that_has_a_part_of_the_weights_costs_nothing
    assert kinds.kinds(crash, {"name": "shards", "victim": 1}) == ["crash at a file operation: shards, rank 1 of two"]


def test_every_test_that_takes_a_fault_down_names_its_kind_where_it_is_found():
    for file in Path(__file__).parent.glob("test_*.py"):
        for name, test in inspect.getmembers(importlib.import_module(f"tests.faults.{file.stem}"), inspect.isfunction):
            if name.startswith("test_") and "ledger" in inspect.signature(test).parameters:
                assert kinds.NAMED.search(inspect.getsource(test)), name


def test_a_line_of_more_cases_stays_until_as_many_were_tried_again_or_one_failed():
    page = with_older(table([(kind, "survived", 9) for kind in ("a", "b", "c", "d")]), "old", "")
    tried = [("a", "survived", 8), ("b", "survived", 9), ("c", "survived", 1), ("c", "lost", 1), ("e", "survived", 1)]
    lines = [line.split(" | ") for line in with_older(table(tried), "new", page).splitlines()[2:-1]]
    found = {kind.removeprefix("| "): (cases, commit.removesuffix(" |")) for kind, cases, *_, commit in lines}
    expected = {"a": ("9", "old"), "b": ("9", "new"), "c": ("2", "new"), "d": ("9", "old"), "e": ("1", "new")}
    assert found == expected

"""Each finding is made by a real run that is ill in that way, while it runs and afterwards from its files."""

from __future__ import annotations

import pytest

from dpo_cli.evaluation.findings.facts import RunFacts
from dpo_cli.evaluation.findings.watch import RUN_CHECKS, found
from dpo_cli.reporting.row_log import rows_in
from dpo_cli.training.run_folder import RunFolder
from tests.evaluation.findings.ill_runs import ILL, configured, trained, warned


def found_in(run):
    """Return what is found in the files of a run."""
    folder = RunFolder(run)
    files = (folder.metrics, folder.samples, folder.held_out)
    return found(RunFacts.read(folder.facts), *map(rows_in, files))


QUICK = "learning rate 0.1"


@pytest.mark.parametrize(
    "name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ILL if name != QUICK)]
)
def test_an_ill_run_is_told_what_it_has(tmp_path, tiny_llama, demo_rows, name):
    rows, groups, expected = ILL[name]
    run, said = trained(tmp_path, tiny_llama, rows(demo_rows), **groups)
    findings = found_in(run)
    assert {one.name for one in findings} >= expected
    # Afterwards the files say what the run said, each once and in that order.
    assert [line for line in said if "Try: " in line] == [str(one) for one in findings if one.severity != "info"]


def test_every_finding_has_a_run_that_is_ill_in_that_way():
    assert {name for _, _, expected in ILL.values() for name in expected} == {check.name for check in RUN_CHECKS}


@pytest.mark.slow
def test_a_resumed_run_does_not_say_again_what_was_said_before_its_checkpoint(tmp_path, tiny_llama, demo_rows):
    rows, groups, _ = ILL[QUICK]
    config = configured(tmp_path, tiny_llama, rows(demo_rows), **groups, checkpoints={"every_steps": 5})
    first = warned(config, until=7)
    second = warned(config, resume=True)
    told = [line for line in [*first, *second] if "Try: " in line]
    findings = found_in(tmp_path / "runs" / "run")
    assert told == [str(one) for one in findings if one.severity != "info"]
    assert [line for line in first if "Try: " in line]

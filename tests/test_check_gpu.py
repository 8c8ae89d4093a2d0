"""The check of a GPU, dry on a CPU: every stage runs and gives answers, and outlives the end of another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from gpu import pack
from gpu.stages import STAGES

from tests.conftest import ROOT
from tests.waiting import PATIENCE

SCRIPT = ROOT / "scripts" / "check_gpu.py"


def checked(tmp_path, *options, script=SCRIPT):
    """Run the check and return its exit status and its answers, by stage."""
    command = [sys.executable, script, "--dry", "--out", tmp_path, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE, check=False)
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert ended.stdout.splitlines() == lines
    by_stage: dict[str, list[dict[str, object]]] = {}
    for answer in map(json.loads, lines):
        by_stage.setdefault(answer["stage"], []).append(answer)
    return ended.returncode, by_stage


@pytest.mark.program
@pytest.mark.slow
def test_every_stage_runs_without_an_error_and_nothing_is_wrong(tmp_path):
    status, answers = checked(tmp_path)
    wrong = [one for some in answers.values() for one in some if "error" in one or one.get("right") is False]
    assert not wrong
    assert status == 0
    assert set(answers) - {"printed"} == {stage.name for stage in STAGES}
    for stage in STAGES:
        assert "done" in answers[stage.name][-1] or "not_built" in answers[stage.name][-1]
    assert {"date", "commit", "versions", "dry"} <= answers["environment"][0].keys()


FAULTY = """
import os, signal, time
from gpu import clock, stages
stages.STAGES[:] = [
    clock.Stage("first", 60, lambda check: check.tell(right=True)),
    clock.Stage("dies", 60, lambda check: os.kill(os.getpid(), signal.SIGKILL)),
    clock.Stage("fails", 60, lambda check: 1 / 0),
    clock.Stage("slow", 1, lambda check: time.sleep(600)),
    clock.Stage("last", 60, lambda check: check.tell(right=True)),
]
"""


@pytest.mark.program
def test_a_stage_that_dies_fails_or_hangs_costs_no_other_its_answer(tmp_path):
    """As where a kernel breaks the card's context: the process is gone, and another goes on behind it."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nif '--worker' in sys.orig_argv:\n    import faulty\n")
    (tmp_path / "faulty.py").write_text(FAULTY, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "scripts")])
    command = [sys.executable, SCRIPT, "--dry", "--out", tmp_path / "out"]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.returncode == 1
    answers = {one["stage"]: one for one in map(json.loads, ended.stdout.splitlines())}
    assert answers["first"]["done"] and answers["last"]["done"]
    assert answers["dies"]["error"] == f"its process ended with status -{signal.SIGKILL.value}"
    assert answers["fails"]["error"].startswith("ZeroDivisionError")
    assert "more than" in answers["slow"]["error"]


def test_the_kit_takes_the_versions_that_the_tests_ran_with(tmp_path):
    """However a package's name is spelt; a package without a version would be any."""
    command = pack.download(list(pack.NEEDED), tmp_path)
    named = command[command.index("manylinux1_x86_64") + 1 :]
    assert len(named) == len(pack.NEEDED)
    assert all("==" in name for name in named)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert set(named) <= {line.partition(";")[0].strip() for line in lines}

"""What a rank does and exchanges, as it notes it for the others."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile

import pytest

from dpo_cli.training.ranks import Progress
from tests.faults.launching import free_port
from tests.waiting import wait_until


def test_steps_are_counted_and_what_is_between_them_may_take_any_time():
    progress, seen = Progress(), []

    def note():
        seen.append((progress.step, progress.doing))

    def steps():
        note()
        yield "taken"
        note()

    for _ in progress.following(steps(), done=4):
        note()
        with progress.during("while a checkpoint was saved"):
            note()
    note()
    assert seen == [(5, ""), (5, None), (5, "while a checkpoint was saved"), (6, ""), (5, None)]


def test_an_error_in_a_step_leaves_nothing_at_hand():
    progress = Progress()

    def steps():
        yield 1
        raise ValueError

    with pytest.raises(ValueError):
        list(progress.following(steps(), done=0))
    assert progress.doing is None


def run_ranks(*scripts):
    """Run a script of `tests.training.exchanging` in each of several ranks; return what each notes."""
    command = [sys.executable, "-m", "tests.training.exchanging", str(free_port()), str(len(scripts))]
    with contextlib.ExitStack() as opened:
        said, wrong = ([opened.enter_context(tempfile.TemporaryFile("w+")) for _ in scripts] for _ in range(2))
        ranks = [
            subprocess.Popen([*command, str(rank), script], stdout=said[rank], stderr=wrong[rank])
            for rank, script in enumerate(scripts)
        ]
        try:
            # Who has failed is waited for by the others.
            wait_until(lambda: None not in (found := [one.poll() for one in ranks]) or any(found), lambda: "ranks hang")
        finally:
            for one in ranks:
                one.kill()
                one.wait()
        assert [one.returncode for one in ranks] == [0] * len(ranks), [contents(file) for file in wrong]
        return [json.loads(contents(file).splitlines()[-1]) for file in said]


def contents(file):
    file.seek(0)
    return file.read()


@pytest.mark.program
def test_all_that_ranks_exchange_is_counted_and_has_ended_when_they_have_done_it():
    """Gradients, layers of shards, objects, barriers; on all ranks alike."""
    first, second = run_ranks("everything", "everything")
    assert first["begun"] == second["begun"]
    assert sum(first["begun"].values()) > 20
    assert first["waits"] == second["waits"] == []


@pytest.mark.program
def test_who_waits_says_for_what_and_who_is_behind_has_not_begun_it():
    waiting, behind = run_ranks("waits in a layer", "hangs in a layer")
    (wait,) = waiting["waits"]
    assert wait["ranks"] == [0, 1]
    assert wait["what"].startswith("all_gather of [")
    assert behind["waits"] == []
    assert behind["begun"][wait["group"]] == wait["number"] - 1
    assert waiting["exchanged"] != behind["exchanged"]

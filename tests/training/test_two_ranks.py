"""What fails in one of two ranks leaves the other waiting for nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from tests.faults.launching import free_port
from tests.training.two_ranks import LAYERS, gradients_of

pytestmark = [pytest.mark.program, pytest.mark.slow]


@pytest.fixture(scope="module")
def found():
    """Run `tests.training.two_ranks` in two ranks; return what each found, by script."""
    command = [sys.executable, "-m", "tests.training.two_ranks", str(free_port())]
    started = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE, text=True) for rank in "01"]
    ranks = [json.loads(one.communicate(timeout=300)[0].splitlines()[-1]) for one in started]
    return {script: [rank[script] for rank in ranks] for script in ranks[0]}


def test_a_rank_that_has_no_memory_for_a_gradient_exchanges_all_the_same(found):
    first, second = found["memory_for_a_gradient"]
    before = [[0.0] * 3 if one is None else one.tolist() for rank in (0, 1) for one in gradients_of(rank)]
    means = [
        [(a + b) / 2 for a, b in zip(*both, strict=True)] for both in zip(before[:LAYERS], before[LAYERS:], strict=True)
    ]
    assert first == second == means


def test_a_rank_whose_exchange_breaks_off_goes_on_with_those_that_are_left(found):
    """Those before it are not exchanged again, and the step that is taken anew has all of them."""
    first, second = found["memory_for_an_exchange"]
    assert first == second
    assert [one[0] for one in first] == [5.0, 1 / 2, 2 / 2 + 12 / 2, 3 / 2]


def test_every_step_exchanges_its_gradients_where_none_may_be_broken_off(found):
    assert found["steps_that_are_not_begun"] == [[1.0, 2.0, 3.0]] * 2


PLACE = "\n  in run/step-1\nhint: "


@pytest.mark.parametrize(
    ("script", "kind", "own", "reason"),
    [
        ("damage", "UserError", "saving a checkpoint failed: weights.safetensors is missing", None),
        ("defect", "KeyError", "'layers.7'", "saving a checkpoint failed: KeyError: 'layers.7'"),
        ("full_disk", "UserError", "saving a checkpoint failed: no space left on device", None),
    ],
)
def test_whatever_fails_in_one_rank_is_an_error_in_both(found, script, kind, own, reason):
    first, second = found[script]
    where = f"rank 1 (on {socket.gethostname()}): "
    assert first[0] == "UserError" and second[0] == kind
    assert first[1].startswith(f"{where}{reason or own}{PLACE}")
    assert second[1] == own if reason else second[1] == first[1]
    assert first[2] == second[2] == "[0, 1]"

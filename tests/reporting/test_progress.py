"""Status lines: one stands below the other while a job within a job is under way."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.live import Live

from dpo_cli.reporting.console import Console as Program
from dpo_cli.reporting.progress import StatusLine
from tests.screen import Screen


@pytest.mark.parametrize("width", [30, 60, 120], ids=["without a bar", "with figures alone", "with a bar"])
def test_a_job_within_a_job_has_a_status_line_of_its_own(width):
    """Drawn at every moment, as a terminal does where the inner job takes long enough to be seen."""
    drawn, screen = io.StringIO(), Screen(width)
    console = Console(file=drawn, force_terminal=True, width=width)
    steps, pairs = StatusLine("step", 0, 8), StatusLine("evaluating:", 0, 40)
    steps.update(3, [("loss 0.6931", 1), ("accuracy 50 %", 2)])
    with Live(steps, console=console, auto_refresh=False), Live(pairs, console=console, auto_refresh=False) as inner:
        inner.refresh()
        screen.show(drawn.getvalue().replace("\n", "\r\n"))
        above, below, *_ = [line.strip() for line in screen.lines if line.strip()]
    assert (above.split()[0], below.split()[0]) == ("step", "evaluating:")
    assert above.endswith("left")
    assert below.endswith("left")


def test_the_progress_of_one_pair_is_not_that_of_pairs(capsys):
    for number in (1, 2):
        with Program().progress("evaluating", number) as advance:
            advance(number, number)
    with Program().progress("answers of a", 1, "prompt"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert [lines[0], lines[2], lines[4]] == ["evaluating: 1 pair", "evaluating: 2 pairs", "answers of a: 1 prompt"]

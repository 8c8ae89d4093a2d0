"""What tables and marked pairs show."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dpo_cli.reporting.console import clock
from dpo_cli.reporting.tables import figures_table, marked_pair, statistics_table, visible


def text(renderable) -> str:
    console = Console(file=io.StringIO(), width=100, no_color=True)
    console.print(renderable)
    return console.file.getvalue()


def test_weights_and_margins_are_counted_where_there_are_any():
    statistics = {"rows_read": 9, "pairs_kept": 9, "dropped": {}, "truncated": 0, "weighted": 0, "with_margin": 0}
    plain = text(statistics_table(statistics))
    assert "weight" not in plain
    assert "margin" not in plain
    lines = text(statistics_table(statistics | {"weighted": 1234, "with_margin": 5})).splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["weight", "other", "than", "1", "1,234"],
        ["margin", "other", "than", "0", "5"],
    ]


def test_figures_stand_beside_each_other_and_nothing_is_minus_zero():
    names = ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    figures = dict.fromkeys(names, -1e-9) | {"pairs": 5, "ties": 2, "rewards/accuracies": 0.6}
    before = figures | {"accuracy_interval": [0.25, 0.875]}
    after = before | {"rewards/margins": 1.25}
    shown = text(figures_table({"before": before, "after": after}))
    assert "before" in shown.splitlines()[0]
    assert "after" in shown.splitlines()[0]
    assert "25.0 – 87.5 %" in shown
    (margins,) = (line for line in shown.splitlines() if "margin" in line)
    assert margins.split() == ["reward", "margin", "0.0000", "+1.2500"]


@pytest.mark.parametrize(
    ("token", "shown"), [("a\n", "a⏎"), ("\t", "⇥"), ("\x1b[31m", "\\x1b[31m"), ("\x00é", "\\x00é"), ("[red]", "[red]")]
)
def test_control_characters_are_shown_and_never_sent(token, shown):
    assert visible(token) == shown


def test_without_colour_the_parts_are_told_apart_by_marks():
    shown = marked_pair("f:1", {"prompt": ["a", "b"], "chosen": ["c"], "rejected": ["d\n"]}, colour=False).plain
    assert shown == "f:1\nprompt (2 tokens)\na|b\nchosen (1 tokens)\nc\nrejected (1 tokens)\nd⏎\n"


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")])
def test_a_clock(seconds, shown):
    assert clock(seconds) == shown

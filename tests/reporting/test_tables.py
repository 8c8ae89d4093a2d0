"""What tables and marked pairs show."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dpo_cli.preference.metrics import PAIR_METRICS
from dpo_cli.reporting.progress import clock
from dpo_cli.reporting.streams import output_stream, unpadded
from dpo_cli.reporting.tables import MarkedPair, figures_table, groups_table, marked_pair, percent


def text(renderable) -> str:
    console = Console(file=io.StringIO(), width=100, no_color=True)
    console.print(renderable)
    return console.file.getvalue()


class Terminal(io.StringIO):
    """A file that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_figure_is_cut_on_a_narrow_terminal(width):
    values = {"pairs": 56, "ties": 0, "accuracy_interval": [0.936, 1.0], **dict.fromkeys(PAIR_METRICS, 0.123456)}
    table = figures_table(dict.fromkeys(("before", "best (step 15)", "last (step 20)"), values))
    stream = output_stream(prints=True)
    stream.file, stream.width, stream.is_interactive = Terminal(), width, True
    stream.print(unpadded(stream, table))
    said = stream.file.getvalue()
    assert "…" not in said
    assert (said.count("93.6 – 100.0 %"), said.count("+0.1235")) == (3, 9)
    assert "best (step 15)" in said
    assert said.count("log-probability") == 2


def test_the_largest_groups_are_shown_in_their_order_and_the_others_counted():
    def group(pairs):
        return {
            "pairs": pairs,
            "loss": 0.5,
            "rewards/accuracies": 0.5,
            "accuracy_interval": [0.1, 0.9],
            "rewards/margins": 0,
        }

    few = {f"group{number}": group(1) for number in range(20)}
    assert "more" not in text(groups_table("category", few))
    many = {"small": group(1), "b": group(5), "\x1b": group(7), "a": group(5)} | {
        f"g{n:02}": group(9) for n in range(17)
    }
    lines = [line.split() for line in text(groups_table("category", many)).splitlines()]
    assert [line[0] for line in lines[1:4]] == ["b", "\\x1b", "a"]
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == ["and", "1", "more,", "in", "the", "JSON"]
    even = {f"g{number:02}": group(3) for number in reversed(range(22))}
    shown = text(groups_table("category", even))
    assert "g19" in shown
    assert not {"g20", "g21"} & set(shown.split())


def test_figures_stand_beside_each_other_and_nothing_is_minus_zero():
    figures = dict.fromkeys(PAIR_METRICS, -1e-9) | {"pairs": 5, "ties": 2, "rewards/accuracies": 0.6}
    before = figures | {"accuracy_interval": [0.25, 0.875]}
    after = before | {"rewards/margins": 1.25}
    shown = text(figures_table({"before": before, "after": after}))
    assert "before" in shown.splitlines()[0]
    assert "after" in shown.splitlines()[0]
    assert "25.0 – 87.5 %" in shown
    (margins,) = (line for line in shown.splitlines() if "margin" in line)
    assert margins.split() == ["reward", "margin", "0.0000", "+1.2500"]


def test_a_figure_that_an_earlier_version_did_not_write_is_a_dash():
    now = dict.fromkeys(PAIR_METRICS, 0.5) | {"pairs": 5, "ties": 2, "accuracy_interval": [0.25, 0.875]}
    before = {name: value for name, value in now.items() if name != "logps/accuracies_mean"}
    (line,) = (line for line in text(figures_table({"before": before, "after": now})).splitlines() if "mean" in line)
    assert line.split()[-3:] == ["–", "50.0", "%"]


def test_without_colour_the_parts_are_told_apart_by_marks():
    parts = {"prompt": ["a", "b"], "chosen": ["c"], "rejected": ["d\n"]}
    shown = marked_pair(MarkedPair("f:1", parts, {}), colour=False).plain
    assert shown == "f:1\nprompt (2 tokens)\na|b\nchosen (1 token)\nc\nrejected (1 token)\nd⏎\n"


def test_what_is_not_scored_within_a_response_is_marked():
    parts = {"prompt": ["a"], "chosen": ["b", "c", "d", "e"], "rejected": ["f", "g"]}
    shown = marked_pair(MarkedPair("f:1", parts, {"chosen": {1, 2}, "rejected": {1}}), colour=False).plain
    assert "chosen (4 tokens, 2 of them context: in ⟨ ⟩)\nb|⟨c|d⟩|e\n" in shown
    assert shown.endswith("f|⟨g⟩\n")


@pytest.mark.parametrize("colour", [True, False])
def test_the_name_of_a_file_sends_no_control_characters(colour):
    assert marked_pair(MarkedPair("f\x1b[2J:1", {"prompt": ["a"]}, {}), colour=colour).plain.startswith("f\\x1b[2J:1\n")


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")])
def test_a_clock(seconds, shown):
    assert clock(seconds) == shown


@pytest.mark.parametrize(
    ("share", "shown"), [(0, "0.0 %"), (1e-6, "< 0.1 %"), (0.126, "12.6 %"), (1 - 1e-6, "> 99.9 %"), (1, "100.0 %")]
)
def test_a_few_among_many_are_not_none_and_all_but_a_few_are_not_all(share, shown):
    assert percent(share) == shown

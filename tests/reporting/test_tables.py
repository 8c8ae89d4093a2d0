"""What tables and marked pairs show."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dpo_cli.data.report import Example, Finding, LengthBias
from dpo_cli.reporting.progress import clock
from dpo_cli.reporting.tables import (
    dropped_examples,
    figures_table,
    finding_examples,
    findings_table,
    groups_table,
    length_bias_line,
    marked_pair,
    percent,
    statistics_table,
    visible,
)


def text(renderable) -> str:
    console = Console(file=io.StringIO(), width=100, no_color=True)
    console.print(renderable)
    return console.file.getvalue()


ONE = {"source": "a.jsonl", "shape": "text", "rows": 9, "pairs": 8}
STATISTICS = {
    "sources": [ONE], "rows_read": 9, "pairs_kept": 8, "dropped": {}, "examples": {}, "truncated": 0, "weighted": 0,
    "with_margin": 0,
}  # fmt: skip


def test_weights_and_margins_are_counted_where_there_are_any():
    plain = text(statistics_table(STATISTICS))
    assert "weight" not in plain
    assert "margin" not in plain
    lines = text(statistics_table(STATISTICS | {"weighted": 1234, "with_margin": 5})).splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["weight", "other", "than", "1", "1,234"],
        ["margin", "other", "than", "0", "5"],
    ]


def test_one_source_has_its_shape_named_and_several_have_a_table():
    one = text(statistics_table(STATISTICS)).splitlines()
    assert one[0].split() == ["shape", "text"]
    assert not any("source" in line for line in one)
    several = [ONE, {"source": "[red]\x1b", "shape": "hh", "rows": 1234, "pairs": 1200}]
    two = text(statistics_table(STATISTICS | {"sources": several, "pairs_kept": 1208})).splitlines()
    assert ["pairs", "kept", "1,208"] in [line.split() for line in two]
    assert [line.split() for line in two[-3:]] == [
        ["source", "shape", "rows", "pairs"],
        ["a.jsonl", "text", "9", "8"],
        ["[red]\\x1b", "hh", "1,234", "1,200"],
    ]


def test_dropped_rows_are_named_a_few_of_each_reason_and_send_no_control_characters():
    read = {
        "dropped": {"wrong type": 7, "too long": 1},
        "examples": {"wrong type": ["a\x1b[2J:1: \x9b"] * 5, "too long": ["b:2"]},
    }
    lines = dropped_examples(STATISTICS | read)
    assert all(line.isprintable() for line in lines)
    assert [line.partition("): ")[2] for line in lines] == ["a\\x1b[2J:1: \\x9b"] * 3 + ["and 4 more", "b:2"]


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
    shown = marked_pair("f:1", {"prompt": ["a", "b"], "chosen": ["c"], "rejected": ["d\n"]}, {}, colour=False).plain
    assert shown == "f:1\nprompt (2 tokens)\na|b\nchosen (1 tokens)\nc\nrejected (1 tokens)\nd⏎\n"


def test_what_is_not_judged_within_a_response_is_marked():
    parts = {"prompt": ["a"], "chosen": ["b", "c", "d", "e"], "rejected": ["f", "g"]}
    shown = marked_pair("f:1", parts, {"chosen": {1, 2}, "rejected": {1}}, colour=False).plain
    assert "chosen (4 tokens, 2 of them context: in ⟨ ⟩)\nb|⟨c|d⟩|e\n" in shown
    assert shown.endswith("f|⟨g⟩\n")


@pytest.mark.parametrize("colour", [True, False])
def test_the_name_of_a_file_sends_no_control_characters(colour):
    assert marked_pair("f\x1b[2J:1", {"prompt": ["a"]}, {}, colour=colour).plain.startswith("f\\x1b[2J:1\n")


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")])
def test_a_clock(seconds, shown):
    assert clock(seconds) == shown


def test_the_findings_are_listed_with_count_share_and_what_to_do():
    found = Finding("near_identical", "warning", 1234, 0.25, "They are alike.", "Look at them.", False, ())
    guessed = Finding("other_script", "info", 1, 0.0002, "They differ.", "Look.", True, ())
    lines = text(findings_table([found, guessed])).splitlines()
    assert lines[0].split()[:4] == ["severity", "finding", "count", "share"]
    first = next(line for line in lines if "near_identical" in line)
    assert first.split()[:5] == ["warning", "near_identical", "1,234", "25.0", "%"]
    whole = " ".join(" ".join(lines).split())
    assert "They are alike." in whole
    assert "< 0.1 %" in whole
    assert "rule of thumb" in whole


def test_examples_name_file_and_line_and_send_no_control_characters():
    example = Example("a:1", "b:2", {"chosen": "Yes\x1b[2J\n", "rejected": "\u202eNo"})
    found = Finding("leakage", "error", 5, 0.5, "Means.", "Do.", False, (example, Example("c\x07:3", "", {})))
    first, second = finding_examples([found])
    assert first.startswith("leakage: a:1 (beside b:2)")
    assert "Yes\\x1b[2J⏎" in first
    assert all(line.isprintable() for line in (first, second))


@pytest.mark.parametrize(
    ("share", "shown"), [(0, "0.0 %"), (1e-6, "< 0.1 %"), (0.126, "12.6 %"), (1 - 1e-6, "> 99.9 %"), (1, "100.0 %")]
)
def test_a_few_among_many_are_not_none_and_all_but_a_few_are_not_all(share, shown):
    assert percent(share) == shown


def test_the_judge_by_length_is_told_with_his_interval():
    assert "75.0 %" in length_bias_line(LengthBias(3, 0, 1, 0.75, (0.3006, 0.9544)))
    assert "30.1 – 95.4 %" in length_bias_line(LengthBias(3, 0, 1, 0.75, (0.3006, 0.9544)))

"""What the check of the data shows on a screen of any width, and on a pipe."""

from __future__ import annotations

import io
import re
from pathlib import PurePath

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from dpo_cli.data.checkup.report import Example, Finding, LengthBias, Lengths, Margins, Report
from dpo_cli.reporting.data_check import PathLine, Wrapped, findings, length_bias_line, reading, screen

WIDTHS = [60, 80, 120]
LENGTHS = {"min": 1, "p50": 20, "p99": 12345, "mean": 1234.5}
TOKENS = dict.fromkeys(("prompt", "chosen", "rejected"), LENGTHS)
ONE = {"source": "a.jsonl", "shape": "text", "rows": 9, "pairs": 8}
STATISTICS = {
    "sources": [ONE], "rows_read": 9, "pairs_kept": 8, "dropped": {}, "examples": {}, "truncated": 0, "weighted": 0,
    "with_margin": 0, "tokens": TOKENS,
}  # fmt: skip
ENGLISH = "The quick brown fox jumps over the lazy dog, and what is more: it does so again, and again, and again."
CHINESE = "…分析社交媒体平台风险的最有效方法是使用数据分析工具，" * 2


def text(renderable, width=100, **settings) -> str:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, **{"no_color": True, **settings})
    console.print(renderable)
    return console.file.getvalue()


def found(name="leakage", severity="error", count=5, share=0.5, title="they say so", *examples, heuristic=False):
    return Finding(name, severity, count, share, title, "Means much.", "Do this.", heuristic, examples)


def example(said=ENGLISH, folder="/a/folder/with/a/long/name"):
    texts = {"prompt": said, "chosen": said, "rejected": said}
    return Example(f"{folder}/pairs.jsonl:14", f"{folder}/pairs.jsonl:2", texts)


def report(*listed, **changed) -> Report:
    values = {
        "read": {"data.train": STATISTICS}, "num_train": 9, "num_held_out": 0, "num_copies": 0, "left_out": {},
        "findings": listed, "not_found": ("one", "two"), "length_bias": LengthBias(3, 0, 1, 0.75, (0.3006, 0.9544)),
        "lengths": Lengths(10, False, {}, {}, 5, (), ()), "margins": None, "boundary": None,
    }  # fmt: skip
    return Report(**{**values, **changed})


DROPPED = found(
    "dropped_rows", "warning", 153, 0.51, "of 300 rows (51 %) were dropped as too long",
    Example("/a/folder/with/a/long/name/pairs.jsonl:2", "", {"dropped": "has 2043 tokens where it is 1024"}),
)  # fmt: skip


@pytest.mark.parametrize("said", [ENGLISH, CHINESE, "x" * 300, f"{ENGLISH} \x1b[2J\n\t{CHINESE}"])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal_and_words_stay_whole(width, said):
    shown = text(findings(report(found("conflicts", "warning", 2, 0.1, "a title", example(said)), DROPPED)), width)
    several = [{**ONE, "shape": "long" * 30}, ONE]
    read = {"data.train": {**STATISTICS, "sources": several, "weighted": 3, "with_margin": 4}}
    shown += text(screen(report(found("conflicts", "warning", 2, 0.1, "a title", example(said)), read=read)), width)
    lines = shown.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert all(line.isprintable() for line in lines)
    if said == ENGLISH:
        assert {word for line in lines for word in line.split() if word.isalpha()} >= {"quick", "brown", "jumps"}


def test_a_finding_is_a_line_and_one_example_with_its_texts_indented_and_coloured():
    shown = text(
        findings(report(found("conflicts", "warning", 2, 0.25, "a title", example("Yes"), example("No")))),
        80, no_color=False, force_terminal=True, color_system="standard",
    )  # fmt: skip
    assert "\x1b[33mwarning  " in shown
    for colour, name in ((36, "prompt"), (32, "chosen"), (31, "rejected")):
        (line,) = (line for line in shown.splitlines() if line.startswith(f"    \x1b[{colour}m{name} "))
        assert f"\x1b[{colour}mYes" in line
    plain = text(findings(report(found("conflicts", "warning", 2, 0.25, "a title", example("Yes"), example("No")))))
    assert plain.splitlines()[0] == "warning  conflicts: 2 pairs (25.0 %): a title"
    assert plain.count("pairs.jsonl:14") == 1
    assert "No" not in plain
    assert "Means much" not in plain


@pytest.mark.parametrize(("number", "lines"), [(1, 2), (2, 2), (3, 1), (4, 0), (9, 0)])
def test_examples_are_the_shorter_the_more_findings_there_are(number, lines):
    """18 lines hold findings of a line each with a place and three texts of two lines, of one, or of none."""
    listed = [found(f"finding_{n}", "warning", 2, 0.25, "a title", example()) for n in range(number)]
    shown = text(findings(report(*listed)), 60).splitlines()
    assert sum("prompt" in line for line in shown) == number * bool(lines)
    assert len([line for line in shown if line.startswith(" " * 14)]) == number * 3 * max(0, lines - 1)
    assert sum(line.endswith("…") for line in shown) == number * 3 * bool(lines)
    assert sum("pairs.jsonl" in line for line in shown) == number


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("number", [10, 18, 19, 36])
def test_of_findings_that_no_screen_holds_the_last_are_named_and_counted(number, width):
    severities = ["error"] * 2 + ["warning"] * (number // 2) + ["info"] * number
    listed = [found(f"finding_{n}", severities[n], 1000 + n, 0.25, "t " * 30, example()) for n in range(number)]
    shown = text(findings(report(*listed)), width).split("\n\n")[0].splitlines()
    assert len(shown) <= 18
    assert shown[0].startswith("error    finding_0: 1,000 pairs (25.0 %): t")
    assert "pairs.jsonl" not in "".join(shown) or number < 18
    words = re.findall(r"finding_\d+:? \S+\d", " ".join(" ".join(shown).split()))
    assert [word.replace(":", "") for word in words] == [f"finding_{n} {1000 + n:,}" for n in range(number)]
    assert all(line.startswith(("error ", "warning ", "info ", " ")) for line in shown)


def test_a_pipe_has_the_screen_of_a_narrow_terminal():
    listed = [found(f"finding_{n}", "warning", 2, 0.25, "a title", example()) for n in range(3)]
    assert text(screen(report(*listed)), 10_000) == text(screen(report(*listed)), 80)


@pytest.mark.parametrize(("share", "bold"), [(0.51, True), (0.1, False)])
def test_more_than_a_tenth_of_the_rows_dropped_is_bold_with_the_setting_that_changes_it(share, bold):
    advice = "Raise `data.max_length` (1024) or set `data.on_too_long: truncate`."
    title = "of 300 rows (51 %) were dropped as too long"
    dropped = Finding("dropped_rows", "warning", 153, share, title, "Means.", advice, False, ())
    shown = text(findings(report(dropped)), 200, force_terminal=True, color_system="standard", no_color=False)
    said = (
        "153 of 300 rows (51 %) were dropped as too long: raise `data.max_length` (1024) or set "
        "`data.on_too_long: truncate`"
    )
    assert (f"\x1b[1m{said}" in shown or f"\x1b[1mdropped_rows: {said}" in shown) == bold
    assert said in shown


def test_what_the_lengths_give_away_is_said_once():
    biased = found("length_bias", "warning", 3, 1.0)
    for listed in ((), (biased,)):
        assert text(findings(report(*listed)), 200).count("the longer response is the chosen one in 75.0 %") == 1


def test_margins_are_shown_where_the_loss_uses_them():
    used = text(findings(report(margins=Margins(True, 1234, 0.5, 3.0, 8.25))))
    assert "1,234 pairs, 0.5 to 8.25, median 3" in used
    assert "margin" not in text(findings(report(margins=Margins(False, 1234, 0.5, 3.0, 8.25))))


def test_weights_and_margins_are_counted_where_there_are_any():
    plain = text(reading("data.train", STATISTICS))
    assert plain.splitlines()[0] == "data.train: 9 rows of the shape text, 8 pairs"
    shown = text(reading("data.train", STATISTICS | {"weighted": 1234, "with_margin": 5}), 200)
    assert "1,234 with a weight other than 1, 5 with a margin other than 0" in shown


def test_several_sources_are_counted():
    assert "source" not in text(reading("data.train", STATISTICS))
    several = [ONE, {"source": "b.jsonl", "shape": "[red]\x1b", "rows": 1234, "pairs": 1200}]
    shown = text(reading("data.train", STATISTICS | {"sources": several}))
    assert shown == "data.train: 9 rows of the shape text, [red]\\x1b from 2 sources, 8 pairs\n"


def test_the_screen_has_the_findings_then_what_was_read_then_lengths():
    read = {"data.train": STATISTICS, "data.eval": STATISTICS | {"rows_read": 3}}
    shown = text(screen(report(found(), read=read)), 80).splitlines()
    starts = ["error    leakage:", "data.train: 9 rows", "data.eval: 3 rows", "9 pairs to train on, 0 held out"]
    starts += ["tokens", "prompt", "chosen", "rejected", "the longer response is", "2 other checks found nothing"]
    order = [next(number for number, line in enumerate(shown) if line.startswith(start)) for start in starts]
    assert order == sorted(order)
    assert (order[0], order[-1]) == (0, len(shown) - 1)


def test_without_findings_the_screen_begins_with_what_was_read():
    shown = text(screen(report()), 80).splitlines()
    assert shown[0].startswith("data.train: ")
    assert shown[-1] == "2 checks found nothing"


def test_texts_longer_than_their_lines_end_with_dots():
    assert text(Wrapped(Text("one two three"), indent=2, label=Text("a "), max_lines=2), 8).splitlines() == [
        "  a one",
        "    two…",
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_path_of_the_report_is_never_folded(width):
    path = PurePath("/a/folder/" + "0123456789abcdef" * 4 + "/report.html")
    lines = text(PathLine("report", path), width).splitlines()
    assert lines == ([f"report: {path}"] if len(f"report: {path}") <= width else ["report:", str(path)])


def test_the_judge_by_length_is_told_with_his_interval():
    assert "75.0 %" in length_bias_line(LengthBias(3, 0, 1, 0.75, (0.3006, 0.9544)))
    assert "30.1 – 95.4 %" in length_bias_line(LengthBias(3, 0, 1, 0.75, (0.3006, 0.9544)))

"""The page of the check: complete, self-contained, and deaf to what stands in the data."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from dpo_cli.data.checkup.report import Boundary, Cut, Example, Finding, LengthBias, Lengths, Margins, Report
from dpo_cli.reporting.data_page import data_page
from dpo_cli.reporting.plots import histogram, plane

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style><style>body{display:none}",
    "</title></details></section></body>",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.exe \u2066hidden\u2069",
    "\x9b31m \x00 \ufeff \u2028",
    "`<b>code</b>`",
    "{{ 7 * 7 }} %s {0}",
]

TOKENS = {"min": 1, "p50": 2, "p90": 3, "p99": 4, "max": 5, "mean": 2.5}


def report(text="plain", **changed) -> Report:
    """A report in which every text that comes from data is the same."""
    example = Example(text, text, {"prompt": text, "chosen": text, "rejected": text})
    statistics = {
        "rows_read": 4321, "pairs_kept": 4300, "dropped": {text: 21}, "examples": {text: [text]}, "truncated": 7,
        "weighted": 0, "with_margin": 0, "sources": [{"source": text, "shape": text, "rows": 4321, "pairs": 4300}],
        "tokens": dict.fromkeys(("prompt", "chosen", "rejected"), TOKENS),
    }  # fmt: skip
    values = {
        "read": {"data.train": statistics},
        "num_train": 4000,
        "num_held_out": 300,
        "num_copies": 150,
        "left_out": {"duplicates": 17},
        "findings": (
            Finding("leakage", "error", 3, 0.001, "Is.", "Means `this`.", "Do `that`.", False, (example,)),
            Finding("other_script", "info", 1, 0.0001, "Is.", "Means.", "Do.", True, ()),
        ),
        "not_found": ("conflicts",),
        "length_bias": LengthBias(6, 2, 2, 0.7, (0.4, 0.9)),
        "lengths": Lengths(
            10,
            True,
            {"prompt": (1, 0, 9), "longest": (0, 0, 10)},
            {"prompt": (0, 0, 47), "longest": (0, 0, 47)},
            5,
            ((0, 1, 9), (2, 0, 1)),
            (Cut(64, 5123),),
        ),
        "margins": Margins(True, 1234, 0.5, 3, 8),
        "boundary": Boundary(text, 9, 0, text, {"chosen": 0, "rejected": 1}, {"prompt": ((text, 9),)}),
    }
    return Report(**{**values, **changed})


class Page(HTMLParser):
    """The elements, attributes and text of a page, all of them closed as they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_the_data_becomes_a_part_of_the_page(text):
    hostile, plain = Page(data_page(report(text))), Page(data_page(report("plain")))
    assert hostile.tags == plain.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_on_the_page_is_invisible_or_a_control_character(text):
    page = data_page(report(text))
    assert all(character.isprintable() or character == "\n" for character in page)


def test_the_texts_are_shown_as_they_are():
    shown = Page(data_page(report("<b>5 > 4 & 3</b>\n\x1b[2J"))).text
    assert shown.count("<b>5 > 4 & 3</b>⏎\\x1b[2J") >= 10


def test_nothing_is_fetched_and_nothing_runs():
    page = Page(data_page(report()))
    assert not {"script", "link", "img", "iframe", "object", "a", "base", "form"} & set(page.tags)
    assert not [
        name for name, _ in page.attributes if name in {"src", "href", "srcset", "action"} or name.startswith("on")
    ]
    assert not [value for _, value in page.attributes if "url(" in value or "://" in value]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "@import" not in page.text
    assert "url(" not in page.text
    assert "prefers-color-scheme: dark" in page.text


def test_every_figure_of_the_report_is_on_the_page():
    shown = Page(data_page(report())).text
    for part in (
        "4,000 pairs to train on", "150 of them repeated by a weight", "300 held out",
        "17 duplicates", "1 error", "leakage", "Means this.", "Do that.",
        "by a rule of thumb", "conflicts", "4,321", "4,300", "70.0 %", "40.0 to 90.0 %", "5,123", "2.5",
        "47 dropped as too long", "30 tokens and more", "1,234", "0.5", "margin_scale",
    ):  # fmt: skip
        assert part in shown, part


def test_without_a_tokenizer_and_findings_the_page_is_whole():
    page = Page(data_page(report(findings=(), not_found=(), left_out={}, boundary=None)))
    assert "plain" in page.text
    assert "left out" not in page.text.lower()


def test_a_bar_is_as_high_as_its_share_of_the_highest():
    drawn = Page(histogram("prompt", (1, 0, 9), 10))
    heights = [float(value) for name, value in drawn.attributes if name == "height"]
    assert heights == pytest.approx([heights[2] / 9, 0, heights[2]], abs=0.1)
    assert "0 to 9 tokens: 1" in drawn.text
    assert "20 to 29 tokens: 9" in drawn.text


def test_what_was_dropped_as_too_long_is_drawn_above_what_is_kept_in_another_shade():
    drawn = histogram("prompt", (1, 2), 10, (0, 4), open_ended=True)
    bars = re.findall(r'<rect class="(.*?)" x="(.*?)" y="(.*?)" width=".*?" height="(.*?)">', drawn)
    assert [shade for shade, *_ in bars] == ["prompt", "prompt", "prompt gone"]
    (x, y, height), (x_gone, y_gone, height_gone) = (map(float, bar[1:]) for bar in bars[1:])
    assert x_gone == x
    assert y_gone + height_gone == pytest.approx(y, abs=0.11)
    assert height_gone == pytest.approx(2 * height, abs=0.11)
    assert "10 and more tokens: 4 dropped as too long" in Page(drawn).text


def test_in_the_plane_pairs_with_a_longer_chosen_response_stand_above_the_line():
    drawn = Page(plane(((2, 0, 5), (0, 2, 1)), 10))
    (left, top), (right, bottom) = corners(drawn)
    assert left < right
    assert top < bottom


def corners(drawn):
    values = [float(value) for name, value in drawn.attributes if name in ("x", "y") and "." in value]
    return list(zip(values[::2], values[1::2], strict=True))[:2]

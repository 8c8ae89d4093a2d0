"""The page of the check: complete, self-contained, and deaf to what stands in the data."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from dpo_cli.data.checkup.report import Boundary, Cut, Example, Finding, LengthBias, Lengths, Margins, Report
from dpo_cli.reporting.pages.data import data_page
from dpo_cli.reporting.pages.plots import histogram, plane
from dpo_cli.reporting.pages.rendering import code_in_backticks, render
from dpo_cli.reporting.tables import MarkedPair

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
        if tag not in ("br", "meta"):
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
        "(heuristic)", "conflicts", "4,321", "4,300", "70.0 %", "40.0 to 90.0 %", "5,123", "2.5",
        "47 dropped as too long", "30 tokens and more", "1,234", "0.5", "margin_scale",
    ):  # fmt: skip
        assert part in shown, part


def test_pairs_are_shown_token_by_token_with_what_is_not_scored_marked():
    pair = MarkedPair(
        "f:1", {"prompt": ["<b>", "\n"], "chosen": ["a", "tool", "b"], "rejected": ["c"]}, {"chosen": {1}}
    )
    written = data_page(report(), [pair])
    assert Page(written).text.count("<b>⏎") == 1
    assert "chosen, 3 tokens" in written and "rejected, 1 token<" in written
    assert "<span>a</span><span class=context>tool</span><span>b</span>" in written
    assert "token by token" not in data_page(report())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_token_is_harmless(text):
    pairs = [MarkedPair(shown, {"prompt": [shown]}, {}) for shown in (text, "plain")]
    hostile, plain = (Page(data_page(report(), [pair])) for pair in pairs)
    assert hostile.tags == plain.tags
    assert hostile.text.replace("\n", "").isprintable()


def test_without_a_tokenizer_and_findings_the_page_is_whole():
    page = Page(data_page(report(findings=(), not_found=(), left_out={}, boundary=None)))
    assert "plain" in page.text
    assert "left out" not in page.text.lower()


def test_a_bar_is_as_high_as_its_share_of_the_highest():
    drawn = histogram("prompt", (1, 0, 9), 10).rectangles
    assert [bar.height / drawn[2].height for bar in drawn] == pytest.approx([1 / 9, 0, 1])
    assert [bar.hint for bar in drawn[::2]] == ["0 to 9 tokens: 1", "20 to 29 tokens: 9"]
    assert len({round(bar.y + bar.height, 6) for bar in drawn}) == 1


def test_what_was_dropped_as_too_long_is_drawn_above_what_is_kept_in_another_shade():
    first, kept, gone = histogram("prompt", (1, 2), 10, (0, 4), open_ended=True).rectangles
    assert [bar.style for bar in (first, kept, gone)] == ["prompt", "prompt", "prompt gone"]
    assert gone.x == kept.x
    assert gone.y + gone.height == pytest.approx(kept.y)
    assert gone.height == pytest.approx(2 * kept.height)
    assert gone.hint == "10 and more tokens: 4 dropped as too long"


def test_in_the_plane_pairs_with_a_longer_chosen_response_are_above_the_line():
    longer_chosen, longer_rejected = plane(((2, 0, 5), (0, 2, 1)), 10).rectangles
    assert longer_chosen.x < longer_rejected.x
    assert longer_chosen.y < longer_rejected.y


def test_every_plot_is_on_the_page_as_it_was_computed():
    drawn = data_page(report())
    assert Page(drawn).tags.count("rect") == 1 + 4 + 4 + 2
    assert "20 and more tokens: 47 dropped as too long" in Page(drawn).text
    heights = re.findall(r'<rect class="longest.*?" .*? height="(.*?)"', drawn)
    expected = histogram("longest", (0, 0, 10), 10, (0, 0, 47), open_ended=True).rectangles
    assert list(map(float, heights)) == pytest.approx([bar.height for bar in expected], abs=0.05)


def test_a_name_that_a_template_does_not_know_is_an_error():
    with pytest.raises(UndefinedError, match="'report' is undefined"):
        render("data.html", severities={})


@pytest.mark.parametrize("text", HOSTILE)
def test_code_in_a_sentence_is_harmless(text):
    shown = Page(f"<p>{code_in_backticks(f'{text} `{text}`')}</p>")
    assert set(shown.tags) == {"p", "code"}
    assert shown.text.isprintable()

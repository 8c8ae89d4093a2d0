"""What two answers have in common and what they have not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.reporting.differences import differences

TEXTS = st.text(alphabet="ab \n.,分析é") | st.text()


def marked(parts) -> str:
    return "".join(f"[{part.text}]" if part.differs else part.text for part in parts)


@given(TEXTS, TEXTS)
def test_parts_joined_are_the_texts_and_what_is_common_is_the_same_words(one, other):
    ours, theirs = differences(one, other)
    assert "".join(part.text for part in ours) == one
    assert "".join(part.text for part in theirs) == other
    common = [["".join(part.text.split()) for part in parts if not part.differs] for parts in (ours, theirs)]
    assert "".join(common[0]) == "".join(common[1])
    assert all(part.text for part in ours + theirs)


@given(TEXTS)
def test_a_text_does_not_differ_from_itself(text):
    for parts in differences(text, text):
        assert not any(part.differs for part in parts)


@pytest.mark.parametrize(
    ("one", "other", "ours", "theirs"),
    [
        ("Paris is big.", "Paris is small.", "Paris is[ big].", "Paris is[ small]."),
        ("", "new", "", "[new]"),
        ("Well, a b c d", "a b c d", "[Well,] a b c d", "a b c d"),
        ("x the y", "u the v", "[x the y]", "[u the v]"),
        ("分析数据方法", "分析平台方法", "分析[数据]方法", "分析[平台]方法"),
        ("a b\n", "a b", "a b\n", "a b"),
    ],
    ids=["a word", "nothing before", "a beginning", "no common ground", "ideographs", "white space"],
)
def test_words_that_the_other_lacks_are_marked(one, other, ours, theirs):
    assert tuple(map(marked, differences(one, other))) == (ours, theirs)


def test_answers_that_repeat_themselves_are_compared_in_no_time():
    ours, _ = differences("again and " * 4000, "and again, " * 4000)
    assert "".join(part.text for part in ours) == "again and " * 4000

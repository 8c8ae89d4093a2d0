"""The demo pairs: nothing but directness tells the chosen answer from the rejected one."""

from __future__ import annotations


def test_no_prompt_and_no_rejected_answer_comes_twice(demo_rows):
    prompts = {(row["instruction"].lower(), row.get("input", "").lower()) for row in demo_rows}
    assert len(demo_rows) >= 480
    assert len(prompts) == len({row["rejected"] for row in demo_rows}) == len(demo_rows)


def test_a_rejected_answer_is_the_chosen_one_in_filler(demo_rows):
    for row in demo_rows:
        chosen, rejected = row["chosen"], row["rejected"]
        # Its first letter loses its capital where filler leads into the sentence.
        assert chosen[1:] in rejected
        assert len(chosen) < len(rejected)
        assert 22 <= len(rejected.split()) <= 35


def test_texts_are_plain_and_answers_whole_sentences(demo_rows):
    for row in demo_rows:
        assert row.keys() - {"input"} == {"instruction", "chosen", "rejected"}
        for text in row.values():
            assert text.isascii()
            assert text == " ".join(text.split()) != ""
            assert not set(text) & set("{}|\\")
        assert row["chosen"][-1] in ".!?"
        assert row["rejected"][-1] in '.!?"'

"""What is noticed of texts: what each rule finds, and what looks like it and is nothing."""

from __future__ import annotations

import pytest

from dpo_cli.data.checkup.comparisons import COMPARISONS, DROPPABLE, PAIR_CHECKS
from dpo_cli.data.findings import FlaggedCheck
from dpo_cli.data.pairs.text_checks import TEXT_CHECKS, text_flags
from dpo_cli.data.records import Message, Pair

RUSSIAN = "Столица Франции — это город Париж, он стоит на Сене."
CHINESE = "法国的首都是巴黎，它位于塞纳河畔，是一座历史悠久的美丽城市。"
ENGLISH = "The capital of France is Paris, on the river Seine."
CODE = "```python\nfor number in range(100):\n    print(number, number ** 2, sep=', ')\n```"


def noticed(chosen="Paris, I would say.", rejected="It may be Lyon.", prompt="Which city is it?"):
    return names(Pair((Message("user", prompt),), said(chosen), said(rejected), "x"))


def said(*turns):
    return tuple(turn if isinstance(turn, Message) else Message("assistant", turn) for turn in turns)


def names(pair):
    flags = text_flags(pair)
    return {check.name for check in TEXT_CHECKS if flags & check.flag}


def test_nothing_is_noticed_of_an_ordinary_pair():
    assert noticed() == set()


@pytest.mark.parametrize("edits", [0, 1, 5, 6, 30])
def test_responses_are_near_identical_up_to_one_edit_in_ten_characters(edits):
    text = "0123456789" * 5
    assert ("near_identical" in noticed(text, text[edits:])) == (edits <= 5)
    assert ("near_identical" in noticed("x" * edits + text[edits:], text)) == (edits <= 5)


@pytest.mark.parametrize(("chosen", "rejected"), [("Yes", "No"), ("4", "5"), ("a" * 200, "a" * 100)])
def test_short_or_cut_responses_are_not_near_identical(chosen, rejected):
    assert "near_identical" not in noticed(chosen, rejected)


@pytest.mark.parametrize("mark", ["\x00", "\x1b", "\x7f", "\x85", "\x93", "\u202e", "\u2060", "\ufeff"])
@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_what_is_not_seen_is_noticed_wherever_it_stands(mark, part):
    assert noticed(**{part: f"Paris {mark}is the capital."}) == {"control_characters"}


@pytest.mark.parametrize(
    "text", ["a\tb\r\nc", "👩\u200d🚀 liftoff", "می\u200cخواهم", "שלום \u200fעולם", "naïve “quotes” €"]
)
def test_marks_that_writing_needs_are_left_alone(text):
    assert "control_characters" not in noticed(f"Here it is: {text}")


def test_lost_characters_are_noticed():
    assert noticed("Caf\ufffd Paris, I would say.") == {"replacement_characters"}


@pytest.mark.parametrize("nothing", [" \n", "\u200b", "\x00", "\ufffd\ufffd"])
def test_a_response_that_shows_nothing_is_blank(nothing):
    assert "blank_response" in noticed(nothing)
    assert "blank_response" in noticed(rejected=nothing)


def test_a_call_of_a_tool_is_something_said():
    def call(**function):
        return said(Message("assistant", "", extras={"tool_calls": [{"function": function}]}))

    weather, note = (
        call(name="weather", arguments={"city": "Paris"}),
        call(name="note", arguments={"text": "Rain, I guess"}),
    )
    assert names(Pair((Message("user", "Rain?"),), weather, note, "x")) == set()


@pytest.mark.parametrize("rejected", [RUSSIAN, CHINESE])
def test_responses_in_two_writing_systems_are_told_apart(rejected):
    assert noticed(ENGLISH, rejected, "What is the capital of France? Answer me.") == {"mixed_scripts"}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        pytest.param(f"请写一个程序。{CHINESE}", CODE, f"{CHINESE}\n{CODE}", id="code beside explained code"),
        pytest.param(CHINESE, "函数 print(number, number ** 2) 会把数字打印出来，你可以试试看。", CHINESE, id="terms"),
        pytest.param("2 + 2?", "四", "It is four, of course, as anybody knows.", id="too short to tell"),
        pytest.param(RUSSIAN, RUSSIAN, RUSSIAN[::-1], id="one language"),
        pytest.param("翻译成中文：" + ENGLISH, CHINESE, CHINESE[5:] + "好", id="a translation that is asked for"),
        pytest.param(
            "日本の首都はどこですか。教えてください。お願いします。", "東京都、日本国首都", "とうきょうです", id="kana"
        ),
    ],
)
def test_languages_that_belong_together_are_not_told_apart(prompt, chosen, rejected):
    assert not noticed(chosen, rejected, prompt) & {"mixed_scripts", "other_script"}


def test_both_responses_in_another_writing_system_than_the_prompt():
    assert noticed(CHINESE, CHINESE[::-1], f"{ENGLISH} Is it so?") == {"other_script"}


@pytest.mark.parametrize(
    "refusal",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist with this request.",
        "Sorry, but I am unable to do this.",
        "I cannot provide instructions for that.",
        "As an AI language model, I cannot give you that.",
        "Es tut mir leid, aber ich kann dir dabei nicht helfen.",
        "Lo siento, pero no puedo ayudarte con eso.",
        "Je suis désolé, mais je ne peux pas vous aider.",
        "很抱歉，我无法提供这方面的帮助。",
        "申し訳ありませんが、そのご要望にはお応えできません。",
    ],
)
def test_a_refusal_is_noticed_where_it_is_chosen_and_alone(refusal):
    assert noticed(refusal) == {"refusal_chosen"}
    assert noticed(rejected=refusal) == set()
    assert "refusal_chosen" not in noticed(refusal, refusal + " Ask me something that is quite different.")


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that. Try turning it off.",
        "I can't wait to show you Paris!",
        "Sorry is what one says after a mistake.",
        "As an AI, I find this question lovely: Paris.",
        "The error says: I'm sorry, I can't do that.",
        "抱歉让您久等了，答案是巴黎。",
    ],
)
def test_regret_is_no_refusal(text):
    assert noticed(text) == set()


def test_white_space_at_one_side_gives_a_response_away_and_on_both_sides_it_does_not():
    assert noticed(" Paris, I would say.") == {"space_at_one_side"}
    assert noticed(rejected="It may be Lyon.\n") == {"space_at_one_side"}
    assert noticed(" Paris, I would say.", " It may be Lyon.") == set()


def test_several_turns_are_noticed_and_what_others_say_between_them_is_not_the_response():
    between = (Message("user", "Sure\ufeff?"), Message("assistant", "Yes, it is Paris."))
    pair = Pair((Message("user", "Where?"),), said("Paris, I would say."), said("It may be Lyon.", *between), "x")
    assert names(pair) == {"multi_turn"}


ASKED = "Which city is the capital?"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "repeats"),
    [
        pytest.param(f"{ASKED} It is Paris.", f" {ASKED}\nLyon, I guess.", f"{ASKED}\n", True, id="both"),
        pytest.param(f"{ASKED} It is Paris.", "Lyon, I guess.", ASKED, False, id="one"),
        pytest.param(f"You ask: {ASKED} Paris.", f"You ask: {ASKED} Lyon.", ASKED, False, id="quoted"),
        pytest.param("Where? It is Paris, I say.", "Where? Some say Lyon.", "Where?", False, id="a word"),
        pytest.param("x" * 20 + "Paris", "x" * 20 + "Lyon?", "x" * 20, True, id="20 characters"),
        pytest.param("x" * 19 + "Paris", "x" * 19 + "Lyon?", "x" * 19, False, id="19 characters"),
    ],
)
def test_responses_that_begin_with_what_was_asked_repeat_the_prompt(chosen, rejected, prompt, repeats):
    assert ("repeats_prompt" in noticed(chosen, rejected, prompt)) == repeats


def test_it_is_the_last_turn_that_may_be_repeated():
    turns = (Message("user", ASKED), Message("assistant", "Paris."), Message("user", "And of the other country?"))
    first = Pair(turns, said(f"{ASKED} Rome, I say."), said(f"{ASKED} Or Milan?"), "x")
    last = Pair(turns, said(f"{turns[-1].text} Rome, I say."), said(f"{turns[-1].text} Or Milan?"), "x")
    assert (names(first), names(last)) == (set(), {"repeats_prompt"})


@pytest.mark.parametrize(
    "marker",
    [
        "\n\nHuman:", "\n\nAssistant:", "[INST]", "[/INST]", "<|assistant|>", "<|user|>", "### Instruction:",
        "### Response:", "<start_of_turn>", "<|im_start|>",
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", ["prompt", "chosen", "rejected"])
def test_what_marks_turns_elsewhere_is_noticed_in_any_text(marker, part):
    assert noticed(**{part: f"Where is it?{marker} In Paris."}) == {"turn_markers"}


@pytest.mark.parametrize(
    "text",
    ["To err is human: so it is.", "a[i] < b | c", "### Result\n\nHumans: many", "# Instructions <user>", "x\n\nhuman"],
)
def test_what_looks_a_little_like_a_mark_is_none(text):
    assert "turn_markers" not in noticed(f"So be it. {text}")


def test_broken_surrogates_are_looked_at_like_any_text():
    assert noticed("\ud800 Париж, я бы сказал, но точно не знаю.", "\udfff It may be Lyon.") <= {"mixed_scripts"}


def test_every_check_of_pairs_has_a_name_and_a_bit_of_its_own_and_those_of_texts_can_be_dropped():
    assert len({check.name for check in PAIR_CHECKS}) == len(PAIR_CHECKS)
    bits = [check.bit for check in PAIR_CHECKS if isinstance(check, FlaggedCheck)]
    assert len(set(bits)) == len(bits)
    assert all(0 <= bit < 32 for bit in bits)
    assert set(DROPPABLE) == {check.name for check in (*COMPARISONS, *TEXT_CHECKS)} - {"shared_prompts"}

"""What is too long loses whole turns of its prompt first; a response stays whole unless a minimum is stated."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.tokens.tokenize import Tokenized
from tests.data.chat_templates import TEMPLATES
from tests.data.tiny_tokenizers import (
    judged,
    marked,
    rendered,
    tokenized,
    tokenizer_of,
    tokenizing,
    tokens_of,
    tokens_within,
)

every_template = pytest.mark.parametrize("name", TEMPLATES)
with_and_without_system = pytest.mark.parametrize(
    ("name", "system"),
    [(name, s) for name in TEMPLATES for s in (False, True) if not s or TEMPLATES[name].system != "refused"],
)


def exchanges(*, system: bool) -> tuple[Message, ...]:
    """Return a prompt of four of the user's turns, each of its own length."""
    turns = [Message("user" if n % 2 == 0 else "assistant", f"Turn {n}: " + "why not? " * (7 - n)) for n in range(7)]
    return (Message("system", "Be brief."), *turns) if system else tuple(turns)


def long_pair(*, system: bool = False, chosen: str = "Because it is so, and so it was.", rejected: str = "No.") -> Pair:
    return Pair(exchanges(system=system), (Message("assistant", chosen),), (Message("assistant", rejected),), "f:1")


def prompts(name: str, messages: tuple[Message, ...]) -> list[list[int]]:
    """Return the prompt's tokens with all of its turns, without the first exchange, and so on."""
    system, turns = (messages[:1], messages[1:]) if messages[0].role == "system" else ((), messages)
    kept = [(*system, *turns[place:]) for place in range(0, len(turns), 2)]
    texts = [rendered(name, some, add_generation_prompt=True).removesuffix(TEMPLATES[name].opens) for some in kept]
    return [tokens_of(name, text) for text in texts]


def fitted(name: str, pair: Pair, max_length: int, **settings: Any) -> Tokenized | BadRow:
    return tokenizing(name, max_length=max_length, on_too_long="truncate", **settings)([pair])[0]


def sizes(name: str, pair: Pair) -> tuple[Tokenized, int]:
    """Return the pair as it is when nothing is too long, and the length of its longer response."""
    whole = tokenized(name, pair)
    return whole, max(len(whole.pair.chosen), len(whole.pair.rejected))


def num_bos(name: str) -> int:
    return 1 if TEMPLATES[name].bos else 0


@with_and_without_system
def test_whole_exchanges_go_from_the_left_and_the_system_message_stays(name, system):
    """What is left of the prompt is what the template makes of the messages that are left: the most that fit."""
    pair = long_pair(system=system)
    whole, longest = sizes(name, pair)
    candidates = prompts(name, pair.prompt)
    assert whole.pair.prompt.tolist() == candidates[0]
    for expected, shorter in itertools.pairwise([*candidates, None]):
        for max_length, prompt in ((len(expected) + longest, expected), (len(expected) + longest - 1, shorter)):
            if prompt is None:
                continue
            found = fitted(name, pair, max_length)
            assert isinstance(found, Tokenized)
            assert found.pair.prompt.tolist() == prompt
            assert (found.truncated, found.responses_cut) == (prompt != candidates[0], 0)
            for part in ("chosen", "rejected"):
                assert getattr(found.pair, part).tolist() == getattr(whole.pair, part).tolist()


def around_last(name, pair, system):
    """Count the tokens of the shortest prompt before the question in it, and those behind."""
    question = (Message("user", "QQ"),)
    left = pair.prompt[:1] + question if system else question
    head, tail = rendered(name, left, add_generation_prompt=True).split("QQ")
    last, before = prompts(name, pair.prompt)[-1], tokens_of(name, head)
    behind = tokens_within(name, tail.removesuffix(TEMPLATES[name].opens))
    return in_common(before, last), in_common(behind[::-1], last[::-1])


def in_common(one, other):
    """Count the tokens with which both begin."""
    return len(list(itertools.takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False))))


@with_and_without_system
def test_a_last_turn_that_is_too_long_loses_its_beginning_and_the_prompt_keeps_its_form(name, system):
    pair = long_pair(system=system)
    whole, longest = sizes(name, pair)
    last, (head, tail) = prompts(name, pair.prompt)[-1], around_last(name, pair, system)
    assert head + tail < len(last)
    for kept in (len(last) - 1, (len(last) + head + tail) // 2, head + tail + 1):
        found = fitted(name, pair, kept + longest)
        assert isinstance(found, Tokenized)
        assert found.truncated
        assert found.pair.prompt.tolist() == last[:head] + last[len(last) - kept + head :]
        assert found.pair.chosen.tolist() == whole.pair.chosen.tolist()
        assert found.pair.rejected.tolist() == whole.pair.rejected.tolist()
    for kept in range(head + tail + 1):
        refused = fitted(name, pair, kept + longest)
        assert isinstance(refused, BadRow)
        assert not refused.structural


LOOKS = {
    "a sign": "':' not in messages[-1].content",
    "a length": "messages[-1].content | length < 5",
    "a part": "messages[-1].content.split(':')[1] + '' == 'none'",
}


@pytest.mark.parametrize("looks", LOOKS)
@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_prompt_whose_end_cannot_be_cut_since_the_template_looks_at_it_is_refused(looks, role):
    last = Message(role, "sum: " + "4 and " * 60)
    pair = Pair((*long_pair().prompt[:1], last), *2 * ((Message("assistant", "8"),),), "f:1")
    text = (
        f"{{%- if add_generation_prompt and ({LOOKS[looks]}) -%}}{{{{- raise_exception('no sum') -}}}}{{%- endif -%}}"
    )
    settings = {"template": text + TEMPLATES["ChatML"].text, "max_length": 60, "on_too_long": "truncate"}
    (found,) = tokenizing("ChatML", **settings)([pair])
    assert isinstance(found, BadRow)
    assert "fails where the last text of the prompt is cut" in found.detail


def test_a_response_is_cut_only_where_the_prompt_alone_does_not_give_way():
    pair = long_pair(chosen="because " * 30)
    _, longest = sizes("ChatML", pair)
    last, (head, tail) = prompts("ChatML", pair.prompt)[-1], around_last("ChatML", pair, False)
    for room in range(head + tail + 1, len(last)):
        found = fitted("ChatML", pair, room + longest, min_response=3)
        assert (len(found.pair.prompt), found.responses_cut) == (room, 0)
    found = fitted("ChatML", pair, head + tail + longest, min_response=3)
    assert (len(found.pair.prompt), len(found.pair.chosen)) == (head + tail + 1, longest - 1)


@every_template
def test_a_response_that_is_too_long_drops_the_row_unless_a_minimum_is_stated(name):
    pair = long_pair(chosen="because " * 100)
    whole, longest = sizes(name, pair)
    refused = fitted(name, pair, longest // 2)
    assert isinstance(refused, BadRow)
    assert not refused.structural
    kept = fitted(name, pair, longest // 2, min_response=8)
    assert isinstance(kept, Tokenized)
    assert kept.responses_cut == 1
    assert kept.pair.chosen.tolist() == whole.pair.chosen[: len(kept.pair.chosen)].tolist()
    assert kept.pair.rejected.tolist() == whole.pair.rejected.tolist()


@every_template
def test_what_is_left_fits_and_no_response_is_shorter_than_the_minimum(name):
    pair = long_pair(chosen="because " * 40, rejected="why " * 20)
    whole, longest = sizes(name, pair)
    last, least = prompts(name, pair.prompt)[-1], 10
    for max_length in range(1, len(last) + longest + 10, 7):
        found = fitted(name, pair, max_length, min_response=least)
        if isinstance(found, BadRow):
            assert max_length < len(last) + least
            assert not found.structural
            continue
        assert max_length > least
        lengths = [len(found.pair.prompt), len(found.pair.chosen), len(found.pair.rejected)]
        assert lengths[0] + max(lengths[1:]) <= max_length
        assert lengths[0] > num_bos(name)
        assert min(lengths[1:]) >= least
        for part in ("chosen", "rejected"):
            tokens = getattr(found.pair, part).tolist()
            assert tokens == getattr(whole.pair, part)[: len(tokens)].tolist()
        cut = (len(found.pair.chosen) < len(whole.pair.chosen)) + (len(found.pair.rejected) < len(whole.pair.rejected))
        assert found.responses_cut == cut
        assert found.responses_cut == 0 or max_length < len(last) + longest
        assert found.truncated == (found.pair.prompt.tolist() != whole.pair.prompt.tolist())


def test_a_response_of_several_turns_is_cut_with_its_gaps():
    """Wherever the cut falls, what is judged of the rest is what was judged of the whole."""
    pair = TEMPLATES["ChatML"].example()
    whole, longest = sizes("ChatML", pair)
    first = prompts("ChatML", pair.prompt)[-1]
    shown = marked("ChatML", [], whole.pair.chosen, whole.pair.chosen_gaps)
    for length in range(1, longest):
        found = fitted("ChatML", pair, len(first) + length, min_response=1)
        assert isinstance(found, Tokenized)
        gaps = found.pair.chosen_gaps
        assert len(judged(found.pair.chosen.tolist(), gaps)) > 0
        edges = [0, *(() if gaps is None else gaps.tolist()), len(found.pair.chosen)]
        assert edges == sorted(edges)
        part = marked("ChatML", [], found.pair.chosen, gaps)
        assert shown.startswith(part.removesuffix("⟧"))


def test_a_prompt_that_begins_with_the_assistant_is_cut_at_the_users_turns():
    greeting = Message("assistant", "Welcome! " * 10)
    pair = long_pair()
    longer = Pair((greeting, *pair.prompt), pair.chosen, pair.rejected, "f:1")
    _, longest = sizes("ChatML", longer)
    for expected in prompts("ChatML", pair.prompt):
        found = fitted("ChatML", longer, len(expected) + longest)
        assert isinstance(found, Tokenized)
        assert found.pair.prompt.tolist() == expected


def test_tool_results_go_with_the_question_that_they_answer():
    """A prompt never begins with a tool's result: what is cut is cut at a user's turn."""
    call, result = Message("assistant", "", extras={"tool_calls": []}), Message("tool", "4 " * 20)
    question = (Message("user", "And why?"),)
    earlier = (Message("user", "Add 2 and 2."), call, result, Message("assistant", "It is four."))
    pair = Pair(earlier + question, (Message("assistant", "So."),), (Message("assistant", "No."),), "f:1")
    whole, longest = sizes("Qwen 3", pair)
    alone = tokens_of("Qwen 3", rendered("Qwen 3", question, add_generation_prompt=True))
    for max_length in (len(whole.pair.prompt) + longest - 1, len(alone) + longest):
        found = fitted("Qwen 3", pair, max_length)
        assert isinstance(found, Tokenized)
        assert found.pair.prompt.tolist() == alone


@pytest.mark.parametrize(("rule", "structural"), [("drop", False), ("error", True)])
@every_template
def test_under_the_other_rules_nothing_is_cut(name, rule, structural):
    pair = long_pair()
    whole, longest = sizes(name, pair)
    max_length = len(whole.pair.prompt) + longest
    (fits,) = tokenizing(name, max_length=max_length, on_too_long=rule)([pair])
    assert isinstance(fits, Tokenized)
    (refused,) = tokenizing(name, max_length=max_length - 1, on_too_long=rule)([pair])
    assert isinstance(refused, BadRow)
    assert (refused.reason, refused.structural) == ("too long", structural)


def test_a_cut_pair_still_says_what_it_was_asked():
    """The last question is what is left longest: read it back."""
    pair = long_pair(system=True)
    _, longest = sizes("Llama 3", pair)
    found = fitted("Llama 3", pair, len(prompts("Llama 3", pair.prompt)[-1]) + longest)
    assert isinstance(found, Tokenized)
    assert tokenizer_of("Llama 3").decode(found.pair.prompt.tolist()) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTurn 6: why not?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )

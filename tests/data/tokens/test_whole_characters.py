"""What is too long is cut between characters: nothing of what is left decodes to the mark of broken text."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.tokens.encoding import TextEncoder
from dpo_cli.data.tokens.tokenize import Tokenized
from tests.data.chat_templates import TEMPLATES
from tests.data.tiny_tokenizers import tokenizer_of, tokens_of
from tests.data.tokens.test_length_rule import around_last, fitted, sizes

BROKEN = "\ufffd"
ENGINES = {"bytes": "ChatML", "pieces": "Mistral"}
every_engine = pytest.mark.parametrize("name", ENGINES.values(), ids=ENGINES)
TEXTS = st.text(st.sampled_from("中文字你好é👩🏽‍🦰🙂𠀀a.1"), min_size=1, max_size=40)


def pair_of(asked: str, chosen: str = "好", rejected: str = "不") -> Pair:
    return Pair((Message("user", asked),), (Message("assistant", chosen),), (Message("assistant", rejected),), "f:1")


def decoded(name: str, tokens) -> str:
    return str(tokenizer_of(name).decode(tokens))


def kept_of(prompt: str) -> str:
    """Return the question within a prompt of ChatML."""
    return prompt.rsplit("user\n", 1)[1].split("<|im_end|>")[0]


def test_the_templates_are_of_both_engines():
    assert {kind: TEMPLATES[name].engine for kind, name in ENGINES.items()} == {kind: kind for kind in ENGINES}


@every_engine
@settings(deadline=None)
@given(asked=TEXTS, chosen=TEXTS, rejected=TEXTS, data=st.data())
def test_whatever_is_cut_no_character_is_parted(name, asked, chosen, rejected, data):
    pair = pair_of(asked, chosen, rejected)
    whole, _ = sizes(name, pair)
    fewest = data.draw(st.none() | st.integers(1, 30), label="min_response")
    longest = len(whole.pair.prompt) + max(len(whole.pair.chosen), len(whole.pair.rejected))
    max_length = data.draw(st.integers(max(2, (fewest or 0) + 1), max(longest, 32)), label="max_length")
    found = fitted(name, pair, max_length, min_response=fewest)
    if isinstance(found, BadRow):
        assume(found.reason != "template error")
        assert found.reason == "response too long"
        return
    responses = found.pair.chosen, found.pair.rejected
    assert min(longest, max_length) - 6 <= len(found.pair.prompt) + max(map(len, responses)) <= max_length
    assert BROKEN not in decoded(name, found.pair.prompt)
    for cut, uncut, said in zip(responses, (whole.pair.chosen, whole.pair.rejected), (chosen, rejected), strict=True):
        assert cut.tolist() == uncut[: len(cut)].tolist()
        assert len(cut) >= min(len(uncut), fewest or len(uncut))
        assert BROKEN not in decoded(name, cut)
        assert (said + TEMPLATES[name].eos).startswith(decoded(name, cut).strip()) or len(cut) == len(uncut)


@settings(deadline=None)
@given(asked=st.text(st.sampled_from(f"中🙂{BROKEN}a"), min_size=3, max_size=30), spare=st.integers(1, 30))
def test_what_is_left_of_a_question_is_its_end_even_where_it_has_the_mark_itself(asked, spare):
    pair = pair_of(asked)
    _, longest = sizes("ChatML", pair)
    head, tail = around_last("ChatML", pair, False)
    found = fitted("ChatML", pair, head + tail + longest + spare)
    if isinstance(found, Tokenized):
        kept = kept_of(decoded("ChatML", found.pair.prompt))
        assert kept
        assert asked.endswith(kept)


@pytest.mark.parametrize(
    "asked", ["🙂" * 20, "中" * 20, BROKEN * 20, f"a{BROKEN}" * 20], ids=["emoji", "Chinese", "marks", "single marks"]
)
@every_engine
def test_as_much_is_left_as_fits(name, asked):
    """Each character more takes as many tokens as it has, and not one of them is wasted on a part of it."""
    pair = pair_of(asked)
    whole, longest = sizes(name, pair)
    head, tail = around_last(name, pair, False)
    width = len(whole.pair.prompt) - head - tail
    for spare in range(1, width):
        found = fitted(name, pair, head + tail + longest + spare)
        if isinstance(found, Tokenized):
            assert spare - 3 <= len(found.pair.prompt) - head - tail <= spare
        else:
            assert spare < 4


def test_a_question_of_which_no_character_fits_is_dropped_unless_a_response_gives_way():
    pair = pair_of("🙂" * 9, chosen="because " * 20)
    _, longest = sizes("ChatML", pair)
    head, tail = around_last("ChatML", pair, False)
    tokens = tokens_of("ChatML", "🙂")
    assert len(tokens) > 1
    too_short = head + tail + longest + len(tokens) - 1
    assert isinstance(fitted("ChatML", pair, too_short), BadRow)
    found = fitted("ChatML", pair, too_short, min_response=1)
    assert isinstance(found, Tokenized)
    assert kept_of(decoded("ChatML", found.pair.prompt)) == "🙂"
    assert (len(found.pair.chosen), found.responses_cut) == (longest - 1, 1)


@every_engine
@settings(deadline=None)
@given(text=TEXTS)
def test_tokens_begin_within_a_character_where_their_bytes_do(name, text):
    """Independent of any decoder: the bytes of each token are read off its name."""
    tokens = TextEncoder(tokenizer_of(name))([text])[0]
    names = tokenizer_of(name).convert_ids_to_tokens(tokens.tolist())
    encode = TextEncoder(tokenizer_of(name))
    for place, token in enumerate(names):
        assert encode.begins_within(tokens[place:]) == (0x80 <= first_byte(token) < 0xC0)


def first_byte(token: str) -> int:
    """Return the first byte of a token that is called as GPT-2 or SentencePiece call theirs."""
    if token.startswith("<0x"):
        return int(token[3:5], 16)
    if token.startswith("▁"):
        return ord(" ")
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    return table.get(token[0], token[0].encode()[0])

"""Texts put together from pieces have the tokens of the whole; where that is not sure, the tokenizer is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from dpo_cli.data.records import Message, Pair
from dpo_cli.data.tokens import encoding as encode
from dpo_cli.data.tokens.encoding import TextEncoder
from dpo_cli.data.tokens.tokenize import PairTokenizer

AWKWARD = [
    "",
    " ",
    "a",
    "two  spaces, three   spaces,    four",
    "  leading and trailing  ",
    "tab\t then\n newline \n\n  and \r\n more\u00a0 hard\u2003 spaces\x1f \x00 end",
    "it's you'll I'VE 'S 'ſ don 't",
    "12345 1 23 456 7, 8.9 - 3.14e-10",
    "<|im_end|> <|im_start|>user\nhello<|im_end|><|im_end|>\n <|im_start|> <|im_sta rt|><|im_start",
    "日本語 の 文 章。 中文没有空格但是很长所以这是一个很长的片段没有任何空格在里面的句子\u3000全角",
    "cafe\u0301 cafe\u0301 \u0301 A\u030a a\u0327\u0301 ;\u037e \u1100\u1161\u11a8 x\u0338 < \u0338",
    "👩‍👩‍👧 emoji🙂 \u202eright to left\u202c ﬁ ligature \ufeff bom \U0001d4d0",
    'punctuation!? ("quoted") — dash… `code` $x^2$ a/b/c http://x.y/z?q=1&r=2 #tag @me \\n',
    "word " * 50 + "supercalifragilisticexpialidocioussupercalifragilisticexpialidocious" * 3,
]
SAID = (("user", "Name two big things."), ("assistant", "one two"), ("assistant", "three"))
TEXTS = st.text(st.sampled_from("ab'sS1 2\n\t\r ,.<|é\u0301\u00a0\u2028日🙂"), max_size=25) | st.text(max_size=15)
LLAMA_3, QWEN_2, QWEN_3_5 = sorted(encode._PATTERNS, key=lambda pattern: ("{1,3}" not in pattern, "M" in pattern))


def split(pattern: str) -> Any:
    step = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([step, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_digits() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


COVERED = {
    "GPT-2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "digits": (None, with_digits()),
    "Llama 3": (None, split(LLAMA_3)),
    "Qwen 2": (normalizers.NFC(), split(QWEN_2)),
    "Qwen 3.5": (normalizers.NFC(), split(QWEN_3_5)),
}


def make(folder, normalizer, pre_tokenizer) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


@pytest.fixture(scope="session", params=COVERED)
def covered(request, tokenizer_folder) -> Any:
    return make(tokenizer_folder, *COVERED[request.param])


def whole(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def assert_as_whole(tokenizer, texts) -> None:
    encoder = TextEncoder(tokenizer)
    for _ in range(2):  # The second time from what is remembered.
        assert [ids.tolist() for ids in encoder(texts)] == [whole(tokenizer, text) for text in texts]
    assert encoder._added is not None


def test_awkward_texts_have_the_tokens_of_the_whole(covered):
    assert_as_whole(covered, AWKWARD)


@given(TEXTS)
def test_any_text_has_the_tokens_of_the_whole(covered, text):
    assert_as_whole(covered, [text])


@given(TEXTS, TEXTS)
def test_a_text_falls_apart_at_its_last_cut_however_it_goes_on(covered, text, more):
    cut = TextEncoder(covered).last_cut(text)
    assert whole(covered, text[:cut]) + whole(covered, text[cut:] + more) == whole(covered, text + more)


def test_a_template_is_cut_behind_its_last_special_token_and_a_sentence_before_its_last_word(tokenizer):
    encoder = TextEncoder(tokenizer)
    assert encoder.last_cut("<|im_start|>user\nhi you<|im_end|>\n<|im_start|>assistant\n") == 46
    assert encoder.last_cut("one two three") == len("one two")
    assert encoder.last_cut("one  two\n three") == len("one")


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda backend: setattr(backend, "pre_tokenizer", split(r"\w+ \w+|.")),
        lambda backend: setattr(backend, "pre_tokenizer", None),
        lambda backend: setattr(backend, "normalizer", normalizers.Prepend("_")),
        lambda backend: setattr(backend.model, "dropout", 0.1),
        lambda backend: backend.add_tokens([AddedToken("<left>", lstrip=True, normalized=False)]),
        lambda backend: backend.add_tokens([AddedToken("<a b>", normalized=False)]),
        lambda backend: backend.add_tokens([AddedToken("<|im_start|>assistant", normalized=False)]),
        lambda backend: backend.add_tokens([AddedToken("late", normalized=True)]),
        lambda backend: backend.enable_truncation(5),
    ],
)
def test_of_any_other_tokenizer_whole_texts_are_asked(tokenizer_folder, change):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    change(tokenizer.backend_tokenizer)
    encoder = TextEncoder(tokenizer)
    assert encoder._added is None
    assert encoder.last_cut("one two <|im_start|> three") == 0
    if not tokenizer.backend_tokenizer.model.dropout:
        assert [ids.tolist() for ids in encoder(AWKWARD)] == [whole(tokenizer, text) for text in AWKWARD]


def test_a_tokenizer_with_ways_of_its_own_is_found_out(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    class Shouting(type(tokenizer)):
        def __call__(self, texts, **settings):
            return super().__call__([text.upper() for text in texts], **settings)

    tokenizer.__class__ = Shouting
    found = TextEncoder(tokenizer)(["hello there"])[0]
    assert np.array_equal(found, tokenizer(["hello there"], add_special_tokens=False)["input_ids"][0])


def test_what_is_remembered_stays_small(tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "_MOST_PIECES", 50)
    encoder = TextEncoder(tokenizer)
    for start in range(0, 1000, 10):
        encoder([f"number {n} and a long one " + "x" * 60 for n in range(start, start + 10)])
        for known in (encoder._beginnings, encoder._words):
            assert 0 < len(known) <= 50
            assert all(len(piece) <= encode._LONGEST_PIECE for piece in known)


def test_of_a_tokenizer_with_ways_of_its_own_the_first_pair_is_made_as_all_others(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    class Stripping(type(tokenizer)):
        def __call__(self, text, **settings):
            stripped = text.strip() if isinstance(text, str) else [part.strip() for part in text]
            return super().__call__(stripped, **settings)

    tokenizer.__class__ = Stripping
    tokenize = PairTokenizer(tokenizer, template="plain", max_length=1000, on_too_long="drop")
    pair = Pair(*((Message(role, text),) for role, text in SAID), origin="f:1")
    [first], [second] = tokenize([pair]), tokenize([pair])
    assert first.pair.prompt.tolist() == second.pair.prompt.tolist()

"""Control tokens that texts spell out stay characters, whatever the tokenizer's engine, or their row is refused."""

from __future__ import annotations

import functools
import json
from collections import Counter

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.tokens.tokenize import PairTokenizer, Tokenized
from tests.conftest import DEMO_PAIRS

MARKS = ["<unk>", "<s>", "</s>", "[SEP]", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
PLAIN = "What does it do?"


def pieces(scheme):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme)


def unigram(scheme, normalizer=None):
    engine = Tokenizer(models.Unigram())
    engine.pre_tokenizer, engine.decoder = pieces(scheme), decoders.Metaspace(prepend_scheme=scheme)
    if normalizer:
        engine.normalizer = normalizer
    return engine, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=MARKS, unk_token="<unk>", show_progress=False, initial_alphabet=ALPHABET
    )


def bpe(pre_tokenizer, **settings):
    engine = Tokenizer(models.BPE(unk_token="<unk>", **settings))
    engine.pre_tokenizer = pre_tokenizer
    return engine, trainers.BpeTrainer(
        vocab_size=600, special_tokens=MARKS, show_progress=False, initial_alphabet=ALPHABET
    )


def word_pieces(pre_tokenizer, **settings):
    engine = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=100))
    engine.normalizer, engine.pre_tokenizer = normalizers.BertNormalizer(**settings), pre_tokenizer
    return engine, trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=MARKS, show_progress=False, initial_alphabet=ALPHABET
    )


def words():
    engine = Tokenizer(models.WordLevel(unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return engine, trainers.WordLevelTrainer(vocab_size=600, special_tokens=MARKS, show_progress=False)


def on_bytes():
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return engine, trainers.BpeTrainer(
        vocab_size=600, special_tokens=MARKS, show_progress=False, initial_alphabet=alphabet
    )


ALPHABET = [chr(code) for code in range(32, 127)]
ENGINES = {
    "byte-level BPE": on_bytes,
    "BPE, a space before": lambda: bpe(pieces("always")),
    "BPE, a space before the first": lambda: bpe(pieces("first")),
    "BPE, no space before": lambda: bpe(pieces("never")),
    "BPE that looks words up": lambda: bpe(pre_tokenizers.WhitespaceSplit(), ignore_merges=True),
    "Unigram, a space before": lambda: unigram("always"),
    "Unigram, a space before the first": lambda: unigram("first"),
    "Unigram, no space before": lambda: unigram("never"),
    "Unigram, normalized": lambda: unigram("always", normalizers.NFKC()),
    "WordPiece": lambda: word_pieces(pre_tokenizers.BertPreTokenizer(), lowercase=False),
    "WordPiece, small letters": lambda: word_pieces(pre_tokenizers.BertPreTokenizer(), lowercase=True),
    "WordPiece of whole words": lambda: word_pieces(pre_tokenizers.WhitespaceSplit(), lowercase=False),
    "whole words": words,
}
SPELLING = [name for name in ENGINES if name != "whole words"]


@functools.cache
def tokenizer_of(name):
    engine, trainer = ENGINES[name]()
    rows = map(json.loads, DEMO_PAIRS.read_text(encoding="utf-8").splitlines())
    texts = ["\n".join(row.values()) for row in rows][:60]
    # A word piece within a word is another than at its beginning.
    engine.train_from_iterator([*texts, " ".join(f"x{letter}" for letter in ALPHABET[1:])], trainer)
    assert engine.token_to_id("</s>") is not None
    engine.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=engine,
        eos_token="</s>",
        unk_token=None if name == "byte-level BPE" else "<unk>",
        chat_template=TEMPLATE,
    )


def result_of(name, prompt, chosen, rejected="No."):
    tokenize = PairTokenizer(tokenizer_of(name), template=None, max_length=10_000, on_too_long="error")
    said = Message("user", prompt), Message("assistant", chosen), Message("assistant", rejected)
    (found,) = tokenize([Pair(said[:1], said[1:2], said[2:], "f:1")])
    return found


def control(name, found):
    """Count the control tokens of a pair, by its tokens alone."""
    ids = dict(zip(tokenizer_of(name).convert_tokens_to_ids(MARKS), MARKS, strict=True))
    return [
        Counter(ids[token] for token in tokens.tolist() if token in ids and ids[token] != "<unk>")
        for tokens in (found.pair.prompt, found.pair.chosen, found.pair.rejected)
    ]


def as_template_writes(name):
    return control(name, result_of(name, PLAIN, "It ends a text."))


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("text", ["{}", "What does {} do?", "a{}b", "{}{}", "\n{} ", "x {}"])
@pytest.mark.parametrize("name", SPELLING)
def test_a_control_token_that_is_spelled_is_characters(name, mark, text):
    said = text.replace("{}", mark)
    found = result_of(name, said, f"{said}?")
    assert isinstance(found, Tokenized), found.detail
    assert found.literals == 2 * text.count("{}")
    assert control(name, found) == as_template_writes(name)
    assert tokenizer_of(name).convert_tokens_to_ids("<unk>") not in found.pair.chosen.tolist()


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("name", [name for name in SPELLING if not name.startswith("WordPiece")])
def test_its_characters_are_read_back(name, mark):
    found = result_of(name, f"What does{mark}do?", f"The token{mark} ends{mark}it.")
    spelled = tokenizer_of(name).convert_ids_to_tokens(found.pair.chosen.tolist())
    read = "".join(spelled).translate(str.maketrans("▁Ġ", "  "))
    assert read.endswith(f"token{mark} ends{mark}it.</s>" if "words up" not in name else f"ends{mark}it.</s>")


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("where", [0, 1, 2])
def test_where_a_tokenizer_has_no_such_characters_the_row_is_refused_with_that_reason(mark, where):
    said = ["x", "y", "z"]
    said[where] = f"The {mark} ends"
    found = result_of("whole words", *said)
    assert isinstance(found, BadRow)
    assert (found.reason, found.structural) == ("control token", True)
    assert f"the characters of `{mark}`" in found.detail


@pytest.mark.parametrize("text", ["＜/s＞", "It ends with \uff3bSEP\uff3d"])
def test_a_text_that_only_normalizing_makes_a_control_token_is_refused(text):
    found = result_of("Unigram, normalized", PLAIN, text)
    assert isinstance(found, BadRow)
    assert found.reason == "control token"
    other = result_of("Unigram, no space before", PLAIN, text)
    assert isinstance(other, Tokenized)
    assert control("Unigram, no space before", other) == as_template_writes("Unigram, no space before")

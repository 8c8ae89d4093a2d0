"""A tokenizer in a GGUF file gives texts the tokens that it was trained with, in every reader that knows the format."""

from __future__ import annotations

import contextlib
import copy
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_cli.modeling.gguf.tokenizers import ends_of, tokenizer_of
from dpo_cli.modeling.gguf.vocabulary import Inexpressible, Vocabulary
from dpo_cli.modeling.gguf.vocabulary_texts import (
    PLAIN_TEXTS,
    differing,
    encode,
    same_in_llama_cpp,
    with_special,
)
from tests.modeling.gguf.families import BYTE_LEVEL, CHATML, FAMILIES, WORDS, byte_level, family, llama_2, mistral

DECOMPOSED_TEXTS = (unicodedata.normalize("NFD", "Éclair naïve Ångström 각"), "x̂ + ŷ = z̸")

CONVERSATION = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": " What's 12 + 30?\n\n"},
    {"role": "assistant", "content": "42."},
    {"role": "user", "content": "Sure?"},
]


def write(folder: Path, tokenizer: Any, size: int | None = None, stops: tuple[int, ...] = (), name: str = "x") -> Path:
    """Write a file that holds a vocabulary alone."""
    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    vocabulary = Vocabulary.of(tokenizer, size or len(tokenizer) + 3, stops)
    writer.add_name(vocabulary.name_for(name))
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "vocabulary.gguf"


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def check_vocabulary_read(tokenizer: Any, found: Callable[[str], list[int]], texts: Sequence[str] = ()) -> list[str]:
    """Return the texts that a reader gives other tokens: plain ones as questions where there is a template."""
    plain = same_in_llama_cpp(tokenizer, PLAIN_TEXTS)
    if tokenizer.chat_template:
        turns = ([{"role": "user", "content": text}] for text in plain)
        plain = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in turns]
    plain += with_special(tokenizer)
    return differing(encode(tokenizer), found, same_in_llama_cpp(tokenizer, [*texts, *plain]))


@contextlib.contextmanager
def in_llama_cpp(file: Path) -> Iterator[Any]:
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    try:
        yield opened
    finally:
        opened.close()


def rendered(tokenizer: Any) -> list[str]:
    turns = CONVERSATION[1:] if "no system" in tokenizer.chat_template else CONVERSATION
    return [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_written_vocabulary_reads_texts_as_its_tokenizer_does(tmp_path: Path, name: str) -> None:
    tokenizer = family(name)
    read = tokenizer_of(write(tmp_path, tokenizer))
    assert check_vocabulary_read(tokenizer, encode(read), rendered(tokenizer)) == []
    assert read.chat_template == tokenizer.chat_template
    assert (read.eos_token, read.bos_token) == (tokenizer.eos_token, tokenizer.bos_token)
    tokens = encode(tokenizer)(rendered(tokenizer)[0])
    assert read.decode(tokens) == tokenizer.decode(tokens)


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_reads_texts_as_the_tokenizer_does(tmp_path: Path, name: str) -> None:
    tokenizer = family(name)
    with in_llama_cpp(write(tmp_path, tokenizer)) as opened:

        def tokens(text: str) -> list[int]:
            found: list[int] = opened.tokenize(text.encode(), add_bos=False, special=True)
            return found

        assert check_vocabulary_read(tokenizer, tokens, rendered(tokenizer)) == []
        assert opened.token_eos() == tokenizer.eos_token_id
        chat = tokens(rendered(tokenizer)[0])
        written = opened.tokenize(rendered(tokenizer)[0].removeprefix("<s>").encode(), add_bos=True, special=True)
        # With the setting for the bos token, a reader that takes it from the template adds none of its own.
        assert name not in ("Llama 2", "Mistral v0.3") or written == chat


@pytest.mark.parametrize("name", ["GPT-2", "SmolLM", "Llama 3", "Llama 2", "Phi-3"])
def test_a_reader_reads_plain_texts_the_same_too(tmp_path: Path, name: str) -> None:
    tokenizer = family(name)
    read = tokenizer_of(write(tmp_path, tokenizer))
    texts = [*PLAIN_TEXTS, *DECOMPOSED_TEXTS]
    assert [encode(read)(text) for text in texts] == [encode(tokenizer)(text) for text in texts]


def test_characters_are_composed_again_where_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer, text = family("Qwen 2"), DECOMPOSED_TEXTS[0]
    composed = unicodedata.normalize("NFC", text)
    file = write(tmp_path, tokenizer)
    assert encode(tokenizer_of(file))(text) == encode(tokenizer)(composed)
    with in_llama_cpp(file) as opened:
        found = [opened.tokenize(one.encode(), add_bos=False, special=True) for one in (text, composed)]
        # llama.cpp leaves characters as they are, which the page on exports says.
        assert found[0] != found[1] == encode(tokenizer)(composed)


def test_transformers_reads_the_vocabularies_it_knows(tmp_path: Path) -> None:
    """Its own reader splits numbers of SmolLM's otherwise, which is why ours is another."""
    for name, same in (("GPT-2", True), ("Llama 3", True), ("SmolLM", False)):
        tokenizer = family(name)
        file = write(tmp_path, tokenizer)
        theirs = encode(AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name))
        differing = [text for text in PLAIN_TEXTS if theirs(text) != encode(tokenizer)(text)]
        assert (not differing) == same, name


@pytest.mark.parametrize("name", ["Llama 2", "GPT-2", "Gemma"])
def test_what_is_around_a_text_stays(tmp_path: Path, name: str) -> None:
    tokenizer = family(name)
    read = tokenizer_of(write(tmp_path, tokenizer))
    for text in ("Hello you", "", "a\nb"):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert read(text, text)["input_ids"] == tokenizer(text, text)["input_ids"]


def test_the_bos_token_goes_with_the_template(tmp_path: Path) -> None:
    """A tokenizer that adds one, trained with a template that has none: a reader would put it before the prompt."""
    for template, expected in ((None, True), ("{{ bos_token }}" + CHATML, True), (CHATML, False)):
        tokenizer = llama_2(chat_template=template)
        fields = fields_of(write(tmp_path, tokenizer))
        assert fields["tokenizer.ggml.add_bos_token"] is expected
        assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id


def test_tokens_without_an_embedding_are_refused_and_embeddings_without_a_token_are_unused(tmp_path: Path) -> None:
    tokenizer = family("SmolLM")
    with pytest.raises(Inexpressible, match="tokens of which the model has only 10"):
        write(tmp_path, tokenizer, size=10)
    size = len(tokenizer) + 5
    fields = fields_of(write(tmp_path, tokenizer, size=size))
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == size
    assert fields["tokenizer.ggml.token_type"][-6:] == [4, 5, 5, 5, 5, 5]
    assert len(set(fields["tokenizer.ggml.tokens"])) == size


def test_a_filler_is_no_token_that_is_there_already(tmp_path: Path) -> None:
    tokenizer = byte_level(None, WORDS)
    filler = f"[PAD{len(tokenizer) + 1}]"
    tokenizer.add_tokens([filler])
    fields = fields_of(write(tmp_path, tokenizer, size=len(tokenizer) + 2))
    assert len(set(fields["tokenizer.ggml.tokens"])) == len(fields["tokenizer.ggml.tokens"])


def test_special_tokens_are_control_tokens_and_others_user_defined(tmp_path: Path) -> None:
    tokenizer = family("GPT-2")
    fields = fields_of(write(tmp_path, tokenizer))
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    kinds = {name: types[name] for name in ("<|im_end|>", "<|endoftext|>", "<think>", "two words", "a")}
    assert kinds == {"<|im_end|>": 3, "<|endoftext|>": 3, "<think>": 4, "two words": 4, "a": 1}
    fields = fields_of(write(tmp_path, family("Llama 2")))
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert (types["<unk>"], types["<s>"], types["<0x0A>"]) == (2, 3, 6)


def test_tokens_that_end_an_answer(tmp_path: Path) -> None:
    tokenizer = byte_level(None, WORDS)
    tokenizer.add_tokens([AddedToken(f"<end{n}>", special=True) for n in range(3)])
    eos, *others = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<end0>", "<end1>", "<end2>"])
    file = write(tmp_path, tokenizer, stops=(*others[1:3], eos))
    fields = fields_of(file)
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [eos, *others[1:3]]
    assert ends_of(file) == [eos, *others[1:3]]
    with in_llama_cpp(file) as opened:
        import llama_cpp

        vocabulary = llama_cpp.llama_model_get_vocab(opened.model)
        ending = [llama_cpp.llama_vocab_is_eog(vocabulary, end) for end in (eos, *others[1:])]
        assert ending == [True, True, True, False]
    fields = fields_of(write(tmp_path, tokenizer, stops=(others[1],)))
    assert fields["tokenizer.ggml.eos_token_id"] == others[1]
    with pytest.raises(Inexpressible, match="more than three tokens that end an answer"):
        Vocabulary.of(tokenizer, stops=(eos, *others))


def test_templates_by_name_stay(tmp_path: Path) -> None:
    tokenizer = byte_level(None, WORDS)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    file = write(tmp_path, tokenizer)
    assert fields_of(file)["tokenizer.chat_template"] == CHATML
    assert tokenizer_of(file).chat_template == tokenizer.chat_template


def test_splits_that_keep_what_they_match_are_the_same(tmp_path: Path) -> None:
    """Some files of the same family part a text at what is not matched, which is nothing."""
    removed = pre_tokenizers.Split(Regex(json.loads(family("Qwen 2").backend_tokenizer.to_str())["pre_tokenizer"][
        "pretokenizers"][0]["pattern"]["Regex"]), "removed", invert=True)  # fmt: skip
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = byte_level(normalizers.NFC(), pre_tokenizers.Sequence([removed, pieces]))
    assert fields_of(write(tmp_path, tokenizer))["tokenizer.ggml.pre"] == "qwen2"
    assert check_vocabulary_read(tokenizer, encode(tokenizer_of(tmp_path / "vocabulary.gguf"))) == []


def test_words_taken_whole_make_no_difference_where_merges_make_them_all(tmp_path: Path) -> None:
    normalizer, pre_tokenizer, _ = BYTE_LEVEL["GPT-2"]
    tokenizer = byte_level(normalizer, pre_tokenizer, whole_words=True)
    assert Vocabulary.of(tokenizer)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    # With a token that merges do not make, it is read as a whole by the one and not by the other.
    words["model"]["vocab"]["answerer"] = len(tokenizer)
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), eos_token="<|im_end|>")
    with pytest.raises(Inexpressible, match="taken whole"):
        Vocabulary.of(changed)


def odd_merges() -> Any:
    words = json.loads(llama_2().backend_tokenizer.to_str())
    words["model"]["merges"] = words["model"]["merges"][1:]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), eos_token="</s>")


def without_bytes() -> Any:
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")


def of_words() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), eos_token="b")


def unigram() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)])), eos_token="b")


def with_added(**how: bool) -> Any:
    tokenizer = byte_level(None, WORDS)
    tokenizer.add_tokens([AddedToken("<odd>", **how)])
    return tokenizer


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown split": (lambda: byte_level(None, pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{L}+|\P{L}+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])),
        r"the pre-tokenizer Split\('\\\\p{L}\+"),
    "space before": (lambda: byte_level(None, pre_tokenizers.ByteLevel(True)), "add_prefix_space=True"),
    "white space": (lambda: byte_level(None, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), WORDS])),
        "the pre-tokenizer WhitespaceSplit"),
    "lower case": (lambda: byte_level(normalizers.Lowercase(), WORDS), "the normalizer Lowercase"),
    "NFKC": (lambda: byte_level(normalizers.NFKC(), WORDS), "the normalizer NFKC"),
    "merges out of order": (odd_merges, "never join|sooner or later"),
    "no bytes": (without_bytes, "without the bytes <0x00>, <0x01>, <0x02>"),
    "words": (of_words, "a vocabulary of the kind WordLevel"),
    "unigram": (unigram, "a vocabulary of the kind Unigram"),
    "strips left": (lambda: with_added(lstrip=True), "white space around them .*`<odd>`"),
    "strips right": (lambda: with_added(rstrip=True), "white space around them .*`<odd>`"),
    "whole words": (lambda: with_added(single_word=True), "white space around them .*`<odd>`"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_file_can_say_is_refused_by_its_name(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(Inexpressible, match=words):
        Vocabulary.of(make())


def test_a_reader_that_differs_is_caught(tmp_path: Path) -> None:
    """Ten plants in what is read: each is seen by the texts that are compared."""
    tokenizer = family("Llama 3")
    words = json.loads(tokenizer.backend_tokenizer.to_str())

    def changed(change: Callable[[dict[str, Any]], None]) -> list[str]:
        other = copy.deepcopy(words)
        change(other)
        engine = Tokenizer.from_str(json.dumps(other))
        return check_vocabulary_read(tokenizer, lambda text: engine.encode(text, add_special_tokens=False).ids)

    def swap(other: dict[str, Any]) -> None:
        vocabulary = other["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    parts = {name: json.loads(family(name).backend_tokenizer.to_str())["pre_tokenizer"] for name in BYTE_LEVEL}
    assert changed(lambda other: None) == []
    assert changed(swap)
    assert changed(lambda other: other["model"].update(merges=other["model"]["merges"][:100], ignore_merges=False))
    assert changed(lambda other: other["model"]["merges"].reverse())
    assert changed(lambda other: other["added_tokens"].pop(1))
    for name in ("GPT-2", "SmolLM", "Qwen 2", "GPT-4o", "Falcon", "Mistral Nemo"):
        assert changed(lambda other, name=name: other.update(pre_tokenizer=parts[name])), name


def test_texts_that_llama_cpp_reads_otherwise_are_known() -> None:
    decomposed, hindi, plain = "e\u0301", "हिन्दी", "é, 日本"
    for name, expected in {
        "GPT-2": [decomposed, hindi, plain],
        "Qwen 2": [hindi, plain],
        "Mistral Nemo": [plain],
        "GPT-4o": [plain],
        "Llama 2": [decomposed, hindi, plain],
    }.items():
        assert same_in_llama_cpp(family(name), [decomposed, hindi, plain]) == expected, name


def test_a_name_makes_llama_cpp_strip_where_the_tokenizer_does() -> None:
    def named(tokenizer: str, name: str) -> str:
        return Vocabulary.of(family(tokenizer)).name_for(name)

    assert named("Phi-3", "mine") == "mine (Phi-3)"
    assert named("Phi-3", "my-phi-3") == "my-phi-3"
    assert named("GPT-2", "beats-Phi-3") == "beats-phi 3"
    assert named("GPT-2", "Mine") == "Mine"


def test_a_tokenizer_that_begins_texts_with_a_space_is_written_by_its_template(tmp_path: Path) -> None:
    for tokenizer, expected in ((mistral(), False), (mistral(chat_template=None), True)):
        fields = fields_of(write(tmp_path, tokenizer))
        assert fields["tokenizer.ggml.add_space_prefix"] is expected
        read = tokenizer_of(tmp_path / "vocabulary.gguf")
        assert check_vocabulary_read(tokenizer, encode(read)) == []

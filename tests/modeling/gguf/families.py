"""Small tokenizers with the structure of well-known ones, in the words of `tokenizers` and transformers themselves."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN_2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN_3_5
from transformers.tokenization_utils_base import generate_merges

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (s if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
PIECES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)

_TEXTS = (
    "The answer isn't 42, it's 1,234.5 -- they've said so; I'll see what we'd do in 2024 and 100000 times again.",
    "  def f(x):\n        return [x ** 2 for x in range(10)]\n\n\n    # done\t\tnow   and   then",
    "今日は天気がいいですね。你好世界，这是中文。안녕하세요 여러분 ¿Cómo estás? Größe, Ärger, naïve Übung",
    "🙂🙂👍 emoji 👩‍👩‍👧 e\u0301te\u0301 x\u0302 ŷ \u0644\u0627 \u0647\u0630\u0627 привет мир",
    "camelCaseWords HTTPServer",
    "https://example.org/path?query=1&other=2 <div class='x'>&nbsp;</div> $100 50% #1 @you [INST] <<SYS>> [/INST]",
)


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(one), "isolated") for one in patterns), PIECES])


BYTE_LEVEL: dict[str, tuple[Any, Any, bool]] = {
    "GPT-2": (None, WORDS, False),
    "Pythia": (normalizers.NFC(), WORDS, False),
    "SmolLM": (None, pre_tokenizers.Sequence([DIGITS, WORDS]), False),
    "Command R": (normalizers.NFC(), pre_tokenizers.Sequence([DIGITS, WORDS]), False),
    "Llama 3": (None, split(theirs._LLAMA3_SPLIT), True),
    "DBRX": (None, split(theirs._LLAMA3_SPLIT), False),
    "Qwen 2": (normalizers.NFC(), split(QWEN_2), False),
    "StableLM 2": (None, split(QWEN_2), False),
    "Qwen 3.5": (normalizers.NFC(), split(QWEN_3_5), False),
    "Mistral Nemo": (None, split(theirs._TEKKEN_SPLIT), True),
    "GPT-4o": (None, split(theirs._GPT4O_SPLIT), False),
    "Falcon": (
        None,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"), WORDS, pre_tokenizers.Digits(individual_digits=False),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        ),
        False,
    ),
    "DeepSeek Coder": (
        None,
        pre_tokenizers.Sequence(
            [
                *(
                    pre_tokenizers.Split(Regex(one), "isolated")
                    for one in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
                ),
                DIGITS, PIECES,
            ]
        ),
        False,
    ),
}  # fmt: skip
"""By family: normalizer, pre-tokenizer, and whether words of the vocabulary are taken whole."""

FAMILIES = (*BYTE_LEVEL, "Llama 2", "Mistral v0.1", "Mistral v0.3", "Gemma", "Phi-3")


@functools.cache
def family(name: str) -> Any:
    """Return a tokenizer of a family, with its chat template."""
    if name in BYTE_LEVEL:
        return byte_level(*BYTE_LEVEL[name])
    made = {"Llama 2": llama_2, "Mistral v0.1": mistral_of_equals, "Mistral v0.3": mistral, "Gemma": gemma}
    return {**made, "Phi-3": phi_3}[name]()


def byte_level(normalizer: Any, pre_tokenizer: Any, whole_words: bool = False, size: int = 900) -> Any:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("two words", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHATML
    )


def llama_2(**settings: Any) -> Any:
    """A tokenizer that puts a space before every text behind a special token, as Llama 2 and Mistral v0.1 do."""
    tokenizer = mistral(**settings)
    engine = tokenizer.backend_tokenizer
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.pre_tokenizer = None
    return tokenizer


def mistral(chat_template: str | None = LLAMA_2, vocabulary: Any = None) -> Any:
    """A tokenizer that puts a space before the text as a whole, if it begins with a word."""
    tokens, merges = vocabulary or pieces(("<unk>", "<s>", "</s>"))
    return LlamaTokenizer(vocab=tokens, merges=merges, add_bos_token=True, chat_template=chat_template)


def mistral_of_equals() -> Any:
    """Llama 2's with runs of spaces that have the same score, the least of all: their merges are made in turns."""
    vocabulary, _ = pieces(("<unk>", "<s>", "</s>"))
    scores = {token: -1e9 if set(token) == {"▁"} else -float(place) for token, place in vocabulary.items()}
    merges = generate_merges(vocabulary, scores, skip_tokens=[*vocabulary][: 3 + 256])
    return llama_2(vocabulary=(vocabulary, merges))


def gemma() -> Any:
    vocabulary, merges = pieces(("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"))
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, chat_template=GEMMA)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    return tokenizer


def phi_3() -> Any:
    """Llama 2's with special tokens that swallow the white space behind them."""
    tokenizer = llama_2(chat_template=PHI_3)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    place = len(words["model"]["vocab"])
    for token in ("<|endoftext|>", "<|assistant|>", "<|user|>", "<|system|>", "<|end|>"):
        one = {"content": token, "single_word": False, "lstrip": False, "normalized": False, "special": True}
        words["added_tokens"].append({"id": place, "rstrip": token != "<|endoftext|>", **one})
        place += 1
    for one in words["added_tokens"]:
        one["rstrip"] = one["rstrip"] or one["content"] == "</s>"
    words["post_processor"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(words)),
        bos_token="<s>", eos_token="<|end|>", unk_token="<unk>", chat_template=PHI_3,
    )  # fmt: skip


@functools.cache
def pieces(special: Sequence[str], size: int = 900) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary of a SentencePiece model, with bytes and runs of spaces, and its merges."""
    first = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *("▁" * length for length in range(16, 1, -1))]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(_TEXTS, trainers.BpeTrainer(vocab_size=size, show_progress=False, min_frequency=1))
    found = json.loads(trained.to_str())["model"]
    joined = ["".join(merge) for merge in found["merges"]]
    ordered = list(dict.fromkeys([*first, *joined, *found["vocab"]]))
    vocabulary = {token: place for place, token in enumerate(ordered)}
    scores = {token: -float(place) for token, place in vocabulary.items()}
    return vocabulary, generate_merges(vocabulary, scores, skip_tokens=ordered[: len(special) + 256])

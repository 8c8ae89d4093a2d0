"""A tokenizer as the vocabulary of a GGUF file, or why it cannot be one: nothing of it is guessed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from dpo_cli.data.tokens.chat_template import DEFAULT, named_templates
from dpo_cli.modeling.gguf.conversations import conversations, probes, written
from dpo_cli.modeling.gguf.header import add_key
from dpo_cli.modeling.gguf.pre_tokenizers import described, found_in, name_of
from dpo_cli.modeling.gguf.tokenizers import (
    BYTE,
    BYTE_LEVEL,
    CONTROL,
    ENDS,
    NORMAL,
    SENTENCE_PIECE,
    SPACE,
    SPECIAL,
    TEMPLATE,
    TEMPLATES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    is_phi_3,
    pairs_of,
    tokenizer_from,
)
from dpo_cli.modeling.gguf.vocabulary_texts import PLAIN_TEXTS, differing, encode, same_in_llama_cpp

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_METASPACE = ("Metaspace", SPACE, False)
_PHI_3 = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
"""What llama.cpp asks for in a vocabulary of Phi-3."""


class Inexpressible(ValueError):
    """What a tokenizer does and a GGUF file cannot say."""

    def __str__(self) -> str:
        """Say so in a sentence."""
        return f"GGUF files and llama.cpp have nothing for {super().__str__()}"


@dataclass(frozen=True)
class _Words:
    """A tokenizer's own description, taken apart.

    Attributes:
        whole: Its `tokenizer.json`.
        tokens: The tokens by id; `None` where an id has none.
        added: Tokens that are found in a text before anything else, by id.
    """

    whole: Mapping[str, Any]
    tokens: Sequence[str | None]
    added: Mapping[int, Mapping[str, Any]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> _Words:
        engine = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(engine, Tokenizer):
            raise Inexpressible(f"a tokenizer without a `tokenizer.json` ({type(tokenizer).__name__})")
        whole = json.loads(engine.to_str())
        known = engine.get_vocab(with_added_tokens=True)
        most = max(known.values(), default=-1) + 1
        if size is not None and most > size:
            raise Inexpressible(f"{most:,} tokens of which the model has only {size:,}")
        tokens: list[str | None] = [None] * (most if size is None else size)
        for token, place in known.items():
            tokens[place] = token
        return cls(whole, tokens, {one["id"]: one for one in whole["added_tokens"]})

    @property
    def model(self) -> Mapping[str, Any]:
        """What merges."""
        found: Mapping[str, Any] = self.whole["model"]
        return found

    def merges(self) -> list[tuple[str, str]]:
        """Return the pairs that are merged, the first of them first."""
        pairs = (one.split(" ", 1) if isinstance(one, str) else one for one in self.model["merges"])
        return [(first, second) for first, second in pairs]


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file has about a tokenizer.

    Attributes:
        fields: By names without `tokenizer.`.
        swallows: Whether special tokens take the white space behind them as those of Phi-3 do.
    """

    fields: Mapping[str, Any]
    swallows: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int | None = None, stops: Collection[int] = ()) -> Vocabulary:
        """Take it from a tokenizer, which takes seconds where there are many tokens.

        Args:
            tokenizer: A Hugging Face tokenizer.
            size: How many tokens the model has embeddings for; those beyond the tokenizer are unused. None: as many as
                the tokenizer has.
            stops: The tokens that end an answer.

        Raises:
            Inexpressible: A GGUF file cannot say what this tokenizer does.
        """
        words = _Words.of(tokenizer, size)
        _check_added(words)
        kind = _sentence_piece if words.model.get("byte_fallback") else _byte_level
        if words.model["type"] != "BPE":
            raise Inexpressible(f"a vocabulary of the kind {words.model['type']}")
        common = {**_marks(tokenizer), **_ends(tokenizer, stops), **_templates(tokenizer)}
        choices = [{**_with_unknown(fields, tokenizer), **common} for fields in kind(words)]
        return cls(_settled(tokenizer, words, choices), _swallows(words))

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it into a GGUF file."""
        for name, value in self.fields.items():
            # The package writes no array without elements.
            if value != []:
                add_key(writer, f"tokenizer.{name}", value)

    def name_for(self, name: str) -> str:
        """Return a model's name so that llama.cpp treats its special tokens as the tokenizer does.

        llama.cpp lets special tokens swallow the white space behind them where a model's name has `phi-3` in it, and
        fails there if its vocabulary is not that of Phi-3.
        """
        if self.swallows and not is_phi_3(name):
            return f"{name} (Phi-3)"
        if is_phi_3(name) and not self.swallows:
            return name.lower().replace("phi-3", "phi 3").replace("phi3", "phi 3")
        return name


def _with_unknown(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a vocabulary in which the token for what is not known is of that type, as in those of SentencePiece."""
    if fields["ggml.model"] == SENTENCE_PIECE and tokenizer.unk_token_id is not None:
        fields["ggml.token_type"][tokenizer.unk_token_id] = UNKNOWN
    return fields


def _settled(tokenizer: PreTrainedTokenizerBase, words: _Words, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first of several vocabularies that gives conversations, or else plain texts, their tokens."""
    name = "phi-3" if _swallows(words) else ""
    texts = probes(tokenizer) or same_in_llama_cpp(tokenizer, PLAIN_TEXTS)
    found: list[str] = []
    for fields in choices:
        found = differing(encode(tokenizer), encode(tokenizer_from(fields, name=name)), texts)
        if not found:
            return fields
    raise Inexpressible(f"how the tokenizer treats spaces around special tokens: it would read {found[0]!r} otherwise")


def _check_added(words: _Words) -> None:
    """Refuse added tokens that are found in a text in ways of their own.

    Raises:
        Inexpressible: There are some.
    """
    strict = [one for one in words.added.values() if one["lstrip"] or one["single_word"]]
    if any(one["rstrip"] for one in words.added.values()) and not _swallows(words):
        strict += [one for one in words.added.values() if one["rstrip"]]
    if strict:
        named = ", ".join(f"`{one['content']}`" for one in strict[:3])
        raise Inexpressible(f"added tokens that take white space around them or whole words alone ({named})")


def _swallows(words: _Words) -> bool:
    """Tell whether special tokens take the white space behind them as those of Phi-3 do."""
    return any(one["rstrip"] for one in words.added.values()) and {*words.tokens} >= _PHI_3


def _byte_level(words: _Words) -> list[dict[str, Any]]:
    """Return the vocabulary of a byte-level tokenizer."""
    found = found_in(words.whole)
    if isinstance(found, str):
        raise Inexpressible(found)
    if any(words.model.get(part) for part in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise Inexpressible("a mark on tokens within or at the end of words")
    if words.model.get("unk_token") and not {*ByteLevel.alphabet()} <= words.model["vocab"].keys():
        raise Inexpressible("a vocabulary that has not all bytes and a token for those that it does not know")
    name = name_of(found) or name_of(found, either=_reaches_all(words))
    if name is None:
        raise Inexpressible(f"the pre-tokenizer {described(found)}")
    tokens, types = _listed(words, lambda token: NORMAL)
    merges = [f"{first} {second}" for first, second in words.merges()]
    fields = {"ggml.model": BYTE_LEVEL, "ggml.pre": name, "ggml.tokens": tokens, "ggml.token_type": types}
    return [{**fields, "ggml.merges": merges}]


def _reaches_all(words: _Words) -> bool:
    """Tell whether merges make every token of its letters, so that taking words whole makes no difference."""
    model = {**words.model, "ignore_merges": False, "dropout": None}
    engine = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    added = {one["content"] for one in words.added.values()}
    return all(len(engine.model.tokenize(token)) == 1 for token in model["vocab"] if token not in added)


def _sentence_piece(words: _Words) -> list[dict[str, Any]]:
    """Return the vocabularies that one of characters and bytes may be: with a space before texts, and without."""
    model = words.model
    if any(model.get(part) for part in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")):
        raise Inexpressible("words of a vocabulary with bytes that are taken whole or marked")
    if missing := [byte for byte in _BYTES if byte not in model["vocab"]]:
        raise Inexpressible(f"a vocabulary without the bytes {', '.join(missing[:3])}")
    starts = _starts(words.whole)
    scores = _scores(words)
    tokens, types = _listed(words, lambda token: BYTE if token in _BYTES else NORMAL)
    fields = {
        "ggml.model": SENTENCE_PIECE,
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.scores": [scores.get(token, 0.0) for token in tokens],
        "ggml.token_type": types,
        # llama.cpp merges by the scores; transformers takes merges where there are some.
        "ggml.merges": [f"{first} {second}" for first, second in words.merges()],
        "ggml.remove_extra_whitespaces": False,
    }
    return [{**fields, "ggml.add_space_prefix": start} for start in starts]


def _starts(whole: Mapping[str, Any]) -> list[bool]:
    """Return whether a text may begin with a space, the likelier first.

    Raises:
        Inexpressible: Its characters are changed or parted otherwise.
    """
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    start = {"type": "Prepend", "prepend": SPACE}
    apart = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    normal, parted = whole.get("normalizer"), whole.get("pre_tokenizer")
    steps = normal["normalizers"] if normal and normal["type"] == "Sequence" else [normal]
    if parted in (None, apart) and steps == [start, spaces]:
        return [True]
    if parted in (None, apart) and steps == [spaces]:
        # Behind the replacement there are no spaces to part at.
        return [False]
    if normal is None and parted and (parted["type"], parted.get("replacement"), parted.get("split")) == _METASPACE:
        return [False] if parted["prepend_scheme"] == "never" else [True, False]
    raise Inexpressible(f"the normalizer {_brief(normal)} with the pre-tokenizer {_brief(parted)}")


def _brief(found: Any) -> str:
    return json.dumps(found, ensure_ascii=False) if found else "none"


def _scores(words: _Words) -> dict[str, float]:
    """Return a score for each token so that merging the best one first is merging in the order of the merges.

    Raises:
        Inexpressible: No scores do that.
    """
    merges = words.merges()
    apart = {*_BYTES, *(one["content"] for one in words.added.values())}
    plain = {token: place for token, place in words.model["vocab"].items() if token not in apart}
    listed = set(merges)
    for first, second in pairs_of(plain, plain):
        if (first, second) not in listed:
            raise Inexpressible(
                f"merges that never join `{first}` and `{second}`, though `{first + second}` is a token"
            )
    ranked = list(_together([first + second for first, second in merges]))
    scores = {token: -float(rank) for rank, together in ranked for token in together}
    for _, together in ranked:
        if len(together) > 1 and not _same_runs(words, together, scores):
            raise Inexpressible(f"merges that make `{min(together)}` before and after `{max(together)}`")
    return scores


def _together(made: Sequence[str]) -> Iterator[tuple[int, set[str]]]:
    """Yield what merges make, in their order: one token at a time, or several that are made in turns."""
    last = {token: rank for rank, token in enumerate(made)}
    start = 0
    while start < len(made):
        end, rank, together = last[made[start]], start, set()
        while rank <= end:
            together.add(made[rank])
            end = max(end, last[made[rank]])
            rank += 1
        yield start, together
        start = rank


def _same_runs(words: _Words, tokens: Collection[str], scores: Mapping[str, float]) -> bool:
    """Tell whether tokens are runs of one character, and scores make of every run what the merges make of it."""
    letters = {*"".join(tokens)}
    if len(letters) > 1:
        return False
    engine = Tokenizer.from_str(json.dumps({**words.whole, "post_processor": None}))
    runs = ("".join(letters) * length for length in range(2, 4 * max(map(len, tokens))))
    return all([one.value for one in engine.model.tokenize(run)] == _merged(run, scores) for run in runs)


def _merged(text: str, scores: Mapping[str, float]) -> list[str]:
    """Return the tokens of a text where the token with the best score is made first, of the leftmost parts."""
    parts = list(text)
    while True:
        pairs = [(scores.get(first + second), -place) for place, (first, second) in enumerate(pairwise(parts))]
        known = [(score, place) for score, place in pairs if score is not None]
        if not known:
            return parts
        place = -max(known)[1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


def _listed(words: _Words, kind: Callable[[str], int]) -> tuple[list[str], list[int]]:
    """Return all tokens and their types; ids without a token get one that no text has."""
    tokens, types = [], []
    taken = {*words.tokens}
    for place, token in enumerate(words.tokens):
        if token is None:
            filler = f"[PAD{place}]"
            while filler in taken:
                filler = f"[{filler}]"
            tokens.append(filler)
            types.append(UNUSED)
            continue
        added = words.added.get(place)
        tokens.append(token)
        types.append(kind(token) if added is None else CONTROL if added["special"] else USER_DEFINED)
    return tokens, types


def _marks(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return special tokens, and those that a reader puts before and behind a text."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    named = {f"ggml.{SPECIAL[name]}_token_id": place for name, place in ids.items() if place is not None}
    return {**named, "ggml.add_bos_token": starts_with_bos(tokenizer), "ggml.add_eos_token": _added_to(tokenizer)[1]}


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether texts begin with the bos token: where the tokenizer puts it there and the chat template does too.

    llama.cpp has one setting for both. Without a bos token in the template, conversations were trained on without it.
    """
    chat = written(tokenizer, conversations(system=False)[0])
    return _added_to(tokenizer)[0] and (chat is None or chat.startswith(str(tokenizer.bos_token)))


def _added_to(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Tell whether a tokenizer puts a bos token before a text, and an eos token behind it."""
    bare, whole = (list(tokenizer("a", add_special_tokens=on)["input_ids"]) for on in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = bos is not None and whole[:1] == [bos] and bare[:1] != [bos]
    return start, eos is not None and whole[-1:] == [eos] and bare[-1:] != [eos]


def _ends(tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> dict[str, int]:
    """Return the tokens that end an answer: the eos token as trained with, and up to two others.

    Raises:
        Inexpressible: There are more.
    """
    eos = tokenizer.eos_token_id
    ends = sorted(stops or ([] if eos is None else [eos]), key=lambda end: (end != eos, end))
    if len(ends) > len(ENDS):
        named = ", ".join(f"`{tokenizer.convert_ids_to_tokens(end)}`" for end in ends)
        raise Inexpressible(f"more than three tokens that end an answer ({named})")
    return {f"ggml.{name}_token_id": int(end) for name, end in zip(ENDS, ends, strict=False)}


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the chat templates of a tokenizer."""
    named = named_templates(tokenizer)
    others = {name: text for name, text in named.items() if name != DEFAULT}
    listed = {TEMPLATES: sorted(others)} if others else {}
    texts = {f"{TEMPLATE}.{name}": text for name, text in others.items()}
    return {**({TEMPLATE: named[DEFAULT]} if DEFAULT in named else {}), **listed, **texts}

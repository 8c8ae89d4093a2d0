"""A tiny tokenizer for each chat template, and what it makes of conversations by itself."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any

from dpo_cli.data.records import Message, Pair
from dpo_cli.data.tokens.tokenize import PairTokenizer, Tokenized
from tests.conftest import DEMO_PAIRS
from tests.data.chat_templates import TEMPLATES


def tokenizing(name: str, **settings: Any) -> PairTokenizer:
    """Return the program's tokenization under a template; nothing is too long unless the settings say so."""
    return PairTokenizer(
        tokenizer_of(name), **{"template": None, "max_length": 100_000, "on_too_long": "error", **settings}
    )


def tokenized(name: str, pair: Pair, **settings: Any) -> Tokenized:
    """Tokenize one pair that must not be refused."""
    (result,) = tokenizing(name, **settings)([pair])
    assert isinstance(result, Tokenized), result.detail
    return result


def rendered(name: str, messages: Sequence[Message], **arguments: Any) -> str:
    """Return the text that the tokenizer itself makes of messages."""
    return str(tokenizer_of(name).apply_chat_template(as_dicts(messages), tokenize=False, **arguments))


def own_tokens(name: str, messages: Sequence[Message], **arguments: Any) -> list[int]:
    """Return the tokens that the tokenizer itself makes of messages."""
    found = tokenizer_of(name).apply_chat_template(as_dicts(messages), tokenize=True, return_dict=False, **arguments)
    return list(found)


def tokens_of(name: str, text: str) -> list[int]:
    """Return the tokens of a text, of which the control tokens it spells are some."""
    return list(tokenizer_of(name)(text, add_special_tokens=False)["input_ids"])


def tokens_within(name: str, text: str) -> list[int]:
    """Return the tokens of a text that does not begin its sequence: some tokenizers put a space before what does."""
    return tokens_of(name, TEMPLATES[name].special[0] + text)[1:]


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as a chat template gets them."""
    return [{"role": message.role, "content": message.text, **message.extras} for message in messages]


def marked(name: str, prompt: Sequence[int], response: Sequence[int], gaps: Sequence[int] | None) -> str:
    """Return prompt and response as text, what is judged between ⟦ and ⟧."""
    tokenizer, edges = tokenizer_of(name), [0, *(() if gaps is None else gaps), len(response)]
    parts = [tokenizer.decode(list(response[start:stop])) for start, stop in itertools.pairwise(edges)]
    shown = [part if place % 2 else f"⟦{part}⟧" for place, part in enumerate(parts)]
    return (tokenizer.decode(list(prompt)) + "".join(shown)).replace("⟦⟧", "")


def judged(response: Sequence[int], gaps: Sequence[int] | None) -> list[int]:
    """Return the tokens that are judged."""
    edges = [0, *(() if gaps is None else gaps), len(response)]
    return [token for start, stop in zip(edges[::2], edges[1::2], strict=True) for token in response[start:stop]]


@functools.cache
def tokenizer_of(name: str) -> Any:
    """Return a tokenizer that knows a template and its tokens; those of one engine have their words in common."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    template = TEMPLATES[name]
    engine = Tokenizer.from_str(_engine(template.engine))
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in template.special])
    engine.add_tokens([AddedToken(token, special=False, normalized=False) for token in template.added])
    bos = {"bos_token": template.bos} if template.bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=engine, eos_token=template.eos, chat_template=template.text.strip(), **bos
    )


@functools.cache
def _engine(kind: str) -> str:
    """Train a tokenizer on the demo pairs and return it as JSON."""
    from tokenizers import trainers

    tokenizer, settings = _on_bytes() if kind == "bytes" else _on_pieces()
    rows = map(json.loads, DEMO_PAIRS.read_text(encoding="utf-8").splitlines())
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, **settings)
    tokenizer.train_from_iterator(("\n\n".join(row.values()) for row in rows), trainer)
    # The single bytes are words like any other: nobody can spell them.
    return json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []})


def _on_bytes() -> tuple[Any, dict[str, Any]]:
    """Return byte-level BPE that cuts words as Llama 3 does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}


def _on_pieces() -> tuple[Any, dict[str, Any]]:
    """Return BPE in the manner of SentencePiece: spaces become `▁`, one more begins a text, the unknown is bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n+"), "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, {"special_tokens": ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]}

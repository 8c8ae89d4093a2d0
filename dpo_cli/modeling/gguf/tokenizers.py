"""The tokenizer of a GGUF file: the same tokens as llama.cpp makes of a text, as a tokenizer of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.reader import read_gguf_metadata

from dpo_cli.modeling.gguf.pre_tokenizers import ADD_BOS, BY_NAME

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, as llama.cpp counts them."""

BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"
"""What such files call the kinds of vocabularies that are known here."""

SPACE = "▁"
TEMPLATE, TEMPLATES = "chat_template", "chat_templates"
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Tokens with a part to play: what transformers and what such files call them."""

ENDS = ("eos", "eot", "eom")
"""Tokens that end an answer, by what such files call them."""

_STRINGS = ("ggml.tokens", "ggml.merges", TEMPLATES)
_PREFIX = "tokenizer."

Fields = Mapping[str, Any]
"""What a file has about its vocabulary, without `tokenizer.` before the names."""


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a GGUF file.

    transformers reads most pre-tokenizers of such files as if they were GPT-2's, and splits other numbers and other
    white space than the model was trained with; those that are not known here are left to it.
    """
    metadata, _ = read_gguf_metadata(str(path), [_PREFIX + name for name in _STRINGS])
    fields = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    if not is_known(fields):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return tokenizer
    general = {name: str(metadata.get(f"general.{name}", "")) for name in ("architecture", "name")}
    return tokenizer_from(fields, **general)


def ends_of(path: Path) -> list[int]:
    """Return the tokens that end an answer, as a GGUF file has them: the eos token first."""
    metadata, _ = read_gguf_metadata(str(path))
    found = (metadata.get(f"{_PREFIX}ggml.{name}_token_id") for name in ENDS)
    return list(dict.fromkeys(end for end in found if end is not None))


def is_known(fields: Fields) -> bool:
    """Tell whether a file's vocabulary is of a kind that is known here."""
    kind = fields.get("ggml.model")
    return kind == SENTENCE_PIECE or (kind == BYTE_LEVEL and fields.get("ggml.pre") in BY_NAME)


def tokenizer_from(fields: Fields, architecture: str = "", name: str = "") -> PreTrainedTokenizerBase:
    """Make the tokenizer that a file describes.

    Args:
        fields: What it has about its vocabulary.
        architecture: The model's: merges of Gemma's vocabularies follow the order of the tokens.
        name: The model's name, by which llama.cpp knows Phi-3's tokens.
    """
    tokens = list(fields["ggml.tokens"])
    made = {
        "version": "1.0",
        "added_tokens": _added(fields, strips=is_phi_3(name)),
        **(_byte_level(fields) if fields["ggml.model"] == BYTE_LEVEL else _sentence_piece(fields, architecture)),
        "post_processor": _around(fields),
    }
    named = {f"{ours}_token": tokens[fields[f"ggml.{theirs}_token_id"]] for ours, theirs in _present(fields)}
    engine = Tokenizer.from_str(json.dumps(made, ensure_ascii=False))
    return PreTrainedTokenizerFast(tokenizer_object=engine, chat_template=_templates(fields), **named)


def is_phi_3(name: str) -> bool:
    """Tell whether llama.cpp takes a model of this name for Phi-3, whose special tokens swallow white space."""
    return any(part in name.lower() for part in ("phi-3", "phi3"))


def pairs_of(tokens: Iterable[str], known: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    """Yield every two tokens that make up one of the tokens, token by token."""
    for token in tokens:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        yield from sorted(
            (h for h in halves if h[0] in known and h[1] in known), key=lambda h: (known[h[0]], known[h[1]])
        )


def _present(fields: Fields) -> list[tuple[str, str]]:
    return [(ours, theirs) for ours, theirs in SPECIAL.items() if f"ggml.{theirs}_token_id" in fields]


def _added(fields: Fields, strips: bool) -> list[dict[str, Any]]:
    """Return the tokens that are found in a text as they are."""
    plain = {"single_word": False, "lstrip": False, "normalized": False}
    types = fields.get("ggml.token_type") or []
    special = {fields[f"ggml.{theirs}_token_id"] for _, theirs in _present(fields)}
    added = []
    for place, (content, kind) in enumerate(zip(fields["ggml.tokens"], types, strict=False)):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) or place in special:
            kept = strips and content not in ("<unk>", "<s>", "<|endoftext|>")
            one = {"id": place, "content": content, "rstrip": kept, "special": kind != USER_DEFINED, **plain}
            added.append(one)
    return added


def _byte_level(fields: Fields) -> dict[str, Any]:
    """Return model, pre-tokenizer and decoder of byte-level BPE."""
    pre = BY_NAME[fields["ggml.pre"]]
    model = {
        **_model(fields["ggml.tokens"], [_halves(merge) for merge in fields["ggml.merges"]]),
        "ignore_merges": pre.whole_words,
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {**pre.as_json(), "model": model, "decoder": decoder}


def _sentence_piece(fields: Fields, architecture: str) -> dict[str, Any]:
    """Return model, normalizer and decoder of BPE over characters, with bytes for those that it does not know."""
    prefix = bool(fields.get("ggml.add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    start = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = fields["ggml.tokens"][fields.get("ggml.unknown_token_id", 0)]
    known = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*start, spaces]},
        "pre_tokenizer": None,
        "model": {**_model(fields["ggml.tokens"], _merges(fields, architecture)), **known},
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Fuse"}, *strip]},
    }


def _merges(fields: Fields, architecture: str) -> list[tuple[str, str]]:
    """Return the merges of a vocabulary that has scores instead: the best token first."""
    if "ggml.merges" in fields:
        return [_halves(merge) for merge in fields["ggml.merges"]]
    tokens: Sequence[str] = fields["ggml.tokens"]
    known = {token: place for place, token in enumerate(tokens)}
    worth = [-place for place in known.values()] if architecture.startswith("gemma") else fields["ggml.scores"]
    types = fields.get("ggml.token_type") or [NORMAL] * len(tokens)
    found = (token for token, kind in zip(tokens, types, strict=False) if kind in (NORMAL, USER_DEFINED))
    return list(pairs_of(sorted(found, key=lambda token: -worth[known[token]]), known))


def _halves(merge: str) -> tuple[str, str]:
    """Return the two tokens of a merge, the first of which may begin with a space."""
    cut = merge.index(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _model(tokens: Iterable[str], merges: list[tuple[str, str]]) -> dict[str, Any]:
    vocabulary = {token: place for place, token in enumerate(tokens)}
    known = [merge for merge in merges if {*merge, "".join(merge)} <= vocabulary.keys()]
    return {"type": "BPE", "vocab": vocabulary, "merges": known, "fuse_unk": False, "byte_fallback": False}


def _around(fields: Fields) -> dict[str, Any]:
    """Return what is put around a text: the tokens that begin and end it."""
    start = fields["ggml.model"] == SENTENCE_PIECE or fields.get("ggml.pre") in ADD_BOS
    wanted = {"bos": fields.get("ggml.add_bos_token", start), "eos": fields.get("ggml.add_eos_token", False)}
    ids = {
        name: fields[f"ggml.{name}_token_id"] for name, on in wanted.items() if on and f"ggml.{name}_token_id" in fields
    }
    words = {name: fields["ggml.tokens"][place] for name, place in ids.items()}

    def one(sequence: str, kind: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": kind}}]
        marks = {name: [{"SpecialToken": {"id": word, "type_id": kind}}] for name, word in words.items()}
        return [*marks.get("bos", []), *parts, *marks.get("eos", [])]

    special = {words[name]: {"id": words[name], "ids": [ids[name]], "tokens": [words[name]]} for name in ids}
    pair = [*one("A", 0), *one("B", 1)]
    return {"type": "TemplateProcessing", "single": one("A", 0), "pair": pair, "special_tokens": special}


def _templates(fields: Fields) -> str | dict[str, str] | None:
    """Return the chat template of a file; several by name."""
    default = fields.get(TEMPLATE)
    others = {name: fields[f"{TEMPLATE}.{name}"] for name in fields.get(TEMPLATES, [])}
    if others:
        return {**({"default": default} if default else {}), **others}
    return default

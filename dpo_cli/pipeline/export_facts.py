"""What a model's tokenizer and settings of generation say, as a reader has them: which tokens end, how turns look."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.data.checkup.endings import end_tokens
from dpo_cli.data.records import BadRow, Message
from dpo_cli.data.tokens.chat_template import TEMPLATE_ERRORS, ChatTemplate, named_templates
from dpo_cli.errors import FAILED, UserError
from dpo_cli.modeling.gguf.vocabulary_texts import same_in_llama_cpp, with_special

NOTHING_WRITTEN = "nothing was written; update PEFT and transformers to versions that fit each other, or report this"
"""What to do where the proof fails."""

TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs; don't they're we'll I'd.",
    "  two  spaces,\ttabs\tand\n\nempty lines \n at\r\nthe end   ",
    "1234567890 3.14159 1,000,000 0x1F 2²",
    "def f(x):\n    return {'a': x[0] ** 2}  # comment\n",
    "Zürich, naïve café, Ångström, łódź, Ελληνικά, Привет, שלום, مرحبا, हिन्दी, ไทย",
    "你好，世界。こんにちは世界。안녕하세요 세계.",
    "😀👩‍👩‍👧‍👦🇨🇭 e\u0301 \u200b\ufeff",
    "ALLCAPS CamelCase snake_case kebab-case https://example.org/a?b=c&d=%20",
)
"""Texts that tokenizers take apart in different ways."""

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How many legs has a spider?",
    "Write a sentence about the sea.",
    "Translate `good morning` into German.",
    "What comes after Tuesday?",
    "Why is the sky blue?",
    "List the first five prime numbers.",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
)
"""What a model is asked that has no pairs."""

_CONVERSATIONS = (
    (Message("user", QUESTIONS[0]),),
    (Message("system", "Be brief."), Message("user", QUESTIONS[1])),
    (Message("user", QUESTIONS[2]), Message("assistant", "Eight."), Message("user", QUESTIONS[3])),
)

_ERROR = "an error: "


@dataclass(frozen=True)
class Facts:
    """What is compared of two readings of the same model beside their weights.

    Attributes:
        stops: The tokens that end a text.
        ids: Those with a meaning of their own, by what they are called.
        templates: The chat templates by name.
        renderings: What they make of conversations, by a name for each.
        tokens: The tokens of texts.
        whole: The tokens of a text with those that the tokenizer puts around it; empty where that is not compared.
    """

    stops: frozenset[int]
    ids: Mapping[str, int | None]
    templates: Mapping[str, str]
    renderings: Mapping[str, str]
    tokens: Mapping[str, tuple[int, ...]]
    whole: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, generation_config: Any, texts: Sequence[str], *, chats_alone: bool = False) -> Facts:
        """Ask a tokenizer and settings of generation.

        Args:
            tokenizer: The tokenizer.
            generation_config: The settings.
            texts: Texts of pairs, or others.
            chats_alone: Whether what is read is a GGUF file: where there is a chat template, it says of texts what is
                done with those that the template writes.
        """
        plain = not (chats_alone and named_templates(tokenizer))
        asked = [*_written(tokenizer, TEXTS), *(TEXTS if plain else ()), *with_special(tokenizer), *texts]
        if chats_alone:
            asked = same_in_llama_cpp(tokenizer, asked)
        return cls._asked(tokenizer, generation_config, asked, whole=plain)

    def read_again(self, tokenizer: Any, generation_config: Any) -> Facts:
        """Ask a reader of what was written the same, whatever its tokenizer is."""
        return self._asked(tokenizer, generation_config, self.tokens, whole=bool(self.whole))

    @classmethod
    def _asked(cls, tokenizer: Any, generation_config: Any, texts: Iterable[str], *, whole: bool) -> Facts:
        templates = named_templates(tokenizer)
        return cls(
            end_tokens(tokenizer, generation_config),
            {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
            templates,
            {name: text for one in templates for name, text in _renderings(tokenizer, one, templates[one])},
            {text: tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts},
            tuple(tokenizer(QUESTIONS[0]).input_ids) if whole else (),
        )

    def conversations(self) -> list[str]:
        """Return what templates make of conversations that they take."""
        return [text for text in self.renderings.values() if not text.startswith(_ERROR)]

    def differences(self, other: Facts) -> Iterator[str]:
        """Yield what `read_again` has otherwise: first this one's, then that one's."""
        if self.stops != other.stops:
            yield f"texts end at the tokens {_listed(self.stops)}, and in what was written at {_listed(other.stops)}"
        for name, number in self.ids.items():
            if (another := other.ids[name]) != number:
                yield f"the {name} token is {number}, and in what was written {another}"
        for name in sorted(self.templates.keys() | other.templates.keys()):
            if self.templates.get(name) != other.templates.get(name):
                yield f"the chat template `{name}` is another in what was written"
        for name, text in self.renderings.items():
            if (made := other.renderings.get(name, "")) != text:
                yield f"the chat template makes {text!r} of {name}, and in what was written {made!r}"
        if differing := [text for text, tokens in self.tokens.items() if other.tokens[text] != tokens]:
            first = differing[0]
            both = " and in what was written ".join(_excerpt(one.tokens[first]) for one in (self, other))
            yield f"the tokens of {len(differing)} texts are others, of {first[:40]!r} {both}"
        elif self.whole != other.whole:
            both = " and in what was written ".join(_excerpt(one.whole) for one in (self, other))
            yield f"a text by itself begins or ends with other tokens: {both}"


def check_facts(ours: Facts, theirs: Facts, where: str) -> None:
    """Refuse a model whose tokenizer or end tokens are not those of what it was made of.

    Raises:
        UserError: Something differs; it is named.
    """
    if differing := list(ours.differences(theirs)):
        raise not_as_exported("; ".join(differing), where)


def not_as_exported(told: str, where: str) -> UserError:
    """Return the error for something that was written otherwise than it should be."""
    return UserError(f"what was written is not what was exported: {told}", where, NOTHING_WRITTEN, status=FAILED)


def _renderings(tokenizer: Any, name: str, template: str) -> Iterator[tuple[str, str]]:
    """Yield what a template makes of each conversation, or why it fails."""
    write = ChatTemplate(tokenizer, template)
    for number, conversation in enumerate(_CONVERSATIONS, 1):
        try:
            text = write([conversation], {}, add_generation_prompt=True)[0]
        except (BadRow, UserError, *TEMPLATE_ERRORS) as error:
            text = f"{_ERROR}{error}"
        yield f"conversation {number} (`{name}`)", text


def question_tokens(tokenizer: Any) -> list[tuple[int, ...]]:
    """Return the tokens of questions, with the tokenizer's own chat template where it has one."""
    if texts := _written(tokenizer, QUESTIONS):
        return [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    return [tuple(tokenizer(text).input_ids) for text in QUESTIONS]


def _written(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Return texts as the tokenizer's own chat template asks them; none where there is none, or where it fails."""
    for template in named_templates(tokenizer).values():
        with contextlib.suppress(BadRow, UserError, *TEMPLATE_ERRORS):
            write = ChatTemplate(tokenizer, template)
            return write([(Message("user", text),) for text in texts], {}, add_generation_prompt=True)
    return []


def _listed(tokens: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(tokens))) or "none"


def _excerpt(tokens: Sequence[int]) -> str:
    shown = ", ".join(map(str, tokens[:8]))
    return f"[{shown}, …]" if len(tokens) > 8 else f"[{shown}]"

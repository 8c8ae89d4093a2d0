"""A chat template makes one text of a conversation, within bounds: it is a program, and mostly somebody else's."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpo_cli.data.pairs import calls
from dpo_cli.data.records import BadRow, Message
from dpo_cli.errors import UserError
from dpo_cli.system.bounds import TookTooLong, bounded_memory, bounded_time

MAX_SECONDS, MAX_BYTES = 5.0, 1 << 29
"""The processor's time and the memory that a template may take for a conversation."""

MAX_CHARACTERS, MAX_GROWTH = 1 << 20, 8
"""A template writes no more than this, or than so many times what it was given, whichever is more."""

DEFAULT, TOOL_USE = "default", "tool_use"
"""What transformers calls the template for conversations, and the one for those with tools."""

_ASKS = "strftime_now"
"""The function by which a template asks for the date, in a format."""

_DIRECTIVES = tuple(
    f"%{flag}" for flag in ("-d", "-m", "-j", "-H", "-I", "-M", "-S", "-y", *"aAbBcdDeFGHIjmMpRSTuUVwWxXyYzZf")
)
"""What a format may hold."""

TEMPLATE_ERRORS = (
    TemplateError,
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
    # Of a template nested too deeply, what Jinja makes of it is no Python.
    SyntaxError,
)
"""What applying a template may raise."""

_Settings = Mapping[str, Any]


class ChatTemplate:
    """Write conversations as a chat template does.

    Args:
        tokenizer: A Hugging Face tokenizer; it applies templates in a sandbox.
        text: The template.
        day: The date that the template gets where it asks for one; None: that of the day on which it asks.
    """

    def __init__(self, tokenizer: Any, text: str, day: date | None = None) -> None:
        self.tokenizer, self.text = tokenizer, text
        self._on_its_day = with_day(text, day)

    def __call__(
        self, conversations: Sequence[Sequence[Message]], arguments: _Settings, *, add_generation_prompt: bool
    ) -> list[str]:
        """Write conversations.

        Args:
            conversations: Their messages.
            arguments: What the template is given beside them.
            add_generation_prompt: Whether the assistant is to answer.

        Raises:
            UserError: The template leaves its bounds.
            BadRow: The arguments say what is not theirs to say, or what the template writes is no text.
            Exception: The template fails: one of `TEMPLATE_ERRORS`.
        """
        if taken := _arguments_taken() & arguments.keys():
            raise BadRow("template error", f"a row cannot set `{min(taken)}` of the chat template")
        settings = {**arguments, "add_generation_prompt": add_generation_prompt}
        texts = self._applied([list(map(_as_mapping, one)) for one in conversations], settings)
        for text, one in zip(texts, conversations, strict=True):
            self._check(text, one, settings)
        return texts

    @functools.cached_property
    def call_form(self) -> calls.CallForm:
        """How calls of tools are to be given."""
        return calls.wanted_form(self._tried)

    @functools.cached_property
    def always_asks(self) -> bool:
        """Whether it writes a generation prompt behind an answer too, as if another were to follow."""
        turns = [
            {"role": role, "content": f"\ufdd2{number}"} for number, role in enumerate(("user", "assistant", "user"))
        ]
        asked, answered, going_on = (self._tried(turns[:stop], {}) or "" for stop in (1, 2, 3))
        if not asked or not answered.startswith(asked):
            return False
        behind, next_turn = (text.partition(turns[1]["content"])[2] for text in (answered, going_on))
        more = behind[common_length(behind, next_turn) :]
        return bool(more.strip()) and asked.endswith(more)

    def _tried(self, conversation: list[dict[str, Any]], settings: _Settings) -> str | None:
        """Write a conversation that the template may fail on; None where it does."""
        try:
            return self._applied([conversation], {**settings, "add_generation_prompt": False})[0]
        except TEMPLATE_ERRORS:
            return None

    def _applied(self, conversations: list[list[dict[str, Any]]], settings: _Settings) -> list[str]:
        """Let the tokenizer apply the template.

        Raises:
            UserError: The template leaves its bounds.
        """
        texts, excess = [], ""
        try:
            with bounded_time(MAX_SECONDS), bounded_memory(MAX_BYTES):
                texts = self.tokenizer.apply_chat_template(
                    conversations, chat_template=self._on_its_day, tokenize=False, **settings
                )
        except TookTooLong:
            excess = f"takes more than {MAX_SECONDS:g} seconds"
        except MemoryError:
            excess = f"takes more than {MAX_BYTES >> 20} MiB"
        if excess and len(conversations) > 1:
            # Each has as much for itself.
            return [text for one in conversations for text in self._applied([one], settings)]
        if excess:
            raise self._excess(excess)
        return list(map(str, texts))

    def _check(self, text: str, conversation: Sequence[Message], settings: _Settings) -> None:
        """Refuse what a template must not write: too much, or what is no text."""
        if len(text) > MAX_CHARACTERS:
            given = [settings, *map(_as_mapping, conversation)]
            if len(text) > MAX_GROWTH * _num_characters(given):
                raise self._excess(f"writes {len(text):,} characters")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRow("template error", "the chat template writes half of a surrogate pair") from None

    def _excess(self, what: str) -> UserError:
        own = self.text in named_templates(self.tokenizer).values()
        name = "the tokenizer's own chat template" if own else "`model.chat_template`"
        hint = "no conversation needs that: set `model.chat_template` to another template, or to `plain`"
        return UserError(f"the chat template {what} for a single conversation", name, hint)


class ChatTemplates:
    """Choose among a model's chat templates as transformers does.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: The templates by name; one alone is called `default`.
        day: As `ChatTemplate` has it.
    """

    def __init__(self, tokenizer: Any, texts: Mapping[str, str], day: date | None = None) -> None:
        self._named = {name: ChatTemplate(tokenizer, text, day) for name, text in texts.items()}

    def of(self, arguments: _Settings) -> ChatTemplate:
        """Return the template for a conversation: with tools, the one called `tool_use`, if there is one.

        Raises:
            BadRow: There is none.
        """
        name = TOOL_USE if TOOL_USE in self._named and arguments.get("tools") is not None else DEFAULT
        if name not in self._named:
            raise BadRow("template error", f"none of the chat templates {_listed(self._named)} is called `{name}`")
        return self._named[name]


def named_templates(tokenizer: Any) -> dict[str, str]:
    """Return a tokenizer's own chat templates by name."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, Mapping):
        return {str(name): str(text) for name, text in found.items()}
    return {DEFAULT: str(found)} if found else {}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def asks_for_the_day(text: str) -> bool:
    """Tell whether a template asks for the date."""
    return _ASKS in text


def with_day(text: str, day: date | None) -> str:
    """Return a template that gets a fixed date, whenever it asks for one.

    A macro of the name of the function that it would call returns the date: what a template is given is plain data.
    """
    if day is None or not asks_for_the_day(text):
        return text
    midnight = datetime.combine(day, time.min)
    answers = [(asked, midnight.strftime(asked)) for asked in _DIRECTIVES]
    replaced = "".join(f"|replace({json.dumps(asked)}, {json.dumps(answer)})" for asked, answer in answers)
    head = f"{{%- macro {_ASKS}(format) %}}{{{{- format|replace('%%', '\ufdd6'){replaced}|replace('\ufdd6', '%') -}}}}"
    # A line's end behind a tag is not written, whether the template begins with one or not.
    return f"{head}{{% endmacro %}}\n{text}"


def common_length(one: str, other: str) -> int:
    """Count the characters with which two texts begin alike."""
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _as_mapping(message: Message) -> dict[str, Any]:
    """Return a message as chat templates know it."""
    return {"role": message.role, "content": message.text, **message.extras}


def _num_characters(value: Any) -> int:
    """Count the characters of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_num_characters, inner))


@functools.cache
def _arguments_taken() -> frozenset[str]:
    """Name what is not a row's to say of how a template is applied."""
    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset(names) - {"tools", "documents"} | {"messages"}

"""A chat template makes one text of a conversation, within bounds: it is a program, and mostly somebody else's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.data.bounds import TookTooLong, bounded_memory, bounded_time
from dpo_cli.data.forms import Form, only_writes, stand_in
from dpo_cli.data.records import BadRow, Message
from dpo_cli.errors import UserError

MAX_SECONDS, MAX_BYTES = 5.0, 1 << 29
"""The processor's time and the memory that a template may take for a conversation."""

MAX_CHARACTERS, MAX_GROWTH = 1 << 20, 8
"""A template writes no more than this, or than so many times what it was given, whichever is more."""

_MOST_FORMS = 1024

_Settings = Mapping[str, Any]


class ChatTemplate:
    """Write conversations as a chat template does.

    Args:
        tokenizer: A Hugging Face tokenizer; it applies templates in a sandbox.
        text: The template.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self._forms: dict[tuple[bool, tuple[str, ...]], Form] = {}
        self._has_forms = _applied_as_usual(tokenizer) and only_writes(text)

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
            BadRow: The arguments say what is not theirs to say.
            Exception: The template fails: one of `template_errors`.
        """
        if taken := _arguments_taken() & arguments.keys():
            raise BadRow("template error", f"a row cannot set `{min(taken)}` of the chat template")
        if self._has_forms and not arguments and not any(message.extras for one in conversations for message in one):
            forms = [self._form(one, add_generation_prompt) for one in conversations]
            # What is written over and over may leave the bounds.
            if all(len(form.places) <= MAX_GROWTH * len(one) for form, one in zip(forms, conversations, strict=True)):
                return [
                    form.fill([message.text for message in one]) for form, one in zip(forms, conversations, strict=True)
                ]
        settings = {**arguments, "add_generation_prompt": add_generation_prompt}
        return self._applied([list(map(_as_mapping, one)) for one in conversations], settings)

    def _form(self, conversation: Sequence[Message], add_generation_prompt: bool) -> Form:
        """Return the form in which the template writes all conversations of the same roles."""
        roles = tuple([message.role for message in conversation])
        key = add_generation_prompt, roles
        if key not in self._forms:
            if len(self._forms) >= _MOST_FORMS:
                self._forms.clear()
            shown = [{"role": role, "content": stand_in(number)} for number, role in enumerate(roles)]
            (written,) = self._applied([shown], {"add_generation_prompt": add_generation_prompt})
            self._forms[key] = Form.of(written)
        return self._forms[key]

    def _applied(self, conversations: list[list[dict[str, Any]]], settings: _Settings) -> list[str]:
        """Let the tokenizer apply the template.

        Raises:
            UserError: The template leaves its bounds.
        """
        texts, excess = [], ""
        try:
            with bounded_time(MAX_SECONDS), bounded_memory(MAX_BYTES):
                texts = self.tokenizer.apply_chat_template(
                    conversations, chat_template=self.text, tokenize=False, **settings
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
        for text, conversation in zip(texts, conversations, strict=True):
            if len(text) > MAX_CHARACTERS and len(text) > MAX_GROWTH * _num_characters([conversation, settings]):
                raise self._excess(f"writes {len(text):,} characters")
        return list(map(str, texts))

    def _excess(self, what: str) -> UserError:
        own = getattr(self.tokenizer, "chat_template", None) == self.text
        name = "the tokenizer's own chat template" if own else "`model.chat_template`"
        hint = "no conversation needs that: set `model.chat_template` to another template, or to `plain`"
        return UserError(f"the chat template {what} for a single conversation", name, hint)


@functools.cache
def template_errors() -> tuple[type[Exception], ...]:
    """Name what applying a template may raise."""
    from jinja2 import TemplateError

    # Of a template nested too deeply, what Jinja makes of it is no Python: a `SyntaxError`.
    found = TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError
    return TemplateError, *found


def _as_mapping(message: Message) -> dict[str, Any]:
    """Return a message as chat templates know it."""
    return {"role": message.role, "content": message.text, **message.extras}


def _num_characters(value: Any) -> int:
    """Count the characters of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_num_characters, inner))


def _applied_as_usual(tokenizer: Any) -> bool:
    """Tell whether a tokenizer has no way of its own to apply templates."""
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template


@functools.cache
def _arguments_taken() -> frozenset[str]:
    """Name what is not a row's to say of how a template is applied."""
    from transformers import PreTrainedTokenizerBase

    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset(names) - {"tools", "documents"}

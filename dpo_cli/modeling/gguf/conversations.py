"""Made-up conversations, as a chat template writes them: by these, what a template does is found out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cli.data.records import BadRow, Message
from dpo_cli.data.tokens.chat_template import DEFAULT, TEMPLATE_ERRORS, ChatTemplate, named_templates
from dpo_cli.errors import UserError

_USERS = ('What is 2 + 2?\nSay "four".', "Ünïcode: 日本語 {{ .X }} {% y %} <b>&amp;</b>", "Und\tnun 3?")
_ANSWERS = ("It's four: `4`.", "Nothing\n\nelse, e.g. 50 %.")
_SYSTEM = Message("system", "You answer in one word; don't explain.\nEver.")


def conversations(system: bool) -> list[list[Message]]:
    """Return conversations of one to three questions that end with one; each with a system message, or each without."""
    start = [_SYSTEM] if system else []
    return [[*start, *turns(_USERS[:questions], _ANSWERS)] for questions in range(1, len(_USERS) + 1)]


def turns(questions: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """Return a conversation of questions, each but the last of which is answered."""
    found: list[Message] = []
    for place, question in enumerate(questions):
        found += [Message("assistant", answers[place - 1])] if place else []
        found.append(Message("user", question))
    return found


def written(tokenizer: Any, messages: Sequence[Message]) -> str | None:
    """Return a conversation as the default chat template writes it, with an answer begun.

    None: there is no template, or it refuses such a conversation.
    """
    text = named_templates(tokenizer).get(DEFAULT)
    if text is None:
        return None
    try:
        return ChatTemplate(tokenizer, text)([messages], {}, add_generation_prompt=True)[0]
    except (BadRow, UserError, *TEMPLATE_ERRORS):
        return None


def probes(tokenizer: Any) -> list[str]:
    """Return made-up conversations as a tokenizer's template writes them; none where it has none."""
    rendered = (written(tokenizer, messages) for system in (False, True) for messages in conversations(system))
    return [text for text in rendered if text is not None]

"""A conversation becomes text: by a chat template or plainly, control tokens that a message spells out marked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from dpo_cli.data.pairs.calls import in_form
from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.tokens.chat_template import TEMPLATE_ERRORS, ChatTemplates
from dpo_cli.data.tokens.control_tokens import STAND_IN, Literals

PLAIN = "plain"


class ConversationText:
    """Write conversations as text.

    Args:
        tokenizer: A Hugging Face tokenizer; it renders chat templates in a sandbox.
        templates: Chat templates by name; none: `plain`.
        day: What a template is given that asks for the date.
    """

    def __init__(self, tokenizer: Any, templates: Mapping[str, str], day: date | None = None) -> None:
        bos = tokenizer.bos_token if not templates and _adds_bos(tokenizer) else ""
        self._plain = functools.partial(_written_plainly, bos=bos, end=tokenizer.eos_token)
        self._templates = ChatTemplates(tokenizer, templates, day) if templates else None
        self._literals = Literals(tokenizer, "\n".join(templates.values()))

    def check_template(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a template under which every answer would end with the beginning of the next.

        Raises:
            BadRow: It is one, or there is no template for these arguments.
        """
        if self._templates is not None and self._templates.of(arguments).always_asks:
            raise BadRow(
                "template error",
                "the chat template writes a generation prompt behind an answered conversation too: let it do so only "
                "`if add_generation_prompt`",
            )

    def with_calls(self, pair: Pair) -> Pair:
        """Return a pair whose tool calls are as the template expects them."""
        if self._templates is None or not has_extras(pair):
            return pair
        form = self._templates.of(pair.arguments).call_form
        return _each_message(pair, lambda message: in_form(message, form))

    def num_literals(self, pair: Pair) -> int:
        """Count the control tokens that a pair spells out."""
        return self._literals.count(pair)

    def marked_pair(self, pair: Pair) -> Pair:
        """Mark the control tokens that the messages of a pair spell out."""
        return _each_message(pair, self._literals.marked)

    def marked(self, messages: Sequence[Message]) -> list[Message]:
        """Mark the control tokens that messages spell out."""
        return list(map(self._literals.marked, messages))

    def write_marked(
        self,
        conversations: Sequence[Sequence[Message]],
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> list[str]:
        """Write conversations in which the control tokens that they spell out are marked.

        Raises:
            BadRow: They cannot be written.
            Exception: The template fails: one of `TEMPLATE_ERRORS`.
        """
        if self._templates is not None:
            return self._templates.of(arguments)(
                conversations, self._literals.marked_values(arguments), add_generation_prompt=add_generation_prompt
            )
        if arguments:
            detail = f"`plain` ignores {', '.join(f'`{name}`' for name in arguments)}"
            raise BadRow("template error", detail)
        return [self._plain(one, add_generation_prompt=add_generation_prompt) for one in conversations]

    def write(self, messages: Sequence[Message], arguments: Mapping[str, Any], **settings: bool) -> str:
        """Write one conversation; raises as `write_marked` does."""
        return self.write_marked([self.marked(messages)], arguments, **settings)[0]

    def try_to_write(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> str | None:
        """Write a conversation on which the template may fail; None where it does."""
        return self.try_to_write_marked(self.marked(messages), arguments, add_generation_prompt=False)

    def try_to_write_marked(
        self, messages: Sequence[Message], arguments: Mapping[str, Any], add_generation_prompt: bool
    ) -> str | None:
        """Write a conversation in which control tokens are marked; None where the template fails on it."""
        try:
            return self.write_marked([messages], arguments, add_generation_prompt=add_generation_prompt)[0]
        except (BadRow, *TEMPLATE_ERRORS):
            return None

    def around_last(self, pair: Pair) -> tuple[str, str]:
        """Write a prompt as inference sends it, without its last text; return what precedes that text and follows it.

        Raises:
            BadRow: The template does not write the last text, or fails without it.
        """
        pair = self.with_calls(pair)
        *before, last = pair.prompt
        messages = [*before, Message(last.role, STAND_IN, extras=last.extras)]
        try:
            text = self.write(messages, pair.arguments, add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            detail = f"the chat template fails where the last text of the prompt is cut: {reason(error)}"
            raise BadRow("template error", detail) from None
        head, found, tail = text.partition(STAND_IN)
        if not found:
            raise BadRow("template error", "the chat template leaves out the last text of the prompt")
        return head, tail


def has_extras(pair: Pair) -> bool:
    """Tell whether a message of a pair has more than a role and a text."""
    # A loop takes half the time of `any`.
    for messages in (pair.prompt, pair.chosen, pair.rejected):
        for message in messages:
            if message.extras:
                return True
    return False


def reason(error: Exception) -> str:
    """Return what an error of a template says."""
    return str(error) or type(error).__name__


def _each_message(pair: Pair, change: Callable[[Message], Message]) -> Pair:
    """Return a pair of which each message is changed."""
    prompt, chosen, rejected = (tuple(map(change, turns)) for turns in (pair.prompt, pair.chosen, pair.rejected))
    return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)


def _written_plainly(messages: Sequence[Message], *, add_generation_prompt: bool, bos: str, end: str) -> str:
    """Write a conversation for a model without a chat template: headed sections, an end behind each answer."""
    sections = list(_sections(messages, end))
    if add_generation_prompt:
        sections.append("### Response:\n")
    return bos + "\n\n".join(sections)


def _sections(messages: Sequence[Message], end: str) -> Iterator[str]:
    for message in messages:
        if message.role == "tool" or "tool_calls" in message.extras:
            raise BadRow("template error", "`plain` cannot write tools: set `model.chat_template` to a template")
        if message.role == "assistant":
            yield f"### Response:\n{message.text}{end}"
        else:
            heading = "System" if message.role == "system" else "Instruction"
            yield f"### {heading}:\n{message.content}"
            if message.input:
                yield f"### Input:\n{message.input}"


def _adds_bos(tokenizer: Any) -> bool:
    """Tell whether the model's own convention is to start a text with BOS."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id

"""A `Pair` becomes text: the prompt as inference sends it, both whole conversations, and where their turns stand.

Where a turn of the assistant begins and ends is never guessed from the template's source: the conversation is
written up to that place as well, and compared with the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from dpo_cli.data.pairs.calls import has_broken_arguments, in_form, what_is_called
from dpo_cli.data.records import BadRow, Message, Pair, TurnRule
from dpo_cli.data.tokens.chat_template import ChatTemplates, common_length, template_errors
from dpo_cli.data.tokens.control_tokens import LITERAL_START, STAND_IN, STAND_IN_TURN, Literals
from dpo_cli.data.tokens.encoding import TextEncoder
from dpo_cli.data.tokens.unwritten import NOT_JSON, Unwritten

Span = tuple[int, int]

PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Written:
    """A whole conversation as text.

    Attributes:
        text: The text; control tokens that a message spells out are marked (`literals.LITERAL_START`).
        judged: Where the turns that are judged stand in it, in characters; ascending.
    """

    text: str
    judged: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A pair as text.

    Attributes:
        prompt: What both conversations begin with: what inference sends, or as much of it as stands in them.
        chosen: The prompt and the chosen response.
        rejected: The prompt and the rejected response.
        literals: Control tokens that messages spell out.
        prompt_differs: Whether what inference sends does not stand in the conversations as it is.
        context_differs: Whether inference would send something else before a later turn that is judged.
        rewritten: Whether something that the assistant says does not stand in them as it was said.
        unwritten: What the template does not write of what the row says, as in `unwritten.UNWRITTEN`, and whether
            arguments of a call are no JSON.
    """

    prompt: str
    chosen: Written
    rejected: Written
    literals: int
    prompt_differs: bool
    context_differs: bool
    rewritten: bool
    unwritten: frozenset[str]


class Renderer:
    """Write pairs out as text.

    Args:
        tokenizer: A Hugging Face tokenizer; it renders chat templates in a sandbox.
        templates: Chat templates by name; none: `plain`.
        turns: Which of a response's turns are judged.
        encode: Makes token ids of texts.
        day: What a template is told that asks for the date.
    """

    def __init__(
        self,
        tokenizer: Any,
        templates: Mapping[str, str],
        turns: TurnRule,
        encode: TextEncoder,
        day: date | None = None,
    ) -> None:
        self.turns, self.encode = turns, encode
        bos = tokenizer.bos_token if not templates and _adds_bos(tokenizer) else ""
        self._plain = functools.partial(_written_plainly, bos=bos, end=tokenizer.eos_token)
        self._templates = ChatTemplates(tokenizer, templates, day) if templates else None
        self._literals = Literals(tokenizer, "\n".join(templates.values()))
        self._unwritten = Unwritten(self._tried)

    def __call__(self, pairs: Sequence[Pair]) -> list[Rendered | BadRow]:
        """Write many pairs, those without arguments of their own together."""
        together = [pair for pair in pairs if not pair.arguments]
        written = iter(self._write_all(together))
        return [next(written) if not pair.arguments else self._write_all([pair])[0] for pair in pairs]

    def _write_all(self, pairs: Sequence[Pair]) -> list[Rendered | BadRow]:
        """Write pairs that have the same arguments."""
        if not pairs:
            return []
        arguments = pairs[0].arguments
        try:
            self._check_template(arguments)
            pairs = [self._with_calls(pair) for pair in pairs]
            asked = [self._marked(pair.prompt) for pair in pairs]
            both = [
                prompt + self._marked(response)
                for pair, prompt in zip(pairs, asked, strict=True)
                for response in (pair.chosen, pair.rejected)
            ]
            prompts = self._write(asked, arguments, add_generation_prompt=True)
            wholes = self._write(both, arguments)
            found = zip(pairs, prompts, wholes[::2], wholes[1::2], strict=True)
            return [self._located(pair, *texts) for pair, *texts in found]
        except BadRow as bad:
            return [bad] if len(pairs) == 1 else self._one_by_one(pairs)
        except template_errors() as error:
            if len(pairs) > 1:
                return self._one_by_one(pairs)
            return [BadRow("template error", f"the chat template fails: {_reason(error)}")]

    def _one_by_one(self, pairs: Sequence[Pair]) -> list[Rendered | BadRow]:
        """Find out which of several pairs cannot be written."""
        return [item for pair in pairs for item in self._write_all([pair])]

    def _check_template(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a template under which every answer would end with the beginning of the next."""
        if self._templates is not None and self._templates.of(arguments).always_asks:
            raise BadRow(
                "template error",
                "the chat template writes a generation prompt behind an answered conversation too: let it do so only "
                "`if add_generation_prompt`",
            )

    def _as_given(self, pair: Pair) -> Pair:
        """Return a pair as the template is given it: with the control tokens marked that it spells out."""
        return _each_message(pair, self._literals.marked)

    def _with_calls(self, pair: Pair) -> Pair:
        """Return a pair whose tool calls are as the template wants them."""
        if self._templates is None or not _has_extras(pair):
            return pair
        form = self._templates.of(pair.arguments).call_form
        return _each_message(pair, lambda message: in_form(message, form))

    def _located(self, pair: Pair, prompt: str, chosen: str, rejected: str) -> Rendered:
        """Find the end of the prompt in both conversations, and the turns behind it."""
        literals = self._literals.count(pair) if LITERAL_START in chosen or LITERAL_START in rejected else 0
        if literals and (part := self.encode.spell.unspeakable(chosen, rejected)):
            raise BadRow(
                "control token", f"the tokenizer has no tokens for the characters of `{part}`, which a text has"
            )
        whole = chosen.startswith(prompt) and rejected.startswith(prompt)
        boundary = len(prompt) if whole else self._boundary(pair, prompt, chosen, rejected)
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if len(text) <= boundary:
                raise BadRow("template error", f"the chat template writes nothing for `{name}`")
        sides = {"chosen": (pair.chosen, chosen), "rejected": (pair.rejected, rejected)}
        found = [self._turns(pair, *side, boundary) for side in sides.values()]
        written = [Written(text, spans) for (_, text), (spans, _) in zip(sides.values(), found, strict=True)]
        missing = {name: self._missing(*side) for name, side in sides.items()}
        unwritten = self._unwritten(pair, self._as_given)
        has_extras = _has_extras(pair)
        if has_extras and any(map(has_broken_arguments, pair.prompt + pair.chosen + pair.rejected)):
            unwritten |= {NOT_JSON.name}
        for name, side in sides.items():
            if missing[name] or has_extras:
                self._check_turns(pair, name, *side, missing[name])
        return Rendered(
            chosen[:boundary],
            written[0],
            written[1],
            literals,
            prompt_differs=not whole,
            context_differs=any(differs for _, differs in found),
            rewritten=any(missing.values()),
            unwritten=unwritten,
        )

    def _missing(self, response: Sequence[Message], text: str) -> list[int]:
        """Return the assistant's turns of a response of which the text does not hold what was said, as it was said."""
        return [
            place
            for place, turn in enumerate(response)
            if turn.role == "assistant" and self._literals.marked(turn).text.strip() not in text
        ]

    def _check_turns(
        self, pair: Pair, name: str, response: Sequence[Message], text: str, missing: Sequence[int]
    ) -> None:
        """Refuse a response of which a turn that is judged becomes empty: it would teach to answer nothing.

        Args:
            pair: The pair.
            name: What the response is called.
            response: Its messages.
            text: The whole conversation as the template writes it.
            missing: The turns of which the text does not hold what was said.
        """
        calling = [place for place, turn in enumerate(response) if turn.extras and not turn.text.strip()]
        scored = [place for place, turn in enumerate(response) if turn.role == "assistant" and turn.scored]
        judged = scored if self.turns == "all" else scored[-1:]
        for place in sorted({*missing, *calling}.intersection(judged)):
            before, after = (*pair.prompt, *response[:place]), response[place + 1 :]
            empty = self.tried([*before, Message("assistant", ""), *after], pair.arguments)
            if empty is not None and "".join(empty.split()) == "".join(text.split()):
                which = f"turn {place + 1} of `{name}`" if len(response) > 1 else f"`{name}`"
                kept = "what it calls" if any(what_is_called(response[place])) else "what it says"
                raise BadRow("empty turn", f"{which} becomes empty: the chat template does not write {kept}")

    def _turns(
        self, pair: Pair, response: Sequence[Message], text: str, boundary: int
    ) -> tuple[tuple[Span, ...], bool]:
        """Return where the turns that are judged stand, and whether inference would see another context at one."""
        if len(response) == 1:
            return ((boundary, len(text)),), False
        spans, differs = _Turns(self, pair, response, text).spans(boundary)
        answers = (turn for turn in response if turn.role == "assistant")
        scored = tuple(span for span, turn in zip(spans, answers, strict=True) if turn.scored)
        return (scored if self.turns == "all" else scored[-1:]), differs

    def _boundary(self, pair: Pair, prompt: str, chosen: str, rejected: str) -> int:
        """Return where the prompt that inference sends parts from what stands in the whole conversations."""
        sides = [_Turns(self, pair, *side) for side in ((pair.chosen, chosen), (pair.rejected, rejected))]
        boundary = min(turns.start(0, prompt) for turns in sides)
        if chosen[:boundary] != rejected[:boundary]:
            raise _lost("the prompt")
        return boundary

    def around_last(self, pair: Pair) -> tuple[str, str]:
        """Write a prompt as inference sends it, what is said last left out; return what stands before it and behind.

        Raises:
            BadRow: The template does not write what is said last, or fails without it.
        """
        pair = self._with_calls(pair)
        *before, last = pair.prompt
        messages = [*before, Message(last.role, STAND_IN, extras=last.extras)]
        try:
            text = self.write(messages, pair.arguments, add_generation_prompt=True)
        except template_errors() as error:
            detail = f"the chat template fails where what is said last in the prompt is cut: {_reason(error)}"
            raise BadRow("template error", detail) from None
        head, found, tail = text.partition(STAND_IN)
        if not found:
            raise BadRow("template error", "the chat template leaves out what is said last in the prompt")
        return head, tail

    def write(self, messages: Sequence[Message], arguments: Mapping[str, Any], **settings: bool) -> str:
        """Write one conversation."""
        return self._write([self._marked(messages)], arguments, **settings)[0]

    def tried(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> str | None:
        """Write a conversation on which the template may fail; None where it does."""
        return self._tried(self._marked(messages), arguments, add_generation_prompt=False)

    def _tried(
        self, messages: Sequence[Message], arguments: Mapping[str, Any], add_generation_prompt: bool
    ) -> str | None:
        """Write a conversation in which control tokens are marked."""
        try:
            return self._write([messages], arguments, add_generation_prompt=add_generation_prompt)[0]
        except BadRow:
            return None
        except template_errors():
            return None

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        """Mark the control tokens that messages spell out."""
        return list(map(self._literals.marked, messages))

    def _write(
        self,
        conversations: Sequence[Sequence[Message]],
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> list[str]:
        """Write conversations, in which the control tokens that they spell out are marked."""
        if self._templates is None:
            if arguments:
                raise BadRow(
                    "template error", f"`plain` makes no use of {', '.join(f'`{name}`' for name in arguments)}"
                )
            return [self._plain(one, add_generation_prompt=add_generation_prompt) for one in conversations]
        return self._templates.of(arguments)(
            conversations, self._literals.marked_values(arguments), add_generation_prompt=add_generation_prompt
        )


@dataclass(frozen=True)
class _Turns:
    """Finds the assistant's turns of a response of several turns.

    Attributes:
        renderer: Writes conversations.
        pair: The pair.
        response: One of its responses.
        whole: Prompt and response as text.
    """

    renderer: Renderer
    pair: Pair
    response: Sequence[Message]
    whole: str

    def spans(self, boundary: int) -> tuple[tuple[Span, ...], bool]:
        """Return where each turn stands in the whole, and whether inference would see another context at one.

        Args:
            boundary: Where the first turn starts.
        """
        places = [place for place, message in enumerate(self.response) if message.role == "assistant"]
        sent = [self._write(place, add_generation_prompt=True) for place in places[1:]]
        starts = [boundary, *(self.start(place, text) for place, text in zip(places[1:], sent, strict=True))]
        ends = [*map(self._end, places[:-1]), len(self.whole)]
        edges = [edge for span in zip(starts, ends, strict=True) for edge in span]
        if edges != sorted(edges):
            raise _lost("a turn")
        return tuple(zip(starts, ends, strict=True)), not all(map(self.whole.startswith, sent))

    def start(self, place: int, sent: str) -> int:
        """Return where a turn starts: as far as what inference sends before it stands in the whole.

        Args:
            place: Of the turn, in the response.
            sent: What inference sends, generation prompt included.

        Raises:
            BadRow: It cannot be told.
        """
        shared = common_length(sent, self.whole)
        if shared == len(sent):
            return shared
        before, _ = self._around_stand_in(place, len(self.response))
        own = common_length(before, self.whole)
        # Within the generation prompt they part between two tokens, which need not be where their letters part;
        # what the answer begins with may look like the generation prompt's own end.
        tokens = [self._tokens(text) for text in (sent, self.whole)]
        for edge in range(min(shared, own), max(1, common_length(sent, self._write(place))) - 1, -1):
            upto = self._tokens(self.whole[:edge])
            if all(found[: len(upto)] == upto for found in tokens):
                return edge
        # They part before it: what was said is written otherwise once it is answered.
        if not before or own < len(before):
            raise _lost("the prompt")
        return len(_without_answers_space(before, sent))

    def _end(self, place: int) -> int:
        """Return where a turn ends that others follow, the end that the template writes included."""
        upto = self._write(place + 1)
        if self.whole.startswith(upto):
            return len(upto)
        # What the assistant said is written otherwise once others follow; the template's own words are not.
        _, rest = self._around_stand_in(place, len(self.response))
        if not self.whole.endswith(rest):
            raise _lost("a turn")
        _, closing = self._around_stand_in(place, place + 1)
        if not rest.startswith(closing):
            closing = self._inner_closing(place)
        return len(self.whole) - len(rest) + common_length(closing, rest)

    def _inner_closing(self, place: int) -> str:
        """Return what the template writes behind a turn that is not the last: what stands before another's header."""
        header = self._write(place, add_generation_prompt=True).removeprefix(self._write(place))
        turns = [*self._before(place), STAND_IN_TURN, STAND_IN_TURN]
        text = self.renderer.write(turns, self.pair.arguments)
        between = text.split(STAND_IN)[1:2]
        return between[0].partition(header)[0] if header and between else ""

    def _tokens(self, text: str) -> list[int]:
        return list(self.renderer.encode([text])[0].tolist())

    def _around_stand_in(self, place: int, stop: int) -> tuple[str, str]:
        """Write the messages before `stop`, what a turn says replaced; return what stands before it and behind."""
        messages = [*self._before(place), STAND_IN_TURN, *self.response[place + 1 : stop]]
        before, found, behind = self.renderer.write(messages, self.pair.arguments).partition(STAND_IN)
        if not found:
            raise _lost("a turn")
        return before, behind

    def _before(self, place: int) -> tuple[Message, ...]:
        return (*self.pair.prompt, *self.response[:place])

    def _write(self, stop: int, **settings: bool) -> str:
        return self.renderer.write(self._before(stop), self.pair.arguments, **settings)


def _has_extras(pair: Pair) -> bool:
    # A loop takes half the time of `any`.
    for messages in (pair.prompt, pair.chosen, pair.rejected):
        for message in messages:
            if message.extras:
                return True
    return False


def _each_message(pair: Pair, change: Callable[[Message], Message]) -> Pair:
    """Return a pair of which each message is changed."""
    prompt, chosen, rejected = (tuple(map(change, said)) for said in (pair.prompt, pair.chosen, pair.rejected))
    return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)


def _without_answers_space(before: str, sent: str) -> str:
    """Return what stands before an answer's text without the white space that is the answer's to write.

    Args:
        before: It.
        sent: What inference sends before the answer: white space at its end is not the answer's.
    """
    space = before[len(before.rstrip()) :]
    return before[: len(before) - len(space) + common_length(space, sent[len(sent.rstrip()) :])]


def _lost(what: str) -> BadRow:
    detail = f"the chat template does not write the prompt, then the response: where {what} ends cannot be told"
    return BadRow("template error", detail)


def _written_plainly(messages: Sequence[Message], *, add_generation_prompt: bool, bos: str, end: str) -> str:
    """Write a conversation for a model without a chat template: headed sections, an end behind each answer."""
    sections = list(_sections(messages, end))
    if add_generation_prompt:
        sections.append("### Response:\n")
    return bos + "\n\n".join(sections)


def _sections(messages: Sequence[Message], end: str) -> Iterator[str]:
    for message in messages:
        if message.role == "tool" or "tool_calls" in message.extras:
            raise BadRow("template error", "`plain` has no words for tools: set `model.chat_template` to a template")
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


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__

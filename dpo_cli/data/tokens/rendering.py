"""A `Pair` becomes text: the prompt as inference sends it, both whole conversations, and the spans of their turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.data.pairs.calls import has_broken_arguments, what_is_called
from dpo_cli.data.records import BadRow, Message, Pair, TurnRule
from dpo_cli.data.tokens.chat_template import TEMPLATE_ERRORS
from dpo_cli.data.tokens.control_tokens import LITERAL_START
from dpo_cli.data.tokens.conversation_text import ConversationText, has_extras, reason
from dpo_cli.data.tokens.encoding import TextEncoder
from dpo_cli.data.tokens.turn_boundaries import Span, TurnBoundaries, unknown_end
from dpo_cli.data.tokens.unwritten import NOT_JSON, Unwritten


@dataclass(frozen=True, slots=True)
class Written:
    """A whole conversation as text.

    Attributes:
        text: The text; control tokens that a message spells out are marked (`control_tokens.LITERAL_START`).
        scored: The spans of the turns that are scored, ascending.
    """

    text: str
    scored: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A pair as text.

    Attributes:
        prompt: What both conversations begin with: what inference sends, or as much of it as they contain.
        chosen: The prompt and the chosen response.
        rejected: The prompt and the rejected response.
        literals: Control tokens that messages spell out.
        prompt_differs: Whether the conversations do not begin with exactly what inference sends.
        context_differs: Whether inference would send something else before a later turn that is scored.
        rewritten: Whether the template changes a text of the assistant.
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
        texts: Writes conversations.
        encode: Makes token ids of texts.
        turns: Which of a response's turns are scored.
    """

    def __init__(self, texts: ConversationText, encode: TextEncoder, turns: TurnRule) -> None:
        self.texts, self.encode, self.turns = texts, encode, turns
        self._unwritten = Unwritten(texts.try_to_write_marked)

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
            self.texts.check_template(arguments)
            pairs = [self.texts.with_calls(pair) for pair in pairs]
            asked = [self.texts.marked(pair.prompt) for pair in pairs]
            both = [
                prompt + self.texts.marked(response)
                for pair, prompt in zip(pairs, asked, strict=True)
                for response in (pair.chosen, pair.rejected)
            ]
            prompts = self.texts.write_marked(asked, arguments, add_generation_prompt=True)
            wholes = self.texts.write_marked(both, arguments)
            found = zip(pairs, prompts, wholes[::2], wholes[1::2], strict=True)
            return [self._located(pair, *texts) for pair, *texts in found]
        except BadRow as bad:
            return [bad] if len(pairs) == 1 else self._one_by_one(pairs)
        except TEMPLATE_ERRORS as error:
            if len(pairs) > 1:
                return self._one_by_one(pairs)
            return [BadRow("template error", f"the chat template fails: {reason(error)}")]

    def _one_by_one(self, pairs: Sequence[Pair]) -> list[Rendered | BadRow]:
        """Find out which of several pairs cannot be written."""
        return [item for pair in pairs for item in self._write_all([pair])]

    def _located(self, pair: Pair, prompt: str, chosen: str, rejected: str) -> Rendered:
        """Find the end of the prompt in both conversations, and the turns behind it."""
        literals = self.texts.num_literals(pair) if LITERAL_START in chosen or LITERAL_START in rejected else 0
        if literals and (part := self.encode.spell.unspeakable(chosen, rejected)):
            raise BadRow(
                "control token", f"the tokenizer has no tokens for the characters of `{part}`, which a text uses"
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
        unwritten = self._unwritten(pair, self.texts.marked_pair)
        extras = has_extras(pair)
        if extras and any(map(has_broken_arguments, pair.prompt + pair.chosen + pair.rejected)):
            unwritten |= {NOT_JSON.name}
        for name, side in sides.items():
            if missing[name] or extras:
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
        """Return the assistant's turns of a response whose message the text does not contain unchanged."""
        return [
            number
            for number, turn in enumerate(response)
            if turn.role == "assistant" and self.texts.marked([turn])[0].text.strip() not in text
        ]

    def _check_turns(
        self, pair: Pair, name: str, response: Sequence[Message], text: str, missing: Sequence[int]
    ) -> None:
        """Refuse a response of which a turn that is scored becomes empty: it would teach to answer nothing.

        Args:
            pair: The pair.
            name: What the response is called.
            response: Its messages.
            text: The whole conversation as the template writes it.
            missing: The turns whose message the text does not contain unchanged.
        """
        calling = [number for number, turn in enumerate(response) if turn.extras and not turn.text.strip()]
        scored = [number for number, turn in enumerate(response) if turn.role == "assistant" and turn.scored]
        wanted = scored if self.turns == "all" else scored[-1:]
        for number in sorted({*missing, *calling}.intersection(wanted)):
            before, after = (*pair.prompt, *response[:number]), response[number + 1 :]
            empty = self.texts.try_to_write([*before, Message("assistant", ""), *after], pair.arguments)
            if empty is not None and "".join(empty.split()) == "".join(text.split()):
                which = f"turn {number + 1} of `{name}`" if len(response) > 1 else f"`{name}`"
                kept = "what it calls" if any(what_is_called(response[number])) else "what it says"
                raise BadRow("empty turn", f"{which} becomes empty: the chat template does not write {kept}")

    def _turns(
        self, pair: Pair, response: Sequence[Message], text: str, boundary: int
    ) -> tuple[tuple[Span, ...], bool]:
        """Return the spans of the turns that are scored, and whether inference would see another context at one."""
        if len(response) == 1:
            return ((boundary, len(text)),), False
        spans, differs = TurnBoundaries(self.texts, self.encode, pair, response, text).spans(boundary)
        answers = (turn for turn in response if turn.role == "assistant")
        scored = tuple(span for span, turn in zip(spans, answers, strict=True) if turn.scored)
        return (scored if self.turns == "all" else scored[-1:]), differs

    def _boundary(self, pair: Pair, prompt: str, chosen: str, rejected: str) -> int:
        """Return where the prompt that inference sends parts from the whole conversations."""
        sides = [
            TurnBoundaries(self.texts, self.encode, pair, *side)
            for side in ((pair.chosen, chosen), (pair.rejected, rejected))
        ]
        boundary = min(turns.start(0, prompt) for turns in sides)
        if chosen[:boundary] != rejected[:boundary]:
            raise unknown_end("the prompt")
        return boundary

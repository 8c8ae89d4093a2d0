"""Where the assistant's turns begin and end in the text of a conversation.

That is never guessed from the template's source: the conversation is written up to that point as well, and compared
with the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.data.records import BadRow, Message, Pair
from dpo_cli.data.tokens.chat_template import common_length
from dpo_cli.data.tokens.control_tokens import STAND_IN, STAND_IN_TURN
from dpo_cli.data.tokens.conversation_text import ConversationText
from dpo_cli.data.tokens.encoding import TextEncoder

Span = tuple[int, int]
"""Start and stop in a text, in characters."""


@dataclass(frozen=True)
class TurnBoundaries:
    """Finds the assistant's turns of a response of several turns.

    Attributes:
        texts: Writes conversations.
        encode: Makes token ids of texts.
        pair: The pair.
        response: One of its responses.
        whole: Prompt and response as text.
    """

    texts: ConversationText
    encode: TextEncoder
    pair: Pair
    response: Sequence[Message]
    whole: str

    def spans(self, boundary: int) -> tuple[tuple[Span, ...], bool]:
        """Return the span of each turn in the whole, and whether inference would see another context at one.

        Args:
            boundary: Where the first turn starts.

        Raises:
            BadRow: They cannot be determined.
        """
        turns = [number for number, message in enumerate(self.response) if message.role == "assistant"]
        sent = [self._write(turn, add_generation_prompt=True) for turn in turns[1:]]
        starts = [boundary, *(self.start(turn, text) for turn, text in zip(turns[1:], sent, strict=True))]
        ends = [*map(self._end, turns[:-1]), len(self.whole)]
        edges = [edge for span in zip(starts, ends, strict=True) for edge in span]
        if edges != sorted(edges):
            raise unknown_end("a turn")
        return tuple(zip(starts, ends, strict=True)), not all(map(self.whole.startswith, sent))

    def start(self, turn: int, sent: str) -> int:
        """Return where a turn starts: as far as what inference sends before it is found in the whole.

        Args:
            turn: Its number in the response.
            sent: What inference sends, generation prompt included.

        Raises:
            BadRow: It cannot be determined.
        """
        shared = common_length(sent, self.whole)
        if shared == len(sent):
            return shared
        before, _ = self._around_stand_in(turn, len(self.response))
        own = common_length(before, self.whole)
        # Within the generation prompt they part between two tokens, which need not be where their letters part;
        # what the answer begins with may look like the generation prompt's own end.
        tokens = [self._tokens(text) for text in (sent, self.whole)]
        for edge in range(min(shared, own), max(1, common_length(sent, self._write(turn))) - 1, -1):
            upto = self._tokens(self.whole[:edge])
            if all(found[: len(upto)] == upto for found in tokens):
                return edge
        # They part before it: a message is written otherwise once it is answered.
        if not before or own < len(before):
            raise unknown_end("the prompt")
        return len(_without_answers_space(before, sent))

    def _end(self, turn: int) -> int:
        """Return where a turn ends that others follow, the end that the template writes included."""
        upto = self._write(turn + 1)
        if self.whole.startswith(upto):
            return len(upto)
        # What the assistant said is written otherwise once others follow; the template's own words are not.
        _, rest = self._around_stand_in(turn, len(self.response))
        if not self.whole.endswith(rest):
            raise unknown_end("a turn")
        _, closing = self._around_stand_in(turn, turn + 1)
        if not rest.startswith(closing):
            closing = self._inner_closing(turn)
        return len(self.whole) - len(rest) + common_length(closing, rest)

    def _inner_closing(self, turn: int) -> str:
        """Return what the template writes behind a turn that is not the last: what precedes another's header."""
        header = self._write(turn, add_generation_prompt=True).removeprefix(self._write(turn))
        turns = [*self._before(turn), STAND_IN_TURN, STAND_IN_TURN]
        text = self.texts.write(turns, self.pair.arguments)
        between = text.split(STAND_IN)[1:2]
        return between[0].partition(header)[0] if header and between else ""

    def _tokens(self, text: str) -> list[int]:
        return list(self.encode([text])[0].tolist())

    def _around_stand_in(self, turn: int, stop: int) -> tuple[str, str]:
        """Write the messages before `stop`, the text of a turn replaced; return what precedes it and follows it."""
        messages = [*self._before(turn), STAND_IN_TURN, *self.response[turn + 1 : stop]]
        before, found, behind = self.texts.write(messages, self.pair.arguments).partition(STAND_IN)
        if not found:
            raise unknown_end("a turn")
        return before, behind

    def _before(self, turn: int) -> tuple[Message, ...]:
        return (*self.pair.prompt, *self.response[:turn])

    def _write(self, stop: int, **settings: bool) -> str:
        return self.texts.write(self._before(stop), self.pair.arguments, **settings)


def unknown_end(what: str) -> BadRow:
    """Say that the end of something cannot be determined."""
    detail = f"the chat template does not write the prompt, then the response: the end of {what} cannot be determined"
    return BadRow("template error", detail)


def _without_answers_space(before: str, sent: str) -> str:
    """Return what precedes an answer's text without the white space that belongs to the answer.

    Args:
        before: It.
        sent: What inference sends before the answer: white space at its end does not belong to the answer.
    """
    space = before[len(before.rstrip()) :]
    return before[: len(before) - len(space) + common_length(space, sent[len(sent.rstrip()) :])]

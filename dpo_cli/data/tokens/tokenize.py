"""A `Pair` becomes token ids: the boundary between prompt and response, what is judged, the length rule.

The response is what the model is judged on: its text and whatever the template writes to close the turn.
Its first token starts exactly where generation would start, after the prompt that inference sends.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.data.records import BadRow, Gaps, LengthRule, Lengths, Pair, TokenizedPair, Tokens, TurnRule, total_tokens
from dpo_cli.data.tokens.chat_template import DEFAULT, asks_for_the_day, named_templates
from dpo_cli.data.tokens.encoding import TextEncoder, common_beginning
from dpo_cli.data.tokens.rendering import PLAIN, Rendered, Renderer, Written
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.system.storage import text_digest


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A tokenized pair and what had to be done to it.

    Attributes:
        pair: The pair.
        joined: Whether the tokenizer would have merged across the boundary, so that the parts were tokenized apart.
        literals: Control tokens that the messages spell out, and that became text.
        prompt_differs: Whether what inference sends does not stand in the conversations as it is.
        context_differs: Whether inference would send something else before a later turn that is judged.
        rewritten: Whether the template writes something that the assistant says in another way.
        unwritten: What the template does not write of what the row says; names of checks in `unwritten`.
        truncated: Whether some of the prompt was cut away.
        responses_cut: How many of the two responses were cut.
        uncut: The tokens of prompt, chosen and rejected before anything was cut; None where nothing was.
    """

    pair: TokenizedPair
    joined: bool = False
    literals: int = 0
    prompt_differs: bool = False
    context_differs: bool = False
    rewritten: bool = False
    unwritten: frozenset[str] = frozenset()
    truncated: bool = False
    responses_cut: int = 0
    uncut: Lengths | None = None


class PairTokenizer:
    """Turn pairs into token ids under one template and one length rule.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: A chat template's text, `plain`, or None for the tokenizer's own templates.
        max_length: The most tokens that prompt and response may have together.
        on_too_long: What becomes of longer ones.
        turns: Which of a response's turns are judged.
        min_response: The fewest tokens to which a response may be cut, or None where it is never cut.
        day: What a template is told that asks for the date; None: the day on which it asks.

    Raises:
        UserError: The tokenizer has no template, or no end-of-sequence token where one is needed.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None,
        max_length: int,
        on_too_long: LengthRule,
        turns: TurnRule = "all",
        min_response: int | None = None,
        day: date | None = None,
    ) -> None:
        self.tokenizer, self.max_length, self.on_too_long = tokenizer, max_length, on_too_long
        self.turns, self.min_response = turns, min_response
        found = {DEFAULT: template} if template else named_templates(tokenizer)
        if not found:
            hint = "set `model.chat_template` to `plain` or to the path of a Jinja template"
            raise UserError("the tokenizer has no chat template", "`model.chat_template`", hint)
        if template == PLAIN and tokenizer.eos_token is None:
            hint = "set `model.chat_template` to a template that closes its turns"
            raise UserError("the tokenizer has no end-of-sequence token", "`model.chat_template: plain`", hint)
        self.templates = {} if template == PLAIN else found
        self.day = day if any(map(asks_for_the_day, self.templates.values())) else None
        self._encode = TextEncoder(tokenizer)
        self._render = Renderer(tokenizer, self.templates, turns, self._encode, self.day)

    @functools.cached_property
    def settings(self) -> dict[str, str | int | None]:
        """Everything that decides which tokens a pair becomes; tokenizer and template as digests."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else repr(sorted(self.tokenizer.get_vocab().items()))
        special = repr(sorted(self.tokenizer.special_tokens_map.items()))
        return {
            "tokenizer": text_digest(vocabulary, special),
            "chat template": _digest(self.templates),
            **({"day": self.day.isoformat()} if self.day else {}),
            "data.max_length": self.max_length,
            "data.on_too_long": self.on_too_long,
            "data.turns": self.turns,
            "data.min_response": self.min_response,
        }

    def __call__(self, pairs: Sequence[Pair]) -> list[Tokenized | BadRow]:
        """Tokenize many pairs in one call."""
        found = self._tokenize(pairs)
        return [
            item if isinstance(item, BadRow) else self._fit(pair, item) for pair, item in zip(pairs, found, strict=True)
        ]

    def _tokenize(self, pairs: Sequence[Pair]) -> list[Tokenized | BadRow]:
        """Tokenize pairs, however long they are."""
        rendered = self._render(pairs)
        written = [item for item in rendered if isinstance(item, Rendered)]
        self._encode.settle(side.text for item in written for side in (item.chosen, item.rejected))
        texts = [text for item in written for text in self._parts(item)]
        tokens = iter(self._encode(texts))
        return [
            item
            if isinstance(item, BadRow)
            else self._without_control(item, self._assembled(pair, item, *itertools.islice(tokens, 4)))
            for pair, item in zip(pairs, rendered, strict=True)
        ]

    def _without_control(self, item: Rendered, found: Tokenized) -> Tokenized | BadRow:
        """Refuse a pair of which a text became a control token on its way through the tokenizer."""
        pair = found.pair
        for written, response in ((item.chosen, pair.chosen), (item.rejected, pair.rejected)):
            if self._encode.spell.becomes_control(written.text, pair.prompt, response):
                return BadRow("control token", "the tokenizer makes a control token of a text that does not spell one")
        return found

    def _parts(self, item: Rendered) -> tuple[str, str, str, str]:
        """Return the prompt up to its last cut, and what follows the cut: in the prompt, in both sequences."""
        cut = self._encode.last_cut(item.prompt)
        return item.prompt[:cut], item.prompt[cut:], item.chosen.text[cut:], item.rejected.text[cut:]

    def _assembled(
        self, pair: Pair, item: Rendered, head: Tokens, tail: Tokens, chosen: Tokens, rejected: Tokens
    ) -> Tokenized:
        """Put a pair together from the tokens of its parts."""
        prompt = np.concatenate([head, tail])
        sides = [
            self._response(item.prompt, written, prompt, len(head), tokens)
            for written, tokens in ((item.chosen, chosen), (item.rejected, rejected))
        ]
        (chosen, chosen_gaps, chosen_joined), (rejected, rejected_gaps, rejected_joined) = sides
        tokenized = TokenizedPair(
            prompt,
            chosen,
            rejected,
            pair.origin,
            pair.weight,
            pair.margin,
            pair.source,
            pair.category,
            chosen_gaps,
            rejected_gaps,
        )
        joined = chosen_joined or rejected_joined
        differs = item.prompt_differs, item.context_differs, item.rewritten
        return Tokenized(tokenized, joined, item.literals, *differs, item.unwritten)

    def _response(
        self, prompt_text: str, written: Written, prompt: Tokens, cut: int, rest: Tokens
    ) -> tuple[Tokens, Gaps | None, bool]:
        """Return the tokens after the prompt, which of them are not judged, and whether they were made apart from it.

        Args:
            prompt_text: The prompt.
            written: The whole conversation.
            prompt: The prompt's tokens.
            cut: How many of them stand before the last cut; up to there the conversation's are the same.
            rest: The conversation's tokens from there on.
        """
        tail = prompt[cut:]
        joined = len(rest) <= len(tail) or rest[: len(tail)].tobytes() != tail.tobytes()
        response = self._encode.continuation(written.text[len(prompt_text) :]) if joined else rest[len(tail) :]
        if written.judged == ((len(prompt_text), len(written.text)),):
            return response, None, joined
        return response, self._gaps(prompt_text, written, prompt, response, joined=joined), joined

    def _gaps(self, prompt_text: str, written: Written, prompt: Tokens, response: Tokens, *, joined: bool) -> Gaps:
        """Return which tokens of a response lie outside the turns that are judged.

        A token that reaches across the border of a turn belongs to what comes behind the border.
        """
        start = len(prompt_text) if joined else 0
        before = len(prompt) if not joined else 0
        whole = response if joined else np.concatenate([prompt, response])
        edges = [edge for span in written.judged for edge in span if edge < len(written.text)]
        texts = [written.text[start:edge] for edge in edges]
        upto = list(map(self._encode.continuation, texts)) if joined else self._encode(texts)
        places = [max(0, common_beginning(tokens, whole) - before) for tokens in upto]
        # Where what is judged ends with the conversation, its edges without that end bound the gaps.
        end = [] if len(edges) % 2 else [len(response)]
        return np.asarray([*([0, places[0]] if places[0] else []), *places[1:], *end], np.int32)

    def _fit(self, pair: Pair, whole: Tokenized) -> Tokenized | BadRow:
        """Apply the length rule: turns of the prompt go first, then its tokens, then, if at all, those of responses."""
        for name in ("prompt", "chosen", "rejected"):
            if not len(getattr(whole.pair, name)):
                return BadRow("template error", f"of `{name}` the chat template makes no token")
        if _length(whole.pair) <= self.max_length:
            return whole
        if self.on_too_long != "truncate":
            return self._too_long(whole.pair)
        whole = dataclasses.replace(whole, uncut=_lengths(whole.pair))
        beginnings = list(_later_beginnings(pair))
        tried = zip(beginnings, self._tokenize(beginnings), strict=True)
        shorter = [(later, found) for later, found in tried if isinstance(found, Tokenized)]
        for _, found in shorter:
            if _length(found.pair) <= self.max_length:
                return dataclasses.replace(whole, pair=found.pair, joined=found.joined, truncated=True)
        last, found = [(pair, whole), *shorter][-1]
        cut = self._cut(last, dataclasses.replace(whole, pair=found.pair, truncated=bool(shorter)))
        return cut or self._too_long(whole.pair)

    def _too_long(self, pair: TokenizedPair) -> BadRow:
        """Say why a pair is too long, and how long it is."""
        lengths = _lengths(pair)
        detail = f"the pair has {_length(pair)} tokens where `data.max_length` is {self.max_length}"
        if self.on_too_long != "truncate":
            return BadRow("too long", detail, structural=self.on_too_long == "error", lengths=lengths)
        allowed = "a response is never cut" if self.min_response is None else "`data.min_response` leaves no room"
        return BadRow("response too long", f"{detail}; {allowed}", structural=False, lengths=lengths)

    def _cut(self, pair: Pair, whole: Tokenized) -> Tokenized | BadRow | None:
        """Cut what is said last in the prompt from its left and, only where that is not enough, the responses.

        What the template writes around it stays, and so do system messages: a prompt keeps its form. Where the
        responses are too long for that, nothing is returned.
        """
        tokens = whole.pair
        try:
            head, tail = self._room_around_last(pair, tokens.prompt)
        except BadRow as bad:
            return bad
        asked = tokens.prompt[head : len(tokens.prompt) - tail]
        # Of what is said last, one character must be left.
        least = len(asked) - self._whole_place(asked, range(len(asked) - 1, -1, -1))
        ends = self._ends_within(tokens, self.max_length - head - tail - max(1, least))
        if ends is None:
            return None
        prompt, room = tokens.prompt, self.max_length - head - tail - max(ends)
        if room < len(asked):
            whole = dataclasses.replace(whole, truncated=True)
            start = self._whole_place(asked, range(len(asked) - room, len(asked)))
            prompt = np.concatenate([prompt[:head], asked[start:], prompt[len(prompt) - tail :]])
        cut = dataclasses.replace(
            tokens,
            prompt=prompt,
            chosen=tokens.chosen[: ends[0]],
            rejected=tokens.rejected[: ends[1]],
            chosen_gaps=_cut_gaps(tokens.chosen_gaps, ends[0]),
            rejected_gaps=_cut_gaps(tokens.rejected_gaps, ends[1]),
        )
        responses_cut = (len(tokens.chosen) > ends[0]) + (len(tokens.rejected) > ends[1])
        return dataclasses.replace(whole, pair=cut, responses_cut=responses_cut)

    def _ends_within(self, tokens: TokenizedPair, room: int) -> tuple[int, int] | None:
        """Return where both responses must end to fit into so many tokens, or None where they would be too short."""
        sides = tokens.chosen, tokens.rejected
        longest = max(map(len, sides))
        if longest > room and self.min_response is not None:
            fewest = (min(self.min_response, len(side)) for side in sides)
            ends = (self._whole_place(side, range(n, len(side) + 1)) for side, n in zip(sides, fewest, strict=True))
            longest = max(room, *ends)
        if longest > room:
            return None
        chosen, rejected = (self._whole_place(side, range(min(longest, len(side)), -1, -1)) for side in sides)
        openings = [int(gaps[1]) if gaps is not None and not gaps[0] else 0 for gaps in _gaps_of(tokens)]
        return (chosen, rejected) if chosen > openings[0] and rejected > openings[1] else None

    def _whole_place(self, tokens: Tokens, places: Iterable[int]) -> int:
        """Return the first of some places at which no character is parted; 0 where there is none."""
        return next((place for place in places if not place or not self._encode.begins_within(tokens[place:])), 0)

    def _room_around_last(self, pair: Pair, prompt: Tokens) -> tuple[int, int]:
        """Count the tokens of a prompt before what is said last in it, and those behind."""
        head_text, tail_text = self._render.around_last(pair)
        head, tail = self._encode([head_text])[0], self._encode.continuation(tail_text)
        before = common_beginning(head, prompt)
        rest = prompt[before:]
        # Of a generation prompt that parts from the conversations, the prompt has no more than the beginning.
        ends = (size for size in range(len(tail), 0, -1) if np.array_equal(rest[-size:], tail[:size]))
        return before, common_beginning(tail[::-1], rest[::-1]) or next(ends, 0)


def _length(pair: TokenizedPair) -> int:
    """Return the tokens of a pair's longer sequence."""
    return total_tokens(_lengths(pair))


def _lengths(pair: TokenizedPair) -> Lengths:
    return len(pair.prompt), len(pair.chosen), len(pair.rejected)


def _later_beginnings(pair: Pair) -> Iterator[Pair]:
    """Yield the pair with ever fewer turns of its prompt, each time from a user's turn on; system messages stay."""
    opening = list(itertools.takewhile(lambda message: message.role == "system", pair.prompt))
    for place in range(len(opening) + 1, len(pair.prompt)):
        if pair.prompt[place].role == "user":
            yield dataclasses.replace(pair, prompt=(*opening, *pair.prompt[place:]))


def _gaps_of(pair: TokenizedPair) -> tuple[Gaps | None, Gaps | None]:
    return pair.chosen_gaps, pair.rejected_gaps


def _cut_gaps(gaps: Gaps | None, length: int) -> Gaps | None:
    """Return the gaps of a response's first tokens."""
    if gaps is None:
        return None
    kept = np.minimum(gaps.reshape(-1, 2), length)
    kept = kept[kept[:, 0] < kept[:, 1]].reshape(-1)
    return kept if len(kept) else None


def read_template(name: str | None) -> str | None:
    """Return the text of a chat template file; `plain` and None stand for themselves."""
    if name is None or name == PLAIN:
        return name
    try:
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError("the chat template is not UTF-8 text", name, "save the file as UTF-8") from None
    except OSError as error:
        raise from_os_error(error, "reading the chat template", name, status=2) from error
    if not text.strip():
        raise UserError("the chat template is empty", name, "name another, or null for the tokenizer's own")
    return text


def _digest(templates: Mapping[str, str]) -> str:
    """Return a digest of chat templates; of none, which is `plain`, its name."""
    if not templates:
        return PLAIN
    # One alone is told by its text.
    return text_digest(*templates.values(), *(templates if len(templates) > 1 else ()))

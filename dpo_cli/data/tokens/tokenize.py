"""A `Pair` becomes token ids: the boundary between prompt and response, what is scored, the length rule.

The response is what is scored: its text and whatever the template writes to close the turn.
Its first token starts exactly where generation would start, after the prompt that inference sends.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.data.records import BadRow, Gaps, LengthRule, Lengths, Pair, TokenizedPair, Tokens, TurnRule, total_tokens
from dpo_cli.data.tokens.chat_template import DEFAULT, asks_for_the_day, named_templates
from dpo_cli.data.tokens.conversation_text import PLAIN, ConversationText
from dpo_cli.data.tokens.cutting import Cutter, later_beginnings
from dpo_cli.data.tokens.encoding import TextEncoder, common_beginning
from dpo_cli.data.tokens.rendering import Rendered, Renderer, Written
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.system.storage import text_digest


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A tokenized pair and what had to be done to it.

    Attributes:
        pair: The pair.
        joined: Whether the tokenizer would have merged across the boundary, so that the parts were tokenized apart.
        literals: Control tokens that the messages spell out, and that became text.
        prompt_differs: Whether the conversations do not begin with exactly what inference sends.
        context_differs: Whether inference would send something else before a later turn that is scored.
        rewritten: Whether the template changes a text of the assistant.
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
        turns: Which of a response's turns are scored.
        min_response: The fewest tokens to which a response may be cut, or None where it is never cut.
        day: The date that a template gets where it asks for one; None: that of the day on which it asks.

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
        texts = ConversationText(tokenizer, self.templates, self.day)
        self._render = Renderer(texts, self._encode, turns)
        self._cut = Cutter(texts, self._encode, max_length, min_response)

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
        """Return the tokens after the prompt, which of them are not scored, and whether they were made apart from it.

        Args:
            prompt_text: The prompt.
            written: The whole conversation.
            prompt: The prompt's tokens.
            cut: How many of them precede the last cut; up to there the conversation's are the same.
            rest: The conversation's tokens from there on.
        """
        tail = prompt[cut:]
        joined = len(rest) <= len(tail) or rest[: len(tail)].tobytes() != tail.tobytes()
        response = self._encode.continuation(written.text[len(prompt_text) :]) if joined else rest[len(tail) :]
        if written.scored == ((len(prompt_text), len(written.text)),):
            return response, None, joined
        return response, self._gaps(prompt_text, written, prompt, response, joined=joined), joined

    def _gaps(self, prompt_text: str, written: Written, prompt: Tokens, response: Tokens, *, joined: bool) -> Gaps:
        """Return which tokens of a response lie outside the turns that are scored.

        A token that reaches across the border of a turn belongs to what comes behind the border.
        """
        start = len(prompt_text) if joined else 0
        before = len(prompt) if not joined else 0
        whole = response if joined else np.concatenate([prompt, response])
        edges = [edge for span in written.scored for edge in span if edge < len(written.text)]
        texts = [written.text[start:edge] for edge in edges]
        upto = list(map(self._encode.continuation, texts)) if joined else self._encode(texts)
        places = [max(0, common_beginning(tokens, whole) - before) for tokens in upto]
        # Where what is scored ends with the conversation, its edges without that end bound the gaps.
        end = [] if len(edges) % 2 else [len(response)]
        return np.asarray([*([0, places[0]] if places[0] else []), *places[1:], *end], np.int32)

    def _fit(self, pair: Pair, whole: Tokenized) -> Tokenized | BadRow:
        """Apply the length rule: turns of the prompt go first, then its tokens, then, if at all, those of responses."""
        for name in ("prompt", "chosen", "rejected"):
            if not len(getattr(whole.pair, name)):
                return BadRow("template error", f"the chat template makes no token of `{name}`")
        if _length(whole.pair) <= self.max_length:
            return whole
        if self.on_too_long != "truncate":
            return self._too_long(whole.pair)
        whole = dataclasses.replace(whole, uncut=_lengths(whole.pair))
        beginnings = list(later_beginnings(pair))
        tried = zip(beginnings, self._tokenize(beginnings), strict=True)
        shorter = [(later, found) for later, found in tried if isinstance(found, Tokenized)]
        for _, found in shorter:
            if _length(found.pair) <= self.max_length:
                return dataclasses.replace(whole, pair=found.pair, joined=found.joined, truncated=True)
        last, found = [(pair, whole), *shorter][-1]
        try:
            cut = self._cut(last, found.pair)
        except BadRow as bad:
            return bad
        if cut is None:
            return self._too_long(whole.pair)
        truncated = bool(shorter) or cut.prompt_cut
        return dataclasses.replace(whole, pair=cut.pair, truncated=truncated, responses_cut=cut.responses_cut)

    def _too_long(self, pair: TokenizedPair) -> BadRow:
        """Say why a pair is too long, and how long it is."""
        lengths = _lengths(pair)
        detail = f"the pair has {_length(pair)} tokens, but `data.max_length` is {self.max_length}"
        if self.on_too_long != "truncate":
            return BadRow("too long", detail, structural=self.on_too_long == "error", lengths=lengths)
        allowed = "a response is never cut" if self.min_response is None else "`data.min_response` leaves no room"
        return BadRow("response too long", f"{detail}; {allowed}", structural=False, lengths=lengths)


def _length(pair: TokenizedPair) -> int:
    """Return the tokens of a pair's longer sequence."""
    return total_tokens(_lengths(pair))


def _lengths(pair: TokenizedPair) -> Lengths:
    return len(pair.prompt), len(pair.chosen), len(pair.rejected)


def read_template(name: str | None) -> str | None:
    """Return the text of a chat template file; `plain` and None are returned as they are."""
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
    # The text of a single one identifies it.
    return text_digest(*templates.values(), *(templates if len(templates) > 1 else ()))

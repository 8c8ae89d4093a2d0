"""A `Pair` becomes token ids: the template, the boundary between prompt and response, the length rule.

The response is what the model is judged on: its text and whatever the template writes to close the turn.
Its first token starts exactly where generation would start, after the prompt that inference sends.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_cli.data.encode import TextEncoder
from dpo_cli.data.records import BadRow, Message, Pair, TokenizedPair, Tokens
from dpo_cli.errors import UserError, from_os_error
from dpo_cli.storage import text_digest

PLAIN = "plain"
LengthRule = Literal["drop", "truncate", "error"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A pair as text: the prompt as inference sends it, and the two whole sequences."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A tokenized pair and what had to be done to it."""

    pair: TokenizedPair
    whole_prompt: Tokens
    """The prompt before any cut: what tells which pairs share one."""
    truncated: bool
    """Whether tokens of the prompt were cut away."""
    joined: bool
    """Whether the tokenizer would have merged across the boundary, so that the parts were tokenized apart."""


class PairTokenizer:
    """Turn pairs into token ids under one template and one length rule.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: A chat template's text, `plain`, or None for the tokenizer's own template.
        max_length: The most tokens that prompt and response may have together.
        on_too_long: What becomes of longer ones.

    Raises:
        UserError: The tokenizer has no template, or no end-of-sequence token where one is needed.
    """

    def __init__(self, tokenizer: Any, *, template: str | None, max_length: int, on_too_long: LengthRule) -> None:
        self.tokenizer, self.max_length, self.on_too_long = tokenizer, max_length, on_too_long
        self.plain = template == PLAIN
        self.template = None if self.plain else template or _own_template(tokenizer)
        if self.plain and tokenizer.eos_token is None:
            hint = "set `model.chat_template` to a template that closes its turns"
            raise UserError("the tokenizer has no end-of-sequence token", "`model.chat_template: plain`", hint)
        if not self.plain and not self.template:
            hint = "set `model.chat_template` to `plain` or to the path of a Jinja template"
            raise UserError("the tokenizer has no chat template", "`model.chat_template`", hint)
        self._encode = TextEncoder(tokenizer)
        self._bos = tokenizer.bos_token if self.plain and _adds_bos(tokenizer) else ""

    @functools.cached_property
    def settings(self) -> dict[str, str | int]:
        """Everything that decides which tokens a pair becomes; tokenizer and template as digests."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else repr(sorted(self.tokenizer.get_vocab().items()))
        special = repr(sorted(self.tokenizer.special_tokens_map.items()))
        return {
            "tokenizer": text_digest(vocabulary, special),
            "chat template": PLAIN if self.plain else text_digest(str(self.template)),
            "data.max_length": self.max_length,
            "data.on_too_long": self.on_too_long,
        }

    def __call__(self, pairs: Sequence[Pair]) -> list[Tokenized | BadRow]:
        """Tokenize many pairs in one call."""
        results: list[Tokenized | BadRow] = []
        rendered = self._render(pairs)
        texts = [text for item in rendered if isinstance(item, Rendered) for text in self._parts(item)]
        tokens = iter(self._encode(texts))
        for pair, item in zip(pairs, rendered, strict=True):
            if isinstance(item, BadRow):
                results.append(item)
                continue
            head, tail, chosen, rejected = itertools.islice(tokens, 4)
            chosen, chosen_joined = self._response(item.prompt, item.chosen, tail, chosen)
            rejected, rejected_joined = self._response(item.prompt, item.rejected, tail, rejected)
            prompt = np.concatenate([head, tail])
            whole = TokenizedPair(prompt, chosen, rejected, pair.origin, pair.weight, pair.margin)
            results.append(self._fit(whole, joined=chosen_joined or rejected_joined))
        return results

    def _parts(self, item: Rendered) -> tuple[str, str, str, str]:
        """Return the prompt up to its last cut, and what follows the cut: in the prompt, in both sequences."""
        cut = self._encode.last_cut(item.prompt)
        return item.prompt[:cut], item.prompt[cut:], item.chosen[cut:], item.rejected[cut:]

    def _render(self, pairs: Sequence[Pair]) -> list[Rendered | BadRow]:
        """Write pairs out as text, by the chat template or plainly."""
        if self.plain:
            return [self._render_plainly(pair) for pair in pairs]
        if not pairs:
            return []
        both = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
        try:
            prompts = self._apply([(pair.prompt,) for pair in pairs], add_generation_prompt=True)
            wholes = self._apply(both)
        except _template_errors() as error:
            if len(pairs) > 1:  # One at a time tells which of them fail.
                return [item for pair in pairs for item in self._render([pair])]
            return [BadRow("template error", f"the chat template fails: {error}")]
        return [_rendered(*texts) for texts in zip(prompts, wholes[::2], wholes[1::2], strict=True)]

    def _render_plainly(self, pair: Pair) -> Rendered:
        prompt = self._bos + plain_prompt(pair.prompt)
        end = self.tokenizer.eos_token
        return Rendered(prompt, prompt + pair.chosen.text + end, prompt + pair.rejected.text + end)

    def _apply(self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False) -> list[str]:
        """Write conversations out by the chat template."""
        listed = [[{"role": message.role, "content": message.text} for message in one] for one in conversations]
        texts = self.tokenizer.apply_chat_template(
            listed, chat_template=self.template, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return list(map(str, texts))

    def _response(self, prompt_text: str, text: str, prompt: Tokens, whole: Tokens) -> tuple[Tokens, bool]:
        """Return the tokens after the prompt, and whether they had to be made apart from it.

        `prompt` and `whole` begin at the last cut before the boundary: up to there they are the same.
        """
        if len(whole) > len(prompt) and whole[: len(prompt)].tobytes() == prompt.tobytes():
            return whole[len(prompt) :], False
        return self._encode([text[len(prompt_text) :]])[0], True

    def _fit(self, pair: TokenizedPair, *, joined: bool) -> Tokenized | BadRow:
        """Apply the length rule. A response is never cut: where it alone is too long, the pair goes."""
        longest = max(len(pair.chosen), len(pair.rejected))
        length = len(pair.prompt) + longest
        if length <= self.max_length:
            return Tokenized(pair, pair.prompt, truncated=False, joined=joined)
        detail = f"has {length} tokens where `data.max_length` is {self.max_length}"
        if self.on_too_long != "truncate":
            return BadRow("too long", detail, structural=self.on_too_long == "error")
        opening = int(pair.prompt[0] == self.tokenizer.bos_token_id)
        kept = self.max_length - longest - opening
        if kept < 1:
            return BadRow("response too long", f"{detail}; a response is never cut", structural=False)
        prompt = np.concatenate([pair.prompt[:opening], pair.prompt[-kept:]])
        return Tokenized(dataclasses.replace(pair, prompt=prompt), pair.prompt, truncated=True, joined=joined)


def _rendered(prompt: str, chosen: str, rejected: str) -> Rendered | BadRow:
    """Take a template's texts for a pair, if the prompt begins both sequences."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.startswith(prompt) or len(text) == len(prompt):
            detail = f"the chat template does not write the prompt, then `{name}`: their boundary is lost"
            return BadRow("template error", detail)
    return Rendered(prompt, chosen, rejected)


def plain_prompt(message: Message) -> str:
    """Write a prompt for a model without a chat template: headed sections, the input's only where there is one."""
    given = f"### Input:\n{message.input}\n\n" if message.input else ""
    return f"### Instruction:\n{message.content}\n\n{given}### Response:\n"


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


def end_tokens(tokenizer: Any, generation_config: Any = None) -> frozenset[int]:
    """Return the ids that end a sequence or a turn, by the tokenizer and by the model's generation settings."""
    ids = getattr(generation_config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in (tokenizer.eos_token_id, *listed) if i is not None)


def _own_template(tokenizer: Any) -> str | None:
    """Return the tokenizer's template; of several named ones, the one called default."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        return None


def _adds_bos(tokenizer: Any) -> bool:
    """Tell whether the model's own convention is to start a text with BOS."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _template_errors() -> tuple[type[Exception], ...]:
    """Name what rendering a template may raise; importing Jinja waits until a template is at hand."""
    from jinja2 import TemplateError

    return TemplateError, TypeError, ValueError, KeyError, AttributeError

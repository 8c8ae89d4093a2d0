"""What `dpo sample` asks models: held-out prompts or others, as each model reads them.

Every model has its own tokenizer, end tokens and chat template. The configuration's template is for models without one
and, where `model.chat_template` is set, for all that have the tokenizer of `model.name`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.config import Config
from dpo_cli.config.inputs import held_out_sources
from dpo_cli.data.pairs.prompts import Prompt
from dpo_cli.data.pairs.sources import Source, as_sources
from dpo_cli.data.prepared.folder import PreparedPairs, is_prepared
from dpo_cli.data.prepared.writing import read_again
from dpo_cli.data.records import BadRow, Message, Pair, TokenizedPair
from dpo_cli.data.tokens.conversation_text import PLAIN
from dpo_cli.data.tokens.tokenize import PairTokenizer
from dpo_cli.errors import UserError, raise_all
from dpo_cli.evaluation.samples import Limits, Sampling, sampled_pairs
from dpo_cli.modeling.folders import tokenizers
from dpo_cli.modeling.folders.model_names import same_model
from dpo_cli.pipeline.pairs import load_tokenizer, reading_of, run_data
from dpo_cli.reporting.console import Console
from dpo_cli.training.run_folder import RunFolder

_NO_LIMIT = 2**31
"""Tokens that no prompt has: what is too long for a model is told when that is known."""

_ANSWERS = (Message("assistant", "Yes."),), (Message("assistant", "No."),)
"""What stands for responses where there are none; from how the template closes them, its end tokens are known."""


@dataclass(frozen=True)
class Questions:
    """The prompts.

    Attributes:
        config: Says how they are read.
        tokenize: Template and tokenizer of the configuration.
        limits: How long answers may be.
        given: Prompts of the user's choice; None: those of held-out pairs.
        pairs: The run's pairs, where held-out ones are asked.
        indices: Which of them.
    """

    config: Config
    tokenize: PairTokenizer
    limits: Limits
    given: Sequence[Prompt] | None
    pairs: PreparedPairs | Sequence[TokenizedPair] = ()
    indices: Sequence[int] = ()

    @classmethod
    def of(
        cls, config: Config, console: Console, limits: Limits, given: Sequence[Prompt] | None, count: int
    ) -> Questions:
        """Return prompts of the user's choice, or a number of held-out ones, those that a run samples first."""
        # Where there is a run, its prompts are as they were on its first day.
        _, tokenize = load_tokenizer(config, console, RunFolder(Path(config.output_dir)).first_day())
        if given is not None:
            return cls(config, tokenize, limits, given)
        data = run_data(config, tokenize, console)
        return cls(config, tokenize, limits, None, data.pairs, sampled_pairs(data.pairs, data.held_out, count))

    def for_model(self, name: str) -> Sampling:
        """Return the prompts as a model reads them.

        Raises:
            UserError: Its tokenizer cannot be loaded, or a prompt cannot be written with its template.
        """
        own, settings = self._own(name), tokenizers.generation_config(name, self.config.model.trust)
        pairs, indices = self.pairs, self.indices
        alike = own.templates == self.tokenize.templates and _same_vocabulary(own.tokenizer, self.tokenize.tokenizer)
        if self.given is not None or not alike:
            pairs = _tokenized(own, self._messages(name))
            indices = range(len(pairs))
        return Sampling.of(pairs, indices, own.tokenizer, settings, self.limits)

    def as_read(self) -> list[str] | None:
        """Return the prompts as a person reads them; None where that is seen by what all of them begin and end with."""
        if self.given is not None:
            return [_turns(one.messages) for one in self.given]
        if len(self.indices) > 1 or self._are_tokens_alone:
            return None
        return [_turns(pair.prompt) for pair in self._read_again()]

    @property
    def _are_tokens_alone(self) -> bool:
        """Whether held-out pairs are on this disk as tokens alone."""
        return any(is_prepared(source.path) for source in self._sources)

    @property
    def _sources(self) -> list[Source]:
        return [*as_sources(self.config.data.train), *held_out_sources(self.config)]

    def _own(self, name: str) -> PairTokenizer:
        """Return the tokenizer of a model and the template that it is asked with."""
        model, tokenizer = self.config.model, self.tokenize.tokenizer
        if not same_model(name, model.name):
            tokenizer = tokenizers.load_tokenizer(name, model.trust)
        templates = list(self.tokenize.templates.values())
        is_set = model.chat_template is not None and _same_vocabulary(tokenizer, self.tokenize.tokenizer)
        template = (templates[0] if templates else PLAIN) if is_set or not tokenizer.chat_template else None
        how: Any = {"on_too_long": "error", "turns": self.config.data.turns, "day": self.tokenize.day}
        return PairTokenizer(tokenizer, template=template, max_length=_NO_LIMIT, **how)

    def _messages(self, name: str) -> list[Pair]:
        """Return the prompts as messages; the held-out ones are read again.

        Raises:
            UserError: Held-out pairs are on this disk as tokens alone.
        """
        if self.given is not None:
            return [Pair(one.messages, *_ANSWERS, one.origin, arguments=one.arguments) for one in self.given]
        if self._are_tokens_alone:
            what = f"`{name}` has another tokenizer or template than the held-out pairs, which are a prepared folder"
            raise UserError(what, f"--model {name}", "name prompts with --prompts, or data that is not prepared")
        return self._read_again()

    def _read_again(self) -> list[Pair]:
        """Read held-out pairs again, as messages."""
        origins = [self.pairs[index].origin for index in self.indices]
        found = read_again(self._sources, reading_of(self.config), set(origins))
        return [found[origin] for origin in origins]


def _turns(messages: Sequence[Message]) -> str:
    """Write a conversation as a person reads it: the user's turns, and others with whose turn they are."""
    return "\n".join(turn.text if turn.role == "user" else f"{turn.role}: {turn.text}" for turn in messages)


def _same_vocabulary(one: Any, other: Any) -> bool:
    return one is other or one.get_vocab() == other.get_vocab()


def _tokenized(tokenize: PairTokenizer, pairs: Sequence[Pair]) -> list[TokenizedPair]:
    """Tokenize pairs.

    Raises:
        UserError: One cannot be tokenized; an `ExceptionGroup` of several.
    """
    found = tokenize(pairs)
    raise_all(
        UserError(bad.detail, pair.origin, "change the prompt, or `model.chat_template`")
        for pair, bad in zip(pairs, found, strict=True)
        if isinstance(bad, BadRow)
    )
    return [one.pair for one in found if not isinstance(one, BadRow)]

"""Greedy answers, by transformers' own `generate` with its cache, whatever a policy was prepared to read."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from dpo_cli.modeling.compiled import uncompiled
from dpo_cli.modeling.folders.model_files import most_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dpo_cli.modeling.policy import Policy

_PADDING = 0
"""A token that every vocabulary has. What stands where is told by the mask."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answers to a prompt.

    Attributes:
        tokens: Its tokens, without the one that ended it.
        ended: Whether a stop token ended it; otherwise the limit did.
    """

    tokens: tuple[int, ...]
    ended: bool

    @property
    def num_tokens(self) -> int:
        """The tokens that were generated, the stop token among them."""
        return len(self.tokens) + self.ended


def room(policy: Policy, prompt: Sequence[int], max_new_tokens: int) -> int:
    """Return how many tokens an answer may have: the model has positions for prompt and answer together."""
    most = most_tokens(policy.model.config)
    return max_new_tokens if most is None else max(0, min(max_new_tokens, most - len(prompt)))


@torch.no_grad()
def greedy_answers(
    policy: Policy, prompts: Sequence[Sequence[int]], stops: Collection[int], max_new_tokens: int
) -> list[Answer]:
    """Return what a policy answers to some prompts, of all tokens always the likeliest.

    Nothing else in the model's generation settings has a part in it. Prompts of other lengths in the same batch change
    an answer only where rounding decides between two tokens, unless the architecture's attention depends on where in a
    row a sequence begins, as that in chunks does. Where weights are sharded over processes, all of these have to ask
    for the same prompts at the same time.

    Args:
        policy: The policy.
        prompts: Their tokens, at least one each.
        stops: The tokens that end an answer.
        max_new_tokens: The most tokens of an answer; there has to be `room` for them behind every prompt.
    """
    if not max_new_tokens:
        return [Answer((), ended=False) for _ in prompts]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=_PADDING,
    )
    with policy.reading_plainly() as model, _generating(model):
        tokens, mask = (part.to(model.device) for part in padded_on_the_left(prompts))

        def generated(_: object) -> Tensor:
            found: Tensor = model.generate(
                tokens, attention_mask=mask, generation_config=settings, synced_gpus=bool(policy.sharded)
            )
            return found[:, tokens.shape[1] :]

        return [_answer(row, stops) for row in policy.scorer(None, instead=generated).tolist()]


def padded_on_the_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the tokens of B prompts, each ending at the end of its row, and a mask of them, `[B, T]` both."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), _PADDING)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return tokens, mask


def _answer(generated: Sequence[int], stops: Collection[int]) -> Answer:
    """Cut a row of generated tokens off at its first stop token, behind which there is padding."""
    end = next((place for place, token in enumerate(generated) if token in stops), None)
    return Answer(tuple(generated[:end]), ended=end is not None)


@contextlib.contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Let a model generate by settings of ours alone, with a cache, by layers that are not compiled for training."""
    own = model.generation_config
    # Layers that are marked to be computed again take no cache.
    marked = [module for module in model.modules() if module.training]
    model.generation_config = GenerationConfig()
    for module in marked:
        module.training = False
    try:
        with uncompiled(model):
            yield
    finally:
        model.generation_config = own
        for module in marked:
            module.training = True

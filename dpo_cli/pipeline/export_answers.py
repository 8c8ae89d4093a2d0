"""Greedy answers: of the model, of its weights in memory, rounded as they are written, and of what was written."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from dpo_cli.evaluation.samples import Limits, answered
from dpo_cli.modeling.generation import Answer, room
from dpo_cli.modeling.policy import Policy
from dpo_cli.modeling.products import next_logps
from dpo_cli.pipeline.export_facts import not_as_exported
from dpo_cli.pipeline.session import Session

ANSWERS = 10
"""How many prompts are answered."""

ANSWER_TOKENS = 24
"""The most tokens of an answer."""

TIE = 1e-3
"""How close, in nats, two tokens are between which sums in another order may decide, in any case."""

_TIMES = 10.0
"""How many times as far as merging takes log-probabilities: those are of other tokens than are answered."""

_BATCH_TOKENS = 8192


def greedy(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    stops: Collection[int],
    drafts: Sequence[Answer],
    session: Session,
    what: str,
) -> tuple[list[Answer], float]:
    """Let a policy answer prompts greedily, if it can generate.

    A draft of which the policy has every token as its likeliest, up to its end or its limit, is its answer, which one
    pass tells: to generate it, too, would take a pass for each token. The first prompt is answered in any case.

    Args:
        policy: The policy.
        prompts: The tokens of each; those that leave no room for an answer are left out.
        stops: The tokens that end an answer.
        drafts: What another model answers, or nothing.
        session: Is told what is done.
        what: What the policy is called.

    Returns:
        The answers, and how much likelier, in nats, the policy has its own token at most where it leaves a draft.
    """
    prompts = [one for one in prompts if room(policy, one, 1)]
    if not policy.model.can_generate():
        return [], 0.0
    gaps = [_leaves(policy, prompt, draft, stops) for prompt, draft in zip(prompts, drafts, strict=False)]
    known = {
        at: draft
        for at, (gap, draft) in enumerate(zip(gaps, drafts, strict=False))
        if at and not gap and (draft.ended or len(draft.tokens) == room(policy, prompts[at], ANSWER_TOKENS))
    }
    # One pass needs no cache, of which the first prompt is for that reason: by itself, so that the same weights answer
    # the same whatever the others are.
    rest = [prompt for at, prompt in enumerate(prompts) if at and at not in known]
    made: list[Answer] = []
    with session.console.progress(f"answers of {what}", len(prompts), "prompt") as progress:

        def told(done: int, _: int) -> None:
            progress(len(known) + len(made) + done, len(prompts))

        limits = Limits(ANSWER_TOKENS, _BATCH_TOKENS)
        for some in filter(None, (prompts[:1], rest)):
            made += answered(policy, some, stops, limits, session.accelerator, told)
    left = iter(made)
    return [known[at] if at in known else next(left) for at in range(len(prompts))], max(gaps, default=0.0)


def check_answers(
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    reader: Policy,
    stops: Collection[int],
    apart: float,
    where: str,
) -> None:
    """Refuse a model that answers otherwise where no rounding decides.

    Args:
        prompts: The tokens of the prompts.
        ours: What the weights answer in memory, rounded as they are written.
        theirs: What the model answers.
        reader: The model.
        stops: The tokens that end its answers.
        apart: How far, in nats, merging has taken log-probabilities in memory at most, by sums in another order.
        where: The folder that is then not written.

    Raises:
        UserError: At the first token where an answer is another, the model tells both clearly apart; or there are more
            answers, or fewer.
    """
    if len(ours) != len(theirs):
        raise not_as_exported(f"{len(theirs)} of {len(ours)} prompts are answered", where)
    prompts, tie = [one for one in prompts if room(reader, one, 1)], max(TIE, _TIMES * apart)
    for number, (prompt, one, other) in enumerate(zip(prompts, ours, theirs, strict=False), 1):
        if one != other and not (gap := first_gap(reader, prompt, one, other, stops)) <= tie:
            same = _same(one, other)
            told = f"answer {number} is another from token {same + 1} on, where {gap:.1e} nats are between both"
            raise not_as_exported(told, where)


def first_gap(policy: Policy, prompt: Sequence[int], one: Answer, other: Answer, stops: Collection[int]) -> float:
    """Return how far apart a policy has the two tokens at which answers part."""
    same = _same(one, other)
    logps = next_logps(policy, prompt, one.tokens[:same])[-1]
    candidates = [
        logps[answer.tokens[same]] if same < len(answer.tokens) else _end(logps, stops) for answer in (one, other)
    ]
    return float((candidates[0] - candidates[1]).abs())


def _leaves(policy: Policy, prompt: Sequence[int], draft: Answer, stops: Collection[int]) -> float:
    """Return how much likelier a policy has its own token where it first leaves a draft; 0: it answers the same."""
    logps = next_logps(policy, prompt, draft.tokens)
    drafted = [logps[at, token] for at, token in enumerate(draft.tokens)] + [_end(logps[-1], stops)] * draft.ended
    gaps = (float(row.max() - one) for row, one in zip(logps, drafted, strict=False))
    return next((gap for gap in gaps if gap), 0.0)


def _end(logps: Tensor, stops: Collection[int]) -> Tensor:
    """Return the log-probability of the likeliest token that ends an answer."""
    return logps[sorted(stops)].max() if stops else torch.tensor(-torch.inf)


def _same(one: Answer, other: Answer) -> int:
    """Return how many tokens two answers begin with alike."""
    parted = (place for place, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b)
    return next(parted, min(len(one.tokens), len(other.tokens)))


def num_alike(ours: Sequence[Answer], theirs: Sequence[Answer]) -> int:
    """Return how many answers are the same."""
    return sum(one == other for one, other in zip(ours, theirs, strict=False))

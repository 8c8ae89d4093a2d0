"""Answers that another model gave are taken over where a policy gives them too, and no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dpo_cli.errors import UserError
from dpo_cli.modeling.generation import Answer
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline import export_answers
from dpo_cli.pipeline.export_answers import ANSWER_TOKENS, check_answers, greedy
from dpo_cli.reporting.console import Console

PROMPTS = [[5, 6, 7], [9], [100, 101, 102, 103, 104], [42, 43]]


@pytest.fixture
def session() -> Any:
    return SimpleNamespace(console=Console(quiet=True), accelerator=Accelerator(cpu=True))


@pytest.fixture
def policy(tiny_llama: Path, session: Any) -> Policy:
    policy = Policy.load(str(tiny_llama))
    policy.place(session.accelerator, trained=False)
    return policy


@torch.no_grad()
def likeliest(policy: Policy, prompt: list[int], stops: set[int]) -> tuple[Answer, list[torch.Tensor]]:
    """Answer token by token, without a cache; return what each token was chosen from, too."""
    tokens: list[int] = []
    chosen_from = []
    while len(tokens) < ANSWER_TOKENS:
        logits = policy.model(torch.tensor([prompt + tokens])).logits[0, -1]
        chosen_from.append(logits.log_softmax(-1))
        if (token := int(logits.argmax())) in stops:
            return Answer(tuple(tokens), ended=True), chosen_from
        tokens.append(token)
    return Answer(tuple(tokens), ended=False), chosen_from


def test_drafts_change_no_answer_and_spare_those_that_are_right(
    policy: Policy, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = {likeliest(policy, PROMPTS[1], set())[0].tokens[6]}
    (one, _), (ends, _), (other, chosen_from), (another, _) = (likeliest(policy, prompt, stops) for prompt in PROMPTS)
    assert ends.ended and not other.ended
    asked: list[int] = []
    right = export_answers.answered

    def counted(*told: Any) -> Any:
        asked.append(len(told[1]))
        return right(*told)

    monkeypatch.setattr(export_answers, "answered", counted)
    expected = [one, ends, other, another]
    assert greedy(policy, PROMPTS, stops, [], session, "it") == (expected, 0.0)
    assert greedy(policy, PROMPTS, stops, expected, session, "it") == (expected, 0.0)
    # One token is another; one ends too soon; and one does not end where it should. The first is always asked for.
    wrong = Answer((*other.tokens[:3], (other.tokens[3] + 1) % 400, *other.tokens[4:]), ended=False)
    found, gap = greedy(policy, PROMPTS, stops, [one, ends, wrong, another], session, "it")
    assert found == expected
    assert gap == pytest.approx(float(chosen_from[3].max() - chosen_from[3][wrong.tokens[3]]), abs=1e-4)
    early, late = Answer(another.tokens[:4], ended=True), Answer((*ends.tokens, *stops, 5), ended=False)
    assert greedy(policy, PROMPTS, stops, [one, late, other, early], session, "it")[0] == expected
    assert asked == [1, 3, 1, 1, 1, 1, 2]


def test_a_draft_that_ended_for_lack_of_room_is_no_answer_of_a_model_with_more_positions(
    policy: Policy, session: Any
) -> None:
    expected = [likeliest(policy, prompt, set())[0] for prompt in PROMPTS]
    drafts = [Answer(one.tokens[:4], ended=False) for one in expected]
    assert greedy(policy, PROMPTS, [], drafts, session, "it")[0] == expected


def test_a_model_that_does_not_answer_all_prompts_is_refused(policy: Policy) -> None:
    ours = [Answer((1,), True), Answer((2,), True)]
    with pytest.raises(UserError, match="1 of 2 prompts are answered"):
        check_answers([[1], [2]], ours, ours[:1], policy, [2], 0.0, "--to out")
    check_answers([[1], [2]], ours, ours, policy, [2], 0.0, "--to out")

"""How far two models are from each other, token by token."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_cli.evaluation.agreement import Difference, Listener
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.modeling.policy import Policy
from tests.builders import prepare_pairs


def test_the_largest_and_the_mean_are_those_of_all_tokens():
    ours = {3: torch.tensor([-1.0, -2.0]), 1: torch.tensor([-3.0])}
    theirs = {1: torch.tensor([-3.5]), 3: torch.tensor([-1.25, -2.0])}
    assert Difference.between(ours, theirs) == Difference(0.5, 0.25)


def test_pairs_that_only_one_was_asked_are_left_out():
    both = {1: torch.tensor([-1.0])}
    assert Difference.between({0: torch.tensor([-9.0]), **both}, {**both, 2: torch.tensor([-9.0])}) == Difference(0, 0)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_what_is_not_finite_is_infinitely_far(broken):
    found = Difference.between({0: torch.tensor([-1.0, broken])}, {0: torch.tensor([-1.0, -2.0])})
    assert found.largest == math.inf


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_listener_keeps_the_tokens_of_each_pair(tmp_path, tiny_llama, pairs_file, tokenizer, layout):
    """Of three pairs at once it keeps what it keeps of each by itself."""
    pairs = prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")
    policy = Policy.load(str(tiny_llama))
    policy.read(LAYOUTS[layout])
    together, apart = Listener(policy.scorer), Listener(policy.scorer)
    with torch.no_grad():
        together(LAYOUTS[layout].batch([2, 0, 1], [pairs[2], pairs[0], pairs[1]]))
        for index in range(3):
            apart(LAYOUTS[layout].batch([index], [pairs[index]]))
    assert together.logps.keys() == apart.logps.keys() == {0, 1, 2}
    assert Difference.between(together.logps, apart.logps).largest < 1e-4

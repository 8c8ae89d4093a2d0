"""The metrics of a pair, by hand, and estimates of KL divergences against their sums over a vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.modeling.responses import Responses
from dpo_cli.preference.metrics import PAIR_METRICS, held_out_names, held_out_values, pair_values


@pytest.mark.parametrize("tie", [precision.tie for precision in PRECISIONS.values()])
def test_pair_values_are_columns_in_the_order_of_their_names_and_a_tie_is_half(tie):
    chosen, rejected = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0 + tie / 2, 3.0])
    logps, lengths = (-4.0, -6.0, -6.0, -5.0, -6.0, -4.0), (2, 2, 6, 5, 3, 2)
    tokens = [whole / length for whole, length in zip(logps, lengths, strict=True) for _ in range(length)]
    policy = SequenceLogps(torch.tensor(tokens, dtype=torch.float64), Responses.of(lengths))
    values = pair_values(torch.zeros(3), chosen, rejected, policy, tie)
    column = {name: values[:, place].tolist() for place, name in enumerate(PAIR_METRICS)}
    assert column["rewards/accuracies"] == [1.0, 0.5, 0.0]
    assert column["rewards/margins"] == pytest.approx([1.0, 0.0, -2.0], abs=tie)
    assert column["logps/rejected"] == pytest.approx([-5.0, -6.0, -4.0])
    # −4 > −5, −6 = −6, −6 < −4; of a token: −2 < −1, −3 < −2, −1 > −2.
    assert column["logps/accuracies"] == [1.0, 0.5, 0.0]
    assert column["logps/accuracies_mean"] == [0.0, 0.0, 1.0]
    assert values.dtype == torch.float64


def _logps(per_token, lengths):
    return SequenceLogps(torch.tensor(per_token, dtype=torch.float64), Responses.of(lengths))


def _named(policy, reference, tie=1e-4):
    values = held_out_values(policy, reference, tie)
    names = held_out_names(reference=reference is not None)[len(PAIR_METRICS) :]
    return {name: values[:, place].tolist() for place, name in enumerate(names)}


def test_held_out_values_are_lengths_and_the_reference_by_itself():
    lengths = (2, 1, 3, 2)
    policy = _logps([-1.0, -2.0, -1.5, -2.0, -1.0, -1.0, -3.0, -1.0], lengths)
    reference = _logps([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -0.5, -0.5], lengths)
    found = _named(policy, reference)
    assert (found["chosen_tokens"], found["rejected_tokens"]) == ([2, 1], [3, 2])
    assert (found["reference_logps/chosen"], found["reference_logps/rejected"]) == ([-2, -1], [-3, -1])
    # −2 > −3, −1 = −1; of a token: −1 = −1, −1 < −½.
    assert found["reference_logps/accuracies"] == [1.0, 0.5]
    assert found["reference_logps/accuracies_mean"] == [0.5, 0.0]
    # d of the chosen responses is 0 and −1, and −½.
    assert found["k3_forward/chosen"] == pytest.approx([math.exp(-1), math.exp(-0.5) - 0.5])
    assert found["k3_reverse/chosen"] == pytest.approx([math.e - 2, math.exp(0.5) - 1.5])
    assert list(_named(policy, None)) == ["chosen_tokens", "rejected_tokens"]


@pytest.mark.parametrize(("kind", "writer"), [("forward", "reference"), ("reverse", "policy")])
def test_k3_over_every_token_by_its_probability_is_the_divergence(kind, writer):
    """Of one token drawn from a vocabulary of six, the mean over what the writer would write is its KL to the other."""
    generator = torch.Generator().manual_seed(4)
    policy, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    lengths = (1,) * 12
    found = _named(*(SequenceLogps(logps.repeat(2), Responses.of(lengths)) for logps in (policy, reference)))
    p, q = (policy, reference) if writer == "policy" else (reference, policy)
    estimate = (p.exp() * torch.tensor(found[f"k3_{kind}/chosen"], dtype=torch.float64)).sum()
    assert float(estimate) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-12)


def test_the_same_model_is_no_distance_from_itself_and_no_token_makes_it_infinite():
    same = _logps([-1.0, -200.0], (1, 1))
    assert [_named(same, same)[f"k3_{kind}/chosen"] for kind in ("forward", "reverse")] == [[0.0], [0.0]]
    far = _named(same, _logps([-1.0, -900.0], (1, 1)))
    assert far["k3_forward/rejected"] == pytest.approx([math.exp(40) - 41])

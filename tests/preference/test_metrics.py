"""The metrics of a pair, by hand."""

from __future__ import annotations

import pytest
import torch

from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.modeling.precision import PRECISIONS
from dpo_cli.modeling.responses import Responses
from dpo_cli.preference.metrics import PAIR_METRICS, pair_values


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

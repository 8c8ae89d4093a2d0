"""What all layers of a model take is known from few of them only where all others are like these."""

from __future__ import annotations

import pytest
from tiny_models import build

from dpo_cli.modeling.depths import extrapolated

SLIDING, FULL = "sliding_attention", "full_attention"


def counted(model, count):
    """Return what is extrapolated of a model, and the numbers of layers of which it was counted."""
    depths = []

    def noting(config):
        depths.append(config.num_hidden_layers)
        return count(config)

    return extrapolated(model, noting), depths


@pytest.mark.parametrize(
    ("kinds", "depths"),
    [
        ([FULL] * 48, [1, 2, 3]),
        ([SLIDING, FULL] * 24, [2, 4, 6]),
        ([SLIDING] * 47 + [FULL], [48]),
        ([FULL] * 3 + [SLIDING] * 45, [48]),
    ],
    ids=["alike", "in turn", "another one at the end", "others at the beginning"],
)
def test_kinds_that_do_not_repeat_throughout_are_counted_one_by_one(kinds, depths):
    """A layer with full attention adds 10, another one 1; beside all of them there are 5."""
    model = build("qwen3", num_hidden_layers=len(kinds), layer_types=kinds)
    found = counted(model, lambda config: 5 + sum(10 if kind == FULL else 1 for kind in config.layer_types))
    assert found == (5 + 10 * kinds.count(FULL) + kinds.count(SLIDING), depths)


@pytest.mark.parametrize(("num_dense", "depths"), [(0, [1, 2, 3]), (3, [12]), (12, [1, 2, 3])])
def test_experts_behind_the_first_layers_are_counted(num_dense, depths):
    """As DeepSeek-V3 has them, whose first three layers are dense."""
    dense = {"first_k_dense_replace": num_dense}
    model = build("deepseek_v3", num_hidden_layers=12, **dense)

    def count(config):
        return build("deepseek_v3", num_hidden_layers=config.num_hidden_layers, **dense).num_parameters()

    assert counted(model, count) == (model.num_parameters(), depths)

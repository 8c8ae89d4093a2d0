"""A run that left the model worse than it was says so, and a healthy one does not."""

from __future__ import annotations

import pytest

from dpo_cli.data.checkup.intervals import wilson_interval
from dpo_cli.evaluation.diagnosis import COLLAPSE, worsened

TOKENS = 10.0


def figures(loss=0.69, accuracy=0.5, chosen=-20.0, rejected=-30.0, pairs=50):
    return {
        "loss": loss,
        "rewards/accuracies": accuracy,
        "accuracy_interval": list(wilson_interval(accuracy, pairs)),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


@pytest.mark.parametrize(
    "after",
    [
        figures(),
        figures(loss=0.01, accuracy=1.0, chosen=-19.0, rejected=-90.0),
        # Both fell, and the chosen ones by less than a nat a token: DPO does that.
        figures(loss=0.3, accuracy=0.9, chosen=-20.0 - 0.9 * COLLAPSE * TOKENS, rejected=-90.0),
        # Of 50 pairs, 22 instead of 25 may be chance; so may a loss that did not move.
        figures(loss=0.692, accuracy=0.44),
    ],
    ids=["no change", "learned", "displaced a little", "chance"],
)
def test_a_healthy_run_has_nothing_to_say(after):
    assert worsened(figures(), after, TOKENS) == []


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (
            figures(loss=0.1, accuracy=1.0, chosen=-35.0, rejected=-90.0),
            "lost 1.5 nats per token (-20.0 → -35.0), and so did the rejected ones (-30.0 → -90.0)",
        ),
        (figures(loss=0.6, chosen=-35.0, rejected=-25.0), "lost 1.5 nats per token (-20.0 → -35.0)"),
        (figures(loss=0.9), "the held-out loss rose from 0.6900 to 0.9000"),
        (figures(loss=-3.0 + 2.0, accuracy=0.1), "the held-out reward accuracy fell from 50.0 % to 10.0 %"),
    ],
    ids=["both collapsed", "the chosen ones collapsed", "loss", "accuracy"],
)
def test_what_got_worse_is_named_with_its_figures(after, said):
    (line,) = worsened(figures(), after, TOKENS)
    assert line.endswith(said)


def test_a_loss_below_zero_rises_when_it_comes_nearer_to_it():
    (line,) = worsened(figures(loss=-3.0), figures(loss=-2.0), TOKENS)
    assert "loss rose" in line
    assert worsened(figures(loss=-2.0), figures(loss=-3.0), TOKENS) == []

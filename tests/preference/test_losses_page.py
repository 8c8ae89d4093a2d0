"""The page of losses says what the losses are, and every loss has an example."""

from __future__ import annotations

import pytest
import torch
from plot_losses import point
from write_losses_page import PAGE, described, kind, members, page

from dpo_cli.config import load_config
from dpo_cli.modeling.logps import SequenceLogps
from dpo_cli.modeling.responses import Responses
from dpo_cli.preference.losses import DPO, Loss
from dpo_cli.preference.losses.base import StepInfo
from tests.conftest import ROOT

LOSSES = members(Loss)


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make generated`"


def test_every_loss_has_an_example():
    files = (ROOT / "configs" / "losses").glob("*.yaml")
    shown = {loss.type for file in files for loss in load_config(file).objective.losses}
    assert shown == {kind(model) for model in LOSSES}


def value(loss, tokens: list[float], lengths: tuple[int, ...]) -> float:
    """Return the loss of one pair against a reference whose logs are 0."""
    policy = SequenceLogps(torch.tensor(tokens, dtype=torch.float64), Responses.of(lengths))
    reference = SequenceLogps(torch.zeros(len(tokens), dtype=torch.float64), Responses.of(lengths))
    return float(loss(policy, reference, StepInfo(1, lengths[0])).losses.sum())


@pytest.mark.parametrize("model", LOSSES, ids=kind)
def test_what_a_loss_takes_is_what_it_looks_at(model):
    """Sums are the same where log-probability moves within a response, and where a response has more tokens."""
    takes = described(model)["Takes"]
    loss = model(logps="mean") if "logps" in model.model_fields else model()
    plain = value(loss, [-0.5, -1.5, -2.0, -0.25, -0.25], (2, 3))
    moved = value(loss, [-1.5, -0.5, -0.25, -0.25, -2.0], (2, 3))
    longer = value(loss, [-0.5, -0.75, -0.75, -2.0, -0.25, -0.25], (3, 3))
    assert (moved != pytest.approx(plain, rel=1e-9)) == ("token values" in takes)
    by_length = any(word in takes for word in ("mean", "lengths", "token values"))
    assert (longer != pytest.approx(plain, rel=1e-9)) == by_length


def test_a_point_of_the_picture_is_the_loss_and_its_slope():
    """−log σ(x) is log 2 at 0, and its slope −½."""
    assert point(DPO(), 0.0) == pytest.approx((0.693147180559945, -0.5))

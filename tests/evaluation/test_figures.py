"""Figures with intervals: the Wilson interval against its defining equation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.checkup.intervals import wilson_interval
from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.evaluation.figures import FIGURES, figures, figures_by
from dpo_cli.preference.metrics import PAIR_METRICS
from tests.conftest import ROOT


@given(st.integers(1, 500), st.floats(0, 1))
def test_the_bounds_are_where_the_observed_share_is_196_standard_errors_away(trials, share):
    """Wilson's bounds are the p that solve |share − p| = z sqrt(p(1−p)/n)."""
    low, high = wilson_interval(share, trials)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for bound in (low, high):
        error_squared = 1.959963984540054**2 * bound * (1 - bound) / trials
        assert (share - bound) ** 2 == pytest.approx(error_squared, abs=1e-12)


def test_a_perfect_score_on_few_pairs_is_not_certain():
    low, high = wilson_interval(1.0, 10)
    assert (low, high) == (pytest.approx(0.722, abs=5e-4), pytest.approx(1.0))


def test_figures_are_means_and_ties_count_half_and_are_reported():
    values = [(0.2, 1.0), (0.4, 0.5), (0.9, 0.0), (0.5, 0.5)]
    results = [
        PairResult(i, {name: {"loss": loss, "rewards/accuracies": accuracy}.get(name, 1.0) for name in PAIR_METRICS})
        for i, (loss, accuracy) in enumerate(values)
    ]
    found = figures(results)
    assert (found["pairs"], found["ties"], found["rewards/accuracies"]) == (4, 2, 0.5)
    assert found["loss"] == pytest.approx(0.5)
    assert found["accuracy_interval"] == list(wilson_interval(0.5, 4))


def test_every_figure_has_a_name_of_its_own_is_shown_and_is_explained():
    results = [PairResult(i, dict.fromkeys(PAIR_METRICS, i / 4)) for i in range(3)]
    found = figures(results)
    assert list(found) == [figure.key for figure in FIGURES]
    assert len({figure.title for figure in FIGURES}) == len(FIGURES)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for figure in FIGURES:
        assert figure.show(found[figure.key])
        assert f"`{figure.key}`" in page


def test_groups_are_told_apart_by_their_label_and_one_group_says_nothing_new():
    results = [PairResult(i, dict.fromkeys(PAIR_METRICS, i / 4)) for i in range(5)]
    found = figures_by(results, ["b", "a", "b", "", "a"])
    assert list(found) == ["", "a", "b"]
    assert [(group["pairs"], group["loss"]) for group in found.values()] == [(1, 0.75), (2, 0.625), (2, 0.25)]
    assert found["b"] == figures([results[0], results[2]])
    assert figures_by(results, ["a"] * 5) == {}

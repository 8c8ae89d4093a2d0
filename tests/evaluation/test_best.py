"""Which evaluation is the best, and when patience ends: compared with a loop that goes through the steps of a run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.evaluation.best import BEST_BY, Outcome, best_step, best_steps, exhausted, is_better

LOWER, HIGHER = "loss", ("rewards/accuracies", "rewards/margins")


def rows_of(by, values, first=1, between=2):
    """Return the rows of a run: an evaluation before step 1, one of each value after it, and steps in between."""
    evaluated = [(0, 0.5), *((first + between * place, value) for place, value in enumerate(values))]
    rows = [{"split": "eval", "step": step, by: value} for step, value in evaluated]
    steps = range(1, evaluated[-1][0] + 1)
    # A step's own loss is none of the held-out pairs'.
    rows += [{"split": "train", "step": step, by: -9.0 if by == LOWER else 9.0} for step in steps]
    return sorted(rows, key=lambda row: (row["step"], row["split"] == "eval"))


def walked(by, values, patience):
    """Take one evaluation after the other as a run does; return the step of the best and after how many it stops."""
    best, since, place = None, 0, None
    for number, value in enumerate(values, 1):
        if best is None or (value < best if by == LOWER else value > best):
            best, since, place = value, 0, number
        else:
            since += 1
        if patience is not None and since == patience:
            return place, number
    return place, None


# Few different values, so that many are equal.
VALUES = st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=12)


@given(by=st.sampled_from(list(BEST_BY)), values=VALUES, patience=st.none() | st.integers(1, 4))
def test_best_and_end_are_those_of_a_run_that_compares_as_it_goes(by, values, patience):
    place, stops = walked(by, values, patience)
    ended = [exhausted(rows_of(by, values[:number]), by, patience) for number in range(len(values) + 1)]
    assert (ended.index(True) if True in ended else None) == stops
    taken = values[:stops] if stops else values
    assert best_step(rows_of(by, taken), by) == 1 + 2 * (place - 1)


@given(by=st.sampled_from(list(BEST_BY)), values=VALUES, keep=st.integers(1, 4))
def test_whoever_is_among_the_best_was_so_when_it_was_evaluated(by, values, keep):
    """So the checkpoints that are kept are always there: none becomes one of the best that was not saved."""
    kept = set()
    for number in range(1, len(values) + 1):
        best = set(best_steps(rows_of(by, values[:number]), by)[:keep])
        kept |= {1 + 2 * (number - 1)} & best
        assert best <= kept
        kept &= best


@pytest.mark.parametrize("by", BEST_BY)
def test_the_order_of_the_best_is_that_of_sorted_values_and_equals_are_in_order_of_steps(by):
    values = [0.5, 0.25, 1.0, 0.25, 1.0]
    steps = best_steps(rows_of(by, values), by)
    assert steps == ([3, 7, 1, 5, 9] if by == LOWER else [5, 9, 1, 3, 7])


def test_before_the_first_evaluation_there_is_none_and_nothing_is_exhausted():
    rows = rows_of("loss", [])
    assert best_step(rows, "loss") is None
    assert not exhausted(rows, "loss", 1)


@pytest.mark.parametrize("value", [None, math.nan, "0.1", True, [0.1]])
def test_a_figure_that_is_no_number_is_worse_than_any_other(value):
    rows = rows_of("loss", [5.0, value, 6.0])
    assert best_steps(rows, "loss") == [1, 5, 3]
    assert not is_better(rows[-1] | {"loss": value}, rows[-1], "loss")


@pytest.mark.parametrize(("by", "value", "than"), [("loss", 0.1, 0.2), *((name, 0.2, 0.1) for name in HIGHER)])
def test_better_is_lower_for_the_loss_and_higher_for_rewards(by, value, than):
    assert is_better({by: value}, {by: than}, by)
    assert not is_better({by: than}, {by: value}, by)
    assert not is_better({by: value}, {by: value}, by)


def test_an_outcome_shows_the_figures_of_the_last_step_where_that_is_not_the_best():
    before, best, last = {"loss": 0.7}, {"loss": 0.5}, {"loss": 0.6}
    assert Outcome(8, 8, None, last).columns(before) == {"before": before, "after": last}
    assert Outcome(4, 8, "loss", best, last).columns(before) == {
        "before": before,
        "best (step 4)": best,
        "last (step 8)": last,
    }
    assert Outcome(8, 8, "loss", last).columns({}) == {"after": last}
    assert Outcome(8, 8).columns(before) == {}

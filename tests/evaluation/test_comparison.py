"""What the rows of two models on the same pairs say of them."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.evaluation.comparison import Comparison, compare
from dpo_cli.preference.metrics import PAIR_METRICS


def row(number, margin, *, prompt=None, **values):
    """Return a row of a pair that has a margin, and whose chosen response is likelier where that is positive."""
    right = 0.5 if margin == 0 else float(margin > 0)
    metrics = dict.fromkeys(PAIR_METRICS, -1.0) | {"rewards/margins": margin, "rewards/accuracies": right}
    at = {"step": 0, "pair": number, "where": f"pairs.jsonl:{number}", "prompt_key": prompt or f"{number:016x}"}
    return at | metrics | {"logps/accuracies": right, "logps/accuracies_mean": right} | values


def rows(margins):
    return [row(number, margin) for number, margin in enumerate(margins)]


def compared(first, second) -> Comparison:
    found = compare(rows(first), rows(second))
    assert found is not None
    return found


def test_more_pairs_the_right_way_round_are_better_by_points_with_an_interval():
    found = compared([1.0] * 40 + [-1.0] * 60, [1.0] * 55 + [-1.0] * 45)
    assert (found.better, found.ahead, found.pairs) == (1, (0, 15), 100)
    assert found.differences["rewards/accuracies"].value == pytest.approx(0.15)
    low, high = (100 * end for end in found.differences["rewards/accuracies"].interval)
    assert found.statement() == (
        f"B is better on these pairs: +15.0 points ({low:.1f} to {high:.1f}); the reward margin of B is larger by "
        f"0.3000 ({0.02 * low:.4f} to {0.02 * high:.4f})"
    )
    assert found.statement("runs/a", "runs/b").startswith("runs/b is better on these pairs: ")


def test_the_first_may_be_the_better_one():
    found = compared([1.0] * 55 + [-1.0] * 45, [1.0] * 40 + [-1.0] * 60)
    assert found.better == 0
    assert found.statement().startswith("A is better on these pairs: +15.0 points (")


def test_few_pairs_that_differ_tell_nothing_and_what_it_would_take_is_said():
    """An interval alone would: of resamples of 100 pairs, 2 % miss all of 4."""
    found = compared([1.0] * 50 + [-1.0] * 50, [1.0] * 54 + [-1.0] * 46)
    assert found.differences["rewards/accuracies"].excludes_zero
    assert (found.better, found.p, found.ahead) == (None, pytest.approx(0.125), (0, 4))
    assert found.statement().startswith(
        "these pairs cannot tell them apart: B − A is +4.0 points (1.0 to 8.0), n = 100 "
    )
    assert f"would need about {-(-found.needed // 10) * 10:,}" in found.statement()


def test_numbers_that_are_needed_are_rounded_up_and_a_minus_is_one():
    found = compared([1.0] * 51 + [-1.0] * 49, [-1.0] * 30 + [1.0] * 49 + [-1.0] * 21)
    assert "B − A is −2.0 points (−" in found.statement()
    needed = int(found.statement().split(" about ")[1].split(";")[0].replace(",", ""))
    assert found.needed <= needed < 1.1 * found.needed
    assert needed % 10 ** (len(str(needed)) - 2) == 0


def test_models_that_are_ahead_equally_often_need_no_number_of_pairs():
    found = compared([1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0])
    assert (found.needed, found.p, found.better) == (None, 1.0, None)
    assert found.statement() == (
        "these pairs cannot tell them apart: +0.0 points (−75.0 to 75.0), each model is ahead of the other on 1 of 4"
    )


def test_models_that_are_right_on_the_same_pairs_differ_by_their_margins_alone():
    found = compared([1.0, 2.0, -1.0, 0.5], [2.0, 3.5, -0.5, 1.5])
    assert (found.ahead, found.p, found.better) == ((0, 0), 1.0, None)
    assert found.differences["rewards/accuracies"].interval is None
    said = found.statement()
    assert said.startswith("these pairs cannot tell them apart: neither is ahead on any of 4")
    assert "; the reward margin of B is larger by 1.0000 (" in said


def test_one_pair_tells_nothing():
    found = compared([-1.0], [1.0])
    assert found.statement() == "these pairs cannot tell them apart: there is only one"
    assert found.differences["rewards/margins"].interval is None


def test_the_reference_has_no_rewards_and_is_compared_by_likelihood():
    """All of its pairs tie: by rewards, any model that is right on most pairs would be better than itself."""
    reference = [row(n, 0.0) | {"logps/accuracies": float(n < 40)} for n in range(80)]
    trained = [row(n, 1.0) | {"logps/accuracies": float(n < 60)} for n in range(80)]
    for first, second, better, ahead in ((reference, trained, 1, (0, 20)), (trained, reference, 0, (20, 0))):
        found = compare(first, second)
        assert found is not None
        assert (found.compared_by, found.better, found.ahead) == ("logps/accuracies", better, ahead)
        assert "is better on these pairs by which response is likelier: +25.0 points (" in found.statement()
        assert "margin" not in found.statement()
    assert compare(reference, reference).better is None


def test_pairs_are_the_same_by_place_and_prompt_and_others_are_counted():
    first = [row(1, 1.0), row(2, 1.0), row(2, -1.0), row(3, 1.0), row(4, 1.0, prompt="other")]
    second = [row(9, 1.0), row(4, 1.0), row(2, 2.0), row(2, -2.0), row(1, -1.0)]
    found = compare(first, second)
    assert found is not None
    assert (found.pairs, found.prompts, found.unmatched) == (3, 2, (2, 2))
    assert [one.margins for one in (*found.first_ahead, *found.second_ahead)] == [(1.0, -1.0), (-1.0, -2.0), (1.0, 2.0)]
    assert compare(first[3:4], second) is None
    assert compare([], second) is None


def test_the_pairs_of_the_largest_disagreement_are_named_each_way():
    found = compared([0.0] * 8 + [5.0], [float(n) for n in range(-3, 5)] + [5.0])
    assert [pair.where for pair in found.second_ahead] == [f"pairs.jsonl:{n}" for n in (7, 6, 5, 4)]
    assert [pair.where for pair in found.first_ahead] == [f"pairs.jsonl:{n}" for n in (0, 1, 2)]
    many = compared([0.0] * 20, [float(n) for n in range(20)])
    assert len(many.second_ahead) == 5
    assert not many.first_ahead


def test_what_json_has_no_number_for_is_left_out():
    """A margin of −∞ is null in the file."""
    first, second = rows([1.0, 1.0, -1.0]), rows([2.0, -2.0, 3.0])
    second[1]["rewards/margins"] = None
    found = compare(first, second)
    assert found is not None
    assert "rewards/margins" not in found.differences
    assert "rewards/accuracies" in found.differences
    assert [pair.where for pair in found.second_ahead] == ["pairs.jsonl:2", "pairs.jsonl:0"]
    assert "margin" not in found.statement()
    json.dumps(found.as_dict(), allow_nan=False)


def test_prompts_that_repeat_count_once_in_intervals_and_in_the_number_needed():
    """Ten copies of each pair: as sure as one, and ten times as many are needed."""
    first, second = [1.0] * 20 + [-1.0] * 20, [1.0] * 15 + [-1.0] * 14 + [1.0] * 11
    once = compared(first, second)
    many = compare(
        *([row(10 * n + k, margin, prompt=f"{n:016x}") for n, margin in enumerate(side) for k in range(10)]
          for side in (first, second))
    )  # fmt: skip
    assert many is not None
    assert (many.pairs, many.prompts) == (400, 40)
    assert many.differences == once.differences
    assert many.needed == pytest.approx(10 * once.needed, rel=0.01)
    assert many.p < 0.05 < once.p
    assert many.better is once.better is None, "a test that takes copies for pairs does not decide alone"


@pytest.mark.parametrize("num_prompts", [1, 2, 3, 5])
@pytest.mark.parametrize("wobble", [0, 1], ids=["all alike", "not all"])
def test_a_few_prompts_tell_nothing_however_many_pairs_they_have(num_prompts, wobble):
    """Of five prompts all go one way with two random models in one of 16 cases."""
    at = [(n, f"{n % num_prompts:016x}") for n in range(60)]
    first = [row(n, -1.0, prompt=prompt) for n, prompt in at]
    second = [row(n, 1.0 if n >= wobble else -1.0, prompt=prompt) for n, prompt in at]
    for found in (compare(first, second), compare(second, first)):
        assert found is not None
        assert found.p < 1e-9
        assert found.p_of_prompts == pytest.approx(2 * 0.5**num_prompts)
        assert found.better is None
        assert f", but the pairs have only {num_prompts} prompt{'s' * (num_prompts > 1)}" in found.statement()


def test_twenty_prompts_that_all_go_one_way_tell():
    at = [(n, f"{n % 20:016x}") for n in range(60)]
    found = compare([row(n, -1.0, prompt=p) for n, p in at], [row(n, 1.0, prompt=p) for n, p in at])
    assert (found.better, found.differences["rewards/accuracies"].interval) == (1, None)


def test_no_number_of_pairs_is_named_that_is_there_already():
    """Ties: the second is ahead on more pairs, the first is ahead by more."""
    found = compared([0.0] * 120 + [1.0] * 60, [1.0] * 120 + [-1.0] * 60)
    assert (found.better, found.ahead) == (None, (60, 120))
    assert found.needed < found.pairs
    assert found.statement().endswith("), B is ahead on 120 and A on 60 of 180")


def test_pairs_whose_responses_were_exchanged_are_not_the_same():
    """Of one line of two versions of a file, as where wrong labels were corrected for the second run."""
    sizes = {"chosen_tokens": 12, "rejected_tokens": 30}
    first, second = [row(1, 1.0, **sizes), row(2, 1.0, **sizes)], [row(1, -1.0, **sizes), row(2, 1.0, **sizes)]
    second[1] |= {"chosen_tokens": 30, "rejected_tokens": 12}
    found = compare(first, second)
    assert (found.pairs, found.unmatched) == (1, (1, 1))


margins = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0])


@given(st.lists(st.tuples(margins, margins), min_size=1, max_size=40))
@settings(max_examples=15, deadline=None)
def test_swapping_both_mirrors_everything(pairs):
    first, second = zip(*pairs, strict=True)
    ours, theirs = compared(first, second), compared(second, first)
    assert ours.ahead == theirs.ahead[::-1]
    assert (ours.p, ours.needed, ours.pairs, ours.compared_by) == (
        theirs.p, theirs.needed, theirs.pairs, theirs.compared_by
    )  # fmt: skip
    assert ours.better == (None if theirs.better is None else 1 - theirs.better)
    assert [one.margins for one in ours.first_ahead] == [one.margins[::-1] for one in theirs.second_ahead]
    for name, found in ours.differences.items():
        mirrored = theirs.differences[name]
        assert found.value == -mirrored.value
        ends = found.interval or (math.inf, math.inf)
        assert ends == pytest.approx(tuple(-end for end in (mirrored.interval or (-math.inf, -math.inf))[::-1]))
    if ours.better is not None:
        assert ours.statement("A", "B") == theirs.statement("B", "A")

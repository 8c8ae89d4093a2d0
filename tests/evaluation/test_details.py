"""What is told beside the figures: against closed forms, loops over single pairs, and simulated pairs."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.data.checkup.intervals import wilson_interval
from dpo_cli.evaluation.baselines import FEWEST_OF_A_SIDE, by_length, by_margin, length_controlled
from dpo_cli.evaluation.calibration import calibration
from dpo_cli.evaluation.details import DETAILS, details, figures_and_details
from dpo_cli.evaluation.evaluate import PairResult
from dpo_cli.evaluation.figures import FIGURES
from dpo_cli.preference.losses import DPO, IPO, SimPO
from dpo_cli.preference.metrics import held_out_names
from dpo_cli.preference.objective import Objective
from tests.conftest import ROOT

PLAIN = Objective.of(DPO())
TIE = 1e-4


def outcome(margin):
    return 0.5 if abs(margin) <= TIE else float(margin > 0)


def pair(index, margin=0.0, tokens=(10, 10), reference=(-10.0, -10.0), policy=(-10.0, -10.0)):
    """Return what an evaluation finds of a pair, from what can differ."""
    mean = [logps / count for logps, count in zip(reference, tokens, strict=True)]
    known = {
        "loss": math.log1p(math.exp(-margin)),
        "rewards/margins": margin,
        "rewards/accuracies": outcome(margin),
        **dict(zip(("chosen_tokens", "rejected_tokens"), map(float, tokens), strict=True)),
        **dict(zip(("logps/chosen", "logps/rejected"), policy, strict=True)),
        **dict(zip(("reference_logps/chosen", "reference_logps/rejected"), reference, strict=True)),
        "reference_logps/accuracies": outcome(reference[0] - reference[1]),
        "reference_logps/accuracies_mean": outcome(mean[0] - mean[1]),
    }
    return PairResult(index, {name: known.get(name, 0.25) for name in held_out_names(reference=True)})


def columns(results):
    return {name: np.array([result.metrics[name] for result in results]) for name in results[0].metrics}


def swapped(result):
    """Return the same pair with the other response chosen."""
    found = dict(result.metrics)
    for name in found:
        if name.endswith("/chosen") or name == "chosen_tokens":
            other = name.replace("chosen", "rejected")
            found[name], found[other] = result.metrics[other], result.metrics[name]
        elif "accuracies" in name:
            found[name] = 1 - found[name]
    return PairResult(result.index, found | {"rewards/margins": -found["rewards/margins"]})


number = st.floats(-30, 30, allow_nan=False).map(lambda x: round(x, 3))
pairs = st.lists(
    st.builds(
        lambda margin, tokens, reference: (margin, tokens, reference),
        number,
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(number, number),
    ),
    min_size=1,
    max_size=60,
).map(lambda rows: [pair(index, *row) for index, row in enumerate(rows)])


@settings(max_examples=40)
@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_changes_nothing(results, shuffler):
    others = list(results)
    shuffler.shuffle(others)
    assert details(results, PLAIN) == details(others, PLAIN)


@settings(max_examples=40)
@given(pairs)
def test_swapping_chosen_and_rejected_mirrors_every_accuracy(results):
    found, mirrored = details(results, PLAIN), details([swapped(result) for result in results], PLAIN)
    for name in ("longer", "shorter", "reference_sum", "reference_mean"):
        assert mirrored["baselines"][name]["accuracy"] == pytest.approx(1 - found["baselines"][name]["accuracy"])
    controlled = [one["length_controlled"] for one in (found, mirrored)]
    if "accuracy" in controlled[0]:
        assert controlled[1]["accuracy"] == pytest.approx(1 - controlled[0]["accuracy"])
        low, high = controlled[0]["interval"]
        assert controlled[1]["interval"] == pytest.approx([1 - high, 1 - low])
    else:
        assert "missing" in controlled[1]
    for ours, theirs in zip(found["by_length"], reversed(mirrored["by_length"]), strict=True):
        assert (ours["from"], ours["to"], ours["pairs"]) == (-theirs["to"], -theirs["from"], theirs["pairs"])
        assert ours["accuracy"] == pytest.approx(1 - theirs["accuracy"])
    for ours, theirs in zip(found["by_margin"], mirrored["by_margin"], strict=True):
        assert ours["accuracy"] == pytest.approx(1 - theirs["accuracy"])


@settings(max_examples=40)
@given(pairs)
def test_bins_have_every_pair_once_and_are_apart(results):
    found = details(results, PLAIN)
    for bins in (found["by_margin"], found["by_length"], found["calibration"]["bins"]):
        assert sum(one["pairs"] for one in bins) == len(results)
        mean = sum(one["pairs"] * one["accuracy"] for one in bins) / len(results)
        assert mean == pytest.approx(np.mean(columns(results)["rewards/accuracies"]))
        for before, after in itertools.pairwise(bins):
            assert before["to"] <= after["from"]
        for one in bins:
            assert one["from"] <= one["to"]
            assert one["interval"] == list(wilson_interval(one["accuracy"], one["pairs"]))


@settings(max_examples=40)
@given(pairs)
def test_baselines_and_scores_are_those_of_a_loop_over_the_pairs(results):
    found, rows = details(results, PLAIN), [result.metrics for result in results]
    longer = [outcome(row["chosen_tokens"] - row["rejected_tokens"]) for row in rows]
    likelier = [outcome(row["reference_logps/chosen"] - row["reference_logps/rejected"]) for row in rows]
    for name, hits in {"longer": longer, "shorter": [1 - hit for hit in longer], "reference_sum": likelier}.items():
        assert found["baselines"][name]["accuracy"] == pytest.approx(sum(hits) / len(rows))
    assert found["baselines"]["chance"] == {"accuracy": 0.5}
    probabilities = [1 / (1 + math.exp(-row["rewards/margins"])) for row in rows]
    scores = found["calibration"]
    assert scores["brier_score"] == pytest.approx(sum((1 - p) ** 2 for p in probabilities) / len(rows), abs=1e-12)
    assert scores["log_score"] == pytest.approx(-sum(math.log(p) for p in probabilities) / len(rows), abs=1e-9)
    assert scores["confidence"] == pytest.approx(sum(max(p, 1 - p) for p in probabilities) / len(rows))
    bins = [[] for _ in range(10)]
    for p, row in zip(probabilities, rows, strict=True):
        sure = max(p, 1 - p)
        bins[min(int((sure - 0.5) / 0.05), 9)].append(row["rewards/accuracies"] - sure)
    assert scores["error"] == pytest.approx(sum(abs(sum(one)) for one in bins) / len(rows), abs=1e-9)


def simulated(reward, number=20_000, seed=7, longer=0.7):
    """Return pairs whose margin is `reward` of the length difference and a standard normal draw."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 60, number) * np.where(draw.random(number) < longer, 1, -1)
    margins = [reward(int(length), noise) for length, noise in zip(lengths, draw.standard_normal(number), strict=True)]
    return columns(
        [
            pair(index, margin, (100 + length, 100))
            for index, (length, margin) in enumerate(zip(lengths.tolist(), margins, strict=True))
        ]
    )


def test_length_controlled_is_the_plain_accuracy_where_rewards_know_nothing_of_length():
    found = simulated(lambda length, noise: noise + 0.5)
    plain = np.mean(found["rewards/accuracies"])
    assert plain == pytest.approx(0.691, abs=0.01)
    assert length_controlled(found)["accuracy"] == pytest.approx(plain, abs=0.012)


@pytest.mark.parametrize("longer", [0.5, 0.7, 0.99])
def test_length_controlled_is_a_half_where_the_reward_is_the_length(longer):
    """However many of the chosen responses are the longer ones, which the plain accuracy then is."""
    found = simulated(lambda length, noise: 0.1 * length, 4000, longer=longer)
    assert np.mean(found["rewards/accuracies"]) == pytest.approx(longer, abs=0.03)
    assert length_controlled(found)["accuracy"] == 0.5


def test_length_controlled_lies_between_where_length_is_a_part_of_the_reward():
    """P(right) is Φ(½ + L/30) for a difference of L tokens: the mean of both signs of each L is what is left."""
    found = simulated(lambda length, noise: noise + 0.5 + length / 30)

    def normal(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    expected = np.mean([(normal(0.5 + length / 30) + normal(0.5 - length / 30)) / 2 for length in range(1, 60)])
    assert length_controlled(found)["accuracy"] == pytest.approx(expected, abs=0.012)
    assert np.mean(found["rewards/accuracies"]) > expected + 0.08


def test_pairs_of_equal_length_count_by_their_share():
    """Ten right of 10 longer, none of 10 shorter, and 15 of 20 as long: ½ · ½ + ½ · ¾."""
    rows = [(1.0, (2, 1))] * 10 + [(-1.0, (1, 2))] * 10 + [(1.0, (1, 1))] * 15 + [(-1.0, (1, 1))] * 5
    found = length_controlled(columns([pair(index, *row) for index, row in enumerate(rows)]))
    assert found["accuracy"] == pytest.approx(0.625)
    assert [found["by_side"][name]["pairs"] for name in ("longer", "shorter", "equal")] == [10, 10, 20]


@pytest.mark.parametrize(("share", "longer"), [(0.7, 0.5), (0.6, 0.8)])
def test_the_length_controlled_interval_covers_the_truth_in_95_of_100_samples(share, longer):
    draw, covered, trials = np.random.default_rng(11), 0, 600
    for _ in range(trials):
        sign = np.where(draw.random(200) < longer, 1.0, -1.0)
        # Length helps by 15 points where chosen is longer, and costs as many where it is shorter.
        right = (draw.random(200) < share + 0.15 * sign).astype(float)
        ones = np.ones(200)
        low, high = length_controlled(
            {"rewards/accuracies": right, "chosen_tokens": ones * 5 + sign, "rejected_tokens": ones * 5}
        )["interval"]
        covered += low <= share <= high
    # Four standard errors of 600 trials.
    assert covered / trials == pytest.approx(0.95, abs=0.036)


def test_a_length_controlled_accuracy_takes_pairs_of_both_kinds():
    few = [pair(index, 1.0, (2, 1)) for index in range(50)]
    few += [pair(index, 1.0, (1, 2)) for index in range(50, 50 + FEWEST_OF_A_SIDE - 1)]
    found = length_controlled(columns(few))
    assert found == {
        "missing": "the chosen response is longer in 50 and shorter in 9 of these pairs, and 10 of each are needed"
    }
    assert "accuracy" in length_controlled(columns([*few, pair(99, 1.0, (1, 2))]))


def test_the_calibration_error_is_near_0_where_probabilities_are_true_and_not_where_they_are_not():
    draw = np.random.default_rng(5)
    margins = draw.normal(0.5, 1.5, 40_000)
    # A draw by σ(margin) says which response is chosen; the margin is then that of the chosen one.
    chosen = np.where(draw.random(len(margins)) < 1 / (1 + np.exp(-margins)), margins, -margins)
    found = calibration(chosen, (chosen > 0).astype(float))
    assert found["error"] < 0.01
    assert found["error"] < 3 * found["error_by_chance"]
    for factor in (0.1, 4.0):
        far = calibration(factor * chosen, (chosen > 0).astype(float))
        assert far["error"] > 0.05
        assert far["log_score"] > found["log_score"]
        assert far["brier_score"] > found["brier_score"]


def test_the_error_by_chance_is_the_mean_error_of_calibrated_samples():
    draw = np.random.default_rng(9)
    margins = draw.normal(0, 1, 300)
    right = (draw.random((400, 300)) < 1 / (1 + np.exp(-np.abs(margins)))).astype(float)
    found = [calibration(np.where(hits > 0, 1, -1) * np.abs(margins), hits) for hits in right]
    assert np.mean([one["error"] for one in found]) == pytest.approx(found[0]["error_by_chance"], rel=0.05)


def test_without_any_margin_it_is_a_coin():
    found = details([pair(index) for index in range(30)], PLAIN)
    assert found["calibration"] | {"bins": []} == {
        "confidence": 0.5,
        "error": 0.0,
        "error_by_chance": pytest.approx(math.sqrt(2 / math.pi * 30 / 4) / 30),
        "brier_score": 0.25,
        "log_score": pytest.approx(math.log(2)),
        "bins": [],
    }
    assert [(one["from"], one["pairs"], one["accuracy"]) for one in found["by_margin"]] == [(0.0, 30, 0.5)]
    assert [(one["from"], one["to"], one["pairs"]) for one in found["by_length"]] == [(0.0, 0.0, 30)]


def test_one_pair_has_all_that_one_pair_can_have():
    found = details([pair(0, 2.0, (7, 3))], PLAIN)
    assert found["baselines"]["longer"] == {"pairs": 1, "accuracy": 1.0, "interval": list(wilson_interval(1.0, 1))}
    assert list(found["length_controlled"]) == ["missing"]
    assert [(one["from"], one["to"]) for one in found["by_length"]] == [(4.0, 4.0)]
    assert found["calibration"]["log_score"] == pytest.approx(math.log1p(math.exp(-2)))


def test_pairs_are_cut_into_quarters_by_margin_and_at_the_median_by_length():
    shuffler = random.Random(1)
    rows = [(shuffler.choice([-1, 1]) * (index + 1) / 10, (100 + index - 30, 100)) for index in range(60)]
    found = columns([pair(index, *row) for index, row in enumerate(rows)])
    assert [(one["from"], one["to"], one["pairs"]) for one in by_margin(found)] == [
        (0.1, 1.5, 15),
        (1.6, 3.0, 15),
        (3.1, 4.5, 15),
        (4.6, 6.0, 15),
    ]
    # Of 30 shorter by 1 to 30, one as long and 29 longer by 1 to 29 the median difference is 15.
    assert [(one["from"], one["to"], one["pairs"]) for one in by_length(found)] == [
        (-30, -16, 15),
        (-15, -1, 15),
        (0, 0, 1),
        (1, 15, 15),
        (16, 29, 14),
    ]


def test_the_distance_from_the_reference_is_a_mean_over_tokens_not_over_pairs():
    results = [
        pair(0, tokens=(1, 1), policy=(-1.0, -4.0), reference=(-2.0, -2.0)),
        pair(1, tokens=(9, 1), policy=(-5.0, -4.0), reference=(-14.0, -2.0)),
    ]
    found = details(results, PLAIN)["from_reference"]
    assert (found["chosen"]["tokens"], found["rejected"]["tokens"]) == (10, 2)
    assert (found["chosen"]["log_ratio"], found["rejected"]["log_ratio"]) == (1.0, -2.0)
    assert (found["chosen"]["forward_k3"], found["rejected"]["reverse_k3"]) == (0.05, 0.25)


def test_without_a_reference_or_a_probability_the_reason_is_told():
    results = [pair(index, 1.0) for index in range(5)]
    without = [
        PairResult(one.index, {name: one.metrics[name] for name in held_out_names(reference=False)}) for one in results
    ]
    found = details(without, Objective.of(SimPO()))
    assert found["from_reference"] == {"missing": "there is no reference"}
    assert list(found["baselines"]) == ["longer", "shorter", "chance"]
    assert "`simpo`" in found["calibration"]["missing"]
    assert "`ipo`" in details(results, Objective.of(IPO()))["calibration"]["missing"]


def test_every_detail_has_a_key_of_its_own_and_is_explained():
    found = figures_and_details([pair(index, 1.0) for index in range(5)], PLAIN)
    assert list(found) == [one.key for one in (*FIGURES, *DETAILS)]
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for detail in DETAILS:
        assert f"`{detail.key}`" in page

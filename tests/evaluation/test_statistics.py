"""Tests and intervals of paired differences, against scipy and by simulation of what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpo_cli.evaluation import statistics
from dpo_cli.evaluation.statistics import bootstrapped, design_effect, mcnemar, pairs_needed


def interval_of(values, prompts=None) -> tuple[float, float]:
    """Return the interval of the mean of some differences; by default each is of a prompt of its own."""
    values = np.asarray(values, float)
    prompts = np.arange(len(values)) if prompts is None else prompts
    (found,) = bootstrapped(values[:, None], prompts)
    assert found.value == pytest.approx(values.mean())
    assert found.interval is not None
    return found.interval


@given(st.integers(0, 3000), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_sign_test_on_the_pairs_that_differ(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(losses, wins) == mcnemar(wins, losses)


def test_mcnemar_of_a_hundred_thousand_pairs():
    assert mcnemar(50_200, 49_100) == pytest.approx(stats.binomtest(50_200, 99_300).pvalue, rel=1e-6)
    assert mcnemar(0, 100_000) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_a_mean_is_scipys(seed):
    """Up to the draws, of which both have 10,000."""
    values = np.random.default_rng(seed).exponential(size=80) - 0.7
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    assert interval_of(values) == pytest.approx((theirs.low, theirs.high), abs=0.04 * values.std())


def test_pairs_of_one_prompt_are_drawn_together():
    """Ten copies of every pair say no more than one, and uneven prompts are those of a ratio of two sums."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=60)
    assert interval_of(np.repeat(values, 10), np.repeat(np.arange(60), 10)) == pytest.approx(interval_of(values))
    assert design_effect(np.repeat(values, 10), np.repeat(np.arange(60), 10)) == pytest.approx(10)

    sizes = generator.integers(1, 6, 60)
    prompts = np.repeat(np.arange(60), sizes)
    values = generator.normal(size=60)[prompts] + generator.normal(size=len(prompts))

    def ratio(drawn):
        return sum(values[prompts == p].sum() for p in drawn) / sum(sizes[p] for p in drawn)

    drawn = np.quantile([ratio(generator.integers(60, size=60)) for _ in range(2000)], [0.025, 0.975])
    low, high = interval_of(values, prompts)
    assert (low, high) == pytest.approx(tuple(drawn), abs=0.12 * (high - low))
    alone_low, alone_high = interval_of(values)
    assert high - low > 1.2 * (alone_high - alone_low)


def test_prompts_that_do_not_repeat_have_no_effect_on_the_number_of_pairs():
    values = np.array([1.0, -1.0, 0.0, 0.0, 1.0])
    assert design_effect(values, np.arange(5)) == pytest.approx(1)
    assert design_effect(np.zeros(5), np.array([0, 0, 1, 1, 2])) == 1


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25, 0.25], [0.0, 0.0]])
def test_one_pair_and_pairs_that_are_all_alike_have_no_interval(values):
    (found,) = bootstrapped(np.array(values)[:, None], np.arange(len(values)))
    assert (found.value, found.interval, found.excludes_zero) == (values[0], None, False)


def test_pairs_of_a_single_prompt_have_no_interval():
    (found,) = bootstrapped(np.array([[0.0], [1.0]]), np.zeros(2, np.int64))
    assert found.interval is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_what_is_swapped_is_mirrored_and_the_same_again(values, num_prompts):
    prompts = np.unique(np.arange(len(values)) % num_prompts, return_inverse=True)[1]
    columns = np.stack([values, np.negative(values), np.ones(len(values))], axis=1)
    found, mirrored, alike = bootstrapped(columns, prompts)
    assert alike.interval is None
    assert mirrored.value == pytest.approx(-found.value)
    assert (found.interval is None) == (mirrored.interval is None)
    if found.interval and mirrored.interval:
        low, high = found.interval
        assert (low, high) == pytest.approx((-mirrored.interval[1], -mirrored.interval[0]), rel=1e-9, abs=1e-9)
        assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrapped(columns, prompts) == [found, mirrored, alike]


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 500))
@settings(deadline=None)
def test_the_number_of_pairs_needed_knows_no_first_and_second(wins, losses, alike):
    pairs = max(1, wins + losses + alike)
    needed = pairs_needed(wins, losses, pairs)
    assert needed == pairs_needed(losses, wins, pairs)
    assert (needed is None) == (wins == losses)
    if needed is not None:
        assert needed >= 6, "of fewer than six pairs no outcome has a p-value below 5 %"
        assert pairs_needed(wins, losses, pairs, 2.0) in (2 * needed, 2 * needed - 1)
        assert needed <= pairs_needed(wins, losses, 2 * pairs), "the same difference among more pairs is smaller"


def simulated_power(win: float, lose: float, pairs: int, trials: int = 20_000) -> float:
    """Return how often scipy's exact test finds a difference at 5 %, of samples of some pairs."""
    drawn = np.random.default_rng(0).multinomial(pairs, [win, lose, 1 - win - lose], size=trials)
    cases, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    found = 2 * stats.binom.cdf(cases.min(axis=1), cases.sum(axis=1), 0.5) < 0.05
    return float(counts[found].sum() / trials)


@pytest.mark.parametrize(
    ("wins", "losses", "pairs"),
    [(14, 6, 109), (60, 30, 400), (8, 2, 56), (30, 26, 90), (12, 0, 109), (3, 0, 56), (3, 1, 200)],
)
def test_that_many_pairs_find_the_difference_four_times_out_of_five(wins, losses, pairs):
    needed = pairs_needed(wins, losses, pairs)
    assert needed is not None
    assert simulated_power(wins / pairs, losses / pairs, needed) == pytest.approx(0.8, abs=0.03)


def binary(generator, size):
    """Draw the difference of two models that are right or wrong, or tie."""
    return generator.choice([-1.0, -0.5, 0.0, 0.5, 1.0], p=[0.06, 0.04, 0.7, 0.08, 0.12], size=size)


BINARY_MEAN = -0.06 - 0.02 + 0.04 + 0.12


def skewed(generator, size):
    """Draw differences of margins, of which some pairs have large ones."""
    return generator.gamma(2.0, 1.0, size=size) - generator.exponential(0.5, size=size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "mean", "pairs"),
    [(binary, BINARY_MEAN, 60), (binary, BINARY_MEAN, 200), (skewed, 1.5, 60), (skewed, 1.5, 200)],
)
def test_95_of_100_intervals_cover_the_truth(draw, mean, pairs, monkeypatch):
    """Of 2,000 intervals the share is known to a point."""
    monkeypatch.setattr(statistics, "_RESAMPLES", 1_000)
    samples = draw(np.random.default_rng(1), (2_000, pairs))
    covered = [low <= mean <= high for low, high in map(interval_of, samples)]
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.slow
def test_95_of_100_intervals_cover_the_truth_where_prompts_repeat(monkeypatch):
    """Three pairs of each of 100 prompts, a prompt's own part as large as that of its pairs."""
    monkeypatch.setattr(statistics, "_RESAMPLES", 1_000)
    generator, prompts = np.random.default_rng(2), np.repeat(np.arange(100), 3)
    covered, alone = [], []
    for _ in range(1_500):
        values = generator.normal(size=100)[prompts] + generator.normal(size=300)
        for intervals, known in ((covered, prompts), (alone, np.arange(300))):
            low, high = interval_of(values, known)
            intervals.append(low <= 0 <= high)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(alone) < 0.9


def test_the_design_effect_is_that_of_equal_prompts():
    """1 + (m − 1)·ρ for m pairs a prompt with a correlation of ρ (Kish)."""
    generator, prompts = np.random.default_rng(3), np.repeat(np.arange(20_000), 4)
    values = generator.normal(size=20_000)[prompts] + generator.normal(scale=math.sqrt(3), size=80_000)
    assert design_effect(values, prompts) == pytest.approx(1 + 3 * 0.25, rel=0.03)


def test_of_many_prompts_the_normal_interval_is_that_of_samples(monkeypatch):
    """Where prompts repeat, too, and with columns of very different spread."""
    generator = np.random.default_rng(2)
    prompts = np.repeat(np.arange(3000), generator.integers(1, 5, 3000))
    columns = [generator.exponential(size=3000)[prompts], generator.choice([-1.0, 0.0, 1.0], len(prompts))]
    values = np.stack([columns[0] + generator.normal(size=len(prompts)), columns[1]], axis=1)
    drawn = bootstrapped(values, prompts)
    monkeypatch.setattr(statistics, "_MOST_RESAMPLED", 2999)
    for one, other in zip(drawn, bootstrapped(values, prompts), strict=True):
        low, high = one.interval
        assert other.value == one.value
        assert other.interval == pytest.approx((low, high), abs=0.02 * (high - low))


def test_the_intervals_of_a_hundred_thousand_prompts_draw_no_samples(monkeypatch):
    """Drawing them takes a minute and a half."""
    monkeypatch.setattr(statistics, "_resampled", None)
    values = np.random.default_rng(0).normal(size=(100_000, 7))
    for found in bootstrapped(values, np.arange(100_000)):
        low, high = found.interval
        assert (high - low) / 2 == pytest.approx(1.96 / math.sqrt(100_000), rel=0.02)

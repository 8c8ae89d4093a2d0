"""Findings are functions of a run's rows: told once, in whatever portions rows come, and at a cost per step."""

from __future__ import annotations

import itertools
import math
import time

import pytest

from dpo_cli.evaluation.findings.facts import Domination, RunFacts
from dpo_cli.evaluation.findings.watch import RUN_CHECKS, Watch, found, gravest_first
from dpo_cli.preference.losses import DPO, RDPO, SFT, APODown, SimPO

LONG_ENOUGH = 400
"""Steps after which everything had its chance."""


def facts(**changes):
    known = {
        "losses": (DPO(),), "trained": "all weights", "learning_rate": 1e-6, "warmup_steps": 10, "num_steps": 1000,
        "steps_per_epoch": 1000, "pairs_per_step": 16, "from_reference": True, "chosen_tokens": 20.0,
        "rejected_tokens": 40.0,
    }  # fmt: skip
    return RunFacts(**{**known, **changes})


def step(number, **changes):
    row = {
        "split": "train", "step": number, "loss": 0.5, "grad_norm": 1.0, "rewards/chosen": 0.1,
        "rewards/rejected": -0.3, "rewards/margins": 0.4, "rewards/accuracies": 0.75,
    }  # fmt: skip
    return {**row, **changes}


def evaluation(number, loss, **changes):
    return {"split": "eval", "step": number, "loss": loss, "logps/chosen": -40.0, "logps/rejected": -80.0, **changes}


def advice(name, **changes):
    """What a finding advises in a run."""
    (check,) = [check for check in RUN_CHECKS if check.name == name]
    return "; ".join(remedy.of(facts(**changes)) for remedy in check.remedies)


def test_nothing_is_advised_that_is_set_already():
    assert "`evaluation.best_by: loss`" in advice("overfitting")
    assert "best_by" not in advice("overfitting", best_by="rewards/margins")
    assert "set `training.max_grad_norm`" in advice("gradient_spike")
    assert "lower `training.max_grad_norm` (0.5)" in advice("gradient_spike", max_grad_norm=0.5)
    assert "`training.epochs`" in advice("rate_too_low")
    assert "`training.epochs`" in advice("rate_too_low", max_steps=1001), "training ends before"
    assert "`training.max_steps`, 1,000" in advice("rate_too_low", max_steps=1000)
    assert "use `r_dpo`" in advice("lengths_drift")
    for loss in (DPO(logps="mean", beta=2.0), SimPO(), RDPO()):
        assert "use " not in advice("lengths_drift", losses=(loss,))


def names(findings):
    return [one.name for one in findings]


def falling(num_steps):
    """Return the steps of a run whose responses fall by a tenth of a nat per token a step, chosen ones by half."""
    return [
        step(n, **{"loss": 0.6931 if n == 1 else 0.4, "rewards/chosen": -0.1 * n, "rewards/rejected": -0.4 * n})
        for n in range(1, num_steps + 1)
    ]


def test_each_is_told_once_in_whatever_portions_rows_come():
    rows = sorted(
        [*falling(60), *(evaluation(n, 0.7 if n == 0 else 0.5 + n / 100) for n in range(0, 60, 10))],
        key=lambda row: (row["step"], row["split"] == "eval"),
    )
    whole = found(facts(), rows)
    assert len(whole) >= 3
    watch, told = Watch(facts()), []
    for _, portion in itertools.groupby(rows, key=lambda row: row["step"]):
        told += watch.take(list(portion))
    assert told == watch.found == whole
    # A run that goes on takes all rows up to there at once, and then one step after the other.
    resumed = Watch(facts())
    before = resumed.take([row for row in rows if row["step"] <= 20])
    after = [one for n in range(21, 61) for one in resumed.take([row for row in rows if row["step"] == n])]
    assert before + after == whole
    assert {one.step for one in before} <= set(range(21))
    assert {one.step for one in after}.isdisjoint(range(21))


def test_a_step_costs_the_same_however_many_were_before():
    class Counted(dict):
        reads = 0

        def get(self, *arguments):
            Counted.reads += 1
            return super().get(*arguments)

    watch, reads = Watch(facts(num_steps=10**6)), []
    for thousand in range(4):
        Counted.reads = 0
        for n in range(1000 * thousand + 1, 1000 * thousand + 1001):
            watch.take([Counted(step(n))])
        reads.append(Counted.reads)
    assert reads[1] == reads[2] == reads[3]
    assert reads[3] < 100 * 1000


def test_rows_of_other_versions_and_broken_values_are_no_findings():
    odd = [{"split": "train", "step": n, "loss": None, "grad_norm": math.inf} for n in range(1, 50)]
    assert found(facts(), [*odd, {"split": "eval", "step": 49}], [{"step": 49}], [{"step": 49}]) == []
    assert found(facts(), []) == []


def test_facts_are_read_back_as_they_were_written(tmp_path):
    kept = facts(
        losses=(DPO(beta=0.2), SFT(weight=0.5)),
        dominated=Domination(source="a", first_step=1, last_step=4, share=1.0, of_data=0.5),
    )
    file = tmp_path / "facts.json"
    file.write_text(kept.model_dump_json())
    assert RunFacts.read(file) == kept
    file.write_text("{}")
    assert RunFacts.read(file) is None
    assert RunFacts.read(tmp_path / "none.json") is None


def test_a_loss_that_lowers_chosen_responses_is_not_blamed_for_it():
    assert {"chosen_falls", "both_fall"} & set(names(found(facts(losses=(APODown(),)), falling(60)))) == set()
    assert {"chosen_falls", "both_fall"} <= set(names(found(facts(), falling(60))))


def test_rewards_of_means_are_per_token_already():
    """At β = 0.1 a reward of −0.12 is 1.2 nats: of a token where the loss takes means, else of 20 tokens."""
    rows = [step(n, **{"rewards/chosen": -0.12, "rewards/rejected": -0.2}) for n in range(1, 20)]
    assert set(names(found(facts(losses=(DPO(logps="mean"),)), rows))) == {"both_fall", "rate_too_high"}
    assert found(facts(), rows) == []


def test_without_a_reference_only_held_out_pairs_tell_how_far_responses_moved():
    free = facts(losses=(SimPO(),), from_reference=False)
    assert "both_fall" not in names(found(free, falling(60)))
    evaluations = [evaluation(0, 1.0), evaluation(60, 0.5, **{"logps/chosen": -70.0, "logps/rejected": -200.0})]
    assert "both_fall" in names(found(free, [*evaluations[:1], *falling(60), *evaluations[1:]]))


def test_a_loss_at_ln_2_is_stuck_only_where_it_began_there():
    def at(value, accuracy, first=None):
        return [
            step(n, **{"loss": first or value, "rewards/accuracies": accuracy} if n == 1 else
                 {"loss": value + 0.01 * (-1) ** n, "rewards/accuracies": accuracy})
            for n in range(1, LONG_ENOUGH)
        ]  # fmt: skip

    assert names(found(facts(), at(math.log(2), 0.5))) == ["stuck_at_ln2"]
    # Another loss that happens to be there; a run that learns slowly; one that has begun only.
    assert found(facts(), at(0.6931, 0.5, first=1.386)) == []
    assert found(facts(), at(math.log(2), 0.56)) == []
    assert found(facts(num_steps=10_000), at(math.log(2), 0.5)) == []


@pytest.mark.parametrize(("norm", "is_found"), [(9.0, False), (11.0, True)])
def test_a_gradient_is_compared_with_those_before(norm, is_found):
    rows = [step(n, grad_norm=norm if n == 50 else 1.0) for n in range(1, 60)]
    assert names(found(facts(), rows)) == ["gradient_spike"] * is_found
    # When gradients have become small, a hard pair has one as large as in the beginning.
    late = [step(n, grad_norm=1.0 if n < 20 or n == 50 else 0.01) for n in range(1, 60)]
    assert found(facts(), late) == []


def test_a_held_out_loss_turns_only_when_it_stays_up_and_training_falls():
    def run(losses, training=0.01):
        rows = [evaluation(0, losses[0])]
        for place, loss in enumerate(losses[1:], 1):
            rows += [step(n, loss=0.6 - training * n) for n in range(10 * place - 9, 10 * place + 1)]
            rows.append(evaluation(10 * place, loss))
        return names(found(facts(), rows))

    assert run([0.69, 0.60, 0.62, 0.63]) == ["overfitting"]
    assert run([0.69, 0.60, 0.62, 0.60]) == []
    assert run([0.69, 0.60, 0.605, 0.606]) == []
    assert run([0.69, 0.60, 0.62, 0.63], training=0.0) == []


LOOP = "I am sorry to hear that. " * 40
TEXT = (
    "Whales breathe air, as all mammals do, and come up for it every few minutes. Below the surface they close the "
    "hole on top of their heads. Some dive for more than an hour, a mile deep, where squid live that nobody has seen."
)


def answers(number, *given, chosen_tokens=40):
    return [
        {"step": number, "where": f"pairs.jsonl:{place}", "answer": text, "tokens": tokens, "ended": True,
         "chosen": "…", "chosen_tokens": chosen_tokens}
        for place, (text, tokens) in enumerate(given)
    ]  # fmt: skip


@pytest.mark.parametrize("text", [LOOP, "好的。" * 200])
def test_answers_repeat_themselves_only_where_they_did_not_before(text):
    fine, loop = (TEXT, 40), (text, 40)
    before, after = answers(0, *[fine] * 4), answers(20, loop, loop, fine, fine)
    rows = [step(n) for n in range(1, 21)]
    assert names(found(facts(), rows, [*before, *after])) == ["repetition"]
    for samples in ([*before, *answers(20, loop, fine, fine, fine)], [*answers(0, loop, loop, fine, fine), *after]):
        assert "repetition" not in names(found(facts(), rows, samples))


LOOPED = TEXT[:60] + " And so it is with all of them." * 3
"""An answer of which the end is the same three times, which zlib does not make short."""


@pytest.mark.parametrize(
    ("texts", "changed", "is_found"),
    [
        (["", " \n"], {}, True),
        ([LOOP, LOOP, TEXT, TEXT], {}, True),
        ([LOOP, TEXT, TEXT], {}, False),
        ([LOOPED, LOOPED], {"ended": False}, True),
        (["分析数据的方法很多。首先是收集数据，" + "然后再仔细地看一遍所有数据，" * 3], {"ended": False}, True),
        # What comes to an end is an answer; what is long alone may make sense; two of a kind are no loop.
        ([LOOPED, LOOPED], {"ended": True}, False),
        ([TEXT, TEXT], {"ended": False, "tokens": 4000}, False),
        ([TEXT + " And so it is with all of them." * 2], {"ended": False}, False),
        ([], {}, False),
    ],
)
def test_a_model_that_writes_nonsense_before_training_is_told_then(texts, changed, is_found):
    before = [{**row, **changed} for row in answers(0, *((text, 40) for text in texts))]
    (told,) = found(facts(), [evaluation(0, 0.69)], before) or [None]
    assert (told is not None) is is_found
    if told:
        assert (told.name, told.step) == ("nonsense_before", 0)
        assert str(told).startswith("before step 1: the model writes nonsense before training (of ")
        assert "Try: begin with a model that was tuned to follow instructions" in str(told)
    # After step 1 it is another finding.
    later = [{**row, "step": 20} for row in before]
    assert "nonsense_before" not in names(found(facts(), [step(n) for n in range(1, 21)], later))


@pytest.mark.parametrize(
    ("before", "after", "is_found"),
    [
        ((40, 45, 38, 50), (90, 100, 85, 120), True),
        ((40, 45, 38, 50), (15, 20, 14, 22), True),
        # Rambling becomes less; one answer became long; what was off stays off.
        ((200, 180, 190, 210), (100, 90, 95, 105), False),
        ((40, 45, 38, 50), (40, 45, 38, 400), False),
        ((200, 180, 190, 210), (200, 180, 190, 210), False),
    ],
)
def test_lengths_drift_where_answers_move_away_from_the_chosen_responses(before, after, is_found):
    samples = [*answers(0, *((TEXT, n) for n in before)), *answers(20, *((TEXT, n) for n in after))]
    assert names(found(facts(), [step(n) for n in range(1, 21)], samples)) == ["lengths_drift"] * is_found


def test_a_category_is_reversed_beyond_chance_or_not_at_all():
    def pairs(number, margins):
        return [
            {"step": number, "pair": place, "source": "", "category": category, "rewards/margins": margin,
             "rewards/accuracies": 0.5 if margin == 0 else float(margin > 0)}
            for place, (category, margin) in enumerate(margins)
        ]  # fmt: skip

    rows = [step(n) for n in range(1, 21)]
    nothing = pairs(0, [("a", 0.0)] * 80 + [("b", 0.0)] * 20)
    swapped = pairs(20, [("a", 1.0)] * 80 + [("b", -1.0)] * 18 + [("b", 1.0)] * 2)
    (one,) = found(facts(), rows, held_out=[*nothing, *swapped])
    assert (one.name, one.step) == ("category_reversed", 20)
    assert one.evidence == "category `b`: accuracy 10 %, margin -0.800, 20 pairs"
    chance = pairs(20, [("a", 1.0)] * 80 + [("b", -1.0)] * 12 + [("b", 1.0)] * 8)
    few = pairs(20, [("a", 1.0)] * 80 + [("b", -1.0)] * 9)
    for after in (chance, few):
        assert found(facts(), rows, held_out=[*nothing, *after]) == []


def test_what_is_known_before_step_1_is_told_then():
    dominated = Domination(source="a.jsonl", first_step=1, last_step=4, share=1.0, of_data=0.5)
    (one,) = found(facts(dominated=dominated), [evaluation(0, 0.69)])
    assert str(one).startswith(
        "before step 1: steps have pairs of one source alone (100 % of the pairs of steps 1 to 4"
    )


def test_thousands_of_sources_are_looked_at_once_each():
    """Looking for each of them in all pairs takes half a minute."""
    pairs = [
        {
            "step": n,
            "source": f"{k // 10}" if k >= 100 else "z",
            "rewards/accuracies": float(k >= 100),
            "rewards/margins": -0.5 * n,
        }
        for n in (0, 1)
        for k in range(60_000)
    ]
    rows = evaluation(0, 0.69), evaluation(1, 0.6)
    began = time.perf_counter()
    (one,) = [one for one in found(facts(), rows, held_out=pairs) if one.name == "category_reversed"]
    assert "source `z`: accuracy 0 %, margin -0.500, 100 pairs" in one.evidence
    assert time.perf_counter() - began < 10


def test_the_gravest_are_first():
    findings = found(facts(), [*falling(60)])
    assert [one.severity for one in gravest_first(findings)] == sorted(
        (one.severity for one in findings), key=["error", "warning", "info"].index
    )


@pytest.mark.parametrize("check", RUN_CHECKS, ids=lambda check: check.name)
def test_each_says_what_to_do_whatever_the_run(check):
    runs = facts(), facts(losses=(SFT(),), trained="an adapter", from_reference=False), facts(losses=(DPO(), SFT()))
    for run in runs:
        assert any(remedy.of(run) for remedy in check.remedies)
    assert len({other.name for other in RUN_CHECKS}) == len(RUN_CHECKS)

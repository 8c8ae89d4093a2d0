"""Losses, gradients and weights that are NaN or infinite, by the data's own numbers or by a fault.

They stop the run, or are skipped where that is asked for; the pairs are named by file and line, and what is saved holds
finite numbers alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dpo_cli.modeling.folders.loading import load_policy
from tests import builders
from tests.conftest import read_metrics
from tests.faults.conftest import FULL
from tests.faults.ledger import Outcome
from tests.faults.trials import (
    NUM_STEPS,
    Broken,
    Trial,
    configured,
    judged,
    require_error,
    require_kept,
    require_said,
    require_same,
    undisturbed,
)
from tests.faults.zygote import Ended

Rows = list[dict[str, Any]]

OVERFLOWS = {
    # 3e38 · 10 is more than a float32 holds; the gradient of the second is, when it is squared for its norm.
    "loss": {"weight": 3e38, "margin": 10.0},
    "gradient": {"weight": 3e38},
}
BAD_LINE, BAD_STEP = 6, 2
"""The line of a pair with such numbers, which stands in that step where pairs are not shuffled."""

SKIP = {"on_nonfinite": "skip"}
MARGINS_USED = {"loss": {"type": "dpo", "margin_scale": 1}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, zygote, tiny_llama, demo_rows) -> Trial:
    return undisturbed(tmp_path_factory.mktemp("numbers"), zygote, tiny_llama, demo_rows[:28])


def with_overflow(rows: Rows, what: str) -> Rows:
    """Return 24 rows, one of which no float32 bears."""
    return [{**row, **(OVERFLOWS[what] if line == BAD_LINE else {})} for line, row in enumerate(rows[:24], 1)]


def require_finite(trial: Trial, *steps: int) -> None:
    """Require whole checkpoints of these steps and no others, with finite numbers alone."""
    require_kept(trial)
    saved = {int(path.name[5:]): path for path in trial.checkpoints.glob("step-*")}
    if sorted(saved) != list(steps):
        raise Broken(Outcome.LOST, f"checkpoints of the steps {sorted(saved)} instead of {steps}")
    for folder in [*saved.values(), *([trial.final] if trial.final.exists() else [])]:
        for file in folder.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                if not torch.isfinite(tensor).all():
                    raise Broken(Outcome.WRONG, f"{name} in {file} is not finite")


def lines_of_step(step: int) -> str:
    """Match the names of all pairs of a step of four."""
    return ", ".join(rf"\S*pairs\.jsonl:{line}" for line in range(4 * step - 3, 4 * step + 1))


@pytest.mark.parametrize("what", OVERFLOWS)
def test_an_overflow_stops_the_run_and_names_the_pairs(tmp_path, zygote, tiny_llama, demo_rows, ledger, what):
    """A loss that is not finite names its pair, a gradient all pairs of the step."""
    rows = with_overflow(demo_rows, what)
    trial = configured(
        tmp_path,
        zygote,
        tiny_llama,
        rows,
        data={"eval": None},
        checkpoints={"every_steps": 1, "keep": 9},
        **MARGINS_USED,
    )
    with judged(ledger, f"numbers: {what} too large"):
        named = rf"its pairs: \S*pairs\.jsonl:{BAD_LINE}$" if what == "loss" else lines_of_step(BAD_STEP)
        require_error(trial.train(), rf"(?m)the {what} of step {BAD_STEP} is not finite.*{named}")
        require_finite(trial, BAD_STEP - 1)
        # The pair is still there.
        require_error(trial.train("--resume"), f"the {what} of step {BAD_STEP} is not finite")
        require_finite(trial, BAD_STEP - 1)


SPOILT = [(kind, value, step) for kind in ("loss", "gradient") for value in ("nan", "inf") for step in range(1, 7)]


@pytest.mark.parametrize(("kind", "value", "step"), SPOILT if FULL else [("loss", "nan", 4), ("gradient", "nan", 6)])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path, whole, ledger, kind, value, step):
    """What went wrong once and not again leaves no trace in the result."""
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, f"numbers: {kind} {value}"):
        ended = trial.train(fault=(f"spoilt_{kind}", {"value": value, "step": step}))
        require_error(ended, rf"the {kind} of step {step} is not finite.*pairs\.jsonl:\d")
        require_finite(trial, *range(2, step, 2))
        require_said(trial.train("--resume"))
        require_same(trial, whole)


UNSAVED = list(itertools.product(("stop", "skip"), ("nan", "inf"), range(1, 7)))


@pytest.mark.parametrize(("setting", "value", "step"), UNSAVED if FULL else [("stop", "inf", 4), ("skip", "nan", 6)])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, whole, ledger, setting, value, step):
    """One weight, of a token that no pair has, so that no loss tells of it; no step can be skipped to mend it."""
    trial = whole.with_cache_only(tmp_path / "t")
    asked = f"training.on_nonfinite={setting}"
    with judged(ledger, f"numbers: weight {value}"):
        ended = trial.train(asked, fault=("spoilt_weight", {"value": value, "step": step}))
        require_error(ended, "(weights|loss) of step.* not finite")
        require_finite(trial, *range(2, step, 2))
        require_said(trial.train("--resume", asked))
        if setting == "stop":
            require_same(trial, whole)


def test_weights_that_are_not_finite_are_not_put_down_to_skipped_steps(tmp_path, whole, ledger):
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, "numbers: weight nan"):
        ended = trial.train("training.on_nonfinite=skip", fault=("spoilt_weight", {"value": "nan", "step": 4}))
        require_error(ended, "weights of step 4 are not finite")
        assert "skipped before" not in ended.said


@pytest.mark.parametrize("rate", [1e3, 1e10, 1e20, 1e30, 1e38] if FULL else [1e38])
def test_no_learning_rate_saves_what_is_not_finite(tmp_path, whole, ledger, rate):
    """At 1e38 the first step is more than a float32 holds; before that the model may answer with finite nonsense."""
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, "numbers: learning rate far too high"):
        ended = trial.train(f"training.learning_rate={rate}", "checkpoints.every_steps=1")
        if ended.status or rate == 1e38:
            require_error(ended, "not finite")
            assert not trial.final.exists()
        saved = sorted(int(path.name[5:]) for path in trial.checkpoints.glob("step-*"))
        require_finite(trial, *saved)


def test_a_last_step_that_breaks_the_weights_is_not_a_result(tmp_path, whole, ledger):
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, "numbers: learning rate far too high"):
        ended = trial.train("training.learning_rate=1e38", "training.max_steps=1", "evaluation.every_steps=null")
        require_error(ended, "not finite")
        assert not trial.final.exists()


@pytest.fixture(scope="module")
def skipped(tmp_path_factory, zygote, tiny_llama, demo_rows) -> tuple[Trial, Ended]:
    """A finished run over two epochs, each with one step that was skipped, and what it said."""
    folder = tmp_path_factory.mktemp("skipping")
    rows = with_overflow(demo_rows, "loss")
    trial = configured(folder, zygote, tiny_llama, rows, **skip_settings(epochs=2))
    return trial, trial.train()


@pytest.fixture(scope="module")
def skipping(skipped) -> Trial:
    """That run."""
    return skipped[0]


def skip_settings(**training: Any) -> dict[str, Any]:
    return {
        "data": {"eval": None},
        "checkpoints": {"every_steps": 3, "keep": 100},
        "training": {**SKIP, "schedule": "constant", "warmup_ratio": 0.0, **training},
        **MARGINS_USED,
    }


def test_a_skipped_step_is_counted_and_its_pair_named(skipped, ledger):
    trial, ended = skipped
    with judged(ledger, "numbers: skipped"):
        require_said(ended, rf"^warning: skipping step {BAD_STEP} .*pairs\.jsonl:{BAD_LINE}\b")
        require_finite(trial, 3, 6, 9, 12)
        assert [row["skipped"] for row in read_metrics(trial.run) if "skipped" in row] == [1, 2]


@pytest.mark.parametrize("what", OVERFLOWS if FULL else ["gradient"])
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(
    tmp_path, zygote, tiny_llama, demo_rows, ledger, what
):
    """With a constant learning rate the result is that of the same rows without those of the step."""
    rows = with_overflow(demo_rows, what)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with judged(ledger, "numbers: skipped"):
        skipped = undisturbed(tmp_path / "a", zygote, tiny_llama, rows, **skip_settings())
        without = undisturbed(tmp_path / "b", zygote, tiny_llama, rows[:4] + rows[8:], **skip_settings())
        ours, theirs = (load_file(trial.final / "model.safetensors") for trial in (skipped, without))
        if not all(torch.equal(ours[name], theirs[name]) for name in theirs):
            raise Broken(Outcome.WRONG, "a step that was skipped changed the weights")


def test_a_run_whose_only_step_is_skipped_ends_where_it_began(tmp_path, zygote, tiny_llama, demo_rows, ledger):
    rows = with_overflow(demo_rows, "loss")[4:8]
    with judged(ledger, "numbers: skipped"):
        trial = undisturbed(tmp_path, zygote, tiny_llama, rows, **skip_settings())
        before, after = (load_policy(str(folder)).state_dict() for folder in (tiny_llama, trial.final))
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_more_skipped_steps_than_allowed_stop_the_run(tmp_path, skipping, ledger):
    trial = skipping.with_cache_only(tmp_path / "t")
    with judged(ledger, "numbers: skipped too often"):
        ended = trial.train("training.max_skipped=1")
        require_error(ended, rf"the loss of step {BAD_STEP + NUM_STEPS} is not finite.*pairs\.jsonl:{BAD_LINE}\b")
        require_finite(trial, 3, 6)


@pytest.mark.parametrize("step", range(1, 11) if FULL else [5])
def test_a_run_with_skipped_steps_is_resumed_bit_for_bit(tmp_path, skipping, ledger, step):
    """Killed after every step that is taken: before the first skipped one, between both, after the second."""
    trial = skipping.with_cache_only(tmp_path / "t")
    with judged(ledger, "numbers: skipped and resumed"):
        assert trial.train(fault=("signalled", {"name": "SIGKILL", "step": step})).status == -9
        require_said(trial.train("--resume"))
        require_same(trial, skipping)


def test_the_count_of_skipped_steps_survives_a_resume(tmp_path, skipping, ledger):
    """Stopped between the two, a run that may skip one step does not skip the second after it went on."""
    trial = skipping.with_cache_only(tmp_path / "t")
    with judged(ledger, "numbers: skipped too often"):
        settings = "training.max_skipped=1"
        assert trial.train(settings, fault=("signalled", {"name": "SIGKILL", "step": 4})).status == -9
        require_error(trial.train("--resume", settings), f"the loss of step {BAD_STEP + NUM_STEPS} is not finite")
        require_finite(trial, 3, 6)


@pytest.mark.parametrize("loss", ["bco", "aot", "dpo"] if FULL else ["bco"])
def test_what_a_loss_remembers_is_not_spoilt_by_a_skipped_step(tmp_path, zygote, tiny_llama, demo_rows, ledger, loss):
    loss = {"type": "dpo", "adaptive_beta": {"alpha": 1.0}} if loss == "dpo" else loss
    trial = configured(tmp_path, zygote, tiny_llama, demo_rows[:24], **{**skip_settings(), "loss": loss})
    with judged(ledger, "numbers: skipped"):
        require_said(trial.train(fault=("spoilt_loss", {"value": "nan", "step": BAD_STEP})), "^warning: .*not finite")
        require_finite(trial, 3, 6)


HALF_STEPS = 20


@pytest.fixture
def in_float16(monkeypatch) -> Iterator[None]:
    """Let Accelerate compute in float16 here, which it does on a GPU alone: real float16, and a real scaler."""

    def make(**keywords: Any) -> Accelerator:
        accelerator = Accelerator(**keywords)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        return accelerator

    monkeypatch.setattr(builders, "Accelerator", make)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pairs(tmp_path, pairs_file, tokenizer) -> Any:
    return builders.prepare_pairs(pairs_file, tokenizer, tmp_path / "prepared")


def test_overflows_in_float16_are_skipped_until_the_scale_suits(tiny_llama, pairs, in_float16, ledger):
    """The scale begins where every gradient overflows, and is halved each time: that is no fault of a pair's."""
    with judged(ledger, "numbers: overflow in float16"):
        metrics, weights = builders.train_in_process(tiny_llama, pairs, pairs_per_step=2, reference=None)
        taken = [torch.isfinite(torch.tensor(row["grad_norm"])).item() for row in metrics]
        assert len(metrics) == HALF_STEPS
        assert not taken[0]
        assert taken[-1]
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())
        start = load_policy(str(tiny_llama)).state_dict()
        assert any(not torch.equal(weights[name], start[name]) for name in start)


def test_a_gradient_that_overflows_at_every_scale_stops(tiny_llama, pairs, in_float16, monkeypatch, ledger):
    """Halving the scale does not help where the gradient is NaN; a run that never takes a step is no run."""
    from dpo_cli.modeling.scorer import Scorer
    from dpo_cli.training.learner import NotFinite

    forward = Scorer.forward

    def spoilt(self: Scorer, batch: Any, **asked: Any) -> torch.Tensor:
        answer = forward(self, batch, **asked)
        if answer.requires_grad:
            answer.register_hook(lambda slope: slope * float("nan"))
        return answer

    monkeypatch.setattr(Scorer, "forward", spoilt)
    with judged(ledger, "numbers: overflow in float16"), pytest.raises(NotFinite):
        builders.train_in_process(tiny_llama, pairs, pairs_per_step=1)

"""Stopped after any step and resumed, a run ends byte for byte as if nothing had happened, whatever it is made of."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.modeling.held import QUANTIZED
from dpo_cli.modeling.layouts import LAYOUTS
from dpo_cli.preference.losses import Loss
from dpo_cli.preference.reference import NoReference, Reference
from dpo_cli.settings import members, types
from dpo_cli.training.optimizer import SCHEDULES, Optimizer
from tests.conftest import differing_rows, make_config, read_metrics, write_rows
from tests.faults.conftest import FULL
from tests.faults.launching import run_ranks
from tests.faults.runs import with_start

LOSSES = {kind().type: kind() for kind in members(Loss)}
REFERENCES = types(Reference)
NO_EVALUATION: dict[str, Any] = {"data": {"eval": None}, "evaluation": {"every_steps": None}}
"""All pairs are trained on, so that an epoch has four steps."""
BEST: dict[str, Any] = {
    "loss": {"type": "dpo", "label_smoothing": 0.3},
    "training": {"learning_rate": 1e-2},
    "evaluation": {"every_steps": 1, "best_by": "loss", "samples": 0},
}
"""The held-out loss is lowest after step 2, whose weights are the trained model's."""
MOVES = {"type": "synced", "every_steps": 2, "alpha": 0.5}
START = {"type": "lora", "rank": 4, "start": "start"}
"""An adapter that goes on from the one in a folder beside the configuration."""

NUM_STEPS = 5
"""Two epochs of three steps, the second cut short; the third step has fewer pairs than the others."""
BASE: dict[str, Any] = {
    "training": {"epochs": 1.5, "pairs_per_step": 7, "learning_rate": 1e-3, "micro_batch_tokens": 400},
    "checkpoints": {"every_steps": 1, "keep": 100},
    "evaluation": {"every_steps": 2},
    "data": {"eval": 0.25},
}


@dataclass(frozen=True)
class Case:
    """A run and what it is made of.

    Attributes:
        name: What the test is called.
        settings: Groups of settings beside those of `BASE`.
        num_ranks: In how many processes.
    """

    name: str
    settings: Mapping[str, Any]
    num_ranks: int = 1


def training(name: str, **settings: Any) -> Case:
    return Case(name, {"training": settings})


def of_losses(names: list[str], reference: str) -> Case:
    settings: dict[str, Any] = {"loss": [{"type": name, "weight": 0.5 + place} for place, name in enumerate(names)]}
    if reference != "none":
        settings["reference"] = MOVES if reference == "synced" else reference
    return Case(f"{'+'.join(names)}-{reference}", settings)


def fits(name: str, reference: str) -> bool:
    """Tell whether a loss goes with a reference: with none go those that need none, and only those."""
    return LOSSES[name].needs_reference == (reference != NoReference().type)


ADAPTERS = [
    Case("lora", {"adapter": "lora"}),
    Case("lora-dropout", {"adapter": {"dropout": 0.5}, "training": {"gradient_checkpointing": True}}),
    Case("lora-bfloat16", {"adapter": "lora", "model": {"dtype": "bfloat16"}}),
    Case("rslora-dropout-synced", {"adapter": {"rslora": True, "dropout": 0.2}, "reference": MOVES}),
    Case("dora-frozen", {"adapter": {"dora": True, "targets": ["q_proj", "down_proj"]}, "reference": "frozen"}),
    *(Case(f"lora-start-{kind}", {"adapter": START, "reference": kind}) for kind in ("cached", "frozen")),
    Case("lora-start-dropout-synced-in-the-background",
         {"adapter": {**START, "dropout": 0.5}, "reference": MOVES, "checkpoints": {"background": True},
          "training": {"gradient_checkpointing": True}}),
    Case("lora-two-ranks", {"adapter": {"dropout": 0.5, "dora": True}, "reference": "frozen"}, 2),
    *(Case(f"{kind}-dropout", {"model": {"quantize": kind}, "adapter": {"dropout": 0.5}}) for kind in QUANTIZED),
    Case("nf4-start-synced", {"model": {"quantize": "nf4"}, "adapter": START, "reference": MOVES}),
    Case("nf4-dora-checkpointing", {"model": {"quantize": "nf4"}, "adapter": {"dora": True}, "reference": "frozen",
                                    "training": {"gradient_checkpointing": True}}),
    Case("nf4-two-ranks", {"model": {"quantize": "nf4"}, "adapter": "lora"}, 2),
    Case("lora-start-two-ranks", {"adapter": START, "reference": MOVES}, 2),
]  # fmt: skip
"""Adapters alone, with each reference, with what takes random numbers, and beside a base of few bits."""
OPTIONS = [
    Case("wpo", {"loss": {"type": "dpo", "wpo": True}}),
    Case("wpo-list", {"loss": [{"type": "simpo", "wpo": True}, {"type": "sft", "weight": 0.3}]}),
    Case("adaptive-beta", {"loss": {"type": "dpo", "adaptive_beta": {"alpha": 5.0}}, "reference": MOVES}),
    Case("bfloat16", {"model": {"dtype": "bfloat16"}}),
    Case("split-synced-in-the-background", {"model": {"weights": "split"}, "reference": MOVES,
                                            "checkpoints": {"background": True}}),
    Case("split-8bit", {"model": {"weights": "split"}, "training": {"optimizer": "adamw_8bit"}}),
    Case("lora-8bit-two-ranks", {"adapter": "lora", "training": {"optimizer": "adamw_8bit"}}, 2),
    Case("split-8bit-two-ranks", {"model": {"weights": "split"}, "training": {"optimizer": "adamw_8bit"}}, 2),
    Case("split-adafactor", {"model": {"weights": "split"}, "training": {"optimizer": "adafactor"}}),
    *ADAPTERS,
    Case("best", BEST),
    Case("best-two-ranks", BEST, 2),
    Case("best-lora-in-the-background", {**BEST, "adapter": "lora", "checkpoints": {"background": True}}),
    Case("without-evaluation", {**NO_EVALUATION, "training": {"epochs": 1.25}}),
    Case("in-the-background", {"checkpoints": {"background": True}}),
    training("checkpointing", gradient_checkpointing=True),
    training("in-order", shuffle=False),
    training("max-steps", epochs=3, max_steps=NUM_STEPS),
    training("unclipped", max_grad_norm=None, warmup_ratio=0.5, weight_decay=0.1),
    *(training(f"optimizer-{kind}", optimizer=kind, weight_decay=0.1) for kind in types(Optimizer)),
    *(training(f"schedule-{kind}", schedule=kind) for kind in SCHEDULES),
    *(training(f"layout-{kind}", layout=kind) for kind in LAYOUTS),
    *(Case(f"two-ranks-{reference}", {**of_losses(["aot", "bco", "sft"], reference).settings}, 2)
      for reference in REFERENCES if reference != "none"),
]  # fmt: skip
EVERY = [
    *(
        of_losses([name], reference)
        for name, reference in itertools.product(LOSSES, REFERENCES)
        if fits(name, reference)
    ),
    *OPTIONS,
]


ADAPTED = ("lora-start-dropout-synced-in-the-background", "lora-two-ranks", "nf4-dropout")
"""The few that train an adapter."""


def few() -> Iterator[Case]:
    """Every loss, every reference and most options in a few runs: a run is the same only if all it is made of is."""
    options = [
        {"optimizer": "adafactor", "schedule": "cosine", "gradient_checkpointing": True, "layout": "padded"},
        {"optimizer": "rmsprop", "schedule": "constant", "weight_decay": 0.1, "layout": "packed"},
        {"shuffle": False, "epochs": 3, "max_steps": NUM_STEPS},
    ]
    references = [reference for reference in REFERENCES if reference != NoReference().type]
    for place, option in enumerate(options):
        case = of_losses(list(LOSSES)[place :: len(options)], references[place % len(references)])
        yield Case(case.name, {**case.settings, "training": option})
    names = (
        "wpo-list",
        "best-two-ranks",
        "two-ranks-synced",
        "split-synced-in-the-background",
        "split-8bit-two-ranks",
        *ADAPTED,
    )
    yield from (case for case in OPTIONS if case.name in names)


FEW = list(few())


@pytest.fixture(scope="module")
def rows(demo_rows):
    return demo_rows[:24]


def run_case(case: Case, folder: Path, model: Path, rows: list[dict[str, str]], zygote: Any) -> Path:
    """Run a case uninterrupted in a folder of its own; return its configuration."""
    folder.mkdir(exist_ok=True)
    groups = {name: {**settings} if isinstance(settings, dict) else settings for name, settings in BASE.items()}
    for name, settings in case.settings.items():
        groups[name] = {**groups[name], **settings} if isinstance(groups.get(name), dict) else settings
    pairs = write_rows(folder / "pairs.jsonl", rows)
    file = make_config(folder, model, pairs, "run", **with_start(groups, model, folder))
    ended = run_ranks(zygote, case.num_ranks, "train", "--config", file)
    assert ended.status == 0, ended.said
    assert [row["step"] for row in read_metrics(folder / "runs" / "run")] == list(range(1, NUM_STEPS + 1))
    return file


def cut_after(whole: Path, step: int, run: Path) -> None:
    """Make a run what it was when it had just saved a step."""
    if run.exists():
        shutil.rmtree(run)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def assert_same_run(run: Path, whole: Path) -> None:
    """Compare what two runs left behind: the model and the state of everything after the last step."""
    last = f"checkpoints/step-{NUM_STEPS:06d}"
    assert sorted(p.name for p in run.rglob("*")) == sorted(p.name for p in whole.rglob("*"))
    for name in ("final/manifest.json", f"{last}/manifest.json"):
        ours, theirs = (json.loads((folder / name).read_text())["files"] for folder in (run, whole))
        assert ours == theirs, name
    assert not differing_rows(run, whole)


def steps_of(case: Case, place: int) -> list[int]:
    """Return the steps after which a case is interrupted; without `FULL` one, another for each case."""
    return list(range(NUM_STEPS + 1)) if FULL else [place % (NUM_STEPS - 1) + 1]


@pytest.mark.parametrize(
    ("case", "steps"),
    [pytest.param(case, steps_of(case, place), id=case.name) for place, case in enumerate(EVERY if FULL else FEW)],
)
def test_after_whatever_step_it_stopped_it_ends_the_same(tmp_path, tiny_llama, rows, zygote, ledger, case, steps):
    file = run_case(case, tmp_path, tiny_llama, rows, zygote)
    run, whole = tmp_path / "runs" / "run", tmp_path / "whole"
    # What is saved names the folder, so that both have to stand in the same.
    run.rename(whole)
    for step in steps:
        cut_after(whole, step, run)
        ended = run_ranks(zygote, case.num_ranks, "train", "--config", file, "--resume")
        assert ended.status == 0, ended.said
        assert (f"resuming after step {step}" if step else "starting from step 1") in ended.said
        assert_same_run(run, whole)
        ledger.record("resumed after a step" if case.num_ranks == 1 else "resumed after a step, two processes")


@pytest.mark.skipif(not FULL, reason="threads that wait for each other on few cores take their time")
def test_on_another_machine_it_goes_on_at_the_right_pair_and_says_what_differs(
    tmp_path, tiny_llama, rows, zygote, ledger
):
    file = run_case(Case("dpo", {}), tmp_path, tiny_llama, rows, zygote)
    run, whole = tmp_path / "runs" / "run", tmp_path / "whole"
    run.rename(whole)
    cut_after(whole, 2, run)
    elsewhere = "tests.faults.strokes:move_elsewhere", {"threads": 2, "build": "elsewhere"}
    ended = zygote.run("train", "--config", file, "--resume", fault=elsewhere)
    assert ended.status == 0, ended.said
    said = next(line for line in ended.said.splitlines() if "perhaps not bit for bit" in line)
    assert "threads 1 → 2" in said
    assert ".elsewhere" in said
    ours, theirs = read_metrics(run), read_metrics(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], abs=1e-5)
    ledger.record("resumed on another machine")


def test_every_loss_and_every_reference_is_among_the_few():
    losses, references = set(), set()
    for case in FEW:
        loss = case.settings.get("loss", [{"type": "dpo"}])
        losses |= {one["type"] for one in (loss if isinstance(loss, list) else [loss])}
        reference = case.settings.get("reference", "none")
        references.add(reference if isinstance(reference, str) else reference["type"])
    assert losses == set(LOSSES)
    assert references == set(REFERENCES)

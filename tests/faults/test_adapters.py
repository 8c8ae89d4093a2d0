"""Runs that train an adapter, whose checkpoints and trained model are other files: damage, full disks and NaN.

Crashes, power cuts and kills are those of every kind of run; what adapters have besides is here.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import build_llama
from tests.faults.conftest import FULL
from tests.faults.damages import (
    STATE_FILES,
    TOKENIZER_FILES,
    cases,
    require_passed_over,
    require_refused_or_saved_again,
)
from tests.faults.ledger import Outcome
from tests.faults.trials import (
    NUM_STEPS,
    Broken,
    Trial,
    judged,
    require_error,
    require_kept,
    require_on_from,
    require_said,
    require_same,
    undisturbed,
)

NEWEST = f"step-{NUM_STEPS:06d}"
ADAPTER = {"adapter": {"rank": 4, "dropout": 0.2}}
SAME_FILES = ("generation_config.json", *TOKENIZER_FILES)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CHECKPOINT_FILES = (*ADAPTER_FILES, *STATE_FILES, "manifest.json", *SAME_FILES)
FINAL_FILES = (*ADAPTER_FILES, "README.md", "manifest.json", *SAME_FILES)
PLACES = {"checkpoint": ("/run/checkpoints/", "saving a checkpoint"),
          "final model": ("/run/.final", "saving the trained model")}  # fmt: skip
"""What is written, by the part of its path and by what the error calls it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, zygote, tiny_llama, demo_rows) -> Trial:
    return undisturbed(tmp_path_factory.mktemp("adapted"), zygote, tiny_llama, demo_rows[:28], **ADAPTER)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, zygote, tokenizer, demo_rows) -> Trial:
    """A run of another base, other pairs and another seed, whose adapter has the same shapes."""
    folder = tmp_path_factory.mktemp("stranger")
    model = build_llama(folder / "model", tokenizer, seed=1)
    return undisturbed(folder, zygote, model, demo_rows[28:56], **ADAPTER, training={"seed": 7})


def test_every_file_is_among_those_that_are_damaged(whole):
    """The base is in neither folder."""
    for folder, files in ((whole.checkpoints / NEWEST, CHECKPOINT_FILES), (whole.final, FINAL_FILES)):
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)


@pytest.mark.parametrize(("file", "damage"), cases(*CHECKPOINT_FILES, same_in_every_run=SAME_FILES, few=2))
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, whole, stranger, ledger, file, damage):
    trial = whole.unfinished(tmp_path / "t")
    with judged(ledger, f"damage: a file of an adapter's checkpoint, {damage}"):
        require_passed_over(trial, whole, stranger, file, damage)


def test_a_checkpoint_of_an_adapter_of_another_base_is_passed_over(tmp_path, whole, stranger, ledger):
    """It is whole, and has the same names and shapes."""
    trial = whole.unfinished(tmp_path / "t")
    shutil.rmtree(trial.checkpoints / NEWEST)
    shutil.copytree(stranger.checkpoints / NEWEST, trial.checkpoints / NEWEST)
    with judged(ledger, "damage: another run's checkpoint in the place of an adapter's"):
        require_on_from(trial.train("--resume"), NUM_STEPS - 2, rf"^warning: .*{NEWEST}: the model is not this run's")
        require_same(trial, whole)


@pytest.mark.parametrize(("file", "damage"), cases(*FINAL_FILES, same_in_every_run=SAME_FILES, few=2))
def test_a_damaged_trained_adapter_is_an_error_or_saved_again(tmp_path, whole, stranger, ledger, file, damage):
    trial = whole.another(tmp_path / "t", "run", "cache")
    with judged(ledger, f"damage: the trained adapter's file, {damage}"):
        require_refused_or_saved_again(trial, whole, stranger, file, damage)


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"] if FULL else ["ENOSPC"])
@pytest.mark.parametrize("name", PLACES)
def test_a_disk_that_refuses_the_adapter_stops_the_run_and_names_it(tmp_path, whole, ledger, name, code):
    trial, (part, doing) = whole.with_cache_only(tmp_path / "t"), PLACES[name]
    with judged(ledger, f"disk: an adapter's {name} refused"):
        require_error(trial.train(fault=("refuse", {"part": part, "code": code})), f"{doing} failed")
        require_kept(trial)
        assert not trial.final.exists()
        require_said(trial.train("--resume"))
        require_same(trial, whole)


@pytest.mark.parametrize("value", ["nan", "inf"] if FULL else ["nan"])
@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1) if FULL else [4])
def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path, whole, ledger, value, step):
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, f"numbers: an adapter's weight {value}"):
        ended = trial.train(fault=("spoilt_weight", {"value": value, "step": step}))
        require_error(ended, "(weights|loss) of step.* not finite")
        require_kept(trial)
        for file in trial.checkpoints.glob("*/*.safetensors"):
            if not all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values()):
                raise Broken(Outcome.WRONG, f"{file} is not finite")
        require_said(trial.train("--resume"))
        require_same(trial, whole)

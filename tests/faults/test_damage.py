"""Files that are not what was written: each of a checkpoint, of the caches, of the trained model and of the run.

Damage is noticed before use and named, and nothing is computed from it: an older whole checkpoint takes the place of a
damaged one, caches are written again, and what can be had nowhere else is an error.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.conftest import build_llama, differing_rows, read_metrics
from tests.faults.conftest import FULL
from tests.faults.damages import (
    DAMAGES,
    FOLDER,
    MISSING,
    STATE_FILES,
    TOKENIZER_FILES,
    cases,
    flip,
    named,
    require_passed_over,
    require_refused_or_saved_again,
)
from tests.faults.launching import run_ranks
from tests.faults.ledger import Outcome
from tests.faults.trials import (
    NUM_STEPS,
    Broken,
    Trial,
    content,
    judged,
    require_error,
    require_no_traceback,
    require_on_from,
    require_said,
    require_same,
    undisturbed,
)
from tests.faults.zygote import Ended

NEWEST, BEFORE = f"step-{NUM_STEPS:06d}", f"step-{NUM_STEPS - 2:06d}"

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
SAME_FILES = ("generation_config.json", *TOKENIZER_FILES)
"""Those that cannot be told from another run's."""
CHECKPOINT_FILES = (*MODEL_FILES, *STATE_FILES, "manifest.json", *TOKENIZER_FILES)
FINAL_FILES = (*MODEL_FILES, "README.md", "manifest.json", *TOKENIZER_FILES)
PREPARED_FILES = ("pairs.arrow", "manifest.json")
ROW_FILES = ("metrics.jsonl", "held_out.jsonl", "samples.jsonl")
RUN_FILES = ("config.yaml", *ROW_FILES, "environment.json", "facts.json", "report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, zygote, tiny_llama, demo_rows) -> Trial:
    return undisturbed(tmp_path_factory.mktemp("damage"), zygote, tiny_llama, demo_rows[:28])


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, zygote, tokenizer, demo_rows) -> Trial:
    """Another run: another model of the same shape, other pairs, another seed and rate; the same tokenizer."""
    folder = tmp_path_factory.mktemp("stranger")
    model = build_llama(folder / "model", tokenizer, seed=1, rms_norm_eps=1e-5)
    training = {"learning_rate": 2e-3, "seed": 7}
    return undisturbed(folder, zygote, model, demo_rows[28:56], training=training)


def only(folder: Path, pattern: str) -> Path:
    """Return the one path below a folder that fits."""
    (found,) = folder.glob(pattern)
    return found


def prepared_of(trial: Trial) -> Path:
    return only(trial.cache, "prepared/*")


def reference_of(trial: Trial) -> Path:
    return only(trial.cache, "reference/*/*.arrow")


def test_every_file_is_among_those_that_are_damaged(whole):
    """What is added to a folder one day is to be damaged too."""
    for folder, files in (
        (whole.checkpoints / NEWEST, CHECKPOINT_FILES),
        (whole.final, FINAL_FILES),
        (prepared_of(whole), PREPARED_FILES),
        (whole.run, RUN_FILES),
    ):
        assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(files)


@pytest.mark.parametrize(("file", "damage"), cases(*CHECKPOINT_FILES, same_in_every_run=SAME_FILES))
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, whole, stranger, ledger, file, damage):
    trial = whole.unfinished(tmp_path / "t")
    with judged(ledger, f"damage: a checkpoint's file, {damage}"):
        require_passed_over(trial, whole, stranger, file, damage)


def test_where_every_checkpoint_is_damaged_there_is_an_error_and_they_stay(tmp_path, whole, stranger, ledger):
    trial = whole.unfinished(tmp_path / "t")
    for damage, checkpoint in zip(DAMAGES.values(), sorted(trial.checkpoints.iterdir()), strict=False):
        damage(checkpoint / "model.safetensors", stranger.final / "model.safetensors")
    before = content(trial.run)
    with judged(ledger, "damage: every checkpoint"):
        require_error(trial.train("--resume"), "every checkpoint is damaged", status=2)
        if content(trial.run) != before:
            raise Broken(Outcome.LOST, "files of the run were changed")


@pytest.mark.parametrize("file", ["model.safetensors", *STATE_FILES] if FULL else ["optimizer.safetensors"])
def test_a_file_of_an_earlier_checkpoint_of_the_same_run_is_damage(tmp_path, whole, ledger, file):
    trial = whole.unfinished(tmp_path / "t")
    shutil.copy(trial.checkpoints / BEFORE / file, trial.checkpoints / NEWEST / file)
    same = content(trial.checkpoints) == content(whole.checkpoints)
    with judged(ledger, "damage: a checkpoint's file, another step's"):
        require_on_from(trial.train("--resume"), NUM_STEPS if same else NUM_STEPS - 2)
        require_same(trial, whole)


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path, whole, ledger):
    trial = whole.unfinished(tmp_path / "t")
    shutil.rmtree(trial.checkpoints / NEWEST)
    shutil.copytree(trial.checkpoints / "step-000002", trial.checkpoints / NEWEST)
    with judged(ledger, "damage: a checkpoint of another step"):
        require_on_from(trial.train("--resume"), NUM_STEPS - 2, rf"^warning: .*{NEWEST}")
        require_same(trial, whole)


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path, zygote, tiny_llama, demo_rows, whole, ledger):
    """On the same model and the same data: only the learning rate differs."""
    data = {"train": str(whole.config.parent / "pairs.jsonl")}
    training = {"learning_rate": 2e-3}
    other = undisturbed(tmp_path, zygote, tiny_llama, demo_rows[:28], training=training, data=data)
    trial = whole.unfinished(tmp_path / "t")
    shutil.rmtree(trial.checkpoints / NEWEST)
    shutil.copytree(other.checkpoints / NEWEST, trial.checkpoints / NEWEST)
    with judged(ledger, "damage: a checkpoint of another run"):
        require_on_from(trial.train("--resume"), NUM_STEPS - 2, rf"^warning: .*{NEWEST}")
        require_same(trial, whole)


def test_a_file_in_the_place_of_a_checkpoint_is_none(tmp_path, whole, ledger):
    trial = whole.unfinished(tmp_path / "t")
    shutil.rmtree(trial.checkpoints / NEWEST)
    (trial.checkpoints / NEWEST).write_text("no checkpoint")
    with judged(ledger, "damage: a checkpoint replaced"):
        require_on_from(trial.train("--resume"), NUM_STEPS - 2)
        require_same(trial, whole)


def test_a_file_in_the_place_of_all_checkpoints_is_refused_before_anything_changes(tmp_path, whole, ledger):
    trial = whole.unfinished(tmp_path / "t")
    shutil.rmtree(trial.checkpoints)
    trial.checkpoints.write_text("no checkpoints")
    before = content(trial.run)
    with judged(ledger, "damage: a checkpoint replaced"):
        require_error(trial.train("--resume"), "", status=(1, 2))
        if content(trial.run) != before:
            raise Broken(Outcome.LOST, "files of the run were changed")


@pytest.mark.parametrize(("file", "damage"), cases(*PREPARED_FILES, few=2))
def test_damaged_prepared_data_is_prepared_again(tmp_path, whole, stranger, ledger, file, damage):
    trial = whole.with_cache_only(tmp_path / "t")
    DAMAGES[damage](prepared_of(trial) / file, prepared_of(stranger) / file)
    with judged(ledger, f"damage: the prepared data's file, {damage}"):
        require_said(trial.train(), rf"^warning: the prepared data is{named(file, damage)}.*; preparing it again")
        require_same(trial, whole)
        if content(trial.cache) != content(whole.cache):
            raise Broken(Outcome.WRONG, "another cache")


def test_prepared_data_of_other_pairs_is_not_trained_on(tmp_path, whole, stranger, ledger):
    """The whole folder, manifest included."""
    trial = whole.with_cache_only(tmp_path / "t")
    shutil.rmtree(prepared_of(trial))
    shutil.copytree(prepared_of(stranger), trial.cache / "prepared" / prepared_of(whole).name)
    with judged(ledger, "damage: the prepared data of another run"):
        require_said(
            trial.train(), "^warning: the prepared data was made from other data or settings; preparing it again"
        )
        require_same(trial, whole)


def test_a_file_in_the_place_of_prepared_data_gives_way(tmp_path, whole, ledger):
    trial = whole.with_cache_only(tmp_path / "t")
    shutil.rmtree(prepared_of(trial))
    (trial.cache / "prepared" / prepared_of(whole).name).write_text("no folder")
    with judged(ledger, "damage: the prepared data replaced"):
        require_said(trial.train(), "^warning: the prepared data is damaged .*; preparing it again")
        require_same(trial, whole)


@pytest.mark.parametrize(("file", "damage"), cases(*PREPARED_FILES, few=2))
def test_a_damaged_prepared_folder_that_was_named_is_an_error(tmp_path, whole, stranger, ledger, file, damage):
    prepared = shutil.copytree(prepared_of(whole), tmp_path / "prepared")
    DAMAGES[damage](prepared / file, prepared_of(stranger) / file)
    trial = whole.with_cache_only(tmp_path / "t")
    with judged(ledger, f"damage: a named prepared folder's file, {damage}"):
        require_error(
            trial.train(f"data.train={prepared}"), f"the prepared folder is damaged{named(file, damage)}", status=2
        )
        assert not trial.run.exists()


@pytest.mark.parametrize("damage", DAMAGES if FULL else ["truncated", FOLDER])
def test_a_damaged_reference_cache_is_computed_again(tmp_path, whole, stranger, ledger, damage):
    trial = whole.with_cache_only(tmp_path / "t")
    file = reference_of(trial)
    DAMAGES[damage](file, reference_of(stranger))
    with judged(ledger, f"damage: the reference cache's file, {damage}"):
        # Of a file that is missing nothing is known; its pairs are counted when they are computed.
        line = "reference log-probabilities: " if damage == MISSING else rf"warning: {named(file.name)}"
        require_said(trial.train(), f"^{line}")
        require_same(trial, whole)
        if content(trial.cache) != content(whole.cache):
            raise Broken(Outcome.WRONG, "another cache")


def test_log_probabilities_of_another_reference_are_not_used(tmp_path, zygote, tokenizer, demo_rows, whole, ledger):
    """Of the same pairs, under the name that their bytes have: only whose they are is wrong."""
    model = build_llama(tmp_path / "model", tokenizer, seed=3)
    data = {"train": str(whole.config.parent / "pairs.jsonl")}
    other = undisturbed(tmp_path, zygote, model, demo_rows[:28], data=data)
    trial = whole.with_cache_only(tmp_path / "t")
    ours, theirs = reference_of(trial), reference_of(other)
    ours.unlink()
    shutil.copy(theirs, ours.parent / theirs.name)
    with judged(ledger, "damage: the reference cache of another reference"):
        require_said(trial.train(), rf"^warning: {named(theirs.name)}")
        require_same(trial, whole)


@pytest.mark.parametrize(("file", "damage"), cases(*FINAL_FILES, same_in_every_run=SAME_FILES))
def test_a_damaged_trained_model_is_an_error_or_saved_again(tmp_path, whole, stranger, ledger, file, damage):
    trial = whole.another(tmp_path / "t", "run", "cache")
    with judged(ledger, f"damage: the trained model's file, {damage}"):
        require_refused_or_saved_again(trial, whole, stranger, file, damage)


@pytest.mark.parametrize(("file", "damage"), cases(*FINAL_FILES, same_in_every_run=SAME_FILES))
def test_a_damaged_trained_model_is_not_scored(tmp_path, whole, stranger, ledger, file, damage):
    trial = whole.another(tmp_path / "t", "run", "cache")
    DAMAGES[damage](trial.final / file, stranger.final / file)
    with judged(ledger, f"damage: a scored model's file, {damage}"):
        where = {"DPO_CACHE_DIR": str(trial.cache)}
        ended = trial.zygote.run("eval", "--config", trial.config, env=where, cwd=trial.folder)
        require_error(ended, "damaged|not a model folder", status=2)


@pytest.mark.parametrize(("file", "damage"), cases(*RUN_FILES, few=4))
def test_a_run_with_a_damaged_file_beside_its_checkpoints_ends_the_same_or_says_what_is_wrong(
    tmp_path, whole, stranger, ledger, file, damage
):
    trial = whole.unfinished(tmp_path / "t")
    DAMAGES[damage](trial.run / file, stranger.run / file)
    with judged(ledger, f"damage: the run's file, {damage}"):
        require_exact_or_clear(trial, whole, trial.train("--resume"), file)


def test_where_rows_are_gone_the_figures_of_the_last_step_are_measured_again(tmp_path, whole, ledger):
    """Whichever row it is; and they stand there once."""
    trial = whole.unfinished(tmp_path / "t")
    file = trial.run / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[2:]))
    with judged(ledger, "damage: the run's file, truncated"):
        again = "measuring the held-out figures again"
        require_said(trial.train("--resume"), rf"^warning: .*{named(file.name)}.*; {again}")
        if content(trial.final) != content(whole.final):
            raise Broken(Outcome.WRONG, "another trained model")
    assert read_metrics(trial.run, "eval") == read_metrics(whole.run, "eval")


@pytest.mark.parametrize("row", ["", '{"split": "eval", "step": 0, "loss": 0.1}\n'], ids=["gone", "another"])
def test_the_figures_before_step_1_come_back_from_the_checkpoint(tmp_path, whole, ledger, row):
    trial = whole.unfinished(tmp_path / "t")
    file = trial.run / "metrics.jsonl"
    file.write_text(row + "".join(file.read_text().splitlines(keepends=True)[1:]))
    with judged(ledger, "damage: the run's file, truncated"):
        require_said(trial.train("--resume"))
        require_same(trial, whole)


def test_two_processes_measure_the_figures_of_the_last_step_again_where_one_knows_that_they_are_gone(tmp_path, whole):
    """Else the trained model's card would have those of an earlier step."""
    trial = whole.unfinished(tmp_path / "t")
    file = trial.run / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    arguments = ("train", "--config", trial.config, "--resume", f"output_dir={trial.run}")
    require_said(run_ranks(trial.zygote, 2, *arguments, env={"DPO_CACHE_DIR": str(trial.cache)}), "^warning: rows of")
    ours, theirs = (read_metrics(one.run, "eval") for one in (trial, whole))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], abs=1e-6)


def test_figures_of_another_run_are_not_told_of_one_without_held_out_pairs(
    tmp_path, zygote, tiny_llama, demo_rows, whole
):
    data = {"train": str(whole.config.parent / "pairs.jsonl"), "eval": None}
    trial = undisturbed(tmp_path, zygote, tiny_llama, demo_rows[:28], data=data)
    card = (trial.final / "README.md").read_text()
    shutil.rmtree(trial.final)
    shutil.copy(whole.run / "metrics.jsonl", trial.run / "metrics.jsonl")
    require_said(trial.train("--resume"), "^warning: rows of .*metrics.jsonl are missing or changed")
    assert (trial.final / "README.md").read_text() == card


@pytest.mark.parametrize("number", range(100 if FULL else 1))
def test_a_flipped_byte_of_the_configuration_is_harmless_or_an_error(tmp_path, whole, ledger, number):
    trial = whole.unfinished(tmp_path / "t")
    file = trial.run / "config.yaml"
    flip(file, random.Random(number).randrange(file.stat().st_size))
    with judged(ledger, "damage: the run's file, a flipped byte"):
        require_exact_or_clear(trial, whole, trial.train("--resume"), file.name)


def require_exact_or_clear(trial: Trial, whole: Trial, ended: Ended, file: str) -> None:
    """Require an error, or the same result; where only metrics are gone that were written, a warning that says so."""
    require_no_traceback(ended)
    if ended.status:
        require_error(ended, "", status=(1, 2))
    elif not differing_rows(trial.run, whole.run):
        require_same(trial, whole)
    else:
        require_said(ended, rf"^warning: {named(file)}")
        if content(trial.final) != content(whole.final):
            raise Broken(Outcome.WRONG, "another trained model")

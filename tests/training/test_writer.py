"""Checkpoints at once and in the background: the same bytes, and what fails is said."""

from __future__ import annotations

import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dpo_cli.errors import UserError
from dpo_cli.modeling.attention.kernels import KERNELS
from dpo_cli.modeling.compiled import compile_layers
from dpo_cli.modeling.layouts import PACKED, PADDED
from dpo_cli.modeling.policy import Policy
from dpo_cli.preference.losses import DPO
from dpo_cli.preference.objective import Objective
from dpo_cli.preference.reference import OpenReference
from dpo_cli.system.storage import verify
from dpo_cli.training import state
from dpo_cli.training.checkpoints import CheckpointWriter, check_finite, newest_whole
from dpo_cli.training.learner import Learner, NotFinite, Skips
from dpo_cli.training.optimizer import AdamW, schedule
from dpo_cli.training.state import RunNotes, restore_checkpoint

FINGERPRINTS = {"model": "m", "data": "d", "settings": "s"}
NOTES = RunNotes(FINGERPRINTS)


@pytest.fixture
def learner(tiny_llama):
    accelerator, policy = Accelerator(cpu=True), Policy.load(str(tiny_llama))
    policy.place(accelerator, trained=True)
    optimizer = AdamW().over(policy.weights.trained(), 1e-3, 0.0)
    learner = Learner(
        policy=policy,
        objective=Objective.of(DPO()),
        reference=OpenReference(lambda batch: torch.zeros(len(batch.targets))),
        optimizer=optimizer,
        rates=schedule(optimizer, "constant", 0.0, 10),
        accelerator=accelerator,
        skips=Skips(3, 1),
    )
    step(learner)
    return learner


def step(learner):
    for parameter in learner.policy.weights.trained():
        parameter.grad = torch.ones_like(parameter)
    learner.optimizer.step()
    learner.rates.step()
    learner.statistics["mean"] = learner.statistics.get("mean", 0.0) + 1.0


def moments_of(learner):
    states = {name: learner.optimizer.state[weights] for name, weights in learner.policy.model.named_parameters()}
    return {(name, kind): tensor.clone() for name, state in states.items() for kind, tensor in state.items()}


def writer_of(folder, tokenizer, *, background):
    return CheckpointWriter(folder, tokenizer, 2, background=background)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_in_the_background_the_state_of_its_moment_is_written_whatever_changes_meanwhile(
    learner, tokenizer, tmp_path, monkeypatch
):
    at_once, background = (writer_of(tmp_path / name, tokenizer, background=name == "b") for name in "ab")
    at_once.save(learner, NOTES)
    gate, write = threading.Event(), CheckpointWriter._write

    def late(writer, *saved):
        gate.wait(30)
        write(writer, *saved)

    monkeypatch.setattr(CheckpointWriter, "_write", late)
    path = background.save(learner, NOTES)
    assert not path.exists()
    step(learner)
    gate.set()
    background.finish()
    verify(path)
    assert files(path) == files(tmp_path / "a" / "step-000001")


def test_tied_weights_are_written_once(learner, tokenizer, tmp_path):
    model = learner.policy.model
    assert model.config.tie_word_embeddings is False
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.tie_weights()
    sizes = []
    for background in (False, True):
        writer = writer_of(tmp_path / str(background), tokenizer, background=background)
        path = writer.save(learner, NOTES)
        writer.finish()
        sizes.append((path / "model.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]


def test_what_fails_in_the_background_is_said_by_the_next_call(learner, tokenizer, tmp_path):
    writer = writer_of(tmp_path / "checkpoints", tokenizer, background=True)
    writer.save(learner, NOTES)
    writer.finish()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").touch()
    writer.save(learner, NOTES)
    with pytest.raises((UserError, OSError)):
        writer.save(learner, NOTES)
    writer.finish()


@pytest.mark.parametrize("background", [False, True])
def test_the_best_one_stays_until_another_is(learner, tokenizer, tmp_path, background):
    writer = CheckpointWriter(tmp_path, tokenizer, 1, background=background)
    left = []
    for best in ([1], [1], [3], [3]):
        writer.save(learner, NOTES, best)
        writer.finish()
        left.append([int(path.name[5:]) for path in sorted(tmp_path.iterdir())])
        step(learner)
    assert left == [[1], [1, 2], [3], [3, 4]]


def test_what_was_saved_comes_back(learner, tokenizer, tmp_path):
    writer = writer_of(tmp_path, tokenizer, background=True)
    writer.save(learner, RunNotes(FINGERPRINTS, "rows", {"loss": 1.5}, {"samples": "others"}))
    writer.finish()
    weights = {name: tensor.clone() for name, tensor in learner.policy.weights.state().items()}
    moments = moments_of(learner)
    step(learner)
    learner.skips.count = 3
    record = restore_checkpoint(newest_whole(tmp_path, FINGERPRINTS), learner)
    assert (record.step, record.metrics, record.before) == (1, "rows", {"loss": 1.5})
    assert record.rows == {"samples": "others"}
    assert learner.done == 1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in learner.policy.weights.state().items())
    assert all(torch.equal(moment, moments[name]) for name, moment in moments_of(learner).items())
    assert learner.statistics == {"mean": 1.0}
    assert learner.skips.count == 1


def test_a_run_that_goes_on_elsewhere_is_told_what_differs(learner, tokenizer, tmp_path, monkeypatch, caplog):
    writer_of(tmp_path, tokenizer, background=False).save(learner, NOTES)
    now = state.surroundings(learner.accelerator)
    elsewhere = now | {"torch": "3.0", "threads": 99}
    monkeypatch.setattr(state, "surroundings", lambda accelerator: elsewhere)
    with caplog.at_level("WARNING"):
        restore_checkpoint(tmp_path / "step-000001", learner)
    assert f"threads {now['threads']} → 99; torch {now['torch']} → 3.0" in caplog.text


def test_a_run_that_goes_on_beside_other_software_of_a_gpu_is_told(learner, tokenizer, tmp_path, monkeypatch, caplog):
    """As after an update of the driver; of what an older checkpoint did not note, nothing is said."""
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1, mixed_precision="bf16", is_main_process=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    versions = {"cuda": "12.8", "driver": "570.1", "triton": "3.4"}
    monkeypatch.setattr(state, "gpu_software", lambda: versions)
    before = state.surroundings(gpu)
    assert before.items() >= {**versions, "device": "a card", "kernels": "any"}.items()
    monkeypatch.setattr(state, "surroundings", lambda accelerator: before)
    path = writer_of(tmp_path, tokenizer, background=False).save(learner, NOTES)
    after = before | {"driver": "580.2", "kernels": "deterministic", "not noted before": "new"}
    monkeypatch.setattr(state, "surroundings", lambda accelerator: after)
    with caplog.at_level("WARNING"):
        restore_checkpoint(path, learner)
    assert caplog.text.rstrip().endswith("not bit for bit: driver 570.1 → 580.2; kernels any → deterministic")


def test_a_run_that_goes_on_with_other_kernels_is_told(learner, tokenizer, tmp_path, caplog):
    """Another layout, attention of another kernel, and compiled layers: each rounds otherwise."""
    learner.policy.read(PADDED)
    path = writer_of(tmp_path, tokenizer, background=False).save(learner, NOTES)
    (flex,) = PACKED.with_kernels([KERNELS["flex"]], (None,))
    learner.policy.read(flex)
    compile_layers(learner.policy.model, "eager")
    with caplog.at_level("WARNING"):
        restore_checkpoint(path, learner)
    told = "layers not compiled → compiled; layout padded → packed (flex attention)"
    assert caplog.text.rstrip().endswith(f"not bit for bit: {told}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(learner, value):
    check_finite(1, (), learner.policy)
    with torch.no_grad():
        learner.policy.model.model.norm.weight[3] = value
    with pytest.raises(NotFinite, match="the weights of step 7 are not finite"):
        check_finite(7, (1, 2), learner.policy)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "random_states.safetensors"])
def test_tensors_that_fit_no_weights_are_refused_before_a_kernel_trusts_them(learner, tokenizer, tmp_path, name):
    """Sealed anew, as a stranger would: the first row of every moment, and random states of another form."""
    path = writer_of(tmp_path, tokenizer, background=False).save(learner, NOTES)
    tensors = load_file(path / name)
    save_file({key: tensor[:1].contiguous() if tensor.ndim else tensor for key, tensor in tensors.items()}, path / name)
    with pytest.raises(UserError, match="not a checkpoint of this run"):
        restore_checkpoint(path, learner)

"""Checkpoints at once and in the background: the same bytes, and what fails is said."""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dpo_cli.errors import UserError
from dpo_cli.modeling.loading import load_policy
from dpo_cli.system.storage import verify
from dpo_cli.training import state
from dpo_cli.training.checkpoints import CheckpointWriter, check_finite, newest_whole
from dpo_cli.training.loop import NotFinite, Skips
from dpo_cli.training.optimizer import AdamW, schedule
from dpo_cli.training.state import TrainingParts, load_checkpoint


@pytest.fixture
def parts(tiny_llama, tokenizer):
    policy = load_policy(str(tiny_llama))
    optimizer = AdamW().over(policy, 1e-3, 0.0)
    rates = schedule(optimizer, "constant", 0.0, 10)
    stands_on = {"model": "m", "data": "d", "settings": "s"}
    parts = TrainingParts(policy, tokenizer, optimizer, rates, Accelerator(cpu=True), None, {}, Skips(3, 1), stands_on)
    step(parts)
    return parts


def step(parts):
    for parameter in parts.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    parts.optimizer.step()
    parts.memory["mean"] = parts.memory.get("mean", 0.0) + 1.0


def moments_of(parts):
    states = {name: parts.optimizer.state[weights] for name, weights in parts.policy.named_parameters()}
    return {(name, kind): tensor.clone() for name, state in states.items() for kind, tensor in state.items()}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_in_the_background_the_state_of_its_moment_is_written_whatever_changes_meanwhile(parts, tmp_path, monkeypatch):
    at_once, background = (CheckpointWriter(tmp_path / name, 2, background=name == "b") for name in "ab")
    at_once.save(3, parts)
    gate, write = threading.Event(), CheckpointWriter._write

    def late(writer, target, state):
        gate.wait(30)
        write(writer, target, state)

    monkeypatch.setattr(CheckpointWriter, "_write", late)
    path = background.save(3, parts)
    assert not path.exists()
    step(parts)
    gate.set()
    background.finish()
    verify(path)
    assert files(path) == files(tmp_path / "a" / "step-000003")


def test_tied_weights_are_written_once(parts, tmp_path):
    assert parts.policy.config.tie_word_embeddings is False
    parts.policy.lm_head.weight = parts.policy.model.embed_tokens.weight
    parts.policy.config.tie_word_embeddings = True
    parts.policy.tie_weights()
    sizes = []
    for background in (False, True):
        writer = CheckpointWriter(tmp_path / str(background), 2, background=background)
        path = writer.save(1, parts)
        writer.finish()
        sizes.append((path / "model.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]


def test_what_fails_in_the_background_is_said_by_the_next_call(parts, tmp_path):
    writer = CheckpointWriter(tmp_path / "checkpoints", 2, background=True)
    writer.save(1, parts)
    writer.finish()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").touch()
    writer.save(2, parts)
    with pytest.raises((UserError, OSError)):
        writer.save(3, parts)
    writer.finish()


def test_what_was_saved_comes_back(parts, tmp_path):
    writer = CheckpointWriter(tmp_path, 2, background=True)
    parts.schedule.last_epoch = 4
    writer.save(4, parts, "rows")
    writer.finish()
    weights = {name: tensor.clone() for name, tensor in parts.policy.state_dict().items()}
    moments = moments_of(parts)
    step(parts)
    parts.skips.count = 3
    assert load_checkpoint(newest_whole(tmp_path, parts.stands_on), parts) == (4, "rows")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in parts.policy.state_dict().items())
    assert all(torch.equal(moment, moments[name]) for name, moment in moments_of(parts).items())
    assert parts.memory == {"mean": 1.0}
    assert parts.skips.count == 1


def test_a_run_that_goes_on_elsewhere_is_told_what_differs(parts, tmp_path, monkeypatch, caplog):
    parts.schedule.last_epoch = 1
    CheckpointWriter(tmp_path, 2, background=False).save(1, parts)
    now = state.surroundings(parts.accelerator)
    elsewhere = now | {"torch": "3.0", "threads": 99}
    monkeypatch.setattr(state, "surroundings", lambda accelerator: elsewhere)
    with caplog.at_level("WARNING"):
        load_checkpoint(tmp_path / "step-000001", parts)
    assert f"threads {now['threads']} → 99; torch {now['torch']} → 3.0" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(parts, value):
    check_finite(1, (), parts.policy)
    with torch.no_grad():
        parts.policy.model.norm.weight[3] = value
    with pytest.raises(NotFinite, match="the weights of step 7 are not finite"):
        check_finite(7, (1, 2), parts.policy)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "random_states.safetensors"])
def test_tensors_that_fit_no_weights_are_refused_before_a_kernel_trusts_them(parts, tmp_path, name):
    """Sealed anew, as a stranger would: the first row of every moment, and random states of another form."""
    parts.schedule.last_epoch = 1
    path = CheckpointWriter(tmp_path, 2, background=False).save(1, parts)
    tensors = load_file(path / name)
    save_file({key: tensor[:1].contiguous() if tensor.ndim else tensor for key, tensor in tensors.items()}, path / name)
    with pytest.raises(UserError, match="not a checkpoint of this run"):
        load_checkpoint(path, parts)

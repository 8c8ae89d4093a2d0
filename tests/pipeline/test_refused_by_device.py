"""What a device cannot do is told at once, each with where it was set, before anything is read."""

from __future__ import annotations

import pytest
import torch

import dpo_cli
from dpo_cli.config import load_config
from dpo_cli.errors import UserError


@pytest.fixture
def no_gpu(monkeypatch):
    """As on any machine without one."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_all_that_a_cpu_cannot_do(write_config, no_gpu):
    file = write_config(model={"dtype": "float16"}, training={"attention": "varlen"})
    with pytest.raises(ExceptionGroup) as caught:
        list(dpo_cli.train(load_config(file, ["training.offload=optimizer"])))
    lines = file.read_text().splitlines()
    dtype, attention = (next(n for n, line in enumerate(lines, 1) if name in line) for name in ("dtype", "attention:"))
    assert {error.where: error.what.split("`")[1] for error in caught.value.exceptions} == {
        f"{file}, line {dtype}": "model.dtype: float16",
        f"{file}, line {attention}": "training.attention: varlen",
        "the command line: training.offload=optimizer": "training.offload: optimizer",
    }


def test_what_only_the_model_shows_is_told_with_where_it_was_set_too(write_config):
    file = write_config(adapter={"type": "lora", "rank": 8, "targets": ["q_porj"]})
    line = next(n for n, line in enumerate(file.read_text().splitlines(), 1) if "targets" in line)
    for overrides, where in ([], f"{file}, line {line}"), (["adapter.rank=1000000"], "the command line: adapter.rank="):
        with pytest.raises(UserError) as caught:
            list(dpo_cli.train(load_config(file, [*overrides, *(["adapter.targets=all-linear"] if overrides else [])])))
        assert where in caught.value.where


def test_settings_of_a_program_have_no_file(write_config, no_gpu):
    settings = {**load_config(write_config()).model_dump(mode="json"), "training": {"attention": "flex"}}
    with pytest.raises(UserError) as caught:
        list(dpo_cli.train(settings))
    assert caught.value.where == "`training.attention`"


def test_a_run_that_kept_its_optimizer_in_the_hosts_memory_is_scored_on_a_cpu(write_config, no_gpu):
    """Nothing is kept of an optimizer there."""
    list(dpo_cli.train(write_config(training={"max_steps": 2})))
    figures = dpo_cli.evaluate(write_config(training={"max_steps": 2, "offload": "optimizer"}))
    assert figures["pairs"] == 8

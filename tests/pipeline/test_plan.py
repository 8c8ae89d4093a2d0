"""What is said of a run before it begins."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import pytest
import torch

from dpo_cli.config import load_config
from dpo_cli.pipeline.plan import header, planned
from dpo_cli.pipeline.session import started
from dpo_cli.reporting.console import Console
from dpo_cli.training.run_folder import RunFolder

SPLIT = "split: bfloat16 and the 16 bits it lacks"
BITS = {"optimizer": "adamw_8bit"}


@pytest.mark.parametrize(
    ("device", "settings", "said"),
    [
        ("cpu", {}, "float32"),
        ("cpu", {"model": {"dtype": "bfloat16"}}, "float32"),
        ("cpu", {"training": BITS}, "float32, gradients in float32, the optimizer's state in 8 bits"),
        (
            "cpu",
            {"model": {"weights": "split"}},
            f"{SPLIT}, gradients in float32, the optimizer's state in float32",
        ),
        ("cpu", {"adapter": "lora"}, "float32"),
        (
            "cpu",
            {"adapter": "lora", "model": {"dtype": "bfloat16"}},
            "bfloat16, float32 in the adapter",
        ),
        ("cuda", {}, f"{SPLIT}, gradients in float32, the optimizer's state in float32"),
        (
            "cuda",
            {"training": {**BITS, "offload": "optimizer"}},
            f"{SPLIT}, gradients in bfloat16, the optimizer's state in 8 bits in the host's memory",
        ),
        (
            "cuda",
            {"model": {"weights": "float32"}},
            "float32, gradients in float32, the optimizer's state in float32",
        ),
        (
            "cuda",
            {"adapter": "lora"},
            "bfloat16, float32 in the adapter, gradients in float32, the optimizer's state in float32",
        ),
    ],
)
def test_a_run_says_how_weights_and_all_that_trains_them_are_held(write_config, device, settings, said):
    config = load_config(write_config(**settings))
    with started(config, Console(quiet=True)) as session:
        run = planned(session, RunFolder(Path(config.output_dir)), resume=False, extend=False)
        if device == "cuda":
            there = types.SimpleNamespace(num_processes=1, device=torch.device(device), mixed_precision="bf16")
            run = dataclasses.replace(run, session=dataclasses.replace(session, accelerator=there))
        assert header(run)["weights"] == said


def test_of_shards_a_run_says_that_split_weights_are_whole(write_config):
    """Their gradients have 32 bits whatever the optimizer, and what is left to the host is its state."""
    training = {**BITS, "offload": "optimizer", "sharding": "full"}
    config = load_config(write_config(training=training))
    with started(config, Console(quiet=True)) as session:
        run = planned(session, RunFolder(Path(config.output_dir)), resume=False, extend=False)
        there = types.SimpleNamespace(num_processes=4, device=torch.device("cuda"), mixed_precision="bf16")
        run = dataclasses.replace(run, session=dataclasses.replace(session, accelerator=there))
        state = "gradients in float32, the optimizer's state in 8 bits in the host's memory"
        assert header(run)["weights"] == f"split: float32, gathered as bfloat16, {state}"

"""Two real processes under torchrun give what one gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.builders import save_adapter
from tests.conftest import read_metrics
from tests.marks import slow_unless
from tests.waiting import PATIENCE


def torchrun(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "dpo_cli", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )  # fmt: skip


def assert_same(two, one, weights_file="model.safetensors"):
    for split in ("train", "eval"):
        for ours, theirs in zip(read_metrics(two, split), read_metrics(one, split), strict=True):
            assert set(ours) == set(theirs)
            for name in set(ours) - {"split", "tokens_per_second", "seconds", "memory_bytes", "accuracy_interval"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    weights = [load_file(run / "final" / weights_file) for run in (two, one)]
    for name, tensor in weights[0].items():
        # Adam divides by the gradient's size, so a gradient near zero may move either way by rounding.
        difference = (tensor - weights[1][name]).abs()
        assert difference.mean() < 2e-5, name


@pytest.mark.parametrize("reference", slow_unless(lambda name: name == "cached", ["cached", "frozen"]))
def test_metrics_and_weights_are_those_of_one_process(forked_dpo, write_config, tmp_path, monkeypatch, reference):
    """Thirteen pairs a step leave ranks with unequal shares; the last step of 32 pairs has six."""
    settings = {"training": {"pairs_per_step": 13, "micro_batch_tokens": 300}, "reference": reference}
    one = forked_dpo("train", "--config", write_config("one", **settings))
    assert one.returncode == 0, one.stderr
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    two = torchrun("train", "--config", write_config("two", **settings))
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("step 1/3") == 1
    # Both processes' pairs are counted, and the count reaches their number.
    assert re.findall(r"^evaluating: (.*?)(?: in .*)?$", two.stderr, re.M) == ["8 pairs", "8/8"]
    if reference == "cached":
        assert re.findall(r"^reference log-prob.*: (.*?)(?: in .*)?$", two.stderr, re.M) == ["40 pairs", "40/40"]
    assert_same(tmp_path / "runs" / "two", tmp_path / "runs" / "one")


ADAPTERS = [
    {"adapter": "lora", "training": {"gradient_checkpointing": True}},
    {"adapter": {"dora": True, "start": "start"}, "reference": "frozen", "model": {"dtype": "bfloat16"}},
    {"adapter": {"rslora": True}, "reference": {"type": "synced", "every_steps": 1, "alpha": 0.6}},
]


@pytest.mark.parametrize("settings", slow_unless(lambda case: case is ADAPTERS[0], ADAPTERS))
def test_an_adapter_is_that_of_one_process(forked_dpo, write_config, tmp_path, monkeypatch, tiny_llama, settings):
    """Of bfloat16 the losses alone are compared: what is added up in another order is rounded otherwise."""
    save_adapter(tiny_llama, tmp_path / "start", rank=16, use_dora=True)
    monkeypatch.chdir(tmp_path)
    shared = {**settings, "training": {"pairs_per_step": 13, "micro_batch_tokens": 300, **settings.get("training", {})}}
    one = forked_dpo("train", "--config", write_config("one", **shared), cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    two = torchrun("train", "--config", write_config("two", **shared))
    assert two.returncode == 0, two.stderr
    runs = [tmp_path / "runs" / name for name in ("two", "one")]
    if "model" not in settings:
        assert_same(*runs, "adapter_model.safetensors")
    losses = [[row["loss"] for row in read_metrics(run)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0][0] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.slow
def test_losses_that_look_at_the_whole_step_see_the_other_ranks_pairs(forked_dpo, write_config, tmp_path):
    loss = ["aot", {"type": "bco", "beta": 0.3}, {"type": "sft", "weight": 0.1}]
    settings = {"training": {"pairs_per_step": 13, "micro_batch_tokens": 300}, "loss": loss}
    one = forked_dpo("train", "--config", write_config("one", **settings))
    assert one.returncode == 0, one.stderr
    two = torchrun("train", "--config", write_config("two", **settings))
    assert two.returncode == 0, two.stderr
    assert_same(tmp_path / "runs" / "two", tmp_path / "runs" / "one")


@pytest.mark.slow
def test_a_step_with_fewer_pairs_than_processes_and_a_resume(forked_dpo, write_config, tmp_path):
    """32 pairs in steps of 31 leave one pair for two processes."""
    settings = {"training": {"pairs_per_step": 31, "epochs": 2}, "checkpoints": {"every_steps": 3, "at_end": False}}
    one = forked_dpo("train", "--config", write_config("one", **settings))
    assert one.returncode == 0, one.stderr
    file = write_config("two", **settings)
    two = torchrun("train", "--config", file)
    assert two.returncode == 0, two.stderr
    run = tmp_path / "runs" / "two"
    assert_same(run, tmp_path / "runs" / "one")

    weights = (run / "final" / "model.safetensors").read_bytes()
    (run / "final").rename(tmp_path / "set-aside")
    resumed = torchrun("train", "--config", file, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 3" in resumed.stderr
    assert (run / "final" / "model.safetensors").read_bytes() == weights
